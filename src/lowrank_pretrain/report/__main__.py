"""Make a page from runs or a sweep's directory: ``python -m lowrank_pretrain.report RUN_DIR... [--out FILE|DIR]``."""

import argparse
import os
import sys
from pathlib import Path

from lowrank_pretrain.core.arguments import as_flags
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.report.page import write_report


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Exit codes: 0; 2: there is no run, or nothing can be written."""
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_pretrain.report",
        description="Turn runs into one HTML page with curves and tables; ratios are to the first run.",
    )
    parser.add_argument("run_dir", nargs="+", type=Path, help="a run directory, or one that holds runs (a multirun's)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE|DIR", help="default: report.html in the directory, or here if there are several"
    )
    given = parser.parse_args(as_flags(arguments, parser))
    try:
        print(f"report: {os.path.relpath(write_report(given.run_dir, given.out))}")
    except (ConfigError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
