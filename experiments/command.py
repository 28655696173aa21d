"""A study's command line: do what is not done, then write the record beside it.

python -m experiments.NAME.study            all runs (what is done already stays), then tables and figures
python -m experiments.NAME.study --table    only tables and figures, from the runs there are
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.runs import Job, run
from experiments.tables import Missing

Stages = Callable[
    [Path], Iterator[tuple[list[Job], int]]
]  # runs' folder -> (runs, how many at a time), one stage after another


def main(doc: str, file: str, stages: Stages, write: Callable[[Path, Path], None], world: int = 1) -> None:
    """The command line of the study whose ``study.py`` is `file`; its training runs are of `world` processes each."""
    here = Path(file).parent
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies") / here.name, help="where the runs are")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        for jobs, together in () if args.table else stages(args.runs.resolve()):
            run(jobs, args.runs.resolve(), world, together)
        write(args.runs.resolve(), here)
    except Missing as error:
        print(f"{here.name}: {error}", file=sys.stderr)
        sys.exit(1)
