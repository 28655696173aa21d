"""LTE's checkpoints, as hooks of the strategy: a plain merged model for everyone, and ``lte_state`` to go on from exactly.

Lightning calls the saving hooks on all workers, so they may talk. A resumed fit loads the merged weights into the bare model
first; the heads' state is put aside until there are heads, and their moments until the optimizers are restored.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lowrank_pretrain.checkpoints import random_state
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lte import projected_state
from lowrank_pretrain.lte.bare_groups import BareGroups
from lowrank_pretrain.lte.heads import checkpoint as state
from lowrank_pretrain.lte.heads.head_set import HeadSet, head_names
from lowrank_pretrain.lte.projected import ProjectedSet
from lowrank_pretrain.lte.rest import Rest
from lowrank_pretrain.lte.workers import Workers


class CheckpointHooks(DDPStrategy):
    """What ``LTEStrategy`` does when Lightning saves and loads."""

    heads: HeadSet | ProjectedSet | None
    rest: Rest | None
    _bare: list[BareGroups]
    _untied: list[Inherit]
    _stash: Mapping[str, Any] | None
    _workers: Workers | None
    _moments: dict

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The merged model under the plain names, on worker 0, which writes; the others' W is as of the last merge.

        All workers must call it together.
        """
        if self.heads is None or not self.heads.worn:
            return super().lightning_module_state_dict()
        if self.heads.shared.viewing:
            return super().lightning_module_state_dict()
        self._look_to_write()
        shared = self.heads.shared
        viewing, shared.viewing = shared.viewing, True  # heads add nothing of their own to what they are asked for
        try:
            plain = super().lightning_module_state_dict()
        finally:
            shared.viewing = viewing
        if self.rest.averaged:
            plain = lora.clone_state(plain)
        self._look_away()
        return plain

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the bare model's optimizer would hold; the heads' moments are in ``lte_state``."""
        for bare in self._bare:
            if bare.optimizer is getattr(optimizer, "_optimizer", optimizer) and self.heads is not None:
                return self.rest.averaged_moments(bare.state_dict(), bare.numbers(self.heads.factors().values()))
        return super().optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add ``lte_state`` to what worker 0 writes; a file of weights only needs none."""
        if self.heads is not None and "optimizer_states" in checkpoint:
            entry = _keeper(self.heads).collect(self.heads)
            rest = self.rest.collect(self._bare)
            random = random_state.capture_all(self._workers.size, self._workers.group)
            if entry is not None:
                checkpoint[state.KEY] = {**entry, "rest": rest, "random": random}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the merged model; keep the heads for when there are some, or put them on at once (``lr_find``)."""
        live = self.heads is not None and self.heads.worn
        stash = checkpoint.get(state.KEY)
        if not live:
            super().load_model_state_dict(checkpoint, strict)
            if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
                # a tied head that comes untied gets its own weight back later: here both names are one tensor
                self._stash = None if stash is None else {**stash, "state_dict": checkpoint["state_dict"]}
                self._random = None if stash is None else stash["random"]
            return
        self._look_away()
        if stash is None:
            super().load_model_state_dict(checkpoint, strict)
            return
        names = head_names(self.lightning_module, self.heads.layers)
        module = self.lightning_module
        own = {k: v.detach() for k, v in (*module.named_parameters(), *module.named_buffers()) if k in names}
        super().load_model_state_dict({**checkpoint, "state_dict": own | checkpoint["state_dict"]}, strict=False)
        self._take_stash(stash)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The bare model's states for the rest, the heads' own for the heads."""
        if self.heads is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        own = _keeper(self.heads).own(self.heads, self._moments)
        for bare, saved in zip(self._bare, checkpoint["optimizer_states"], strict=True):
            bare.load(saved, own)
        self._moments = {}
        if isinstance(self.heads, ProjectedSet):
            self.heads.form()
        self.rest.restore_moments((checkpoint.get(state.KEY) or {}).get("rest"), self._bare)

    def _take_stash(self, stash: Mapping[str, Any]) -> None:
        keeper = _keeper(self.heads)
        keeper.check(stash, self.heads)
        if self._untied and "state_dict" in stash:
            self.lightning_module.load_state_dict(stash["state_dict"], strict=False)
        self._moments, told = keeper.restore(stash, self.heads)
        if told:
            rank_zero_info(told)
        self.rest.restore(stash.get("rest"))


def _keeper(heads: HeadSet | ProjectedSet) -> Any:
    """The module that knows what a checkpoint holds of these."""
    return projected_state if isinstance(heads, ProjectedSet) else state
