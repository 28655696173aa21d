"""A study's command line: do what is not done, then write the record beside it.

python -m experiments.NAME.study            all runs (what is done already stays), then tables and figures
python -m experiments.NAME.study --quick    the same: these studies have the pocket form alone
python -m experiments.NAME.study --table    only tables and figures, from the runs there are
python -m experiments.NAME.study --cells text-128 --sides full "factored 1/4"    a part, where a study has parts
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from experiments.runs import Job, run
from experiments.tables import Missing

Stages = Callable[..., Iterator[tuple[list[Job], int]]]  # runs' folder -> (runs, how many at a time), one stage after another


def main(
    doc: str,
    file: str,
    stages: Stages,
    write: Callable[[Path, Path], None],
    world: int = 1,
    parts: dict[str, tuple[str, ...]] | None = None,
) -> None:
    """The command line of the study whose ``study.py`` is `file`; its training runs are of `world` processes each.

    `parts`: options by name with their choices; `stages` gets those that were chosen.
    """
    here = Path(file).parent
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies") / here.name, help="where the runs are")
    parser.add_argument("--quick", action="store_true", help="the pocket form, which is this study's only one")
    for name, choices in (parts or {}).items():
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(choices), metavar=name.upper())
    args = parser.parse_args()
    chosen = {name: tuple(getattr(args, name)) for name in parts or {}}

    def work() -> None:
        for jobs, together in () if args.table else stages(args.runs.resolve(), **chosen):
            run(jobs, args.runs.resolve(), world, together)
        write(args.runs.resolve(), here)

    if code := exit_code(here.name, work):
        sys.exit(code)


def exit_code(name: str, work: Callable[[], None]) -> int:
    """Run the study `name`, one thread per process; return 1 and say in one line what is missing, or return 0."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        work()
    except Missing as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def need_data(folder: Path, file: str, maker: str) -> None:
    """Look whether a study's data have been made.

    Raises:
        Missing: `folder` does not hold `file`; says which module makes it.
    """
    if not (folder / file).is_file():
        raise Missing(f"{folder}: must hold {file}: python -m {maker} --out {folder}")
