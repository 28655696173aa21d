"""PreLoRA at width 384, on a task where capacity matters: accuracy, switch and time next to full training and factored weights.

    python -m experiments.prelora_glyphs.study                       all runs; what is done stays
    python -m experiments.prelora_glyphs.study --together 2          two at a time
    python -m experiments.prelora_glyphs.study --table                       only tables and figure

The images are made beforehand: python -m lowrank_pretrain.data.images.draw_glyphs --out runs/studies/prelora_glyphs/glyphs

A ViT of two blocks, width 384, 64 tokens, on glyphs of fonts: 94 classes, test fonts never seen. 60 epochs of 60 steps of 32
images, bf16-mixed: a run takes a quarter of an hour on one core. Full training tries three learning rates on seed 0, then three
rates of embedding, head and norms over it (more where the best is at an edge), by the validation split. PreLoRA switches by the
authors' own tolerances, between windows of two epochs, a thirtieth of the run (theirs: 1,000 iterations, about a fiftieth), and
from epoch 10 on (theirs: 50 of 300; before it the loss has hardly moved, which any tolerance takes for convergence). Its runs
branch off the same base run, so they keep its rates; what is theirs to try is the rate of their adapters or factors. Reported:
seeds 1-3, the test split.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.command import exit_code, need_data
from experiments.rates import Two, chosen, chosen_two, rounds, rounds_of_two
from experiments.runs import Job, run

EPOCHS, STEPS, BATCH, WIDTH, DEPTH = 60, 60, 32, 384, 2
SEEDS = (1, 2, 3)
MIDDLE = (5e-4, 8.0)  # the matrices' rate, and the rest's over it
MIDDLE_RATIO = 2.0  # the adapters' or factors' rate over their weight's
LOOKS = 10  # epochs between validations
TOLERANCES = {"exp1": (0.01, 0.05), "exp2": (0.005, 0.025), "exp3": (0.0025, 0.01)}  # of the source: weight norms, loss
WINDOW = 2  # epochs
WARMUP, REWARM = 1, 60  # windows (the source's 10 of 300 epochs), steps
EARLIEST = 5  # windows, the source's 50 of 300 epochs
LATEST = 22  # windows: a run that has not switched by then is made to


def switching(exp: str) -> list[str]:
    """Return when PreLoRA switches."""
    weight_tol, loss_tol = TOLERANCES[exp]
    return [f"method.weight_tol={weight_tol}", f"method.loss_tol={loss_tol}", f"method.window={WINDOW}",
            f"method.earliest={EARLIEST}", f"method.latest={LATEST}", f"method.rewarm={REWARM}"]  # fmt: skip


ADAPTERS = ["method=prelora", f"method.warmup={WARMUP}"]  # targets and ranks as by default: all matrices of the blocks, 4 to 32
FACTORS = ["method=prelora_factorize", "method.ranks=[0.25]"]
QUICKEST = ["method.freeze_rest=true", "method.frozen_dtype=bfloat16"]
# side -> (overrides, whose chosen rate of adapters or factors it takes)
LOW_RANK = {
    "adapters, exp2": ([*ADAPTERS, *switching("exp2")], "adapters, exp2"),
    "factored 1/4, exp2": ([*FACTORS, *switching("exp2")], "factored 1/4, exp2"),
    "adapters, exp2, rest frozen, W in bf16": ([*ADAPTERS, *switching("exp2"), *QUICKEST], "adapters, exp2"),
    "adapters, exp1": ([*ADAPTERS, *switching("exp1")], "adapters, exp2"),
    "adapters, exp3": ([*ADAPTERS, *switching("exp3")], "adapters, exp2"),
}
SIDES = ("full", *LOW_RANK)
SEARCHED = ("adapters, exp2", "factored 1/4, exp2")


@dataclass(frozen=True)
class Study:
    """What to run and where.

    Attributes:
        where: folder of the runs.
        device: ``cpu`` or ``cuda``.
        sides: by name.
        seeds: that are reported.
    """

    where: Path
    device: str = "cpu"
    sides: tuple[str, ...] = SIDES
    seeds: tuple[int, ...] = SEEDS

    @property
    def glyphs(self) -> Path:
        """Return the folder of the images."""
        return self.where / "glyphs"

    def task(self) -> list[str]:
        """Return the overrides that all runs share."""
        return [
            "experiment=prelora_pocket", "data=glyphs", f"data.root={self.glyphs}", f"data.batch_size={BATCH}",
            "model.model_kwargs.patch_size=8", f"model.model_kwargs.embed_dim={WIDTH}", f"model.model_kwargs.depth={DEPTH}",
            f"model.model_kwargs.num_heads={WIDTH // 64}", "model.model_kwargs.mlp_ratio=4",
            f"++trainer.accelerator={'gpu' if self.device == 'cuda' else 'cpu'}", "trainer.precision=bf16-mixed",
            "++trainer.enable_progress_bar=false", f"trainer.max_epochs={EPOCHS}", f"++trainer.limit_train_batches={STEPS}",
            f"++trainer.check_val_every_n_epoch={LOOKS}", "save_every=0",
        ]  # fmt: skip

    def full(self, _: str, lr: float, rest: float, seed: int = 0) -> Job:
        """Return a run of full training."""
        return Job(
            f"full-lr{lr:g}-rest{rest:g}-seed{seed}",
            [*self.task(), "method=full", f"optim.lr={lr:g}", f"optim.rest_lr={lr * rest:g}", f"seed={seed}"],
            {"run": "full", "lr": lr, "rest": rest, "ratio": 1.0, "seed": seed},
        )  # fmt: skip

    def rates(self) -> Two:
        """Return the rates that full training has chosen: the matrices', and the rest's over it.

        Raises:
            Missing: it has not tried all.
        """
        return chosen_two("full", MIDDLE, self.full, self.where)

    def low_rank(self, side: str, ratio: float, seed: int = 0) -> Job:
        """Return a run of PreLoRA.

        Raises:
            Missing: full training has no rates yet.
        """
        lr, rest = self.rates()
        name = "".join(letter if letter.isalnum() else "-" for letter in side)
        more = [f"optim.lr={lr:g}", f"optim.rest_lr={lr * rest:g}", f"method.adapter_lr={ratio:g}", f"seed={seed}"]
        return Job(
            f"{name}-lr{lr:g}-rest{rest:g}-a{ratio:g}-seed{seed}", [*self.task(), *LOW_RANK[side][0], *more],
            {"run": side, "lr": lr, "rest": rest, "ratio": ratio, "seed": seed},
        )  # fmt: skip

    def final(self) -> dict[tuple[str, int], Job]:
        """Return the reported runs by (side, seed), the first seed of every side before the next seed.

        Raises:
            Missing: a rate is not chosen yet.
        """
        rates = self.rates()
        ratio = {side: chosen(side, MIDDLE_RATIO, self.low_rank, self.where) for side in SEARCHED}
        return {
            (side, seed): self.full(side, *rates, seed)
            if side == "full" else self.low_rank(side, ratio[LOW_RANK[side][1]], seed)
            for seed in self.seeds for side in self.sides
        }  # fmt: skip

    def stages(self) -> Iterator[list[Job]]:
        """Yield what to run, one list after another."""
        yield from rounds_of_two([("full", MIDDLE)], self.full, self.where)
        yield from rounds([(side, MIDDLE_RATIO) for side in SEARCHED], self.low_rank, self.where)
        yield [*self.final().values()]


def main() -> int:
    """Run the study, then write its record; returns the exit code."""
    from experiments.prelora_glyphs.table import write

    parser = argparse.ArgumentParser(
        prog="python -m experiments.prelora_glyphs.study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--together", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/prelora_glyphs"), help="where the runs are")
    parser.add_argument("--quick", action="store_true", help="name the study in the same words that takes minutes")
    args = parser.parse_args()
    if args.quick:
        print("prelora_glyphs: --quick: its pocket form is python -m experiments.prelora_vit.study", file=sys.stderr)
        return 2
    study = Study(args.runs.resolve(), args.device)

    def work() -> None:
        if not args.table:
            need_data(study.glyphs, "glyphs.npz", "lowrank_pretrain.data.images.draw_glyphs")
            for jobs in study.stages():
                run(jobs, study.where, 1, args.together)
        write(study, Path(__file__).parent)

    return exit_code("prelora_glyphs", work)


if __name__ == "__main__":
    sys.exit(main())
