"""LTE as a Lightning strategy: workers train low-rank heads on their own data and merge now and then (arXiv 2402.16828).

One process per device, started by Lightning's own launchers; a DDP strategy by inheritance, so that samplers share the data
out. The model is converted in ``setup``, after ``configure_optimizers`` has seen the bare model and before DDP wraps what is
synchronised at every step. This file knows hooks and no maths: ``heads.head_set`` has the heads and their clock, ``merge`` the
traffic, ``heads.checkpoint`` the checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lowrank_pretrain.core.agreement import agreed_hash
from lowrank_pretrain.core.buckets import settle_buckets
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import (
    ADAPTER_DEFAULTS,
    HEAD_SETTINGS,
    Adopter,
    HasPhase,
    Inherit,
    Merges,
    Reports,
    phase_callback,
)
from lowrank_pretrain.core.targets import families
from lowrank_pretrain.lora.function import Part
from lowrank_pretrain.lte import advice, rest
from lowrank_pretrain.lte.bare_groups import BareGroups
from lowrank_pretrain.lte.batches import shared_out
from lowrank_pretrain.lte.checkpointing import CheckpointHooks
from lowrank_pretrain.lte.clipping import clip_norms, share_overflow
from lowrank_pretrain.lte.conversion import Conversion
from lowrank_pretrain.lte.first_step import FirstStep
from lowrank_pretrain.lte.heads import record
from lowrank_pretrain.lte.heads.head_set import HeadSet, Settings, head_names
from lowrank_pretrain.lte.leaves import batch_size
from lowrank_pretrain.lte.looking import ViewHooks
from lowrank_pretrain.lte.projected import ProjectedSet
from lowrank_pretrain.lte.settings import check, check_ddp
from lowrank_pretrain.lte.workers import Workers, make_group, same_weights, set_patience
from lowrank_pretrain.lte.written import leaf
from lowrank_pretrain.phases import transition

DRIFTED = (
    "each worker changed gradients or weights in its own way; if it clips by hand, use gradient_clip_val or "
    "self.clip_gradients(optimizer, …): a norm over self.parameters() takes this worker's own heads along"
)


class LTEStrategy(Conversion, CheckpointHooks, ViewHooks, Adopter, HasPhase, Reports, Merges):
    """Workers train heads apart and merge them every so many optimizer steps.

    With several heads on a device targets must see the batch as dim 0 of their input, and the loss must be a mean over it:
    head k trains on the k-th share of the batch. In the first step each target is looked at: one that is never called, or sees
    no batch, trains in full instead (a preset chose it) or is refused (it was named). In the middle of a fit
    ``module.state_dict()`` is a plain model's: W with what this worker's heads have learnt, as they would merge alone; who
    writes into W adds to it for good. Checkpoints hold the merge of all workers. A model that puts time first would share out
    time (it is refused only where the sizes show it). BatchNorm and contrastive losses look across the shares.

    Args:
        rank: R of every head.
        heads: H per device; N = devices × heads.
        merge_every: T, optimizer steps between merges.
        alpha: scale = alpha / rank; ``None``: alpha = rank, scale 1. The authors use 64 to 128 times that.
        targets: presets or globs (``targets.find_targets``).
        mode: ``parallel``: each head on its own share of the batch; ``joint``: all heads on the whole batch, synchronous, no
            merge (the authors' MHLoRA); ``sequential``: one head per window, on the whole batch.
        reset: heads start anew after a merge. Without it rank(W − W₀) ≤ N·R for ever.
        sync_rest: what belongs to no target is averaged at every ``step``, like DDP, or at every ``merge``.
        route: ``factors`` or ``dense``; ``None``: per target the fewer bytes.
        update: what a worker trains: ``lora``: heads beside W; ``galore``: W itself, by the GaLoreAdamW that
            ``configure_optimizers`` returns. Its groups say which targets and what rank, ``merge_every`` how long a basis
            lives (in place of their ``update_proj_gap`` and ``stagger``); merges send the bases and what was done in them.
            Costs a float32 copy of the targets beside the bases' coefficients, r·n numbers a matrix.
        basis: with ``update="galore"``, every worker's ``own`` or one ``shared`` by all.
        overlap: apply a merge this many steps after it was begun, ``< merge_every``; needs ``reset=False``.
        prune: with ``reset``, share of the heads' moments to zero instead of deleting their optimizer state (ReLoRA).
        merge_timeout: seconds after which a worker that does not answer at a merge ends the job; ``None``: `timeout` if that
            is given, else 600. Without `timeout` it bounds all other waiting of a fit too.
        ddp_kwargs: further arguments of ``DDPStrategy`` and of DDP (``timeout``, ``find_unused_parameters``, …).

    Raises:
        ConfigError: a wrong value.
    """

    strategy_name = "lte"
    compares_ranks = True

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
        **ddp_kwargs: Any,
    ) -> None:
        check(locals())
        check_ddp(
            ddp_kwargs, [name for name in signature(LTEStrategy.__init__).parameters if name not in ("self", "ddp_kwargs")]
        )
        super().__init__(**ddp_kwargs)
        self._patience = ddp_kwargs.get("timeout")
        self._injects: bool | None = None  # what use_distributed_sampler was before the fit
        if merge_timeout is None:
            merge_timeout = 600.0 if self._patience is None else self._patience.total_seconds()
        self.rank, self.targets = rank, targets if isinstance(targets, str) else [str(t) for t in targets]
        self.sync_rest, self.merge_timeout = sync_rest, merge_timeout
        self.update, self.basis = update, basis
        self.makes_adapters = update == "lora"
        # heads have the strategy's scale and train their A; projections are no adapters
        self.adapter_settings = {**HEAD_SETTINGS, "alpha": alpha} if self.makes_adapters else ADAPTER_DEFAULTS
        self.settings = Settings(1 if update == "galore" else heads, merge_every, alpha, mode, reset, route, overlap, prune)
        self._forget()

    def _forget(self) -> None:
        """As before a fit."""
        self.heads: HeadSet | ProjectedSet | None = None
        self.rest: rest.Rest | None = None
        self.rehearsal: FirstStep | None = None
        self._ignored: set[str] = set()  # what the module itself keeps from DDP
        self._bare: list[BareGroups] = []
        self._untied: list[Inherit] = []
        self._stash: Mapping[str, Any] | None = None
        self._workers: Workers | None = None
        self._moments: dict = {}
        self._holding = False
        self._inside_step = False
        self._ticks: Any = None

    # -- putting on -------------------------------------------------------------------------------------------------

    @property
    def merge_every(self) -> int:
        """T."""
        return self.settings.merge_every

    @property
    def workers_differ(self) -> bool:
        """Tell whether workers hold different weights between merges, heads aside."""
        return self.rest is not None and self.rest.apart

    @property
    def phase(self) -> str:
        """``lowrank`` while the model has heads, else ``full``."""
        return "full" if self.heads is None else "lowrank"

    def setup(self, trainer: pl.Trainer) -> None:
        """DDP's set-up, then the conversion, then the wrapper."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            for callback in trainer.callbacks:
                if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                    allowed = "pairs weights by position and would average the heads: remove it, or average the exports"
                    raise ConfigError("callbacks", type(callback).__name__, allowed)
            stash, self._stash = self._stash, None
            self._forget()
            self._stash = stash
            self._workers = self._make_workers()
            if not self.lightning_module.automatic_optimization:
                self._workers.hint = " (in manual optimization all workers must take equally many optimizer steps)"
            self._ignored = set(getattr(self.lightning_module, "_ddp_params_and_buffers_to_ignore", ()))
        if self.world_size == 1 and self._injects is None:
            # nothing to share out: a loader that Lightning cannot take apart runs
            connector = trainer._accelerator_connector
            self._injects, connector.use_distributed_sampler = connector.use_distributed_sampler, False
        self._holding = True
        super().setup(trainer)
        self._holding = False
        if not fitting:
            return
        same_weights(self.lightning_module, self._workers)
        if phase_callback(trainer) is None:
            transition.apply(trainer, self.lightning_module, self._convert_targets, replay=True)
        elif (self.rank, self.targets) != (16, "all"):
            raise ConfigError(
                "rank, targets", (self.rank, self.targets), "the phase callback's plan decides them: leave them out"
            )
        self.configure_ddp()
        scaler = getattr(self.precision_plugin, "scaler", None)
        if scaler is not None and self._workers.size > 1:
            share_overflow(scaler, self._workers.group)
        self.precision_plugin.clip_grad_by_norm = self._clip_grad_by_norm

    def _make_workers(self) -> Workers:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return Workers()
        if not hasattr(self, "_group"):
            self._group = make_group(self.merge_timeout)
        if self._patience is None:
            set_patience(timedelta(seconds=self.merge_timeout))
        return Workers(self._group, self.merge_timeout)

    # -- a step -----------------------------------------------------------------------------------------------------

    def process_dataloader(self, dataloader: Any) -> Any:
        """Training loaders must share the data out and end together."""
        trainer = self.lightning_module.trainer
        if not trainer.training or self._workers is None:
            return dataloader
        return shared_out(dataloader, self._workers.size)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """At an epoch's start: what a callback has unfrozen trains with the rest from here on, and is averaged with it."""
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx or self.rest is None or self._workers.size == 1 or not self.heads.worn:
            return
        if self.rehearsal is not None and self.rehearsal.waits:  # W itself takes gradients now
            return
        frozen = [leaf(layer) for layer in self.heads.layers.values()]
        if self.rest.follow({id(W) for W in frozen}):
            for W in frozen:  # unfrozen with all else; its heads are what trains
                W.requires_grad_(False)
            self.model = self.lightning_module
            self.configure_ddp()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the heads how large the batch is that they share."""
        if self.heads is None:
            return super().training_step(*args, **kwargs)
        shares = self.settings.heads > 1 and self.settings.mode == "parallel"
        self.heads.shared.batch = batch_size(args[0] if args else kwargs) if shares else 1
        watching = self.rehearsal is not None and self.rehearsal.waits
        with nullcontext() if self.rehearsal is None else self.rehearsal.forward():
            output = super().training_step(*args, **kwargs)
        if output is None and self._workers.size > 1 and self.lightning_module.automatic_optimization:
            # Lightning refuses it too, and names neither the worker nor a cure
            raise ConfigError(
                "training_step", None, f"is what worker {self._workers.rank} returned, and the others would wait for its "
                "gradients: leave such batches out in the loader, or return the loss times 0"
            )  # fmt: skip
        if self.heads.shared.seen is not None:
            unfit = self.heads.shared.check_seen(self.settings.heads if shares else 1, partial(families, self.lightning_module))
            if watching:
                self.rehearsal.unfit |= unfit
            elif unfit:
                name, reason = next(iter(unfit.items()))
                raise ConfigError("targets", name, reason)
        return output

    def post_backward(self, closure_loss: Tensor) -> None:
        """Forward passes outside a training step see W as it is."""
        super().post_backward(closure_loss)
        if self.rehearsal is not None and self.rehearsal.waits:
            self._rehearsed()
        if self.heads is not None and self.lightning_module.automatic_optimization:
            self.heads.shared.batch = None

    def after_transition(self) -> None:
        """With the heads comes their clock: it hangs on the optimizer itself, whoever calls its step."""
        super().after_transition()
        if self.heads is not None and self.heads.optimizers and self._ticks is None:
            with suppress(AttributeError):  # an optimizer that is none of torch's: Lightning's own call of its step remains
                self._ticks = self.heads.optimizers[0].register_step_post_hook(self._after_raw_step)

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        """The step, then the clock: it counts attempts, as Lightning does, so that a step skipped for fp16 is one."""
        self._inside_step = True
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._inside_step = False
        if self.heads is not None and self.heads.optimizers and optimizer is self.heads.optimizers[0]:
            self._tick()
        return output

    def _after_raw_step(self, *_: Any) -> None:
        """A step that did not come through Lightning (manual optimization with the raw optimizer)."""
        if not self._inside_step:
            self._tick()

    def _tick(self) -> None:
        """The clock goes on by an optimizer step, and what is due is merged."""
        heads, rehearsal = self.heads, self.rehearsal
        if rehearsal is not None and rehearsal.waits:  # this worker left its first batch out
            self._rehearsed()
        changed = heads.after_step()
        if changed and rehearsal is not None and rehearsal.watches:
            self._rehearsed()
        if self.settings.mode != "joint" and heads.clock % self.settings.merge_every == 0:
            self.rest.merge()
            if not self.rest.agrees():
                self._hash()
        if changed:
            if heads.merges == 1 and isinstance(heads, HeadSet):
                advice.name_unmoved_heads(heads, self.lightning_module)
            self._log()

    def _rehearsed(self) -> None:
        """Leave out, or refuse, targets that the first step showed to be none."""
        reasons = self.rehearsal.finish()
        if reasons:
            self._leave_out(reasons)

    def teardown(self) -> None:
        """Stop the clock, give the module back, and the process group its own patience."""
        if self._ticks is not None:
            self._ticks.remove()
            self._ticks = None
        if self._injects is not None:
            self.lightning_module.trainer._accelerator_connector.use_distributed_sampler = self._injects
            self._injects = None
        super().teardown()
        if self._patience is None and self._workers is not None and self._workers.size > 1 and dist.is_initialized():
            set_patience(self._timeout or default_pg_timeout)

    def _clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        module = self.lightning_module
        apart = [] if self.heads is None or not self.heads.left_out(module) else list(self.heads.factors().values())
        alone = [p for name, p in module.named_parameters() if name in self._ignored and p.grad is not None]
        owned = {id(p) for p in (*apart, *alone)}
        mine = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        own = [p for p in apart if id(p) in mine]
        clip_norms((p for n, p in mine.items() if n not in owned), own, clip_val, stacked=self.update == "lora")
        clip_norms([], [p for p in alone if id(p) in mine], clip_val, stacked=False)

    def _log(self) -> None:
        """A merge's cost, and a hash of what all workers hold alike behind it."""
        trainer, every = self.lightning_module.trainer, self.settings.merge_every
        # Lightning counts the steps it sees: none of a raw optimizer's
        step, often = max(trainer.global_step, self.heads.clock - 1), max(1, trainer.log_every_n_steps)
        # by the step alone, so that a resumed run logs at the same merges
        if step // often == (step - every) // often and self.heads.merges > 1:
            return
        metrics = self.metrics()
        if self._workers.size > 1 and self.settings.mode != "joint":
            metrics["lte/hash"] = float(self._hash())
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _hash(self) -> int:
        """A hash of what all workers hold alike at a merge; ends the run if they do not."""
        apart = head_names(self.lightning_module, self.heads.layers) | self._ignored
        if self.rest.apart and self.settings.overlap:  # the rest was averaged when the merge began, and has moved since
            apart |= set(self.rest.parameters)
        when = f"after the merge at step {self.lightning_module.trainer.global_step + 1}"
        return agreed_hash(self, self.lightning_module, when, apart, DRIFTED)

    def all_heads(self) -> Iterator[tuple[str, Tensor, dict[str, Tensor], tuple[Part, ...]]]:
        """Per layer its name, A (N, ΣR, D), B (N, O, R) per part, and the parts: over all workers, which must all call it."""
        if self.heads is None:
            return
        layers = self.heads.layers
        found = {key: value for key, value in record.of_layers(layers).items() if key[2][0] in "AB"}
        found = dict(zip(found, self.heads.workers.all_heads(list(found.values())), strict=True))
        for name, layer in layers.items():
            B = {part.name: found["layer", name, f"B.{part.name}"] for part in layer._parts}
            yield name, found["layer", name, "A"], B, layer._parts

    def metrics(self) -> dict[str, float]:
        """MiB that this worker sent for the last merge, for the rest in the same window, and milliseconds waited for it."""
        if self.heads is None:
            return {}
        sent, seconds = self.heads.last_cost
        return {
            "lte/merge_mib": sent / 2**20,
            "lte/rest_mib": self.rest.sent_per_window(self.settings.merge_every) / 2**20,
            "lte/merge_ms": 1000 * seconds,
        }

    # -- DDP --------------------------------------------------------------------------------------------------------

    def configure_ddp(self) -> None:
        """Wrap what is synchronised at every step; heads are left out of broadcasts and averages."""
        if self._holding:
            return
        module = self.lightning_module
        ignored = self._ignored | (set() if self.heads is None else self.heads.left_out(module))
        module._ddp_params_and_buffers_to_ignore = sorted(ignored)
        synced = [name for name, p in module.named_parameters() if p.requires_grad and name not in ignored]
        apart = self.heads is not None and self.settings.mode != "joint" and self.sync_rest == "merge"
        if not synced or apart or self._workers.size == 1:
            return  # DDP refuses a model without anything to reduce
        super().configure_ddp()
        settle_buckets(self.model)
