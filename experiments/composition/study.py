"""The eight cells of when × where × how, and full training, on one image task and one text task, two workers.

    python -m experiments.composition.study            all runs (what is done already stays), then results.csv and figure.png
    python -m experiments.composition.study --table    only the table and the figure, from the runs there are

Learning rates: three for every cell, on seed 0, chosen by the validation half; reported: seeds 1-3 on the test half.
"""

import argparse
from pathlib import Path

from experiments.runs import Job, done, run

HERE = Path(__file__).parent
WORLD = 2
PRELORA = [
    "method.windows=2", "method.weight_tol=0.05", "method.loss_tol=0.2", "method.warmup=1", "method.latest=3",
    "method.ranks=[8,16,32]",
]  # fmt: skip
MERGE = ["method.merge_every=10", "method.sync_rest=merge"]
ADAPTERS = ["method.adapter_lr=3.0"]
# cell -> what it adds, and the learning rate in the middle of its three
CELLS = {
    "full": (["method=full"], 1e-3),
    "lora": (["method=lora", "method.rank=32"], 2e-3),
    "prelora": (["method=prelora", *PRELORA, *ADAPTERS], 1e-3),
    "galore": (["method=galore", "method.rank=48", "method.update_proj_gap=50"], 2e-2),
    "prelora_galore": (["method=prelora_galore", *PRELORA, "method.update_proj_gap=50"], 1e-3),
    "lte": (["method=lte", "method.rank=32", "method.heads=2", *MERGE], 2e-3),
    "prelora_lte": (["method=prelora_lte", "method.heads=2", *PRELORA, *ADAPTERS, *MERGE], 1e-3),
    "lte_galore": (["method=lte_galore", "method.rank=48", *MERGE], 2e-2),
    "prelora_lte_galore": (["method=prelora_lte_galore", *PRELORA, *MERGE], 1e-3),
}
WHOLE = [f"++trainer.limit_{part}_batches=1.0" for part in ("val", "test")]
LENGTH = ["trainer.max_epochs=6", "++trainer.limit_train_batches=60", *WHOLE]
TASKS = {
    "images": [
        "experiment=prelora_pocket", "data._target_=experiments.held_out.Images", "data.batch_size=32",
        "model.model_kwargs.embed_dim=128", "model.model_kwargs.depth=2", *LENGTH,
    ],
    "text": [
        "experiment=prelora_gpt2_pocket", "data._target_=experiments.held_out.Text", "data.batch_size=8", "data.seq_len=64",
        "model.config.n_embd=128", "model.config.n_head=4", "model.config.n_layer=2", "optim.weight_decay=0.05", *LENGTH,
        "trainer.limit_train_batches=40",
    ],
}  # fmt: skip
COMMON = ["trainer.devices=2", "++trainer.accelerator=cpu", "++trainer.enable_progress_bar=false", "save_every=0"]
FACTORS = {"images": (0.5, 1.0, 2.0), "text": (0.75, 1.5, 3.0)}  # small language models bear more
SEEDS = (1, 2, 3)


def job(task: str, cell: str, lr: float, seed: int) -> Job:
    """One run of a cell."""
    what, _ = CELLS[cell]
    ddp = [] if "lte" in cell else ["++trainer.strategy=ddp"]
    return Job(
        f"{task}-{cell}-lr{lr:g}-seed{seed}",
        [*TASKS[task], *what, *COMMON, *ddp, f"optim.lr={lr}", f"seed={seed}"],
        {"task": task, "cell": cell, "lr": lr, "seed": seed},
    )


def rates(task: str, cell: str) -> list[Job]:
    """The runs that choose a cell's learning rate."""
    return [job(task, cell, CELLS[cell][1] * factor, 0) for factor in FACTORS[task]]


def chosen(task: str, cell: str, where: Path) -> float | None:
    """The learning rate with the lowest validation loss; None while a run is missing."""
    tried = [(done(j, where), j.facts["lr"]) for j in rates(task, cell)]
    if any(found is None for found, _ in tried):
        return None
    return min((found["summary"]["final"]["val/loss"], lr) for found, lr in tried)[1]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--runs", type=Path, default=Path("runs/composition"), help="where the runs are")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    if not args.table:
        for task in args.tasks:
            run([j for cell in args.cells for j in rates(task, cell)], args.runs, WORLD)
            final = [(task, cell, chosen(task, cell, args.runs)) for cell in args.cells]
            run([job(*what, seed) for seed in args.seeds for what in final if what[-1] is not None], args.runs, WORLD)
    from experiments.composition import table

    table.write(args.runs, HERE)


if __name__ == "__main__":
    main()
