"""Train plain LoRA as a callback: adapters of one rank from the first step, also for fine-tuning from a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.targets import check_patterns, families, plain_name
from lowrank_pretrain.core.trainer import accumulates
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora import storing
from lowrank_pretrain.lora.layer import take_adapters
from lowrank_pretrain.phases import transition
from lowrank_pretrain.phases.callback import PhaseCallback
from lowrank_pretrain.phases.first_step import FirstStep


class LoRA(PhaseCallback):
    r"""Train low-rank adapters from step 0 (LoRA, arXiv 2106.09685).

    Example::

        trainer = Trainer(callbacks=[LoRA(rank=8, targets="attention")])

    Args:
        rank: of every adapter; min(D, O) for a narrower target, with one warning.
        targets: presets (``all``, ``attention``, ``mlp``, ``head``) or globs; ``!`` before one leaves out what it matches.
            What cannot be a target (parametrized, in no optimizer, never called, ...) is left out of a preset with one warning,
            and refused where it is named. A frozen layer is one if ``configure_optimizers`` hands its weight over.
        alpha: scale = alpha / rank; ``None``: scale 1.
        freeze_rest: freeze everything but the adapters (embeddings, norms, head too).
        train_A: ``False`` trains B alone (LoRA-FA).
        adapter_lr: the adapters' learning rate over that of their base weight.
        adapter_weight_decay: the adapters' weight decay; ``None``: that of their base weight.
        recompute_inputs: make a layer's input again in backward where what made it keeps what that takes (GELU, SiLU, norms,
            products such as SwiGLU's), in place of keeping the input too. Saves activation memory and costs a few percent of
            a step.
        frozen_dtype: after the second step, store each frozen W in this type and multiply in it: ``bfloat16``, ``float16``,
            ``float8`` or ``int8``; ``auto``: bfloat16 if the device has instructions for it; ``None``: as it is.
        keep_original: with ``frozen_dtype``: keep W itself in the host's memory, and merge and export from it; without, from W
            as it is stored.

    Raises:
        ConfigError: a wrong value; at the start of fit or in its first step, a pattern without a match, one that names what
            cannot be a target, or a rank above min(D, O) of a named one.
    """

    from_start = True

    def __init__(
        self,
        rank: int = 8,
        targets: str | Sequence[str] = "all",
        alpha: float | None = None,
        freeze_rest: bool = False,
        train_A: bool = True,
        adapter_lr: float = 1.0,
        adapter_weight_decay: float | None = None,
        recompute_inputs: bool = False,
        frozen_dtype: str | None = None,
        keep_original: bool = False,
    ) -> None:
        whole("rank", rank, 1)
        super().__init__(
            alpha, train_A, freeze_rest, adapter_lr=adapter_lr, adapter_weight_decay=adapter_weight_decay,
            recompute_inputs=recompute_inputs, frozen_dtype=frozen_dtype, keep_original=keep_original,
        )  # fmt: skip
        self.rank = int(rank)
        self.targets = check_patterns(targets)

    @property
    def state_key(self) -> str:
        """Return a pinned key: a subclass must find this state too."""
        return "LoRA"

    def _reset(self) -> None:
        super()._reset()
        self._to_take_back: list[str] = []  # targets that the first step found unfit
        self._to_store = False  # W in its cheaper type, once the first steps are watched: what is unfit trains on in full

    def choose_targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the targets after ``setup`` and ``configure_model``, so that mistakes show at once."""
        targets = self._select(trainer, pl_module, self.rank, "rank", frozen=True)
        frozen = [name for name, target in targets.items() if not target.layer.weight.requires_grad]
        if frozen and len(frozen) < len(targets):  # all of them: an intentionally frozen base
            names = ", ".join(dict.fromkeys(families(pl_module, frozen).values()))
            rank_zero_warn(f"LoRA: {names} are frozen, but in the optimizer: they get adapters, and these train")
        if self._adopter.makes_adapters:
            self._first = FirstStep(trainer, pl_module, targets, frozen_dtype=self.frozen_dtype)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch and freeze at once, or replay them."""
        resumed = self.phase != "full"
        self._owned = _snapshot(trainer.optimizers)
        super().on_fit_start(trainer, pl_module)
        if not resumed:
            self._switch(trainer, pl_module, Plan(self.chosen), replay=True)
            self._freeze(trainer, pl_module, replay=True)
            self.switch_step = self.freeze_step = 0
            self._unchecked = True

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule, replay: bool) -> None:
        """Freeze W; a cheaper type waits until the first steps are watched."""
        if isinstance(self._adopter, lora.Adapters) and self.frozen_dtype is not None:
            if self.freeze_step is None:  # no replay of a resumed run
                storing.refuse_overflow(pl_module, self.chosen, self.freeze_rest, self.frozen_dtype)
                self._to_store = True
            self._adopter.frozen_dtype = None if self._to_store else self.frozen_dtype
        super()._freeze(trainer, pl_module, replay)

    def leave_out(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, reasons: Mapping[str, str], refuse: bool = True
    ) -> None:
        """Note targets whose adapters are removed after this step."""
        if not isinstance(self._adopter, lora.Adapters):  # heads of a strategy, which tracks them itself
            name = next(iter(reasons))
            raise ConfigError("targets", name, reasons[name])
        super().leave_out(trainer, pl_module, reasons, refuse)
        self._to_take_back = [name for name in reasons if name in (self.plan or {})]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove adapters, after the first step, from layers that cannot have them: these train in full."""
        if self._to_take_back:
            names, self._to_take_back = self._to_take_back, []
            self._take_back(trainer, pl_module, names)
        if self._to_store and self._first is None and self.frozen_dtype is not None and not accumulates(trainer):
            self._to_store = False
            how = self.plan or Plan({}), self.freeze_rest, self.frozen_dtype, self.keep_original
            transition.apply(trainer, pl_module, lambda: storing.store_frozen(pl_module, *how))

    def _take_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule, names: list[str]) -> None:
        flags = transition.note_plain(pl_module).requires_grad
        plan = Plan({name: rank for name, rank in (self.plan or {}).items() if name not in names})
        layers = {name: layer for name, layer in lora.lora_layers(pl_module) if self._only_of(plain_name(name), names)}

        def change() -> None:
            for name, layer in layers.items():
                layer.write_weight(layer.merged_weight())  # it may have been called in this step
                take_adapters(layer)
                for own, p in layer.named_parameters():
                    p.requires_grad_(flags[f"{name}.{own}"] and not self.freeze_rest)

        transition.apply(trainer, pl_module, change)
        _rejoin(trainer.optimizers, self._owned, [p for layer in layers.values() for p in layer.parameters()])
        self.plan = plan
        if isinstance(self._adopter, lora.Adapters):
            self._adopter.plan = plan
        self._look_at_gradients(True, changed=True)
        transition.note_plain(pl_module).plan = dict(plan)

    def _only_of(self, layer: str, names: list[str]) -> bool:
        parts = [name for name in self.plan or {} if name == layer or name.rpartition(".")[0] == layer]
        return bool(parts) and all(name in names for name in parts)

    def state_dict(self) -> dict[str, Any]:
        """Add the rank: narrow targets may all have less."""
        return super().state_dict() | {"rank": self.rank} | ({"to_store": True} if self._to_store else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another rank."""
        super().load_state_dict(state_dict)
        self._to_store = state_dict.get("to_store", False) if self._restoring else self._to_store
        rank = state_dict.get("rank", max((self.plan or {"": self.rank}).values()))
        if self.plan and rank != self.rank:
            raise ConfigError("rank", self.rank, f"the checkpoint was trained with rank {rank}")


def _snapshot(optimizers: list[Any]) -> list[list[dict[int, tuple[nn.Parameter, str]]]]:
    """Return each group's parameters in order, by id, with names if there are any."""
    found = []
    for optimizer in optimizers:
        groups = [(group["params"], group.get("param_names", [""] * len(group["params"]))) for group in optimizer.param_groups]
        found.append([{id(p): (p, name) for p, name in zip(*group, strict=True)} for group in groups])
    return found


def _rejoin(optimizers: list[Any], owned: list[list[dict[int, tuple[nn.Parameter, str]]]], back: list[nn.Parameter]) -> None:
    """Return parameters to their former places in their groups: a resume restores states by position."""
    returned = {id(p) for p in back if p.requires_grad}
    for optimizer, present, then in zip(optimizers, _snapshot(optimizers), owned, strict=True):
        for group, now, before in zip(optimizer.param_groups, present, then, strict=False):  # the adapters' own come last
            pairs = [pair for key, pair in before.items() if key in now or key in returned]
            pairs += [pair for key, pair in now.items() if key not in before]
            group["params"][:] = [p for p, _ in pairs]
            if "param_names" in group:
                group["param_names"][:] = [name for _, name in pairs]
