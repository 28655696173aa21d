"""Does a frozen W in a cheaper type learn as well? Test losses of PreLoRA runs that differ in ``frozen_dtype`` alone.

    PYTHONPATH=src python benchmarks/frozen_learning.py                              # both tasks, three seeds, one CPU thread
    PYTHONPATH=src python benchmarks/frozen_learning.py --parts vit --kinds bfloat16 --seeds 1 --steps 100

The pocket tasks of ``galore_learning.py``: ``text`` a LLaMA of width 128 and 3 layers on the King James tokens, ``vit`` a ViT
of that size on the Fashion-MNIST sample; float32, AdamW, warm-up 10 %, cosine to 10 %. PreLoRA switches after 2/5 of the steps,
freezes W after 8/15, and trains adapters (with the rest, its default) for the other 7/15. A seed trains once up to the freeze.
From that checkpoint each type goes on with the same batches: the runs of a seed are the same but for the type.
"""

import argparse
import csv
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lowrank_pretrain import PreLoRA

sys.path.insert(0, str(Path(__file__).parent))
from galore_learning import BATCH, CONTEXT, PARTS, data, evaluate, loss_of, make_model  # noqa: E402

RATES = {"text": 4e-3, "vit": 2e-3}
KINDS = ("bfloat16", "int8", "float8", "float16")


class Batches(torch.utils.data.IterableDataset):
    """A task's batches: number i is the same in every run of a seed."""

    def __init__(self, part: str, seed: int, first: int, steps: int) -> None:
        self.part, self.seed, self.first, self.steps = part, seed, first, steps

    def __iter__(self):
        train = data(self.part, "cpu")[0]
        for step in range(self.first, self.steps):
            draw = torch.Generator().manual_seed(100_000 * self.seed + step)
            if self.part == "vit":
                chosen = torch.randint(len(train[0]), (BATCH["vit"],), generator=draw)
                yield train[0][chosen], train[1][chosen]
            else:
                starts = torch.randint(train.numel() - CONTEXT, (BATCH[self.part], 1), generator=draw)
                yield train[starts + torch.arange(CONTEXT)]


class Task(pl.LightningModule):
    """A pocket model with its loss and its schedule."""

    def __init__(self, part: str, seed: int, steps: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.part, self.steps, self.model = part, steps, make_model(part, PARTS[part][0], "cpu")

    def training_step(self, batch, _):
        """The mean cross-entropy."""
        return loss_of(self.model, self.part, batch)

    def configure_optimizers(self):
        """AdamW, with a warm-up and a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATES[self.part], weight_decay=0.0, fused=True)
        warm, steps = max(1, self.steps // 10), self.steps

        def factor(t: int) -> float:
            return (t + 1) / warm if t < warm else 0.55 + 0.45 * math.cos(math.pi * (t - warm) / (steps - warm))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SaveAt(Callback):
    """Write a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        """Write it."""
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(part: str, seed: int, steps: int, kind: str | None, stop: int, ckpt: Path | None, *callbacks: Callback) -> Task:
    """Train up to step ``stop``, from a checkpoint or from the start."""
    module, window = Task(part, seed, steps), steps * 2 // 15
    when = PreLoRA(window=window, window_unit="step", windows=2, latest=3, warmup=1, loss_tol=1e-6, frozen_dtype=kind)
    trainer = pl.Trainer(
        max_steps=stop, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[when, *callbacks],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(
        Batches(part, seed, 0 if ckpt is None else before_freeze(steps), steps), batch_size=None
    )
    trainer.fit(module, loader, ckpt_path=ckpt)
    return module


def before_freeze(steps: int) -> int:
    """Return the last step before the freeze."""
    return 4 * (steps * 2 // 15) - 1


def main() -> None:
    """Run all, print each test loss, and the differences from float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["text", "vit"], choices=["text", "vit"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frozen_learning_cpu.csv"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(f"{date.today()} {platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}", flush=True)
    found: dict[tuple[str, str], list[float]] = {}
    with args.out.open("w", newline="") as file, tempfile.TemporaryDirectory() as folder:
        rows = csv.writer(file)
        rows.writerow(["part", "frozen_dtype", "seed", "steps", "test_loss", "cpu_seconds_after_freeze"])
        for part in args.parts:
            for seed in range(1, args.seeds + 1):
                ckpt = Path(folder) / f"{part}{seed}.ckpt"
                at = before_freeze(args.steps)
                fit(part, seed, args.steps, None, at, None, SaveAt(at, ckpt))
                for kind in (None, *args.kinds):
                    began = time.process_time()
                    module = fit(part, seed, args.steps, kind, args.steps, ckpt)
                    seconds = time.process_time() - began
                    loss = evaluate(module.model, part, data(part, "cpu")[2])
                    found.setdefault((part, kind or "float32"), []).append(loss)
                    rows.writerow([part, kind or "float32", seed, args.steps, f"{loss:.5f}", f"{seconds:.1f}"])
                    file.flush()
                    print(f"{part} seed {seed} {kind or 'float32':9s} {loss:.5f}  {seconds:.0f} s", flush=True)
    for (part, kind), losses in found.items():
        apart = [100 * (x / y - 1) for x, y in zip(losses, found[part, "float32"], strict=True)]
        print(f"{part} {kind:9s} mean {statistics.mean(losses):.4f}; against float32 {' '.join(f'{x:+.3f} %' for x in apart)}")


if __name__ == "__main__":
    main()
