"""Take a run through phases: ``full`` -> (switch) -> ``joint`` -> (freeze) -> ``lowrank``.

The base class owns what every such callback needs, so that a new schedule takes twenty lines: handing the plan to its adopter,
plain checkpoints, resume as a replay, a second ``fit``. PreLoRA decides when to switch; ``LoRA`` switches at the start.

**Resume is a replay.** Lightning restores callbacks after weights, so a callback that injects on restore is too late. Here
the plain weights of the file (``plain_checkpoint``) load into the plain model, and ``configure_optimizers`` sees the plain
model. Then ``on_fit_start`` repeats switch and freeze through the same ``transition.apply`` and puts the exact values back,
before Lightning restores the optimizers.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lowrank_pretrain.checkpoints.format import FORMAT, SIDE, check_format
from lowrank_pretrain.core.agreement import agreed_hash
from lowrank_pretrain.core.buckets import settle_buckets
from lowrank_pretrain.core.checks import choice, whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lr_factor import Rewarm
from lowrank_pretrain.core.plan import Plan, fit_ranks
from lowrank_pretrain.core.protocols import Adopter, HasPhase
from lowrank_pretrain.core.targets import Target, first_named, say_left_out, select
from lowrank_pretrain.core.trainer import callbacks_of, move_before_foreign
from lowrank_pretrain.factorize.model import Factors
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.observe.monitor import count_parameters
from lowrank_pretrain.phases import adapter_groups, adoption, group_order, layers, plain_checkpoint, refusals, transition
from lowrank_pretrain.phases.adapter_watch import AdapterWatch, FlagWatch, GradientWatch, check_optimizers
from lowrank_pretrain.phases.first_step import FirstStep, look_at_validation
from lowrank_pretrain.phases.plain_checkpoint import Brought, Ended, Held

PATIENCE = 100  # optimizer steps without a gradient after which an adapter is reported dead, if there are no windows


class PhaseCallback(HasPhase, Callback):
    """Change the model in the middle of a fit: the base of callbacks that call ``switch`` and ``freeze``.

    At both all ranks compare their weights and log the hash that they agree on as ``lowrank/hash``. Averages that Lightning's
    ``WeightAveraging`` and ``StochasticWeightAveraging`` keep follow the change. A fit in spawned or forked processes
    (``ddp_spawn``, ``ddp_notebook``) hands back merged weights, but no attributes of its callbacks. There
    ``trainer.callback_metrics`` has ``lowrank/phase`` (0, 1, 2), ``lowrank/switch_step``, ``lowrank/freeze_step`` and
    ``lowrank/rank/<target>``.

    A subclass that writes ``on_train_start``, an ``on_..._batch_start`` or an ``on_before_...`` calls this class's too.

    Args:
        alpha: adapters' scale = alpha / rank; ``None``: scale 1.
        train_A: ``False`` trains B alone (LoRA-FA).
        freeze_rest: at the freeze, everything but what low-rank training updates stops too.
        optimizer_state: ``keep`` or ``reset`` the moments at both transitions.
        rewarm: optimizer steps after the freeze over which the learning rate ramps up to the schedule's value.
        adapter_lr: the adapters' learning rate over that of their base weight.
        adapter_weight_decay: the adapters' weight decay; ``None``: that of their base weight.
        then: ``lora``: the plan goes to the strategy or optimizer if one is an ``Adopter``, else to adapters;
            ``galore``: the optimizer must be one; ``factorize``: at the freeze, at least 8 steps after the switch, each W
            becomes a product U V of its rank.
        energy: with ``factorize``, instead of the plan's ranks: the share of each layer's output energy that must stay.
        flops: likewise: the share of the targets' FLOPs that the factors may take in all.
        recompute_inputs: layers with adapters make their input again in backward, where they can, in place of keeping it.
        frozen_dtype: at the freeze, store each frozen W in this type (``lora.frozen``) and multiply in it; ``None``: as it is.
        keep_original: with it: keep W itself in the host's memory, for merges and exports.

    Attributes:
        phase: ``full``, ``joint`` or ``lowrank``.
        plan: {target: rank} once switched, else ``None``.
        switch_step, freeze_step: optimizer steps after which switch and freeze came, or ``None``.

    Example:
        >>> class SwitchAt(PhaseCallback):
        ...     def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ...         if self.phase == "full" and trainer.global_step >= 100:
        ...             self.switch(trainer, pl_module, Plan({"layer": 8}))
        >>> SwitchAt(alpha=16.0).phase
        'full'
    """

    targets: str | list[str] | None = None  # of callbacks that choose their own
    ranks: list[int] | None = None  # likewise
    from_start = False  # whether the model changes before the first step

    def __init__(
        self,
        alpha: float | None = None,
        train_A: bool = True,
        freeze_rest: bool = False,
        optimizer_state: str = "keep",
        rewarm: int = 0,
        then: str = "lora",
        adapter_lr: float = 1.0,
        adapter_weight_decay: float | None = None,
        energy: float | None = None,
        flops: float | None = None,
        recompute_inputs: bool = False,
        frozen_dtype: str | None = None,
        keep_original: bool = False,
    ) -> None:
        refusals.check_adapter_settings(alpha, train_A, freeze_rest, adapter_lr, adapter_weight_decay, recompute_inputs)
        choice("optimizer_state", optimizer_state, ("keep", "reset"))
        whole("rewarm", rewarm, 0, "optimizer steps")
        choice("then", then, ("lora", "galore", "factorize"))
        self.energy, self.flops = refusals.check_rank_rule(then, energy, flops)
        self.frozen_dtype, self.keep_original = refusals.check_frozen_dtype(then, frozen_dtype, keep_original)
        self.alpha, self.train_A, self.freeze_rest, self.recompute_inputs = alpha, train_A, freeze_rest, recompute_inputs
        self.adapter_lr, self.adapter_weight_decay = adapter_lr, adapter_weight_decay
        self.optimizer_state, self.rewarm, self.then = optimizer_state, rewarm, then
        self._brought, self._restoring = Brought(), True
        self._ended: Ended | None = None
        self._rewarm: Rewarm | None = None
        self._diverged = False  # the module came with adapters that are NaN, and no file has replaced them
        self._reset()

    def _reset(self) -> None:
        """Go back to the start of a run."""
        self.phase = "full"
        self.plan: Plan | None = None
        self.switch_step: int | None = None
        self.freeze_step: int | None = None
        self.freeze_due = False  # the freeze was asked for before the adopter could do it
        self._adopter = Adopter()  # found when a fit starts
        self.chosen: dict[str, int] = {}  # target -> largest rank that it may get
        self.left_out: dict[str, str] = {}  # target -> what the first step said against it
        self._first: FirstStep | None = None
        self._over: FirstStep | None = None  # likewise, to be stopped
        self._unchecked = self._unmoved = False  # after a change: not yet seen that gradients reach, and steps move, all
        self._watch: GradientWatch | None = None
        self._moving: AdapterWatch | None = None
        self._validated = False  # a batch of this fit
        self._flags: FlagWatch | None = None
        self._said_dead: set[str] = set()  # layers of adapters that no gradient had reached

    # -- transitions ------------------------------------------------------------------------------------------------

    def switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: Plan) -> None:
        """Hand the plan to its adopter, the first of strategy, optimizer and adapters: full -> joint."""
        self._switch(trainer, pl_module, plan, replay=False)
        self.switch_step = trainer.global_step
        rank_zero_info(f"{type(self).__name__}: switch after step {self.switch_step}; targets by rank: {plan.summary()}")

    def freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop training the targets' full weights: joint -> lowrank. Set ``freeze_due`` if the adopter needs more steps."""
        self.freeze_due = trainer.global_step - (self.switch_step or 0) < self._adopter.joint_steps
        if self.freeze_due:
            return
        self._freeze(trainer, pl_module, replay=False)
        self.freeze_step = trainer.global_step
        said = "{trainable:,} of {total:,} still train".format_map(count_parameters(pl_module))
        rank_zero_info(f"{type(self).__name__}: freeze after step {self.freeze_step}; {said}")

    def _switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: Plan, replay: bool) -> None:
        note = transition.note_plain(pl_module)
        agreed = transition.apply(
            trainer, pl_module, lambda: self._adopter.adopt(plan, pl_module), self.optimizer_state, replay
        )
        if isinstance(self._adopter, Optimizer):
            transition.note_added(pl_module)
        if self.has_own_groups() and not isinstance(self._adopter, Factors):
            adapter_groups.separate(trainer, pl_module, self.adapter_lr, self.adapter_weight_decay)
        self._unmoved, self._moving = True, None
        self.phase, self.plan = "joint", plan
        self._look_at_gradients(not replay, changed=True)
        note.phase, note.plan, note.alpha = self.phase, dict(plan), self.alpha
        transition.log_hash(type(self).__name__, trainer, agreed, replay)

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule, replay: bool) -> None:
        freezes_rest = self.freeze_rest and not isinstance(self._adopter, (lora.Adapters, Factors))  # these do it themselves
        release = (lambda: adoption.release(self, pl_module)) if freezes_rest else self._adopter.release
        agreed = transition.apply(trainer, pl_module, release, self.optimizer_state, replay)
        self.phase = "lowrank"
        if isinstance(self._adopter, Factors):
            self.plan = adoption.settle_factors(self, self._adopter, trainer, pl_module, replay)
        self._look_at_gradients(not replay, changed=True)  # freezing may have cut a gradient's path
        note = transition.note_plain(pl_module)
        note.phase, note.keep_original = self.phase, self.keep_original
        note.frozen_dtype = self.frozen_dtype if isinstance(self._adopter, lora.Adapters) else None  # heads keep W as it is
        transition.log_hash(type(self).__name__, trainer, agreed, replay)
        if self.rewarm:  # from here on, so that its hook always comes after that of the adapters' own groups
            self._rewarm = Rewarm(trainer, self, self.rewarm)

    def _look_at_gradients(self, on: bool, changed: bool = False) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._unchecked, self._watch = on, None
        self._flags = None if changed else self._flags

    # -- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work; before a fit, make a module plain that still has adapters."""
        if stage != "fit":
            if self.phase != "full" and layers.has_changed(pl_module):  # a fit was interrupted: any file may follow
                self._make_plain(trainer, pl_module)
            return
        refusals.check_run(self, trainer, pl_module)
        move_before_foreign(trainer, self)
        ended, self._ended = self._ended, None
        if ended is not None and ended.model.module() is not pl_module:
            ended = None
        left = transition.note_of_changed(pl_module)
        note = left if ended is None else ended.note
        self._brought, self._diverged = Brought(), False
        if self.phase != "full" and note is not None and note.plan == dict(self.plan or {}):  # the fit continues
            self._brought.exact = lora.clone_state(layers.exact_state(pl_module) if ended is None else ended.model.exact())
        else:
            self._reset()
        if left is not None:  # a fit that was interrupted left it so, or an optimizer that took the plan
            # a file may be about to replace the weights, which Lightning does not say yet: `on_fit_start` knows
            self._diverged = not layers.is_finite(pl_module)
            plain_checkpoint.restore_plain(pl_module, check=False)
            transition.restart_averages(callbacks_of(trainer), pl_module)  # those set up before us copied the adapters too
        plain_checkpoint.forget_held(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replay the transitions of a resumed run; the optimizers are still empty and are restored after this."""
        refusals.check_finite(self._diverged)
        self._adopter, self._validated = adoption.find_adopter(self, trainer), False
        if self.phase == "full":
            self.choose_targets(trainer, pl_module)
        adoption.check_adopter(self, self._adopter, pl_module)
        check_optimizers(trainer.optimizers, self.adapter_lr, self.rewarm)
        brought, self._brought = self._brought, Brought()
        refusals.check_settings(self, brought.settings, pl_module)
        if self.phase != "full":
            self._replay(trainer, pl_module, brought)
        group_order.check_same(brought.groups, trainer, pl_module)
        settle_buckets(trainer.strategy.model)

    def _replay(self, trainer: pl.Trainer, pl_module: pl.LightningModule, brought: Brought) -> None:
        """Repeat switch and freeze, then restore the exact values."""
        refusals.check_order(self, trainer, resumed=True)
        phase, unchecked = self.phase, self._unchecked
        self._switch(trainer, pl_module, self.plan or Plan({}), replay=True)
        if phase == "lowrank":
            self._freeze(trainer, pl_module, replay=True)
        self._unchecked = unchecked
        plain_checkpoint.load_brought(brought, pl_module, callbacks_of(trainer), self._adopter)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the restored optimizer states fit, and that every rank read the same file."""
        group_order.check_restored(trainer.optimizers, pl_module)
        for key in ("switch_step", "freeze_step"):  # a fit may continue under a new trainer, which counts steps from 0
            setattr(self, key, None if getattr(self, key) is None else min(getattr(self, key), trainer.global_step))
        if self._first is not None:
            self._first.start()
        if not (isinstance(trainer.strategy, Adopter) and trainer.strategy.compares_ranks):
            agreed_hash(trainer.strategy, pl_module, "at the start of training")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to watch the adapters after a transition; freeze again what was turned on."""
        if self.phase != "full" and isinstance(self._adopter, (lora.Adapters, Factors)):
            self._flags = self._flags or FlagWatch(pl_module, transition.note_plain(pl_module).frozen)
            self._flags.freeze_again(type(self).__name__)
        if self._unchecked and self._watch is None:
            self._watch = GradientWatch(pl_module)
        if self._unmoved and self._moving is None:
            self._moving = AdapterWatch(pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the first batch of validation of a fit, also one before training begins."""
        if not self._validated:
            adapted = self.plan if isinstance(self._adopter, lora.Adapters) else None
            self._validated = look_at_validation(self._first, pl_module, adapted, type(self).__name__)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Name the layers if nothing that trains reaches the loss after a transition."""
        if self._watch is not None:
            self._watch.check_loss(loss)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Evaluate the rehearsal; after a transition, check that gradients reach the adapters and steps move them."""
        if self._first is not None:
            reasons = self._first.look()
            if reasons:
                self.leave_out(trainer, pl_module, reasons, refuse=self._first.early)
            if self._first.over:
                self._first.stop()
                self._first = None
        if self._moving is not None:
            self._moving.before_step(optimizer)
            if self._moving.over:
                self._unmoved, self._moving = False, None
        how = (type(self).__name__, self.patience(trainer), self._said_dead, self.from_start)
        if self._watch is not None and self._watch.judge(*how):
            self._look_at_gradients(False)

    def choose_targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the targets, for callbacks that have some. Called when a fit starts in the full phase."""

    def leave_out(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, reasons: Mapping[str, str], refuse: bool = True
    ) -> None:
        """Remove targets from those chosen, with one warning.

        Args:
            trainer: the running trainer.
            pl_module: its module.
            reasons: why, by name of the target.
            refuse: refuse targets that the patterns name; after the first step this would end a trained run.

        Raises:
            ConfigError: the patterns name one of them, or none is left; not without ``refuse``.
        """
        reasons = {name: reason for name, reason in reasons.items() if name in self.chosen}
        if not reasons:
            return
        patterns = self.targets or []
        if (named := first_named(pl_module, patterns, reasons) if refuse else None) is not None:
            raise ConfigError("targets", named, reasons[named])
        said = say_left_out(pl_module, patterns, reasons)
        if len(reasons) == len(self.chosen) and refuse:
            raise ConfigError("targets", self.targets, f"leaves no target: {said.partition(': ')[2]}")
        self.left_out = self.left_out | reasons
        self.chosen = {name: rank for name, rank in self.chosen.items() if name not in reasons}
        none_left = "" if self.chosen else ". None is left: the run stays in phase full"
        rank_zero_warn(f"{type(self).__name__}: {said}{none_left}")

    def _select(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rank: int, key: str, frozen: bool = False
    ) -> dict[str, Target]:
        """Resolve ``self.targets`` once the fit is set up, and note what may be chosen."""
        patterns = self.targets or []
        selection = select(pl_module, patterns, frozen, adoption.unfit(self, trainer, pl_module, frozen))
        if selection.left_out:
            rank_zero_warn(f"{type(self).__name__}: {say_left_out(pl_module, patterns, selection.left_out)}")
        targets = {name: target for name, target in selection.targets.items() if name not in self.left_out}
        self.chosen, cut = fit_ranks(pl_module, patterns, targets, rank, key)
        if cut is not None:
            rank_zero_warn(f"{type(self).__name__}: {cut}, which is min(D, O)")
        refusals.check_targets(self, trainer, pl_module, targets)
        return targets

    def patience(self, trainer: pl.Trainer) -> int:
        """Return the number of optimizer steps without a gradient after which an adapter counts as dead."""
        return PATIENCE

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the outcome to the metrics: Lightning returns nothing else of a callback from spawned processes."""
        if self._moving is not None and trainer.optimizers:
            self._moving.after_step(trainer.optimizers[0])
        trainer.callback_metrics.update(adoption.outcome(self))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make the module plain again."""
        if stage == "fit":
            self._stop_watching()
            if self._rewarm is not None:
                self._rewarm.remove()
                self._rewarm = None
            self._make_plain(trainer, pl_module)

    def _make_plain(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the module plain; keep what ``trainer.save_checkpoint`` and a second fit need for an exact resume."""
        note = transition.note_of_changed(pl_module)
        if note is None or not layers.has_changed(pl_module):  # strategy or optimizer took the plan, or none is there yet
            transition.restore_flags(pl_module)
            return
        groups = group_order.group_names(trainer.optimizers, pl_module)
        averages = {where: Held(averaged, pl_module) for where, averaged, _ in transition.averages(callbacks_of(trainer))}
        self._ended = Ended(Held(pl_module), averages, note, groups)
        plain_checkpoint.restore_plain(pl_module)
        self._ended.model.show()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ended": None}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching: no hook may stay on the module."""
        adoption.explain(self, exception)
        self._stop_watching()

    def _stop_watching(self) -> None:
        for watching in (self._first, self._over, self._watch):
            if watching is not None:
                watching.stop()
        self._first = self._over = self._watch = self._flags = None

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return plain types only, so that ``weights_only=True`` loads them."""
        return {
            "phase": self.phase,
            "plan": None if self.plan is None else dict(self.plan),
            "switch_step": self.switch_step,
            "freeze_step": self.freeze_step,
            "unchecked": self._unchecked,
            "freeze_due": self.freeze_due,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the phase of a checkpoint, unless Lightning only tests with its weights."""
        if not self._restoring:
            return
        self.phase = state_dict["phase"]
        self.plan = None if state_dict["plan"] is None else Plan(state_dict["plan"])
        self.switch_step, self.freeze_step = state_dict["switch_step"], state_dict["freeze_step"]
        self._unchecked, self.freeze_due = state_dict["unchecked"], state_dict.get("freeze_due", False)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the side entry: what an exact resume needs next to the plain model.

        The optimizers' parameters are noted by name, because their states are stored by position.
        """
        side, ended = checkpoint.setdefault(SIDE, {}), self._ended
        side["settings"] = refusals.settings_of(self)
        if ended is not None and ended.model.module() is pl_module:
            side |= {"format": FORMAT, **ended.note.entry(), "groups": ended.groups, "exact": ended.model.exact()}
            side["averages"] = {where: averaged.exact() for where, averaged in ended.averages.items()}
            return
        side["groups"] = group_order.group_names(trainer.optimizers, pl_module)
        note = transition.note_of_changed(pl_module)
        if note is not None:
            self._adopter.before_checkpoint()
            exact = plain_checkpoint.exact_values(pl_module)
            if self._adopter is trainer.strategy:  # its workers may hold their own values: those of the file count
                exact |= {name: checkpoint["state_dict"][name] for name in exact if name in note.tied}
            averages = {
                where: plain_checkpoint.exact_values(averaged, pl_module)
                for where, averaged, _ in transition.averages(callbacks_of(trainer))
            }
            side |= {"format": FORMAT, **note.entry(), "exact": exact, "averages": averages}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the side entry for the replay; a test with a file from another phase must not touch this run's state."""
        self._restoring = trainer.state.fn == TrainerFn.FITTING
        if not self._restoring:
            return
        side = checkpoint.get(SIDE, {})
        check_format(side, trainer.ckpt_path)
        if side.get("alpha", self.alpha) != self.alpha:
            raise ConfigError("alpha", self.alpha, f"the checkpoint's adapters were trained with {side['alpha']}")
        self._brought = Brought(side.get("exact"), side.get("averages", {}), side.get("groups"), side.get("settings", {}))
        self._diverged = False
        if plain_checkpoint.is_of_now(pl_module, side):  # restored in mid-fit, as by Lightning's LearningRateFinder: no replay
            plain_checkpoint.load_brought(self._brought, pl_module, callbacks_of(trainer), self._adopter)
            self._brought = Brought()

    def has_own_groups(self) -> bool:
        """Return whether adapters have their own learning rate or weight decay."""
        return self.adapter_lr != 1.0 or self.adapter_weight_decay is not None or self.then == "factorize"
