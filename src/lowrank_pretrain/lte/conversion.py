"""How a model comes to be trained by LTE, as hooks of the strategy: at once, or at a phase callback's freeze.

``update="lora"``: targets get heads. ``update="galore"``: nothing is converted, each worker's targets become its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan, fit_ranks
from lowrank_pretrain.core.protocols import Inherit, adopters
from lowrank_pretrain.core.targets import Target, all_targets, first_named, say_left_out, select
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.layer import has_own_forward
from lowrank_pretrain.lte import rest
from lowrank_pretrain.lte.advice import advise
from lowrank_pretrain.lte.bare_groups import BareGroups, check_stacked
from lowrank_pretrain.lte.first_step import FirstStep
from lowrank_pretrain.lte.heads.head_set import HeadSet, Settings, head_names
from lowrank_pretrain.lte.matrix import check_group
from lowrank_pretrain.lte.projected import ProjectedSet
from lowrank_pretrain.lte.workers import Workers


class Conversion(DDPStrategy):
    """What ``LTEStrategy`` does to begin."""

    rank: int
    targets: str | Sequence[str]
    update: str
    basis: str
    sync_rest: str
    settings: Settings
    heads: HeadSet | ProjectedSet | None
    rest: rest.Rest | None
    rehearsal: FirstStep | None
    _ignored: set[str]
    _bare: list[BareGroups]
    _untied: list[Inherit]
    _workers: Workers | None
    _stash: Mapping[str, Any] | None

    def _convert_targets(self) -> list[Inherit]:
        if self.update == "galore":
            return self._part_ways()
        if any(group.get("rank") for optimizer in self.optimizers for group in optimizer.param_groups):
            raise ConfigError("update", "lora", "cannot train heads by a projecting optimizer: use update=galore, or AdamW")
        module = self.lightning_module
        chosen = select(module, self.targets, unfit=self._obstacle)
        gone = set((self._stash or {}).get("left_out", ()))  # the run that is resumed found out in its first step
        targets = {name: target for name, target in chosen.targets.items() if name not in gone}
        ranks, narrow = fit_ranks(module, self.targets, targets, self.rank)
        for line in (say_left_out(module, self.targets, chosen.left_out) if chosen.left_out else None, narrow):
            if line is not None:
                rank_zero_warn(f"LTE: {line}")
        self._untied = lora.untie(module, {t.layer_name for t in targets.values()})
        targets = {name: target for name, target in all_targets(module).items() if name in targets}
        inherited = self._untied + self._convert(targets, ranks)
        self.heads.left_out_names = sorted(gone)
        trained = {id(p) for o in self.optimizers for group in o.param_groups for p in group["params"] if p.requires_grad}
        trained |= {id(target.layer.weight) for target in targets.values()}
        self.rehearsal = FirstStep(module, targets, self._workers, trained)
        return inherited

    def _obstacle(self, target: Target) -> str | None:
        """Why a matrix can have no heads, beyond what no method can take."""
        if has_own_forward(target.layer):
            return "has a class with a forward of its own, which heads cannot follow: leave it out"
        if f"{target.layer_name}.weight" in self._ignored:
            return "is kept from DDP by the module's _ddp_params_and_buffers_to_ignore: leave it out"
        if not any(p is target.layer.weight for o in self.optimizers for group in o.param_groups for p in group["params"]):
            return "is in no optimizer: configure_optimizers must hand over its weight, or leave it out"
        return None

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        """Targets turn out to be none in the first step: their W trains on in full, from this step's gradient on.

        Raises:
            ConfigError: the user named one of them; or none is left.
        """
        module, heads = self.lightning_module, self.heads
        layers = {piece.layer_name for piece in heads.pieces if piece.name in reasons}
        named = first_named(module, self.targets, reasons)
        if named is not None:
            raise ConfigError("targets", named, reasons[named])
        if all(piece.layer_name in layers for piece in heads.pieces):
            first = next(iter(reasons))
            raise ConfigError("targets", self.targets, f"leaves no target: {first} {reasons[first]}")
        rank_zero_warn(f"LTE: {say_left_out(module, self.targets, reasons)}; they train in full")
        heads.left_out_names += [piece.name for piece in heads.pieces if piece.layer_name in layers]
        gone = heads.leave_out(layers)
        for bare in self._bare:
            bare.put_back({id(layer.weight): layer.weight for layer in gone.values()}, heads.parameters_of(gone))
        left_out = head_names(module, heads.layers) | self._ignored
        owned = {id(p) for p in heads.factors().values()}
        self.rest = rest.Rest(module, owned, left_out, self._workers, self.sync_rest, lambda: self.model is not module)
        weights = [layer.weight for layer in gone.values() if layer.weight.requires_grad]
        accumulates = module.trainer.fit_loop.epoch_loop._should_accumulate()  # then the new wrapper sends their sum
        if self._workers.size > 1 and self.sync_rest == "step" and not accumulates:
            for p in weights:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self._workers.average([p.grad for p in weights], counted=False)
        self.model = module
        self.configure_ddp()

    def _convert(self, targets: Mapping, ranks: Mapping[str, int]) -> list[Inherit]:
        self._bare = [BareGroups.of(o, (p for _, p in lora.adapter_parameters(self.lightning_module))) for o in self.optimizers]
        self.heads = HeadSet(self.settings, self._workers)
        inherited = self.heads.convert(targets, ranks)
        for bare in self._bare:
            bare.inherited = list(inherited)
        lora.switch_fast_path(self.lightning_module, off=True)
        return inherited

    def _part_ways(self) -> list[Inherit]:
        """From here on the GaLore targets of each worker are its own."""
        self._bare = [BareGroups.of(optimizer) for optimizer in self.optimizers]
        self.heads = ProjectedSet(self.settings, self._workers, self.optimizers, self.lightning_module, self.basis)
        return []

    def after_transition(self) -> None:
        """The optimizers hold the heads now: tell the rest from the heads, warn, take a checkpoint's heads."""
        heads, module = self.heads, self.lightning_module
        if heads is None or heads.optimizers:
            return
        owned = {id(p) for p in heads.factors().values()}
        # the clock follows the first: merging between the step of one optimizer and that of another would mix two windows
        held = [any(id(p) in owned for group in o.param_groups for p in group["params"]) for o in self.optimizers]
        if sum(held) > 1:
            raise ConfigError("configure_optimizers", f"{sum(held)} optimizers", "LTE's targets must all be in one of them")
        for optimizer, holds in zip(self.optimizers, held, strict=True):
            if holds and self.update == "lora":
                check_stacked(optimizer, next(iter(heads.factors().values())))
        heads.optimizers = [o for _, o in sorted(zip(held, self.optimizers, strict=True), key=lambda pair: not pair[0])]
        left_out = head_names(module, heads.layers) | self._ignored
        self.rest = rest.Rest(module, owned, left_out, self._workers, self.sync_rest, lambda: self.model is not module)
        advise(heads, self.rest)
        stash, self._stash = self._stash, None
        if stash is not None:
            self._take_stash(stash)

    # -- the protocol of ARCHITECTURE.md: a phase callback hands over a plan ---------------------------------------------

    def check_adopt(self, names: Iterable[str], module: pl.LightningModule) -> None:
        """Before training: can the switch hand the targets on?"""
        if self.update == "lora":  # here and not at the freeze, which comes after days
            weights = {id(target.layer.weight): target.layer.weight for target in all_targets(module).values()}
            for optimizer in self.optimizers:
                held = [weights[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in weights]
                if held:
                    check_stacked(optimizer, held[0])
        if self.update == "galore":
            targets, names = all_targets(module), list(names)
            for optimizer in self._adopters():
                optimizer.check_adopt(names, module)
                chosen = {id(targets[name].layer.weight) for name in names}
                for p, entry in optimizer.lookup().items():
                    if id(p) in chosen:
                        check_group(entry.group)

    def adopt(self, plan: Plan, module: pl.LightningModule) -> list[Inherit]:
        """The switch: one synchronous adapter per target, averaged like everything else; or the optimizer's projections.

        Raises:
            ConfigError: every target has rank 0.
        """
        if not any(plan.values()):
            raise ConfigError("ranks", 0, "the plan gives 0 to every target, and LTE has nothing to train apart: leave 0 out")
        self._plan = plan
        if self.update == "galore":
            for optimizer in self._adopters():
                optimizer.adopt(plan, module)
            return []
        return lora.Adapters(self.settings.alpha).adopt(plan, module)

    def release(self) -> list[Inherit]:
        """The freeze: every head starts from the joint phase's adapter, which W holds from now on."""
        if self.update == "galore":
            for optimizer in self._adopters():
                optimizer.release()
            return self._part_ways()
        module = self.lightning_module
        ranks = dict(self._plan)
        old = {name: (layer.lora_A, dict(layer.lora_B.items())) for name, layer in lora.lora_layers(module)}
        for layer in [layer for _, layer in lora.lora_layers(module)]:
            lora.take_adapters(layer)
        every = {name: target for name, target in all_targets(module).items() if name in ranks}
        inherited = self._convert(every, ranks)
        inherited += self.heads.start_from(old)
        return inherited

    def _adopters(self) -> list[Any]:
        found = [*adopters(self.optimizers)]
        if len(found) != 1:
            raise ConfigError(
                "update", "galore", "needs one GaLoreAdamW from configure_optimizers (a group without rank is AdamW)"
            )
        return found
