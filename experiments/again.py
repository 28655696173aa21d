"""Repeat one finished run of any study, and say whether it gives the same numbers, bit for bit.

    python -m experiments.again runs/studies/factorize/images-128-full-lr0.001-a1-seed1

Every metric at every step is compared, but for times, rates per second and memory. It holds on the same kind of CPU with the
same versions of torch and Lightning; else the first number that differs is named. The run that is there stays as it is.
"""

import argparse
import csv
import json
import os
import sys
import tempfile
from pathlib import Path

from experiments.runs import Job, run

MEASURED = ("throughput/", "time/", "memory/")  # vary from run to run, as does what ends so:
IN_SECONDS = ("_ms", "_seconds")


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv without what is measured in seconds or bytes."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [
            {key: value for key, value in row.items() if not key.startswith(MEASURED) and not key.endswith(IN_SECONDS)}
            for row in csv.DictReader(file)
        ]


def difference(there: list[dict[str, str]], here: list[dict[str, str]]) -> str | None:
    """Say where two runs differ first; ``None`` if they do not."""
    for old, new in zip(there, here, strict=False):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                return f"{key} at step {old.get('step')}: {old.get(key)} then, {new.get(key)} now"
    return None if len(there) == len(here) else f"{len(there)} rows then, {len(here)} now"


def main(argv: list[str] | None = None) -> int:
    """Repeat the run that is named; return 0 if it is equal, 1 if it is not, 2 if it cannot be repeated."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.again", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    run_dir: Path = parser.parse_args(argv).run.resolve()
    try:
        found = json.loads((run_dir / "found.json").read_text())
        there = metrics(run_dir)
    except (OSError, ValueError):
        print(f"run={run_dir}: must be the folder of a finished training run, with found.json and metrics.csv", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    overrides = [word.replace("RUNS", str(run_dir.parent)) for word in found["overrides"]]
    world = next((int(word.rpartition("=")[2]) for word in reversed(overrides) if "trainer.devices=" in word), 1)
    with tempfile.TemporaryDirectory() as folder:
        run([Job(run_dir.name, overrides, found["facts"])], Path(folder), world)
        if not (Path(folder) / run_dir.name / "found.json").is_file():
            print((Path(folder) / run_dir.name / "rank0.log").read_text()[-2000:], file=sys.stderr)
            return 1
        here = metrics(Path(folder) / run_dir.name)
    wrong = difference(there, here)
    count = sum(value != "" for row in there for value in row.values())
    print(f"{run_dir.name}: " + (f"differs: {wrong}" if wrong else f"equal, {count} numbers of {len(there)} rows"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
