"""The eight cells of when × where × how, and full training, on one image task and one text task, two workers.

    make study NAME=composition                        or  python -m experiments.composition.study
    python -m experiments.composition.study --table    only tables and figure, from the runs there are

Learning rates: three for every cell, on seed 0 (more where the best is at an edge), chosen by the validation half; reported:
seeds 1-3 on the test half.
"""

from collections.abc import Iterator
from pathlib import Path

from experiments.command import main
from experiments.rates import reported, rounds
from experiments.runs import Job

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
MORE = {"images": 1.0, "text": 1.5}  # small language models bear more
SIDES = [((task, cell), middle * MORE[task]) for task in TASKS for cell, (_, middle) in CELLS.items()]
SEEDS = (1, 2, 3)


def job(side: tuple[str, str], lr: float, seed: int = 0) -> Job:
    """One run of a task's cell."""
    task, cell = side
    ddp = [] if "lte" in cell else ["++trainer.strategy=ddp"]
    return Job(
        f"{task}-{cell}-lr{lr:g}-seed{seed}",
        [*TASKS[task], *CELLS[cell][0], *COMMON, *ddp, f"optim.lr={lr:g}", f"seed={seed}"],
        {"task": task, "cell": cell, "lr": lr, "seed": seed},
    )


def final(where: Path) -> dict[tuple[tuple[str, str], int], Job]:
    """The reported runs by ((task, cell), seed).

    Raises:
        Missing: a rate is not chosen yet.
    """
    return reported(SIDES, job, SEEDS, where)


def stages(where: Path) -> Iterator[tuple[list[Job], int]]:
    """What to run, one stage after another; a run has both cores."""
    for jobs in rounds(SIDES, job, where):
        yield jobs, 1
    yield [*final(where).values()], 1


if __name__ == "__main__":
    from experiments.composition.table import write

    main(__doc__, __file__, stages, write, WORLD)
