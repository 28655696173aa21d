"""``python -m lowrank_pretrain.report RUN_DIR... [--out FILE|DIR]``: a page from one run, several, or a sweep's directory."""

import argparse
import os
import sys
from pathlib import Path

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.report.page import write_report


def main(arguments: list[str] | None = None) -> int:
    """The command. Exit codes: 0, 2 no run there."""
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_pretrain.report",
        description="Turn runs into one HTML page with curves and tables; ratios are to the first run.",
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="a run directory, or one that holds runs (a multirun's)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE|DIR", help="default: report.html in the directory, or here if there are several"
    )
    words = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args([f"--{word}" if word.startswith("out=") else word for word in words])  # as Hydra has it
    try:
        print(f"report: {os.path.relpath(write_report(given.run_dir, given.out))}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
