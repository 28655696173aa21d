"""Give a checkpoint its two halves: a plain merged model for any reader, and ``lte_state`` for an exact resume.

Lightning calls the saving hooks on all workers, so they may communicate. A resumed fit loads the merged weights into the bare
model first; ``Resume`` keeps the targets' state until a fit has targets, and their moments until the optimizers are restored.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lowrank_pretrain.checkpoints import random_state
from lowrank_pretrain.checkpoints.format import check_format
from lowrank_pretrain.core.errors import ConfigError

if TYPE_CHECKING:
    from lowrank_pretrain.lte.conversion import ConvertedModule
    from lowrank_pretrain.lte.settings import Settings
    from lowrank_pretrain.lte.workers import Workers

KEY = "lte_state"
# settings that say how increments are merged, with the value that a checkpoint without them has
HOW_MERGED: Mapping[str, Any] = {"wire": "float32", "outer_lr": 1.0, "outer_momentum": 0.0, "fragments": 1}


def how_merged(settings: "Settings") -> dict[str, Any]:
    """Return the settings of wire and outer step that a checkpoint must name: those that differ from a plain mean."""
    return {key: getattr(settings, key) for key, plain in HOW_MERGED.items() if getattr(settings, key) != plain}


def check_saved(state: Mapping[str, Any], update: str, settings: "Settings") -> None:
    """Refuse an ``lte_state`` of a newer format, or of another ``update``, wire or outer step.

    Raises:
        ConfigError: one of these.
    """
    check_format(state, KEY, name=KEY)
    there = state.get("update", "lora")
    if there != update:
        raise ConfigError("update", update, f"the checkpoint was trained with {there}")
    for key, plain in HOW_MERGED.items():
        mine = getattr(settings, key)
        if state.get(key, plain) != mine:
            raise ConfigError(key, mine, f"the checkpoint was trained with {state.get(key, plain)}")


def lte_state(converted: "ConvertedModule") -> dict[str, Any] | None:
    """Return what an exact resume needs, on the worker that writes; ``None`` on the others. All workers call it together."""
    entry = converted.local.saved_state()
    rest = converted.rest.saved_state(converted.bare)
    random = random_state.capture_all(converted.workers.size, converted.workers.group)
    return None if entry is None else {**entry, "rest": rest, "random": random}


class Resume:
    """Keep the parts of a checkpoint that are not restored yet."""

    def __init__(self) -> None:
        self.state: Mapping[str, Any] | None = None  # ``lte_state``
        self.left_out: tuple[str, ...] = ()  # targets that the resumed run had left out in its first step
        self._random: list[Any] | None = None  # random states by worker
        self._moments: dict[str, dict[str, Any]] = {}  # the targets' optimizer state by name

    def keep(self, checkpoint: Mapping[str, Any]) -> None:
        """Keep a checkpoint's ``lte_state``, if it has one, until there are targets."""
        state = checkpoint.get(KEY)
        # an untied output head gets its own weight back later: in the bare model both names are one tensor
        self.state = None if state is None else {**state, "state_dict": checkpoint["state_dict"]}
        self.left_out = () if state is None else tuple(state.get("left_out", ()))
        self._random = None if state is None else state["random"]
        self._moments = {}

    def give_kept(self, converted: "ConvertedModule") -> None:
        """Restore the kept state into targets that have just begun."""
        state, self.state, self.left_out = self.state, None, ()
        if state is not None:
            self.give(state, converted)

    def give(self, state: Mapping[str, Any], converted: "ConvertedModule") -> None:
        """Restore an ``lte_state`` into targets and rest; the targets' moments wait for the optimizers."""
        local = converted.local
        local.check_state(state)
        if local.untied and "state_dict" in state:
            converted.module.load_state_dict(state["state_dict"], strict=False)
        self._moments, message = local.load_state(state)
        if message:
            rank_zero_info(message)
        converted.rest.load_state(state.get("rest"))

    def load_optimizers(self, checkpoint: Mapping[str, Any], converted: "ConvertedModule") -> None:
        """Load the bare model's states for the rest, and the targets' own for the targets."""
        parameters = converted.local.parameters()
        own = {id(p): self._moments[name] for name, p in parameters.items() if name in self._moments}
        for groups, saved in zip(converted.bare, checkpoint["optimizer_states"], strict=True):
            groups.load(saved, own)
        self._moments = {}
        converted.local.finish_load()
        converted.rest.load_moments((checkpoint.get(KEY) or {}).get("rest"), converted.bare)

    def give_random(self, workers: "Workers") -> None:
        """Restore this worker's random states, if the checkpoint has the same number of workers."""
        states, self._random = self._random, None
        if states is not None and len(states) == workers.size:
            random_state.restore(states[workers.rank])
