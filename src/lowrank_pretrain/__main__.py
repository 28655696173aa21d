"""``python -m lowrank_pretrain``."""

from lowrank_pretrain.run.train import main

if __name__ == "__main__":
    main()
