"""Convert a module for LTE, and hold its parts: targets that this worker trains alone, and the rest that all share.

``update="lora"``: targets get heads. Otherwise nothing is converted; each worker's targets become its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.agreement import agreed_hash
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import fit_ranks
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.core.targets import Target, all_targets, families, first_named, say_left_out, select
from lowrank_pretrain.core.trainer import log_interval, log_row
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.layer import has_own_forward
from lowrank_pretrain.lora.storing import check_frozen
from lowrank_pretrain.lte.bare_groups import BareGroups, check_stacked, check_wrapped
from lowrank_pretrain.lte.first_step import FirstStep
from lowrank_pretrain.lte.local_targets import Fit, LocalTargets, NoTargets
from lowrank_pretrain.lte.rest import SharedParameters, not_wrapped
from lowrank_pretrain.lte.workers import Workers, clip_norms
from lowrank_pretrain.phases import adapter_watch
from lowrank_pretrain.phases.gradient_hooks import UNSEEN, has_users_hook

if TYPE_CHECKING:
    from lowrank_pretrain.lte.heads.head_set import HeadSet

DRIFTED = (
    "each worker changed gradients or weights in its own way; if it clips by hand, use gradient_clip_val or "
    "self.clip_gradients(optimizer, …): a norm over self.parameters() takes this worker's own heads along"
)


class ConvertedModule:
    """Hold a module during a fit under LTE.

    Args:
        module: the LightningModule.
        local: its targets, which have not begun yet.
        workers: who trains together.
        sync_rest: ``step`` or ``merge``.
        ignored: parameters that the module itself excludes from DDP.
        wrapped: tells whether DDP has wrapped the module, and broadcasts worker 0's buffers.

    Attributes:
        rest: all other parameters.
        bare: the optimizers' groups as the bare model has them.
    """

    def __init__(
        self, module: pl.LightningModule, local: LocalTargets, workers: Workers, sync_rest: str, ignored: set[str],
        wrapped: Callable[[], bool] = not_wrapped,
    ) -> None:  # fmt: skip
        self.module, self.local, self.workers = module, local, workers
        self.sync_rest, self.ignored = sync_rest, ignored
        self.rest = SharedParameters(nn.Module(), set(), set(), Workers(), sync_rest)
        self.bare: list[BareGroups] = []
        self._wrapped = wrapped

    @classmethod
    def none(cls) -> "ConvertedModule":
        """Return an empty converted module, for use before a fit."""
        return cls(pl.LightningModule(), NoTargets(), Workers(), "step", set())

    # -- conversion -------------------------------------------------------------------------------------------------

    def begin(self, fit: Fit) -> list[Inherit]:
        """Make the targets this worker's own, at the start of a fit; return what new parameters take over."""
        inherited = self.local.begin(fit)
        adapters = [p for _, p in lora.adapter_parameters(self.module)] if self.local.makes_adapters else []
        return self._begun(fit, inherited, adapters)

    def release(self, fit: Fit) -> list[Inherit]:
        """Make the targets this worker's own, at the freeze; return the same as ``begin``."""
        self.local = self.local.successor()
        return self._begun(fit, self.local.release(fit), [])

    def follow(self, fit: Fit) -> None:
        """Train a changed model's parameters, where targets merge until a freeze that is still to come."""
        if self.local.follow(fit):
            self.bare = [BareGroups.of(optimizer) for optimizer in fit.optimizers]

    def _begun(self, fit: Fit, inherited: list[Inherit], adapters: list[nn.Parameter]) -> list[Inherit]:
        self.bare = [BareGroups.of(optimizer, adapters) for optimizer in fit.optimizers]
        for groups in self.bare:
            groups.inherited = list(self.local.row_blocks)
        return inherited

    def assign_optimizers(self, optimizers: list[Optimizer]) -> None:
        """Separate targets and rest, now that the optimizers hold both; the optimizer with the targets comes first.

        The clock follows the first: merging between the step of one optimizer and that of another would mix two windows.

        Raises:
            ConfigError: two optimizers hold targets; or the one that does cannot train them.
        """
        owned = {id(p) for p in self.local.parameters().values()}
        held = [any(id(p) in owned for group in o.param_groups for p in group["params"]) for o in optimizers]
        if sum(held) > 1:
            first = next(o for o, holds in zip(optimizers, held, strict=True) if holds)
            raise ConfigError("configure_optimizers", f"{sum(held)} optimizers", self._in_one_of_them(first))
        for optimizer, holds in zip(optimizers, held, strict=True):
            check_wrapped(optimizer)
            if holds:
                self.local.check_optimizer(optimizer)
        self.local.optimizers = [o for _, o in sorted(zip(held, optimizers, strict=True), key=lambda pair: not pair[0])]
        self._collect_rest()
        self.local.warn_at_start()
        self._warn_of_heavy_rest()

    def _in_one_of_them(self, optimizer: Optimizer) -> str:
        """Return what is wrong with targets in several optimizers, and how to choose those of this one alone."""
        allowed = "LTE's targets must all be in one of them"
        if any(group.get("rank") for group in optimizer.param_groups):
            return f"{allowed}: project groups of one only"
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        here = {name: id(p) in mine for name, p in self.local.parameters().items()}
        words = next(name for name, holds in here.items() if holds).split(".")
        prefixes = (".".join([*words[:depth], ""]) for depth in range(1, len(words)))
        apart = (prefix for prefix in prefixes if all(holds for name, holds in here.items() if name.startswith(prefix)))
        return f'{allowed}: choose them by targets, as targets=["{next(apart, "")}*"]'

    def _collect_rest(self) -> None:
        owned = {id(p) for p in self.local.parameters().values()}
        left_out = self.local.hidden(self.module) | self.ignored
        settings = self.local.settings
        self.rest = SharedParameters(
            self.module, owned, left_out, self.workers, self.sync_rest, self._wrapped, settings.wire, settings.keep_on
        )

    def _warn_of_heavy_rest(self) -> None:
        """Warn if the rest sends more at every step than a merge sends for the targets."""
        local, rest = self.local, self.rest
        if rest.apart or local.workers.size == 1:
            return
        if rest.bytes() * local.settings.merge_every > 4 * sum(piece.bytes_sent() for piece in local.pieces):
            rank_zero_warn(
                f"LTE: sync_rest='step' sends {rest.bytes() / 2**20:.1f} MiB of other parameters at every step, more "
                "than the merges: sync_rest='merge' saves most of it"
            )

    def leave_out(self, reasons: Mapping[str, str], accumulates: bool) -> None:
        """Give up targets that the first step found unfit: their W trains in full, from this step's gradient on.

        Args:
            reasons: why, by target.
            accumulates: whether the step continues: then the new wrapper sends the sum of its gradients.

        Raises:
            ConfigError: the user named one of them; or none is left.
        """
        local, patterns = self.local, self.local.settings.targets
        layers = {piece.weight_name for piece in local.pieces if piece.name in reasons}
        named = first_named(self.module, patterns, reasons)
        if named is not None:
            raise ConfigError("targets", named, reasons[named])
        if all(piece.weight_name in layers for piece in local.pieces):
            first = next(iter(reasons))
            raise ConfigError("targets", patterns, f"leaves no target: {first} {reasons[first]}")
        rank_zero_warn(f"LTE: {say_left_out(self.module, patterns, reasons)}; they train in full")
        weights, gone = local.leave_out(layers)
        for groups in self.bare:
            groups.put_back({id(W): W for W in weights.values()}, gone)
        self._collect_rest()
        if self.workers.size > 1 and self.sync_rest == "step" and not accumulates:
            # DDP did not know these weights in this step's backward pass
            gradients: list[Tensor] = []
            for W in (W for W in weights.values() if W.requires_grad):
                W.grad = torch.zeros_like(W) if W.grad is None else W.grad
                gradients.append(W.grad)
            self.workers.average(gradients, counted=False)

    def follow_unfrozen(self) -> bool:
        """Train and average what a callback has unfrozen as part of the rest; return whether there was any."""
        frozen = self.local.frozen_weights()
        found = self.rest.follow({id(W) for W in frozen})
        if found:
            for W in frozen:  # unfrozen with everything else; its heads train instead
                W.requires_grad_(False)
        return found

    # -- a step -----------------------------------------------------------------------------------------------------

    def check_step(self, output: Any, watching: bool) -> None:
        """Check after a training step's forward pass that it has a loss, and that the batch could be shared out.

        Args:
            output: what ``training_step`` returned.
            watching: whether this is the first step, in which unfit targets may still be left out.

        Raises:
            ConfigError: there is no loss, and other workers wait for gradients; or a target has fewer samples than heads.
        """
        local, settings = self.local, self.local.settings
        if output is None and self.workers.size > 1 and self.module.automatic_optimization:
            # Lightning refuses it too, and names neither the worker nor a cure
            raise ConfigError(
                "training_step", None, f"is what worker {self.workers.rank} returned, and the others would wait for its "
                "gradients: leave such batches out in the loader, or return the loss times 0"
            )  # fmt: skip
        if local.shared.seen is None:
            return
        unfit = local.shared.check_seen(settings.heads if settings.shares_batch else 1, partial(families, self.module))
        if watching:
            local.first_step.unfit |= unfit
        elif unfit:
            name, reason = next(iter(unfit.items()))
            raise ConfigError("targets", name, reason)

    def merge_rest(self) -> bool:
        """Average the rest at the end of a window; return whether all workers hold the same, if they should."""
        settings = self.local.settings
        if settings.mode == "joint" or self.local.clock % settings.merge_every:
            return True
        self.rest.merge()
        return self.rest.agrees()

    def clip(self, optimizer: Optimizer, limit: float) -> None:
        """Clip the gradients of the rest, of the targets, and of what the module excludes from DDP, each by its own norm."""
        targets = list(self.local.parameters().values()) if self.local.unsynced(self.module) else []
        alone = [p for name, p in nn.Module.named_parameters(self.module) if name in self.ignored and p.grad is not None]
        separate = {id(p) for p in (*targets, *alone)}
        mine = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        rest = [p for n, p in mine.items() if n not in separate]
        clip_norms(rest, [p for p in targets if id(p) in mine], limit, stacked=self.local.stacked)
        clip_norms([], [p for p in alone if id(p) in mine], limit, stacked=False)

    def differing(self) -> set[str]:
        """Return the names of tensors that may differ between workers after a merge."""
        names = self.local.hidden(self.module) | self.ignored | self.local.differing()
        local = self.local
        # the rest was averaged when the merge began, and has moved since; or is, when the last fragment merges
        if self.rest.apart and (local.settings.overlap or local.clock % local.settings.merge_every):
            names |= set(self.rest.parameters)
        return names

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Return what the bare model's optimizer would hold; ``None`` before conversion. All workers call it together."""
        for bare in self.bare:
            if bare.optimizer is getattr(optimizer, "_optimizer", optimizer):
                own = bare.numbers(self.local.parameters().values())
                return self.rest.averaged_moments(bare.state_dict(), own)
        return None

    def hash_shared(self, strategy: Any) -> int:
        """Return a hash of the tensors that all workers share at a merge; end the run if they differ. All call it together."""
        when = f"after the merge at step {self.module.trainer.global_step + 1}"
        apart, further = self.differing(), self.local.agreed()
        return self.workers.together(lambda: agreed_hash(strategy, self.module, when, apart, DRIFTED, further))

    def metrics(self) -> dict[str, float]:
        """Return MiB that this worker sent for the last merge and for the rest in that window, and milliseconds waited."""
        if not self.local.begun:
            return {}
        sent, seconds = self.local.last_cost
        return {
            "lte/merge_mib": sent / 2**20,
            "lte/rest_mib": self.rest.sent_per_window(self.local.settings.merge_every) / 2**20,
            "lte/merge_ms": 1000 * seconds,
        }

    def log(self, agreed: Callable[[], int]) -> None:
        """Log a merge's cost, and a hash of the tensors that all workers then share.

        Args:
            agreed: forms the hash; all workers call it together.
        """
        trainer, every = self.module.trainer, self.local.settings.interval
        often = max(1, log_interval(trainer))
        # Lightning counts the steps it sees: none of a raw optimizer's
        step = max(trainer.global_step, self.local.clock - 1)
        # by the step alone, so that a resumed run logs at the same merges
        if step // often == (step - every) // often and self.local.merges > 1:
            return
        metrics = self.metrics()
        if self.workers.size > 1 and self.local.settings.mode != "joint":
            metrics["lte/hash"] = float(agreed())
        log_row(trainer, metrics, step)

    # -- the merged model -------------------------------------------------------------------------------------------

    def swap_in(self) -> None:
        """Swap merged weights and averages in for evaluation. All workers call it together."""
        if self.local.attached:
            self.local.meet()
            self.rest.swap_in()  # first: the merged weights take rows of the rest along
            self.local.view.swap_in()

    def swap_out(self) -> None:
        """Swap this worker's own weights back in."""
        if self.local.attached:
            self.local.view.swap_out()
            self.rest.swap_out()

    def swap_out_keeping_writes(self) -> None:
        """Swap out; a callback's writes into the merged weights join the trained ones. All call it together."""
        if self.local.attached:
            self.local.view.swap_out_keeping_writes()
            self.rest.swap_out_keeping_writes()

    @contextmanager
    def swapped_in_to_write(self) -> Iterator[None]:
        """Swap the merged model in on worker 0, which writes; the others hold at most a few matrices' factors.

        All workers call it together.
        """
        shared, writes = self.local.shared, self.workers.rank == 0
        self.local.meet()
        self.rest.swap_in_to_write(writes)
        self.local.view.swap_in(piecemeal=True, writes=writes)
        viewing, shared.viewing = shared.viewing, True  # heads add nothing of their own to the output
        try:
            yield
        finally:
            shared.viewing = viewing
        self.swap_out()

    def detach(self) -> None:
        """Leave the module plain and merged.

        After an exception W stays that of the last merge (the other workers may be gone). A fit that resumes a finished run
        takes no step, and ``on_train_end`` does not come: the merged weights are swapped in here.
        """
        local = self.local
        local.first_step.stop()
        if not local.attached:
            return
        together = local.workers.size == 1 or not self.module.trainer.interrupted
        if local.optimizers and not local.view.swapped_in and together:
            self.swap_in()
        local.detach()
        self.rest.keep()
        lora.switch_fast_path(self.module, off=False)


def begin_heads(heads: "HeadSet", fit: Fit) -> list[Inherit]:
    """Give heads to the targets that the settings choose, and watch them in the first step.

    Returns:
        What new parameters take over, for the optimizer.

    Raises:
        ConfigError: the optimizer projects gradients; or a target that is named cannot have heads.
    """
    if any(group.get("rank") for optimizer in fit.optimizers for group in optimizer.param_groups):
        raise ConfigError("update", "lora", "cannot train heads by a projecting optimizer: use update=galore, or AdamW")
    module, patterns = fit.module, heads.settings.targets
    # choose targets and ranks
    chosen = select(module, patterns, unfit=lambda target: _obstacle(target, fit))
    targets = {name: target for name, target in chosen.targets.items() if name not in fit.left_out}
    ranks, narrow = fit_ranks(module, patterns, targets, heads.settings.rank)
    for line in (say_left_out(module, patterns, chosen.left_out) if chosen.left_out else None, narrow):
        if line is not None:
            rank_zero_warn(f"LTE: {line}")
    check_frozen_dtype(heads, module, ranks)
    weights = {id(target.layer.weight) for target in targets.values()}
    held = [o for o in fit.optimizers if any(id(p) in weights for group in o.param_groups for p in group["params"])]
    adapter_watch.check_optimizers(held)
    # convert
    heads.untied = lora.untie(module, {t.layer_name for t in targets.values()})
    targets = {name: target for name, target in all_targets(module).items() if name in targets}
    inherited = heads.untied + heads.convert(targets, ranks)
    lora.switch_fast_path(module, off=True)
    heads.left_out_names = sorted(fit.left_out)
    # watch the first step
    trained = {id(p) for o in fit.optimizers for group in o.param_groups for p in group["params"] if p.requires_grad}
    trained |= {id(target.layer.weight) for target in targets.values()}
    heads.first_step = FirstStep(module, targets, fit.workers, trained)
    return inherited


def _obstacle(target: Target, fit: Fit) -> str | None:
    """Return why a matrix cannot have heads, beyond the obstacles common to all methods."""
    if has_own_forward(target.layer):
        return "has a class with a forward of its own, which heads cannot follow: leave it out"
    if f"{target.layer_name}.weight" in fit.ignored:
        return "is kept from DDP by the module's _ddp_params_and_buffers_to_ignore: leave it out"
    if not any(p is target.layer.weight for o in fit.optimizers for group in o.param_groups for p in group["params"]):
        return "is in no optimizer: configure_optimizers must hand over its weight, or leave it out"
    return UNSEEN if has_users_hook(target.layer.weight) else None


def check_fit(heads: "HeadSet", names: Iterable[str], fit: Fit) -> None:
    """Refuse an optimizer or a ``frozen_dtype`` that heads cannot have; raise ``ConfigError``."""
    check_optimizers(fit)
    check_frozen_dtype(heads, fit.module, names)


def check_frozen_dtype(heads: "HeadSet", module: pl.LightningModule, names: Iterable[str]) -> None:
    """Refuse a ``frozen_dtype`` that the device, or a target's shape, does not allow.

    Raises:
        ConfigError: naming it.
    """
    if heads.settings.frozen_dtype is not None:
        check_frozen(module, dict.fromkeys(names, 0), True, heads.settings.frozen_dtype)


def check_optimizers(fit: Fit) -> None:
    """Refuse optimizers that hold weights and cannot train heads in their place.

    Raises:
        ConfigError: such an optimizer.
    """
    weights = {id(W): W for W in (cast(nn.Parameter, target.layer.weight) for target in all_targets(fit.module).values())}
    for optimizer in fit.optimizers:
        held = [weights[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in weights]
        if held:
            check_stacked(optimizer, held)


def begin_from_adapters(heads: "HeadSet", fit: Fit) -> list[Inherit]:
    """Turn the joint phase's adapters into heads, at the freeze; return the same as ``begin_heads``."""
    module, ranks = fit.module, dict(heads.plan)
    adapted: list[tuple[str, Any]] = list(lora.lora_layers(module))
    old = {name: (layer.lora_A, dict(layer.lora_B.items())) for name, layer in adapted}
    for _, layer in adapted:
        lora.take_adapters(layer)
    inherited = heads.convert({name: target for name, target in all_targets(module).items() if name in ranks}, ranks)
    lora.switch_fast_path(module, off=True)
    return inherited + heads.start_from(old)


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that average weights by position.

    Raises:
        ConfigError: such a callback.
    """
    for callback in callbacks:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            cure = "remove it, or average the exports"
            allowed = f"pairs weights by position and would average heads, or one worker's weights: {cure}"
            raise ConfigError("callbacks", type(callback).__name__, allowed)
