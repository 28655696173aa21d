"""``python -m experiments.optimizers``."""

import sys

from experiments.optimizers.study import main

if __name__ == "__main__":
    sys.exit(main())
