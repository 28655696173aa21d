"""Memory that whole weights trained locally need for their merges (``LTEStrategy(update="full")``), by setting.

    python benchmarks/lte_memory.py                                          # ViT-S/16, eight workers, half a minute
    python benchmarks/lte_memory.py --model vit_base_patch16_224 --out benchmarks/results/lte_memory.csv

No process is started: one worker of eight is there, and the others are taken to send the same, since only sizes count. ``kept``
lies between merges (W_base, outer momentum, error feedback) and may be in main memory; ``between`` is all that lies there;
``waiting`` is what overlap holds while a merge is under way; ``peak`` the most that a merge allocates on top of what was there.
By live tensors and by allocations, in MiB and in copies of the float32 weights. Weights, gradients and the optimizer's state
are not counted: each setting has them.
"""

import argparse
import csv
import gc
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.lte.full import FullSet
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.traffic import Imagined

SETTINGS: Sequence[dict[str, Any]] = (
    {}, {"outer_lr": 0.7, "outer_momentum": 0.9}, {"wire": "int8"}, {"wire": "int4", "outer_lr": 0.7, "outer_momentum": 0.9},
    {"overlap": 2}, {"overlap": 2, "wire": "int4"}, {"fragments": 5}, {"fragments": 5, "overlap": 2, "wire": "int4"},
    {"fragments": 5, "overlap": 2, "wire": "int4", "outer_lr": 0.7, "outer_momentum": 0.9},
)  # fmt: skip


class One(Imagined):
    """Stand for one worker of several, each of which reports the same numbers."""

    def gather_numbers(self, mine: Sequence[int]) -> list[list[int]]:
        """Return this worker's numbers for each."""
        return [list(mine)] * self.size

    def gather(self, flat: Tensor, async_op: bool = False, out: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return this worker's numbers for each."""
        return super().gather(flat, out=out)[0].copy_(flat), None

    def swap(self, messages: Tensor, async_op: bool = False, out: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return this worker's own messages."""
        return super().swap(messages, out=out)[0].copy_(messages), None


def kept(full: FullSet) -> Iterator[Tensor]:
    """Yield what is kept between merges."""
    for increments in full.fragments:
        yield from (*increments.base.values(), increments.wire.sent_error, increments.wire.mean_error)
    yield from full.outer.buffers.values()


def bytes_of(tensors: Iterator[Tensor]) -> int:
    """Return the bytes of the storages that hold some tensors."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def live() -> int:
    """Return the bytes of all tensors that are alive."""
    gc.collect()
    return bytes_of(t for t in gc.get_objects() if isinstance(t, Tensor))


def peak_of(call: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds at any time beyond what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def measure(model: nn.Module, workers: int, **how: Any) -> dict[str, float]:
    """Return the bytes of one setting: kept, waiting, and the peak of a merge."""
    before = live()
    settings = Settings(heads=1, merge_every=100, **how)
    full = FullSet(settings, One(workers))
    full.start(dict(model.named_parameters()))
    steps = settings.merge_every + settings.overlap
    for _ in range(steps):  # a whole window: every fragment has merged once
        full.after_step()
    held = bytes_of(kept(full))
    between = live() - before
    rest = settings.interval - full.clock % settings.interval
    for _ in range(rest - 1):
        full.after_step()
    peak = peak_of(full.after_step)
    waiting = max(0, live() - before - between)
    later = [peak_of(full.after_step) for _ in range(settings.overlap)]
    return {"kept": held, "between": between, "waiting": waiting, "peak": max([peak, *(waiting + more for more in later)])}


def main() -> None:
    """Measure every setting, and print or write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import timm

    model = timm.create_model(args.model)
    copy = sum(4 * p.numel() for p in model.parameters())
    rows = []
    for how in SETTINGS:
        got = measure(model, args.workers, **how)
        name = " ".join(f"{key}={value}" for key, value in how.items() if key != "outer_lr") or "plain"
        row: dict[str, Any] = {"model": args.model, "workers": args.workers, "setting": name}
        row["weights_mib"] = round(copy / 2**20, 1)
        row |= {f"{key}_mib": round(value / 2**20, 1) for key, value in got.items()}
        row |= {f"{key}_copies": round(value / copy, 2) for key, value in got.items()}
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
