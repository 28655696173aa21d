"""Run the command line: ``python -m lowrank_pretrain``, or ``lowrank-pretrain``."""

import sys

from lowrank_pretrain.core.extras import optional_import


def main() -> None:
    """Import the command line, which needs the extra ``[cli]``, and run it. Exit code 2: a package is missing."""
    try:
        with optional_import():
            from lowrank_pretrain.run import train
    except ModuleNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    train.main()


if __name__ == "__main__":
    main()
