"""What a run that was killed must share with one that was not: weights, checkpoints, metrics and plan, to the bit."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import torch

TIMED = ("throughput/", "memory/", "time/", "lte/merge_ms", "galore/refresh_ms")  # the clock's and the machine's columns
CLOCKED = ("seconds", "peak_gib", "samples_per_sec", "seconds_per_sample", "merge_ms", "refresh_ms")  # likewise, inside states


def differences(ours: Path, theirs: Path) -> list[str]:
    """One line for each thing that differs between two finished run directories."""
    found = []
    for name in ("export/model.safetensors", "export/config.json"):
        if (ours / name).read_bytes() != (theirs / name).read_bytes():
            found.append(f"{name}: other bytes")
    for name in ("last.ckpt", "best.ckpt"):
        found += unlike(checkpoint(ours / "checkpoints" / name), checkpoint(theirs / "checkpoints" / name), name)
    found += unlike(rows(ours), rows(theirs), "metrics.csv")
    found += unlike(summary(ours), summary(theirs), "summary.json")
    files = [{str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (ours, theirs)]
    return found + [f"{name}: left over or missing" for name in sorted(files[0] ^ files[1])]


def checkpoint(path: Path) -> dict[str, Any]:
    """All that it holds, but for times, with the run directory's name taken out."""
    return _clean(torch.load(path, weights_only=True))


def rows(directory: Path) -> list[dict[str, str]]:
    """metrics.csv without the clock's columns and empty cells, rows without any other left out."""
    with (directory / "metrics.csv").open(newline="") as file:
        kept = [{k: v for k, v in row.items() if v and not k.startswith(TIMED)} for row in csv.DictReader(file)]
    return [row for row in kept if row.keys() != {"step"}]


def summary(directory: Path) -> dict[str, Any]:
    """summary.json without the clock's keys."""
    return _clean(json.loads((directory / "summary.json").read_text()))


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items() if not (isinstance(k, str) and k.endswith(CLOCKED))}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return re.sub("^/.*(?=/checkpoints)", "RUN", value) if isinstance(value, str) else value


def unlike(a: Any, b: Any, where: str) -> list[str]:
    """The places where two nested containers differ; tensors and numbers to the bit, NaN equal to itself."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        return [] if same else [f"{where}: other values"]
    if isinstance(a, dict):
        lacking = [f"{where}.{key}: only in one" for key in a.keys() ^ b.keys()]
        return lacking + [line for key in a.keys() & b.keys() for line in unlike(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list):
        if len(a) != len(b):
            first = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if unlike(x, y, "")), min(len(a), len(b)))
            beside = " beside ".join(str(x[first : first + 1])[:300] for x in (a, b))
            return [f"{where}: {len(a)} and {len(b)} entries, from [{first}] on: {beside}"]
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in unlike(x, y, f"{where}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{where}: {a!r} and {b!r}"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
