"""Run the export: ``python -m lowrank_pretrain.export ckpt=PATH out=DIR``."""

import sys

from lowrank_pretrain.export.weights import main

if __name__ == "__main__":
    sys.exit(main())
