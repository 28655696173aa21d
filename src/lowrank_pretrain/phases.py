"""A callback whose run goes through phases: ``full`` -> (switch) -> ``joint`` -> (freeze) -> ``lowrank``.

It owns what every such callback needs, so that a schedule of one's own is twenty lines: handing the plan to whoever takes
it, plain checkpoints, resume as a replay, a second ``fit``. PreLoRA decides when to switch; ``LoRA`` switches at the start.

**Resume is a replay.** Lightning restores callbacks after weights, so a callback that injects on restore is too late. Here
the plain weights of the file (``plain_checkpoint``) load into the plain model, ``configure_optimizers`` sees the plain model,
then ``on_fit_start`` repeats switch and freeze through the same ``transition.apply`` and puts the exact values back, before
Lightning restores the optimizers.
"""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lowrank_pretrain import adapter_groups, adoption, averaging, lora, plain_checkpoint, refusals, transition
from lowrank_pretrain.agreement import agreed_hash
from lowrank_pretrain.buckets import settle_buckets
from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.monitor import PHASES, count_parameters
from lowrank_pretrain.plain_checkpoint import FORMAT, SIDE
from lowrank_pretrain.plan import Plan
from lowrank_pretrain.rewarm import Rewarm


class PhaseCallback(Callback):
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
            ``galore``: the optimizer must offer it.

    Attributes:
        phase: ``full``, ``joint`` or ``lowrank``.
        plan: {target: rank} once switched, else ``None``.
        switch_step: optimizer step after which the switch came, or ``None``.
        freeze_step: likewise for the freeze.
    """

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
        if then not in ("lora", "galore"):
            raise ConfigError("then", then, "must be lora or galore")
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
        self._restoring = True
        self._rewarm: Rewarm | None = None
        self._reset()

    def _reset(self) -> None:
        """Back to the start of a run."""
        self.phase = "full"
        self.plan: Plan | None = None
        self.switch_step: int | None = None
        self.freeze_step: int | None = None
        self._unchecked = False
        self._adopter: Any = None

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
        """Joint -> lowrank: the targets' full weights stop training."""
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
        if self.has_own_groups():
            adapter_groups.separate(trainer, pl_module, self.adapter_lr, self.adapter_weight_decay)
        self.phase, self.plan = "joint", plan
        self._unchecked = not replay
        self._note(pl_module)
        self._log_hash(trainer, agreed, replay)

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule, replay: bool) -> None:
        agreed = transition.apply(trainer, pl_module, lambda: self._release(pl_module), self.optimizer_state, replay)
        self.phase = "lowrank"
        self._unchecked = not replay  # what freezing stopped may be what an adapter's gradient came through
        self._note(pl_module)
        self._log_hash(trainer, agreed, replay)
        if self.rewarm:  # from here on, so that its hook always comes behind that of the adapters' own groups
            self._rewarm = Rewarm(trainer, self, self.rewarm)

    def _release(self, pl_module: pl.LightningModule) -> Any:
        inherited = self._adopter.release()
        if self.freeze_rest and not isinstance(self._adopter, lora.Adapters):
            adoption.freeze_rest(pl_module, self.plan)
        return inherited

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
        if "_lowrank" in pl_module.__dict__:
            continues = self.phase != "full" and pl_module.__dict__["_lowrank"]["plan"] == dict(self.plan or {})
            self._exact = lora.clone_state(lora.exact_state(pl_module)) if continues else None
            plain_checkpoint.restore_plain(pl_module)
            averaging.restart(trainer.callbacks, pl_module)  # those set up before us copied the adapters too
            if not continues:
                self._reset()
        else:
            self._exact = None
            self._reset()
        self._averages = {}
        plain_checkpoint.wrap(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replay the transitions of a resumed run; the optimizers are still empty and are restored after this."""
        adoption.check_adopter(self, trainer, pl_module)
        if self.phase != "full":
            phase, plan, unchecked = self.phase, self.plan, self._unchecked
            self._switch(trainer, pl_module, plan, replay=True)
            if phase == "lowrank":
                self._freeze(trainer, pl_module, replay=True)
            self._unchecked = unchecked
            if self._exact is not None:
                lora.load_exact(pl_module, self._exact)
            for where, averaged, callback in averaging.averages(trainer.callbacks):
                if where in self._averages:
                    lora.load_exact(averaged, self._averages[where])
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
        if not callable(getattr(trainer.strategy, "after_transition", None)):  # one of ours looks itself
            agreed_hash(trainer.strategy, pl_module, "at the start of training")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """After the first backward behind a transition: an adapter without a gradient would silently never train."""
        if self._unchecked:
            self._unchecked = False
            dead = [name for name, p in lora.adapter_parameters(pl_module) if p.requires_grad and p.grad is None]
            if dead:
                names = sorted({name.partition(".lora_")[0] for name in dead})
                raise ConfigError(
                    "targets", ", ".join(names), "no forward pass calls it (leave it out of the targets), or checkpointing of "
                    "activations cuts it off from the loss (use_reentrant=False)"
                )  # fmt: skip

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where processes are spawned, this callback stays behind in its own; metrics are what Lightning brings back."""
        found = {"phase": PHASES.index(self.phase), "switch_step": self.switch_step, "freeze_step": self.freeze_step}
        found |= {f"rank/{name}": rank for name, rank in (self.plan or {}).items()}
        trainer.callback_metrics.update({f"lowrank/{k}": torch.tensor(float(v)) for k, v in found.items() if v is not None})

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave nothing of ours on a module that needs nothing of ours."""
        if stage == "fit":
            if self._rewarm is not None:
                self._rewarm.remove()
                self._rewarm = None
            if refusals.spawned(trainer):  # the process that called fit has the plain module, and takes what has a plain name
                lora.merge(pl_module)
            if "_lowrank" not in pl_module.__dict__:
                plain_checkpoint.unwrap(pl_module)

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that ``weights_only=True`` loads it."""
        return {
            "phase": self.phase,
            "plan": None if self.plan is None else dict(self.plan),
            "switch_step": self.switch_step,
            "freeze_step": self.freeze_step,
            "unchecked": self._unchecked,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the phase of a checkpoint, unless Lightning only tests with its weights."""
        if not self._restoring:
            return
        self.phase = state_dict["phase"]
        self.plan = None if state_dict["plan"] is None else Plan(state_dict["plan"])
        self.switch_step, self.freeze_step = state_dict["switch_step"], state_dict["freeze_step"]
        self._unchecked = state_dict["unchecked"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the optimizers' parameters by name: their states are stored by position."""
        checkpoint.setdefault(SIDE, {})["groups"] = transition.group_names(trainer.optimizers, pl_module)

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
        self._averages = side.get("averages", {})
        self._groups = side.get("groups")

    def has_own_groups(self) -> bool:
        """Whether adapters have a learning rate or weight decay of their own."""
        return self.adapter_lr != 1.0 or self.adapter_weight_decay is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
