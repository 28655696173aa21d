"""LTE as a Lightning strategy: workers train low-rank heads on their own data and merge periodically (arXiv 2402.16828).

One process per device, started by Lightning's own launchers; a DDP strategy by inheritance, so that samplers share the data
out. The model is converted in ``setup``, after ``configure_optimizers`` has seen the bare model and before DDP wraps what is
synchronised at every step. This file knows hooks and no maths: ``conversion`` holds the converted module, ``local_targets``
declares what a worker trains on its own, ``checkpoint`` keeps what a resumed fit needs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lowrank_pretrain.core.buckets import settle_buckets
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import LEFT_OUT_OF_DDP, leave_out_of_ddp, set_sampler_injection
from lowrank_pretrain.core.protocols import HasPhase, Merges, Reports, phase_callback, phase_of
from lowrank_pretrain.core.trainer import accumulates, callbacks_of
from lowrank_pretrain.galore.guard import closed
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lte import checkpoint as files
from lowrank_pretrain.lte.batches import shared_out
from lowrank_pretrain.lte.before import MergedUntilFreeze
from lowrank_pretrain.lte.conversion import ConvertedModule, check_callbacks
from lowrank_pretrain.lte.full import FullSet
from lowrank_pretrain.lte.handover import FollowsPhases
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.leaves import batch_size
from lowrank_pretrain.lte.local_targets import AllHeads, LocalTargets
from lowrank_pretrain.lte.projected import ProjectedSet
from lowrank_pretrain.lte.sent import REST, BytesSent
from lowrank_pretrain.lte.settings import Settings, check_ddp, check_settings
from lowrank_pretrain.lte.workers import Workers, make_group, same_weights, set_patience, share_overflow
from lowrank_pretrain.phases import transition

KINDS: dict[str, type[HeadSet | ProjectedSet | FullSet]] = {"lora": HeadSet, "galore": ProjectedSet, "full": FullSet}


class LTEStrategy(FollowsPhases, Reports, Merges):
    """Train low-rank heads separately on each worker, and merge them every `merge_every` optimizer steps.

    With several heads on a device targets must see the batch as dim 0 of their input, and the loss must be a mean over it:
    head k trains on the k-th share of the batch. The first step watches each target: one that is never called, or sees no
    batch, trains in full instead (if a preset chose it) or is refused (if it was named). In the middle of a fit
    ``module.state_dict()`` is a plain model's: W with what this worker's heads have learnt, as they would merge alone. What
    others write into W stays in it. Checkpoints hold the merge of all workers. A model that puts time first would share out
    time (it is refused only where the sizes show it). BatchNorm and contrastive losses see all shares.

    Example:
        >>> LTEStrategy(rank=8, heads=2, merge_every=10).phase
        'full'

    Args:
        rank: R of every head.
        heads: H per device; N = devices × heads.
        merge_every: T, optimizer steps between merges.
        alpha: scale = alpha / rank; ``None``: alpha = rank, scale 1. The authors use 64 to 128 times that.
        targets: presets or globs (``targets.find_targets``).
        mode: ``parallel``: each head on its own share of the batch; ``joint``: all heads on the whole batch, synchronous, no
            merge (the authors' MHLoRA); ``sequential``: one head per window, on the whole batch.
        reset: heads start anew after a merge. Without it rank(W − W₀) ≤ N·R for ever.
        sync_rest: average what belongs to no target at every ``step``, like DDP, or at every ``merge``.
        route: ``factors`` or ``dense``; ``None``: per target the fewer bytes.
        update: what a worker trains: ``lora``: heads next to W; ``galore``: W itself, by the GaLoreAdamW that
            ``configure_optimizers`` returns. Its groups say which targets and what rank, ``merge_every`` how long a basis
            lives (instead of their ``update_proj_gap`` and ``stagger``); merges send the bases and the updates in them.
            Costs a float32 copy of the targets, and the bases' coefficients, r·n numbers a matrix.
            ``full``: W itself, by any optimizer (DiLoCo, local SGD), at a float32 copy; ``targets="all"`` is everything that
            trains, others are the weights of the layers they choose.
        basis: with ``update="galore"``, each worker's ``own``, or one that all have ``shared``.
        overlap: apply a merge this many steps after it began; fewer than between two merges. Heads need ``reset=False``.
        prune: with ``reset``, share of the heads' moments to zero instead of deleting their optimizer state (ReLoRA).
        merge_timeout: seconds until a merge gives a worker up; ``None``: ``timeout``, else 600. Without ``timeout`` it
            bounds all other waiting of a fit too.
        wire: what merges travel in (``wire.WIRES``). Whole weights, and a rest averaged at merges, have error feedback
            (float32 copies: one, two). Factors have none, and need ``int4`` or more.
        outer_lr: step W by the workers' mean increment times this (DiLoCo: 0.7).
        outer_momentum: its Nesterov momentum (DiLoCo: 0.9): a float32 copy; another with heads that are not reset.
        before: with a phase callback, how workers agree until its freeze: ``ddp``: at every step; ``merge``: as with
            ``update="full"``, by the same clock, wire and outer step, and with the same copies.
        fragments: with ``update="full"``, parts of the targets that merge in turn within ``merge_every``.
        keep_on: ``device``, or ``cpu`` for what only merges need: outer momentum, error feedback, W_base of ``update="full"``
            (``full.FullSet`` says what each costs).
        recompute_inputs: make layers' inputs again in backward where possible, in place of keeping them (``lora.inject``).
        frozen_dtype: multiply W next to heads in ``bfloat16``, ``float16`` or ``float8``. W itself stays: merges add to it.
        ddp_kwargs: further arguments of ``DDPStrategy`` and of DDP (``timeout``, ``find_unused_parameters``, …).

    Raises:
        ConfigError: a wrong value.
    """

    strategy_name = "lte"

    def __init__(
        self,
        rank: int = 16,
        heads: int = 4,
        merge_every: int = 10,
        alpha: float | None = None,
        targets: str | Sequence[str] = "all",
        mode: str = "parallel",
        reset: bool = False,
        sync_rest: str = "step",
        route: str | None = None,
        overlap: int = 0,
        prune: float | None = None,
        update: str = "lora",
        basis: str = "own",
        merge_timeout: float | None = None,
        wire: str = "float32",
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        before: str = "ddp",
        fragments: int = 1,
        keep_on: str = "device",
        recompute_inputs: bool = False,
        frozen_dtype: str | None = None,
        **ddp_kwargs: Any,
    ) -> None:
        given = dict(locals())
        check_settings(given)
        check_ddp(ddp_kwargs, [name for name in given if name not in ("self", "ddp_kwargs", "__class__")])
        super().__init__(**ddp_kwargs)
        self._patience: timedelta | None = ddp_kwargs.get("timeout")
        self._group: Any = None  # of the merges
        self._gradient_bytes = 0.0
        self._use_sampler: bool | None = None  # what use_distributed_sampler was before the fit
        patience = 600.0 if self._patience is None else self._patience.total_seconds()
        self.rank, self.targets = rank, targets if isinstance(targets, str) else [str(t) for t in targets]
        self.merge_timeout = patience if merge_timeout is None else merge_timeout
        self.merge_every, self.sync_rest = merge_every, sync_rest
        self.update, self.basis, self.before = update, basis, before
        self.settings = Settings.of({**given, "targets": self.targets})
        self.makes_adapters = KINDS[update].makes_adapters
        self.adapter_settings = KINDS[update].decides(self.settings)
        if before == "merge":
            self.settles_every, self.gradients_differ = merge_every, True
        self._resume = files.Resume()
        self._forget()

    def _forget(self) -> None:
        """Reset to the state before a fit."""
        self.phase = "full"  # "lowrank" once the targets are this worker's own
        self.workers_differ = False
        self.sent = BytesSent()
        self.converted = ConvertedModule.none()
        self._trains = False
        self._holding = False  # while Lightning's own set-up runs, DDP does not wrap
        self._inside_step = False
        self._ticks: Any = None  # the clock's hook

    # -- a fit begins -----------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer) -> None:
        """Set DDP up, convert the model, then wrap it."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self._begin_fit(trainer)
        if self.world_size == 1 and self._use_sampler is None:
            # nothing to share out: any loader runs, even one that Lightning cannot rebuild
            self._use_sampler = set_sampler_injection(trainer, False)
        self._holding = True
        super().setup(trainer)
        if fitting:
            same_weights(self._module, self.converted.workers)
            if phase_callback(trainer) is None or self.before == "merge":
                transition.apply(trainer, self._module, lambda: self.converted.begin(self._fit()), replay=True)
        self._holding = False
        if not fitting:
            return
        self.configure_ddp()
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None and self.converted.workers.size > 1:
            share_overflow(scaler, self.converted.workers.group)
        setattr(self.precision_plugin, "clip_grad_by_norm", self.converted.clip)  # noqa: B010  # shadows the method

    def _begin_fit(self, trainer: pl.Trainer) -> None:
        check_callbacks(callbacks_of(trainer))
        self._swap_in_first(trainer)
        self._check_phases(phase_callback(trainer))
        self._forget()
        self.sent, self._resume.sent = BytesSent(self._resume.sent), {}
        workers = Workers()
        if dist.is_initialized() and dist.get_world_size() > 1:
            if self._group is None:
                self._group = make_group(self.merge_timeout)
            if self._patience is None:
                set_patience(timedelta(seconds=self.merge_timeout))
            workers = Workers(self._group, self.merge_timeout)
        if not self._module.automatic_optimization:
            workers.hint = " (in manual optimization all workers must take equally many optimizer steps)"
        local: LocalTargets = KINDS[self.update](self.settings, workers)
        if self.before == "merge":
            local = MergedUntilFreeze(self.settings, workers, local)
        ignored = set(getattr(self._module, LEFT_OUT_OF_DDP, ()))
        self.converted = ConvertedModule(
            self._module, local, workers, self.sync_rest, ignored, lambda: self.model is not self.lightning_module
        )

    def _check_phases(self, callback: HasPhase | None) -> None:
        """Refuse settings of phases without a callback that has some, and those that a callback decides."""
        if callback is None and self.before != "ddp":
            raise ConfigError(
                "before",
                self.before,
                "says how workers agree until a phase callback's freeze, and there is no callback (PreLoRA)",
            )
        if callback is not None and (self.rank, self.targets) != (16, "all"):
            raise ConfigError(
                "rank, targets", (self.rank, self.targets), "the phase callback's plan decides them: leave them out"
            )

    def process_dataloader(self, dataloader: Any) -> Any:
        """Make training loaders divide the data and end together."""
        return shared_out(dataloader, self.converted.workers.size) if self._module.trainer.training else dataloader

    def after_transition(self) -> None:
        """Follow a change of the model; start the clock."""
        super().after_transition()
        if self.local.optimizers and self._ticks is None:
            # on the optimizer itself, so that any call of its step counts; optimizers that are not torch's have no hooks
            with suppress(AttributeError):
                self._ticks = self.local.optimizers[0].register_step_post_hook(self._after_raw_step)
        if self.before == "merge":  # nothing was wrapped: all weights were this worker's own
            self._wrap_again()

    # -- a step -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Train and average what a callback has unfrozen as part of the rest, from an epoch's start."""
        super().on_train_batch_start(batch, batch_idx)
        waits = self.local.first_step.waits  # W itself takes gradients then
        if batch_idx or self.converted.workers.size == 1 or not self.local.attached or waits:
            return
        if self.converted.follow_unfrozen():
            self._wrap_again()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the heads the size of the batch that they share."""
        if not self.local.begun:
            return super().training_step(*args, **kwargs)
        shared, shares = self.local.shared, self.settings.shares_batch
        shared.batch = batch_size(args[0] if args else kwargs) if shares else 1
        watching = self.local.first_step.waits
        with self.local.first_step.forward():
            output = super().training_step(*args, **kwargs)
        self.converted.check_step(output, watching)
        if output is None or not self._module.automatic_optimization:  # nothing is left of the step
            shared.batch = None
        return output

    def post_backward(self, closure_loss: Tensor) -> None:
        """Let forward passes outside a training step see W unchanged."""
        super().post_backward(closure_loss)
        if self.local.first_step.waits:
            self._finish_first_step()
        if self._module.automatic_optimization:  # otherwise the step goes on
            self.local.shared.batch = None

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """Step, then tick: the clock counts attempts, as Lightning does, including steps skipped for fp16."""
        self._inside_step = True
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._inside_step = False
        self._count_gradients()
        if self.local.optimizers and optimizer is self.local.optimizers[0]:
            self._tick()
        return output

    def _after_raw_step(self, *_: Any) -> None:
        """Tick after a step that did not come through Lightning (manual optimization with the raw optimizer)."""
        if not self._inside_step:
            self._tick()

    @closed  # manual optimization steps inside of a training step's autocast
    def _tick(self) -> None:
        """Count an optimizer step, and merge what is due."""
        local, first_step = self.local, self.local.first_step
        if first_step.waits:  # this worker left its first batch out
            self._finish_first_step()
        # the targets, by their clock
        changed = local.after_step()
        self._count(phase_of(self._module.trainer))
        if changed and first_step.watches:
            self._finish_first_step()
        # the rest, at the end of a window
        agree = self.converted.merge_rest()
        self._count(REST)
        if not agree:
            self._hash()
        if changed:
            if local.merges == 1:
                local.warn_after_first_merge(self._module)
            self.converted.log(self._hash)

    def _finish_first_step(self) -> None:
        """Leave out, or refuse, targets that the first step found unfit."""
        reasons = self.local.first_step.finish()
        if reasons:
            self.converted.leave_out(reasons, accumulates(self._module.trainer))
            self._wrap_again()

    # -- what is reported -------------------------------------------------------------------------------------------

    def _hash(self) -> int:
        """Return a hash of the tensors that all workers share at a merge; end the run if they differ."""
        return self.converted.hash_shared(self)

    def all_heads(self) -> AllHeads:
        """Yield per layer its name, A (N, ΣR, D), B (N, O, R) per part, and the parts. All workers call it together."""
        return self.local.all_heads()

    def metrics(self) -> dict[str, float]:
        """Return the cost of merges; see ``ConvertedModule.metrics``."""
        return self.converted.metrics()

    # -- the end of a fit sees the merged model, as evaluation does (``looking``) ------------------------------------

    def on_train_start(self) -> None:
        """Restore a resumed run's random states, after everything that draws; swap out (``lr_find`` leaves the view in)."""
        self._trains = True
        self.converted.swap_out()
        self._resume.give_random(self.converted.workers)

    def on_train_end(self) -> None:
        """Leave the merged model in place from here on."""
        self.converted.swap_in()

    def teardown(self) -> None:
        """Stop the clock, restore the plain module, and reset the process group's timeout."""
        if self._ticks is not None:
            self._ticks.remove()
            self._ticks = None
        if self._use_sampler is not None:
            set_sampler_injection(self._module.trainer, self._use_sampler)
            self._use_sampler = None
        if self.lightning_module is not None:
            self._swap_in_no_more(self._module.trainer)
        with suppress(AttributeError):
            del self.precision_plugin.clip_grad_by_norm
        if self.local.attached:
            leave_out_of_ddp(self._module, self.converted.ignored)
        self.converted.detach()
        super().teardown()
        if self._patience is None and self.converted.workers.size > 1 and dist.is_initialized():
            set_patience(self._timeout or default_pg_timeout)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the merged model under the plain names, on worker 0, which writes; the others' W is as of the last merge.

        All workers call it together.
        """
        if not self.local.attached or self.local.view.swapped_in:
            return super().lightning_module_state_dict()
        with self.converted.swapped_in_to_write():
            plain = super().lightning_module_state_dict()
            return lora.clone_state(plain) if self.converted.rest.averaged else plain

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what the bare model's optimizer would hold; the heads' moments are in ``lte_state``."""
        bare = self.converted.optimizer_state(optimizer)
        return super().optimizer_state(optimizer) if bare is None else bare

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add ``lte_state`` to what worker 0 writes; a weights-only file needs none."""
        if self.local.begun and "optimizer_states" in checkpoint:
            if (entry := files.lte_state(self.converted)) is not None:
                checkpoint[files.KEY] = entry
            self._note_merged(checkpoint)
            if self.local.attached:
                self._count(phase_of(self._module.trainer))  # a merge under way has been completed for the file
        if "optimizer_states" in checkpoint and (sent := self.sent.state()):
            checkpoint[files.SENT] = sent
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the merged model; keep the heads until a fit has some, or attach them at once (``lr_find``)."""
        if not self.local.attached:
            super().load_model_state_dict(checkpoint, strict)
            if self._module.trainer.state.fn == TrainerFn.FITTING:
                self._resume.keep(checkpoint, self.before)
            return
        self.converted.swap_out()
        if (state := checkpoint.get(files.KEY)) is None:
            super().load_model_state_dict(checkpoint, strict)
            return
        module = self._module
        names = self.local.hidden(module)
        own = {k: v for k, v in lora.own_tensors(module).items() if k in names}
        super().load_model_state_dict({**checkpoint, "state_dict": own | checkpoint["state_dict"]}, strict=False)
        self._resume.give(state, self.converted)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the bare model's states for the rest, the heads' own for the heads."""
        if self.local.begun:
            self._resume.load_optimizers(checkpoint, self.converted)
        else:
            super().load_optimizer_state_dict(checkpoint)

    # -- what callbacks ask of all workers ----------------------------------------------------------------------------

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce as DDP does; a worker that died is named as at a merge."""
        return self._together(super().reduce, tensor, group, reduce_op)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast, likewise."""
        return self._together(super().broadcast, obj, src)

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather, likewise."""
        return self._together(super().all_gather, tensor, group, sync_grads)

    def _together(self, call: Callable[..., Any], *args: Any) -> Any:
        with self.converted.workers.uncounted():
            return self.converted.workers.together(lambda: call(*args))

    # -- DDP --------------------------------------------------------------------------------------------------------

    def configure_ddp(self) -> None:
        """Wrap the model for synchronisation at every step; heads are excluded from broadcasts and averages."""
        if self._holding:
            return
        module = self._module
        ignored = self.converted.ignored | self.local.unsynced(module)
        leave_out_of_ddp(module, ignored)
        synced = [name for name, p in nn.Module.named_parameters(module) if p.requires_grad and name not in ignored]
        at_merges = self.local.begun and self.settings.mode != "joint" and self.sync_rest == "merge"
        if not synced or at_merges or self.converted.workers.size == 1:
            return  # DDP refuses a model without anything to reduce
        super().configure_ddp()
        settle_buckets(self.model)
        size, named = self.converted.workers.size, dict(nn.Module.named_parameters(module))
        self._gradient_bytes = 2 * (size - 1) / size * sum(named[name].numel() * named[name].itemsize for name in synced)

    def _wrap_again(self) -> None:
        self.model = self._module
        self.configure_ddp()
