"""Save every global random generator in the checkpoint, so that a resumed run draws what it would have drawn."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

KEY = "random_state"


def capture() -> dict[str, Any]:
    """Return the states of the Python, numpy and torch generators (with the current CUDA device's) as plain types."""
    numpys: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpys
    state = {
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Set the generators to what `capture` returned; a CUDA state without a CUDA device is ignored."""
    random.setstate((3, tuple(state["python"]), state["python_gauss"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def capture_all(world_size: int, group: Any = None) -> list[dict[str, Any]]:
    """Return every process's states, by rank. All must call it together."""
    states: list[Any] = [capture()]
    if world_size > 1:
        mine, states = states[0], [None] * world_size
        torch.distributed.all_gather_object(states, mine, group=group)
    return states


class RandomState(Callback):
    """Save the generators of every process and restore them when training starts, after everything else has drawn.

    Put it last among the callbacks (Lightning moves checkpoint callbacks after it, and they draw nothing).
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = capture_all(trainer.world_size)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(KEY)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        states, self._restored = self._restored, None
        if states is None:
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint is of {len(states)} process(es), this run has {trainer.world_size}:"
                " random numbers go on from the seed, not from the checkpoint"
            )
            return
        restore(states[trainer.global_rank])
