"""Does PreLoRA keep full training's accuracy at a lower cost (its Fig. 2 to 4); what do tolerances and warm-up change (5, 6)?

    make study NAME=prelora_vit                        or  python -m experiments.prelora_vit.study
    python -m experiments.prelora_vit.study --table    only tables and figures, from the runs there are

A ViT of two layers, width 128, on the embedded images, 24 epochs of 20 steps. Full training tries three learning rates on
seed 0 (validation half). A full run at the best of them, watched by a PreLoRA that can never switch, gives the tolerances by
the rule in ``tolerances.py``. As in the source, PreLoRA's runs branch off the same base run, so they keep its rate; what is
theirs to try is the adapters' share of it, as often, with Exp2. Reported: seeds 1-3, test half; one run at a time, since
time counts.
"""

from collections.abc import Iterator
from pathlib import Path

from experiments import tasks
from experiments.command import main
from experiments.prelora_vit.tolerances import RATIOS, tolerances
from experiments.rates import chosen, rounds
from experiments.runs import Job
from experiments.tables import Missing, keys, need, series

EPOCHS, STEPS, BATCH, K = 24, 20, 32, 3
LATEST = 20  # a run that has not switched by then is made to
SEEDS = (1, 2, 3)
MIDDLE_LR, MIDDLE_ADAPTER_LR = 2e-3, 2.0
TASK = [*tasks.images(batch=BATCH), *tasks.length(EPOCHS, STEPS)]
# q, v and dense of the source are targets; key, norms, embeddings and head train on in full, as there
TARGETS = "method.targets=[qkv.q,qkv.v,attn.proj,mlp.fc1,mlp.fc2]"
PRELORA = ["method=prelora", TARGETS, "method.ranks=[1,2,4,8]", f"method.windows={K}", f"method.latest={LATEST}"]
WARMUP = 2  # epochs; the source's 10 of 300, and beside it 1 and 3 for 5 and 15
RUNS = {  # what is reported: run -> (which tolerances, warm-up)
    "full": None, "exp1": ("exp1", WARMUP), "exp2": ("exp2", WARMUP), "exp3": ("exp3", WARMUP),
    "exp2-w1": ("exp2", 1), "exp2-w3": ("exp2", 3),
}  # fmt: skip


def full(_: str, lr: float, seed: int = 0) -> Job:
    """Full training."""
    return Job(
        f"full-lr{lr:g}-seed{seed}", [*TASK, "method=full", f"optim.lr={lr}", f"seed={seed}"],
        {"run": "full", "seed": seed, "lr": lr},
    )  # fmt: skip


def watched(lr: float) -> Job:
    """Full training of seed 0, every window's change on record: at these tolerances PreLoRA never switches."""
    never = ["method.weight_tol=1e-9", "method.loss_tol=1e-9", "method.latest=null", "trainer.log_every_n_steps=1"]
    return Job(f"watched-lr{lr:g}", [*TASK, *PRELORA, *never, f"optim.lr={lr}", "seed=0"], {"run": "watched", "lr": lr})


def found_tolerances(where: Path) -> dict[str, tuple[float, float]]:
    """What the rule makes of the watched run.

    Raises:
        Missing: it, or a run before it, is not done.
    """
    job = watched(chosen("full", MIDDLE_LR, full, where))
    need([job], where)
    directory = where / job.name
    losses: list[list[float]] = [[] for _ in range(EPOCHS)]
    for step, loss in series(directory, "train/loss"):
        losses[(step - 1) // STEPS].append(loss)
    families = [dict(series(directory, key)) for key in keys(directory, "lowrank/weight_change/")]
    windows = sorted(set().union(*families))
    if len(windows) != EPOCHS - 1 or not all(losses):
        raise Missing(f"{job.name} has {len(windows)} changes of {EPOCHS - 1}: it was cut off; remove its directory")
    changes = [max(family[step] for family in families) for step in windows]
    return tolerances([sum(part) / len(part) for part in losses], changes, K)


def prelora(run: str, adapter_lr: float, where: Path, seed: int = 0) -> Job:
    """One of PreLoRA's runs."""
    lr = chosen("full", MIDDLE_LR, full, where)
    name, warmup = RUNS[run]
    weight_tol, loss_tol = found_tolerances(where)[name]
    return Job(
        f"{run}-lr{lr:g}-a{adapter_lr:g}-seed{seed}",
        [*TASK, *PRELORA, f"method.weight_tol={weight_tol:.6g}", f"method.loss_tol={loss_tol:.6g}", f"optim.lr={lr}",
         f"method.adapter_lr={adapter_lr}", f"method.warmup={warmup}", f"seed={seed}"],
        {"run": run, "seed": seed, "lr": lr, "adapter_lr": adapter_lr, "warmup": warmup, "weight_tol": weight_tol,
         "loss_tol": loss_tol},
    )  # fmt: skip


def final(where: Path) -> dict[tuple[str, int], Job]:
    """The reported runs by (run, seed).

    Raises:
        Missing: a rate is not chosen yet.
    """
    lr = chosen("full", MIDDLE_LR, full, where)
    adapter_lr = chosen("exp2", MIDDLE_ADAPTER_LR, lambda run, rate: prelora(run, rate, where), where)
    return {
        (run, seed): full(run, lr, seed) if run == "full" else prelora(run, adapter_lr, where, seed)
        for seed in SEEDS for run in RUNS
    }  # fmt: skip


def stages(where: Path) -> Iterator[tuple[list[Job], int]]:
    """What to run, one stage after another."""
    for jobs in rounds([("full", MIDDLE_LR)], full, where):
        yield jobs, 2
    yield [watched(chosen("full", MIDDLE_LR, full, where))], 1
    for jobs in rounds([("exp2", MIDDLE_ADAPTER_LR)], lambda run, rate: prelora(run, rate, where), where):
        yield jobs, 2
    yield [*final(where).values()], 1


if __name__ == "__main__":
    from experiments.prelora_vit.table import write

    assert set(RATIOS) < set(RUNS)
    main(__doc__, __file__, stages, write)
