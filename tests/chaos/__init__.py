"""The crash harness: runs are killed at any moment, started again by the same command, and must end as if nothing had been.

    python -m tests.chaos --kills 100 --seed 0        (or: make chaos SEED=0)

``place`` lives in the killed process and says where it is; ``lives`` starts and kills processes; ``scenarios`` says which
runs; ``compare`` says what must be equal; ``story`` is a run with its kills, from first start to comparison.
"""
