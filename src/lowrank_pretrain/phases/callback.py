"""A callback whose run goes through phases: ``full`` -> (switch) -> ``joint`` -> (freeze) -> ``lowrank``.

It owns what every such callback needs, so that a schedule of one's own is twenty lines: handing the plan to whoever takes
it, plain checkpoints, resume as a replay, a second ``fit``. PreLoRA decides when to switch; ``LoRA`` switches at the start.

**Resume is a replay.** Lightning restores callbacks after weights, so a callback that injects on restore is too late. Here
the plain weights of the file (``plain_checkpoint``) load into the plain model, ``configure_optimizers`` sees the plain model,
then ``on_fit_start`` repeats switch and freeze through the same ``transition.apply`` and puts the exact values back, before
Lightning restores the optimizers.
"""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lowrank_pretrain.core.agreement import agreed_hash
from lowrank_pretrain.core.buckets import settle_buckets
from lowrank_pretrain.core.checks import number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lr_factor import Rewarm
from lowrank_pretrain.core.plan import Plan, fit_ranks
from lowrank_pretrain.core.protocols import PHASES, Adopter, HasPhase
from lowrank_pretrain.core.targets import Target, families, find_targets, first_named, say_left_out, select
from lowrank_pretrain.factorize.model import Factors
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.observe.monitor import count_parameters
from lowrank_pretrain.phases import adapter_groups, adoption, averaging, layers, plain_checkpoint, refusals, transition
from lowrank_pretrain.phases.adapter_watch import AdapterWatch, check_optimizers
from lowrank_pretrain.phases.first_step import FirstStep
from lowrank_pretrain.phases.plain_checkpoint import FORMAT, SIDE
from lowrank_pretrain.phases.rehearsal import GradientWatch

PATIENCE = 100  # optimizer steps without a gradient after which an adapter is said to be dead, where there are no windows


class PhaseCallback(HasPhase, Callback):
    """Base of callbacks that change the model in the middle of a fit. Subclasses call ``switch`` and ``freeze``.

    At both all ranks compare their weights and log the hash that they agree on as ``lowrank/hash``. Averages that Lightning's
    ``WeightAveraging`` and ``StochasticWeightAveraging`` keep follow the change (``averaging``). A fit in spawned or forked
    processes (``ddp_spawn``, ``ddp_notebook``) hands back merged weights; as with every callback, the attributes stay behind
    there; ``trainer.callback_metrics`` has ``lowrank/phase`` (0, 1, 2), ``lowrank/switch_step``, ``lowrank/freeze_step`` and
    ``lowrank/rank/<target>``.

    Args:
        alpha: adapters' scale = alpha / rank; ``None``: scale 1.
        train_A: ``False`` trains B alone (LoRA-FA).
        freeze_rest: at the freeze, everything but what low-rank training updates stops too.
        optimizer_state: ``keep`` or ``reset`` the moments at both transitions.
        rewarm: optimizer steps after the freeze over which the learning rate ramps up to the schedule's value.
        adapter_lr: the adapters' learning rate over that of their base weight.
        adapter_weight_decay: the adapters' weight decay; ``None``: that of their base weight.
        then: ``lora``: the plan goes to the strategy or optimizer if one offers ``adopt``, else to adapters;
            ``galore``: the optimizer must offer it; ``factorize``: at the switch the inputs of the targets begin to be
            measured, and at the freeze (at least 8 steps later) each W becomes a product U V of its rank and is dropped.
        energy: with ``then="factorize"``: the share of each layer's output energy that its rank must keep, in place of the
            plan's ranks.
        flops: likewise: the share of the targets' FLOPs that the factors may take in all.

    Attributes:
        phase: ``full``, ``joint`` or ``lowrank``.
        plan: {target: rank} once switched, else ``None``.
        switch_step: optimizer step after which the switch came, or ``None``.
        freeze_step: likewise for the freeze.
    """

    targets: str | list[str] | None = None  # of callbacks that choose their own
    ranks: list[int] | None = None  # likewise

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
    ) -> None:
        if alpha is not None and (not _is_number(alpha) or alpha <= 0):
            raise ConfigError("alpha", alpha, "must be a number above 0, or null for alpha = rank")
        for key, value in (("train_A", train_A), ("freeze_rest", freeze_rest)):
            if not isinstance(value, bool):
                raise ConfigError(key, value, "must be true or false")
        if optimizer_state not in ("keep", "reset"):
            raise ConfigError("optimizer_state", optimizer_state, "must be keep or reset")
        if not isinstance(rewarm, int) or isinstance(rewarm, bool) or rewarm < 0:
            raise ConfigError("rewarm", rewarm, "must be 0 or more optimizer steps")
        if then not in ("lora", "galore", "factorize"):
            raise ConfigError("then", then, "must be lora, galore or factorize")
        for key, value in (("energy", energy), ("flops", flops)):
            if value is not None:
                number(key, value, above=0, below=1, allowed="must be a fraction above 0 and below 1, or null")
                if then != "factorize":
                    raise ConfigError(key, value, 'is for then="factorize": leave it out')
        if energy is not None and flops is not None:
            raise ConfigError("flops", flops, f"and energy={energy} both decide the ranks: give one of them")
        self.energy, self.flops = energy, flops
        if not _is_number(adapter_lr) or adapter_lr <= 0:
            raise ConfigError("adapter_lr", adapter_lr, "must be a number above 0, times the base weight's learning rate")
        if adapter_weight_decay is not None and (not _is_number(adapter_weight_decay) or adapter_weight_decay < 0):
            raise ConfigError("adapter_weight_decay", adapter_weight_decay, "must be a number of 0 or more, or null")
        self.adapter_lr, self.adapter_weight_decay = adapter_lr, adapter_weight_decay
        self.alpha, self.train_A, self.freeze_rest = alpha, train_A, freeze_rest
        self.optimizer_state, self.rewarm, self.then = optimizer_state, rewarm, then
        self._exact: dict[str, torch.Tensor] | None = None
        self._averages: dict[str, dict[str, torch.Tensor]] = {}
        self._groups: list | None = None
        self._noted_settings: dict[str, Any] = {}  # of a checkpoint that is being resumed
        self._restoring = True
        self._rewarm: Rewarm | None = None
        self._diverged = False  # the module came with adapters that are NaN, and no file has replaced them
        self._held: dict[str, Any] | None = None  # behind a fit: its adapters, which the module no longer has
        self._reset()

    def _reset(self) -> None:
        """Back to the start of a run."""
        self.phase = "full"
        self.plan: Plan | None = None
        self.switch_step: int | None = None
        self.freeze_step: int | None = None
        self.freeze_due = False  # the freeze was asked for before the adopter could do it
        self._unchecked = False  # whether a gradient reaches every adapter is still looked at
        self._adopter: Any = None
        self.chosen: dict[str, int] = {}  # target -> largest rank that it may get
        self.left_out: dict[str, str] = {}  # target -> what the first step said against it
        self._said_dead: set[str] = set()  # layers of adapters that no gradient had reached
        self._first: FirstStep | None = None
        self._watch: GradientWatch | None = None
        self._moving: AdapterWatch | None = None  # adapters that no step has moved yet

    # -- transitions ------------------------------------------------------------------------------------------------

    def switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: Plan) -> None:
        """Full -> joint: hand the plan to the first of strategy, optimizer and adapters that takes it.

        Raises:
            ConfigError: ``then="galore"`` without an optimizer that offers ``adopt``.
        """
        self._switch(trainer, pl_module, plan, replay=False)
        self.switch_step = trainer.global_step
        rank_zero_info(f"{type(self).__name__}: switch after step {self.switch_step}; targets by rank: {plan.summary()}")

    def freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Joint -> lowrank: the targets' full weights stop training.

        Where the adopter needs some steps in the joint phase first (``Adopter.joint_steps``) nothing happens yet and
        ``freeze_due`` is true: call it again after a later step.
        """
        if trainer.global_step - (self.switch_step or 0) < self._adopter.joint_steps:
            self.freeze_due = True
            return
        self.freeze_due = False
        self._freeze(trainer, pl_module, replay=False)
        self.freeze_step = trainer.global_step
        counts = count_parameters(pl_module)
        said = f"{counts['trainable']:,} of {counts['total']:,} still train"
        rank_zero_info(f"{type(self).__name__}: freeze after step {self.freeze_step}; {said}")

    def _switch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, plan: Plan, replay: bool) -> None:
        plain_checkpoint.note_plain(pl_module)
        self._adopter = adoption.find_adopter(self, trainer)
        agreed = transition.apply(
            trainer, pl_module, lambda: self._adopter.adopt(plan, pl_module), self.optimizer_state, replay
        )
        if isinstance(self._adopter, Optimizer):
            plain_checkpoint.note_added(pl_module)
        if self.has_own_groups() and not isinstance(self._adopter, Factors):
            adapter_groups.separate(trainer, pl_module, self.adapter_lr, self.adapter_weight_decay)
        self._moving = AdapterWatch(pl_module)
        self.phase, self.plan = "joint", plan
        self._look_at_gradients(pl_module, not replay)
        self._note(pl_module)
        self._log_hash(trainer, agreed, replay)

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule, replay: bool) -> None:
        if isinstance(self._adopter, Factors) and replay:
            self._adopter.exact = self._exact
        agreed = transition.apply(trainer, pl_module, lambda: self._release(pl_module), self.optimizer_state, replay)
        self.phase = "lowrank"
        if isinstance(self._adopter, Factors):
            self._own_factors(trainer, pl_module, self._adopter, replay)
        self._look_at_gradients(pl_module, not replay)  # what freezing stopped may be what a gradient came through
        self._note(pl_module)
        self._log_hash(trainer, agreed, replay)
        if self.rewarm:  # from here on, so that its hook always comes behind that of the adapters' own groups
            self._rewarm = Rewarm(trainer, self, self.rewarm)

    def _own_factors(self, trainer: pl.Trainer, pl_module: pl.LightningModule, factors: Factors, replay: bool) -> None:
        """Note which ranks there are, and give the factors groups of their own.

        Both factors decay, and at ``adapter_lr`` times the rate: with this share of W's decay U V decays just as W did.
        """
        self.plan = factors.plan
        adapter_groups.separate(trainer, pl_module, self.adapter_lr, self.adapter_weight_decay, 0.5 / self.adapter_lr)
        if not replay:
            self._log(trainer, {f"lowrank/rank/{name}": float(rank) for name, rank in self.plan.items()})
            self._log(trainer, {"lowrank/kept_energy": min(factors.kept.values())})

    def _release(self, pl_module: pl.LightningModule) -> Any:
        inherited = self._adopter.release()
        if self.freeze_rest and not isinstance(self._adopter, (lora.Adapters, Factors)):
            adoption.freeze_rest(pl_module, self.plan)
        return inherited

    def _look_at_gradients(self, pl_module: pl.LightningModule, on: bool) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._unchecked = on
        self._watch = GradientWatch(pl_module) if on else None

    def _note(self, pl_module: pl.LightningModule) -> None:
        """What a checkpoint of this module must say; kept on the module because it outlives callback and trainer."""
        pl_module.__dict__["_lowrank"] = {"phase": self.phase, "plan": dict(self.plan or {}), "alpha": self.alpha}

    def _log_hash(self, trainer: pl.Trainer, agreed: int, replay: bool) -> None:
        if not replay:
            self._log(trainer, {"lowrank/hash": float(agreed)})
            where = f", the same on all {trainer.world_size} processes" if trainer.world_size > 1 else ""
            rank_zero_info(f"{type(self).__name__}: hash of the weights {agreed:08x}{where}")

    @staticmethod
    def _log(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            # the row of the step just taken; Lightning counts rows from 0
            logger.log_metrics(metrics, step=max(trainer.global_step - 1, 0))

    # -- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work; before a fit, give a module that still has adapters its bare form back."""
        if stage != "fit":
            return
        refusals.check_run(self, trainer, pl_module)
        self._groups = None
        held, self._held = self._held, None
        known = held is not None and held["model"].module() is pl_module
        plan = held["note"]["plan"] if known else pl_module.__dict__.get("_lowrank", {}).get("plan")
        continues = self.phase != "full" and plan is not None and plan == dict(self.plan or {})
        self._exact, self._diverged = None, False
        if continues:
            self._exact = lora.clone_state(held["model"].exact() if known else layers.exact_state(pl_module))
        else:
            self._reset()
        if "_lowrank" in pl_module.__dict__:  # a fit that was interrupted left it so, or an optimizer that took the plan
            # a file may be about to replace the weights, which Lightning does not say yet: `on_fit_start` knows
            self._diverged = not layers.is_finite(pl_module)
            plain_checkpoint.restore_plain(pl_module, check=False)
            averaging.restart(trainer.callbacks, pl_module)  # those set up before us copied the adapters too
        plain_checkpoint.forget_held(pl_module)
        self._averages = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replay the transitions of a resumed run; the optimizers are still empty and are restored after this."""
        if self._diverged:
            raise ValueError(
                "the module's adapters held numbers that are not finite when its last fit ended: give a good file as "
                "ckpt_path, or load good weights first"
            )
        if self.phase == "full":
            self.choose_targets(trainer, pl_module)
        adoption.check_adopter(self, trainer, pl_module)
        check_optimizers(trainer.optimizers)
        if self._noted_settings:
            self._check_settings(self._noted_settings, pl_module)
            self._noted_settings = {}
        if self.phase != "full":
            phase, plan, unchecked = self.phase, self.plan, self._unchecked
            self._switch(trainer, pl_module, plan, replay=True)
            if phase == "lowrank":
                self._freeze(trainer, pl_module, replay=True)
            self._unchecked = unchecked  # the watch itself begins with the first step
            if self._exact is not None:
                layers.load_exact(pl_module, self._exact)
            for where, averaged, callback in averaging.averages(trainer.callbacks):
                if where in self._averages:
                    layers.load_exact(averaged, self._averages[where])
                elif self._exact is not None:
                    averaging.restart([callback], pl_module)
            self._exact, self._averages = None, {}
        if self._groups is not None and self._groups != transition.group_names(trainer.optimizers, pl_module):
            held = "its optimizer groups hold other parameters, or another order"
            raise ConfigError("ckpt_path", str(trainer.ckpt_path), held)
        settle_buckets(trainer.strategy.model)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Optimizer states are restored by now: look whether they fit, and whether every rank read the same file."""
        transition.check_restored(trainer.optimizers, pl_module)
        # a fit that goes on with a changed module under another trainer: that one counts its steps anew
        for key in ("switch_step", "freeze_step"):
            step = getattr(self, key)
            setattr(self, key, None if step is None else min(step, trainer.global_step))
        if self._unchecked and self._watch is None:
            self._look_at_gradients(pl_module, True)
        if self._first is not None:
            self._first.start()
        if not (isinstance(trainer.strategy, Adopter) and trainer.strategy.compares_ranks):
            agreed_hash(trainer.strategy, pl_module, "at the start of training")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Ask the rehearsal once; after a transition, look whether gradients reach the adapters, and steps move them."""
        if self._first is not None:
            reasons = self._first.look()
            if reasons:
                self.leave_out(trainer, pl_module, reasons)
        if self._moving is not None:
            self._moving.before_step(optimizer)
            if self._moving.over:
                self._moving = None
        if self._watch is not None:
            self._look_for_dead(trainer, pl_module, self._watch)

    def choose_targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """At the start of a fit in the full phase, with all layers and optimizers there; for callbacks that have targets."""

    def leave_out(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, reasons: Mapping[str, str], refuse: bool = True
    ) -> None:
        """Take targets out of those chosen, with one warning.

        Args:
            trainer: the running trainer.
            pl_module: its module.
            reasons: why, by name of the target.
            refuse: where the patterns name one of them; later than the first step that would end a run which has trained.

        Raises:
            ConfigError: the patterns name one of them, or none is left.
        """
        reasons = {name: reason for name, reason in reasons.items() if name in self.chosen}
        named = first_named(pl_module, self.targets, reasons) if refuse else None
        if named is not None:
            raise ConfigError("targets", named, reasons[named])
        said = say_left_out(pl_module, self.targets, reasons)
        if len(reasons) == len(self.chosen):
            raise ConfigError("targets", self.targets, f"leaves no target: {said.partition(': ')[2]}")
        self.left_out = self.left_out | reasons
        self.chosen = {name: rank for name, rank in self.chosen.items() if name not in reasons}
        rank_zero_warn(f"{type(self).__name__}: {said}")

    def _select(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rank: int, key: str, frozen: bool = False
    ) -> dict[str, Target]:
        """Resolve ``self.targets`` when all that a fit needs is there, and note what may be chosen."""
        factored = pl_module if self.then == "factorize" else None
        selection = select(pl_module, self.targets, frozen, adoption.unfit(trainer, factored))
        if selection.left_out:
            rank_zero_warn(f"{type(self).__name__}: {say_left_out(pl_module, self.targets, selection.left_out)}")
        targets = {name: target for name, target in selection.targets.items() if name not in self.left_out}
        self.chosen, cut = fit_ranks(pl_module, self.targets, targets, rank, key)
        if cut is not None:
            rank_zero_warn(f"{type(self).__name__}: {cut}, which is min(D, O)")
        refusals.check_targets(self, trainer, pl_module, targets)
        return targets

    def patience(self, trainer: pl.Trainer) -> int:
        """How many optimizer steps without a gradient it takes to call an adapter dead."""
        return PATIENCE

    def _look_for_dead(self, trainer: pl.Trainer, pl_module: pl.LightningModule, watch: GradientWatch) -> None:
        cut_off = watch.look()
        if cut_off:
            raise ConfigError(
                "targets", ", ".join(sorted(cut_off)), "checkpointing of activations cuts it off from the loss: its input "
                "needs no gradient once everything before it is frozen (use_reentrant=False)"
            )  # fmt: skip
        if watch.without and watch.steps < self.patience(trainer):
            return
        self._look_at_gradients(pl_module, False)
        if set(watch.layers()) - self._said_dead:
            self._said_dead |= set(watch.layers())
            family = ", ".join(dict.fromkeys(families(pl_module, watch.layers()).values()))
            steps = f"in the {watch.steps} optimizer steps since the model changed"
            if len(watch.without) == watch.every:
                raise ConfigError("targets", family, f"no adapter had a gradient {steps}: does the loss depend on them?")
            rank_zero_warn(
                f"{type(self).__name__}: no gradient {steps} reached the adapters of {family}: they train only if later steps "
                'use them. If none does, leave them out ("!name")'
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where processes are spawned, this callback stays behind in its own; metrics are what Lightning brings back."""
        if self._moving is not None and trainer.optimizers:
            self._moving.after_step(trainer.optimizers[0])
        found = {"phase": PHASES.index(self.phase), "switch_step": self.switch_step, "freeze_step": self.freeze_step}
        found |= {f"rank/{name}": rank for name, rank in (self.plan or {}).items()}
        trainer.callback_metrics.update({f"lowrank/{k}": torch.tensor(float(v)) for k, v in found.items() if v is not None})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing of ours on a module that needs nothing of ours."""
        if stage == "fit":
            self._stop_watching()
            if self._rewarm is not None:
                self._rewarm.remove()
                self._rewarm = None
            self._take_off(trainer, pl_module)

    def _take_off(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the module plain; keep what ``trainer.save_checkpoint`` and a second fit need for going on exactly."""
        if "_lowrank" not in pl_module.__dict__:
            return
        if not layers.has_changed(pl_module):  # strategy or optimizer took the plan
            plain_checkpoint.restore_flags(pl_module)
            return
        self._held = {
            "note": pl_module.__dict__["_lowrank"],
            "groups": transition.group_names(trainer.optimizers, pl_module),
            "averages": {
                where: plain_checkpoint.Held(averaged, pl_module)
                for where, averaged, _ in averaging.averages(trainer.callbacks)
            },
            "model": plain_checkpoint.Held(pl_module),
        }
        plain_checkpoint.restore_plain(pl_module)
        self._held["model"].show()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Nothing of the first step's watching may stay on the module."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        for watching in (self._first, self._watch):
            if watching is not None:
                watching.stop()
        self._first = self._watch = None

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that ``weights_only=True`` loads it."""
        return {
            "phase": self.phase,
            "plan": None if self.plan is None else dict(self.plan),
            "switch_step": self.switch_step,
            "freeze_step": self.freeze_step,
            "unchecked": self._unchecked,
            "freeze_due": self.freeze_due,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the phase of a checkpoint, unless Lightning only tests with its weights."""
        if not self._restoring:
            return
        self.phase = state_dict["phase"]
        self.plan = None if state_dict["plan"] is None else Plan(state_dict["plan"])
        self.switch_step, self.freeze_step = state_dict["switch_step"], state_dict["freeze_step"]
        self._unchecked = state_dict["unchecked"]
        self.freeze_due = state_dict.get("freeze_due", False)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the side entry: what an exact resume needs beside the plain model.

        The optimizers' parameters are noted by name, for their states are stored by position.
        """
        side, held = checkpoint.setdefault(SIDE, {}), self._held
        side["settings"] = self._settings()
        if held is not None and held["model"].module() is pl_module:
            side |= {"format": FORMAT, **held["note"], "groups": held["groups"], "exact": held["model"].exact()}
            side["averages"] = {where: averaged.exact() for where, averaged in held["averages"].items()}
            return
        side["groups"] = transition.group_names(trainer.optimizers, pl_module)
        note = pl_module.__dict__.get("_lowrank")
        if note is not None:
            exact = plain_checkpoint.exact_values(pl_module)
            if self._adopter is trainer.strategy:  # its workers may hold values of their own: those of the file count
                exact |= {name: checkpoint["state_dict"][name] for name in exact if name in pl_module.__dict__["_lowrank_tied"]}
            averages = {
                where: plain_checkpoint.exact_values(averaged, pl_module)
                for where, averaged, _ in averaging.averages(trainer.callbacks)
            }
            side |= {"format": FORMAT, **note, "exact": exact, "averages": averages}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the side entry for the replay. Testing with a file from another phase must not touch this run's state."""
        self._restoring = trainer.state.fn == TrainerFn.FITTING
        if not self._restoring:
            return
        side = checkpoint.get(SIDE, {})
        if side.get("format", FORMAT) > FORMAT:
            raise ConfigError("ckpt_path", str(trainer.ckpt_path), f"has format {side['format']}, we read {FORMAT}")
        if side.get("alpha", self.alpha) != self.alpha:
            raise ConfigError("alpha", self.alpha, f"the checkpoint's adapters were trained with {side['alpha']}")
        self._exact = side.get("exact")
        self._diverged = False
        self._averages = side.get("averages", {})
        self._groups = side.get("groups")
        self._noted_settings = side.get("settings", {})

    def _settings(self) -> dict[str, Any]:
        """Arguments that a resumed run must have again, as plain types."""
        names = ["train_A", "adapter_lr", "adapter_weight_decay", "freeze_rest", "targets", "ranks"]
        names += ["then", "energy", "flops"] if self.then == "factorize" else []
        found = {name: getattr(self, name) for name in names}
        found = {name: value for name, value in found.items() if name not in ("targets", "ranks") or value is not None}
        return {name: [*value] if isinstance(value, tuple) else value for name, value in found.items()}

    def _check_settings(self, noted: Mapping[str, Any], pl_module: pl.LightningModule) -> None:
        """Compare the arguments with those of the run that the checkpoint is of. Before its switch all but targets may change.

        Raises:
            ConfigError: naming each that differs.
        """
        bound = {"full": ("targets",), "joint": [name for name in noted if name != "freeze_rest"]}.get(self.phase, list(noted))
        now, differing = {"then": self.then} | self._settings(), []
        for name in bound:
            if name not in noted or name not in now or now[name] == noted[name]:
                continue
            if name == "targets":
                there, here = (find_targets(pl_module, words["targets"], warn=False, frozen=True) for words in (noted, now))
                if set(there) == set(here):
                    continue  # other words for the same layers
            differing.append(name)
        if differing:
            more = "".join(f"; {name}={now[name]!r}, there {noted[name]!r}" for name in differing[1:])
            first = differing[0]
            allowed = f"the checkpoint's run has {noted[first]!r}{more}: give the same, or start afresh from its weights alone"
            raise ConfigError(first, now[first], allowed)

    def has_own_groups(self) -> bool:
        """Whether adapters have a learning rate or weight decay of their own."""
        return self.adapter_lr != 1.0 or self.adapter_weight_decay is not None or self.then == "factorize"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
