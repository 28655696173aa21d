"""Run PreLoRA as a Lightning callback (arXiv 2509.21619): decide *when* training becomes low-rank."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lowrank_pretrain.core.checks import choice, number, whole
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.targets import Target, all_targets, check_patterns, families, obstacles
from lowrank_pretrain.core.trainer import StepWatch, is_trial, log_row, run_length
from lowrank_pretrain.factorize.model import Factors
from lowrank_pretrain.factorize.ranks import rank_of_fraction
from lowrank_pretrain.phases.callback import PATIENCE, PhaseCallback
from lowrank_pretrain.phases.first_step import FirstStep
from lowrank_pretrain.prelora.decisions import (
    RANKS,
    Verdict,
    Window,
    assign_ranks,
    check_convergence,
    check_fractions,
    check_ranks,
    norms_of,
    still_flat,
)
from lowrank_pretrain.prelora.length import check_length


class PreLoRA(PhaseCallback):
    r"""Train in full, detect partial convergence, give each layer a rank by its convergence, finish low-rank.

    Example::

        trainer = Trainer(callbacks=[PreLoRA(targets="all", ranks=(4, 8, 16, 32))])

    At the end of each window the mean training loss and the targets' weight norms are noted. When the last ``windows`` of
    them differ by at most ``loss_tol`` and less than ``weight_tol`` (Algorithm 1), every target gets an adapter with a rank
    from its own change (Algorithm 2) and both train for ``warmup`` windows; then W freezes.

    Args:
        targets: presets (``all``, ``attention``, ``mlp``, ``head``) or globs, counted from the LightningModule; ``!`` before
            one leaves out what it matches. What cannot be a target (frozen, parametrized, in no optimizer, never called, ...)
            is left out of a preset with one warning, and refused where it is named.
        ranks: increasing powers of two to choose from; may begin with 0 (frozen without an adapter). A target narrower than
            its rank gets min(D, O), with one warning, and is refused where it is named. With ``then="factorize"`` increasing
            fractions of min(D, O) instead, by default (0.25,).
        window: length of a window, in units of ``window_unit``; under ``LTEStrategy(before="merge")`` it ends with a merge.
        window_unit: ``epoch`` or ``step`` (optimizer steps).
        windows: k, how many windows the test looks at; at least 2.
        weight_tol: fraction in (0, 1) for the families' mean relative norm change. Exp1/2/3 of the paper: .01, .005, .0025.
        loss_tol: fraction in (0, 1) for the relative loss change. Exp1/2/3: .05, .025, .01.
        warmup: windows of joint training between switch and freeze.
        earliest: no switch before this many windows.
        latest: force the switch after this many windows, even before ``earliest``; ``None``: never.
        rank_signal: what ranks are assigned from: ``weight_norm`` (the paper's words) or ``grad_norm`` (the authors' code).
        alpha: adapters' scale = alpha / rank; ``None``: scale 1, as in the authors' runs.
        freeze_rest: at the freeze everything but the adapters stops, so that backward need not descend below them.
        train_A: ``False`` trains B alone (LoRA-FA), which saves activation memory.
        rewarm: optimizer steps over which the learning rate ramps up after the freeze (the authors: 100).
        optimizer_state: ``keep``, or ``reset`` all moments at both transitions as the authors' code does.
        adapter_lr: the adapters' learning rate over that of their base weight.
        adapter_weight_decay: the adapters' weight decay; ``None``: that of their base weight.
        then: ``lora``, or ``galore``: the optimizer (GaLoreAdamW) takes the targets over, without adapters; or ``factorize``:
            W trains on through the joint phase (at least 8 steps), and then becomes a product U V of its rank: everything
            shrinks with it. A target that would not get faster stays whole and trains on.
        energy: with ``then="factorize"``: the share of each layer's output energy that its rank must keep, instead of
            ``ranks``.
        flops: likewise: the share of the targets' FLOPs that the factors may take in all, instead of ``ranks``.
        recompute_inputs: make a layer's input again in backward where what made it keeps what that takes (GELU, SiLU, norms,
            products such as SwiGLU's), in place of keeping the input too. Saves activation memory and costs a few percent of
            a step.
        frozen_dtype: at the freeze, store each frozen W in this type and multiply in it, those of rank 0 included:
            ``bfloat16``, ``float16``, ``float8`` or ``int8``; ``auto``: bfloat16 if the device has instructions for it;
            ``None``: as it is.
        keep_original: with ``frozen_dtype``: keep W itself in the host's memory, and merge and export from it; without, from W
            as it is stored.

    Raises:
        ConfigError: a wrong value; at the start of fit or in its first step, a pattern without a match, one that names what
            cannot be a target, or a run too short to ever switch.
    """

    ranks: list[int]

    def __init__(
        self,
        targets: str | Sequence[str] = "all",
        ranks: Sequence[int] | Sequence[float] = (4, 8, 16, 32),
        window: int = 1,
        window_unit: str = "epoch",
        windows: int = 3,
        weight_tol: float = 0.01,
        loss_tol: float = 0.05,
        warmup: int = 2,
        earliest: int = 0,
        latest: int | None = None,
        rank_signal: str = "weight_norm",
        alpha: float | None = None,
        freeze_rest: bool = False,
        train_A: bool = True,
        rewarm: int = 0,
        optimizer_state: str = "keep",
        then: str = "lora",
        adapter_lr: float = 1.0,
        adapter_weight_decay: float | None = None,
        energy: float | None = None,
        flops: float | None = None,
        recompute_inputs: bool = False,
        frozen_dtype: str | None = None,
        keep_original: bool = False,
    ) -> None:
        own = (adapter_lr, adapter_weight_decay, energy, flops, recompute_inputs, frozen_dtype, keep_original)
        super().__init__(alpha, train_A, freeze_rest, optimizer_state, rewarm, then, *own)
        self.targets = check_patterns(targets)
        if then == "factorize":
            unset = isinstance(ranks, Sequence) and list(ranks) == RANKS
            self.ranks = check_fractions((0.25,) if unset else ranks)  # type: ignore[assignment]  # shares of min(D, O) here
        else:
            self.ranks = check_ranks(ranks)
        fraction = "must be a fraction above 0 and below 1 (1 % is 0.01)"
        self.window, self.windows, self.warmup = (
            whole("window", window, 1),
            whole("windows", windows, 2),
            whole("warmup", warmup, 0),
        )
        self.earliest, self.latest = whole("earliest", earliest, 0), None if latest is None else whole("latest", latest, 1)
        self.weight_tol = float(number("weight_tol", weight_tol, above=0, below=1, allowed=fraction))
        self.loss_tol = float(number("loss_tol", loss_tol, above=0, below=1, allowed=fraction))
        self.window_unit = choice("window_unit", window_unit, ("epoch", "step"))
        self.rank_signal = choice("rank_signal", rank_signal, ("weight_norm", "grad_norm"))

    def _reset(self) -> None:
        super()._reset()
        self.history: list[Window] = []  # the last `windows` windows
        self.grad_norms: list[dict[str, float]] = []  # at the end of the last two, for rank_signal="grad_norm"
        self.verdict = Verdict(False, 0.0, {})
        self.windows_done = 0  # in the present phase
        self._units = 0  # of the present window that have passed: optimizer steps, or epochs
        self.first_loss: float | None = None  # the first window's
        self._due = False  # a window is over, but the last batch took no optimizer step
        self._open: int | None = None  # the epoch that has begun and is not counted yet
        self._loss = torch.zeros(2, dtype=torch.float64)  # sum and number of this rank's micro-batch losses, on the device
        self._restored: list[list[float]] | None = None  # the same by rank, from a checkpoint
        self._steps = StepWatch()
        self._late: dict[str, str] = {}  # why targets are unfit, by the last look before the switch

    @property
    def state_key(self) -> str:
        """Return a pinned key: a subclass must find this state too."""
        return "PreLoRA"

    # -- Lightning's hooks ------------------------------------------------------------------------------------------

    def choose_targets(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resolve the targets after ``setup`` and ``configure_model``, so that mistakes show at once."""
        # a fraction of min(D, O) is never too large: nothing needs cutting down
        targets = self._select(trainer, pl_module, 1 if self.then == "factorize" else self.ranks[-1], "ranks")
        if self.then == "factorize":
            self.chosen = {name: targets[name].max_rank for name in self.chosen}
            if isinstance(self._adopter, Factors):
                self._adopter.check_fraction(self.ranks[0], targets)
        if not trainer.ckpt_path:  # with a file, the trainer still counts the steps of its last fit: on_train_start asks
            self._check_length(trainer)
        if self._adopter.makes_adapters and self.chosen:
            self._first = FirstStep(
                trainer, pl_module, targets, frozen_dtype=self.frozen_dtype, adopter=self._adopter, lasting=True
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count at the trainer's step."""
        super().on_train_start(trainer, pl_module)
        self._check_length(trainer, has_data=True)
        self._steps.begin(trainer)
        if self._restored is not None:
            by_rank, self._restored = self._restored, None
            if len(by_rank) != trainer.world_size:  # another number of processes: all there is goes to the first
                by_rank = [[sum(column) for column in zip(*by_rank, strict=True)]] + [[0.0, 0.0]] * trainer.world_size
            self._loss = torch.tensor(by_rank[trainer.global_rank], dtype=torch.float64)
        self._loss = _on(pl_module.device, self._loss)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count an epoch that ended before its last batch (``on_train_batch_start`` returned -1)."""
        if self._open is not None and self._open < trainer.current_epoch:
            self._open = None
            self._count(int(self.window_unit == "epoch"))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the targets once more in the step after which the switch may come: a loss may have begun late."""
        if self._over is not None:
            self._stop_watching()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._first is not None and self._may_switch(trainer):
            self._first.look_again()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Note gradient norms (unscaled, before clipping) at a window's last step, if ranks come from them."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.rank_signal == "grad_norm" and self.phase == "full" and self._closes_window(trainer):
            self.grad_norms = [*self.grad_norms[-1:], self._gradient_norms(trainer, pl_module)]
        if self._first is not None and self._may_switch(trainer):
            self._late = self._first.last_look()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and act at the first optimizer-step boundary with a window due.

        Never in ``on_train_epoch_end``: a checkpoint written at an epoch's last step would lose the decision.
        """
        if self.phase == "lowrank":
            return
        if self.phase == "full":
            self._add_loss(trainer, outputs)
        stepped = self._steps.stepped(trainer)
        self._open = None if trainer.is_last_batch else trainer.current_epoch
        self._count(int(stepped if self.window_unit == "step" else trainer.is_last_batch))
        if self._due and stepped and self._settled():
            self._due, self._units = False, 0
            self._end_of_window(trainer, pl_module)
        if stepped and self.freeze_due:  # asked for before the adopter was ready
            self.freeze(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn when a run ended before its last phase."""
        super().on_train_end(trainer, pl_module)
        if self.phase == "joint" or self.freeze_step == trainer.global_step:
            joint = f"in phase joint, after {self.windows_done} of warmup={self.warmup} windows"
            ended = joint if self.phase == "joint" else "with the freeze"
            cure = "Train longer, lower warmup, or switch earlier (latest)."
            rank_zero_warn(f"PreLoRA: the run ended {ended}: no step was low-rank. {cure}")
        elif self.phase == "full" and self.chosen:
            changes = {family: round(change, 4) for family, change in self.verdict.family_changes.items()}
            rank_zero_warn(
                f"PreLoRA: the run ended in phase full. Last window: loss moved by {self.verdict.loss_change:.4f} "
                f"(loss_tol={self.loss_tol}), norms by {changes} (weight_tol={self.weight_tol}). Train longer, loosen the "
                "tolerances or set latest."
            )

    # -- the method -------------------------------------------------------------------------------------------------

    def _count(self, passed: int) -> None:
        self._units += passed
        self._due = self._due or self._units >= self.window

    def _end_of_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.windows_done += 1
        if self.phase == "joint":
            if self.windows_done >= self.warmup:
                self.freeze(trainer, pl_module)
            return
        if not self.chosen:  # none was left at an earlier window that wanted to switch
            return
        targets = self._present(pl_module)
        family_of = families(pl_module, targets)
        total, count = trainer.strategy.reduce(self._loss, reduce_op="sum").tolist()
        if not count:  # every step of it was skipped: not a window
            self.windows_done -= 1
            return
        self._loss.zero_()
        with nullcontext() if self._adopter.settles_every == 1 else self._adopter.agreed_weights():
            norms = norms_of(targets)
        self.history = [*self.history, Window(total / count, norms)][-self.windows :]
        self.first_loss = total / count if self.windows_done == 1 else self.first_loss
        self.verdict = check_convergence(self.history, family_of, self.windows, self.loss_tol, self.weight_tol)
        log_row(trainer, {f"lowrank/weight_change/{f}": c for f, c in self.verdict.family_changes.items()})
        if self.windows_done == 1 and self._first is not None:
            self._first.say_unseen(self.chosen, "PreLoRA")
        due = self.verdict.converged and self.windows_done >= self.earliest
        forced = self.latest is not None and self.windows_done >= self.latest
        # every rank must do the same, regardless of rounding: rank 0 decides
        if trainer.strategy.broadcast(due or forced):
            if not due:
                rank_zero_info(f"PreLoRA: not converged by window {self.windows_done}, switching because of latest")
            elif hint := still_flat(self.first_loss, self.history[-1].loss):
                rank_zero_info(f"PreLoRA: converged at window {self.windows_done}, {hint}")
            self._check_again(trainer, pl_module)
            if not self.chosen:
                return
            family_of = {name: family for name, family in family_of.items() if name in self.chosen}
            plan = Plan(trainer.strategy.broadcast(dict(self._assign(family_of, targets))))
            self.switch(trainer, pl_module, plan)
            self.windows_done = 0
            log_row(trainer, {f"lowrank/rank/{name}": float(rank) for name, rank in plan.items()})
            if self.warmup == 0:
                self.freeze(trainer, pl_module)

    def _assign(self, family_of: dict[str, str], targets: Mapping[str, Target]) -> Plan:
        if self.then == "factorize":
            return self._assign_fractions(family_of, targets)
        signal = [w.norms for w in self.history] if self.rank_signal == "weight_norm" else self.grad_norms
        if len(signal) < 2 or any(name not in norms for norms in signal[-2:] for name in family_of):
            rank_zero_warn(f"PreLoRA: fewer than two windows of {self.rank_signal}: every target gets rank {self.ranks[0]}")
            plan = Plan(dict.fromkeys(family_of, self.ranks[0]))
        else:
            plan = assign_ranks(signal[-2], signal[-1], family_of, self.ranks)
        if not any(plan.values()):  # every family changed evenly, and the smallest rank is 0: nothing would train
            rank_zero_warn(f"PreLoRA: every target would get rank 0: they get {self.ranks[1]}")
            plan = Plan(dict.fromkeys(plan, self.ranks[1]))
        return Plan({name: min(rank, self.chosen[name]) for name, rank in plan.items()})

    def _assign_fractions(self, family_of: dict[str, str], targets: Mapping[str, Target]) -> Plan:
        """Choose among fractions as among ranks; if energy or a budget decides later, this is the upper limit."""
        if self.energy is not None or self.flops is not None:
            return Plan({name: self.chosen[name] for name in family_of})
        signal = [w.norms for w in self.history] if self.rank_signal == "weight_norm" else self.grad_norms
        index = dict.fromkeys(family_of, 0)
        if len(signal) > 1 and all(name in norms for norms in signal[-2:] for name in family_of):
            index = assign_ranks(signal[-2], signal[-1], family_of, range(len(self.ranks)))
        fractions = {name: self.ranks[index[name]] for name in family_of}
        return Plan({n: rank_of_fraction(f, targets[n].rows, targets[n].cols) for n, f in fractions.items()})

    def _present(self, pl_module: pl.LightningModule) -> dict[str, Target]:
        """Return the chosen targets that are still targets of the module."""
        return {name: target for name, target in all_targets(pl_module).items() if name in self.chosen}

    def _check_again(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave out, just before the switch, targets that are no longer valid or were never called."""
        against, reasons = obstacles(pl_module), {}
        present = self._present(pl_module)
        for name in self.chosen:
            if name not in present or name in against:
                words = against.get(name) or against.get(name.rpartition(".")[0]) or "is no layer of the module any more"
                reasons[name] = f"since the fit began {words}"  # no colon: a list of reasons is cut at the first one
        reasons = self._late | reasons
        self._first, self._over = None, self._first  # the next batch stops it
        if any(name in self.chosen for name in reasons):
            self.leave_out(trainer, pl_module, reasons, refuse=False)

    def _add_loss(self, trainer: pl.Trainer, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:  # None: training_step skipped this batch
            # Lightning's outputs["loss"] is divided by accumulate_grad_batches; added on the device, no sync per step
            # (of any shape with one number); on a device without float64 it is moved first
            loss = loss.detach().reshape(()).to(self._loss.device)
            self._loss[0] += loss.double() * trainer.accumulate_grad_batches
            self._loss[1] += 1

    def _closes_window(self, trainer: pl.Trainer) -> bool:
        passed = 1 if self.window_unit == "step" else int(trainer.is_last_batch)
        return (self._due or self._units + passed >= self.window) and self._settled(1)

    def _may_switch(self, trainer: pl.Trainer) -> bool:
        """Return whether the switch may come after the step under way."""
        done, needed = self.windows_done + 1, max(self.windows, self.earliest)
        needed = needed if self.latest is None else min(needed, self.latest)
        return self.phase == "full" and done >= needed and self._closes_window(trainer)

    def _settled(self, ahead: int = 0) -> bool:
        """Return whether a window may end now, or after so many more steps: all ranks must hold the same weights."""
        return self._adopter.settles_every == 1 or self._adopter.settled(ahead)

    def _gradient_norms(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Return ‖·‖_F of the targets' gradients; if ranks have gradients of their own, the mean of their norms."""
        present = self._present(pl_module)
        mine = norms_of({n: t for n, t in present.items() if t.layer.weight.grad is not None}, grad=True)
        if not self._adopter.gradients_differ:
            return mine
        table = torch.tensor([[mine.get(n, 0.0), float(n in mine)] for n in present], dtype=torch.float32).to(pl_module.device)
        summed = trainer.strategy.reduce(table, reduce_op="sum").tolist()
        return {n: total / count for n, (total, count) in zip(present, summed, strict=True) if count}

    def _check_length(self, trainer: pl.Trainer, has_data: bool = False) -> None:
        """Refuse a run that ends before it can switch, as far as that is known."""
        if self.phase == "full" and not is_trial(trainer):
            windows, passed = (self.windows, self.earliest, self.latest), (self.windows_done, self._units)
            check_length(trainer, self.window, self.window_unit, windows, passed, self._adopter.settles_every, has_data)

    def patience(self, trainer: pl.Trainer) -> int:
        """Return the optimizer steps of one window."""
        per_epoch = run_length(trainer)[1] if self.window_unit == "epoch" else 1
        return max(1, int(self.window * per_epoch)) if math.isfinite(per_epoch) else PATIENCE

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decision depends on, as plain types."""
        return super().state_dict() | {
            "history": [[w.loss, w.norms] for w in self.history],
            "grad_norms": self.grad_norms,
            "verdict": [self.verdict.converged, self.verdict.loss_change, self.verdict.family_changes],
            "windows_done": self.windows_done,
            "first_loss": self.first_loss,
            "units": self._units,
            "due": self._due,
            "open": self._open,
            "loss": self._loss.tolist(),
            "left_out": dict(self.left_out),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the middle of a window."""
        super().load_state_dict(state_dict)
        if not self._restoring:
            return
        self.history = [Window(loss, norms) for loss, norms in state_dict["history"]]
        self.grad_norms = state_dict["grad_norms"]
        self.verdict = Verdict(*state_dict["verdict"])
        self.windows_done, self._units, self._due = (state_dict[key] for key in ("windows_done", "units", "due"))
        self.left_out, self.first_loss = dict(state_dict.get("left_out", {})), state_dict.get("first_loss")
        self._open = state_dict.get("open")
        loss = state_dict["loss"]
        self._restored = loss if isinstance(loss[0], list) else [loss]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the window's loss so far of all ranks; Lightning itself writes rank 0's state."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["callbacks"][self.state_key]["loss"] = trainer.strategy.all_gather(self._loss).reshape(-1, 2).tolist()


def _on(device: torch.device, total: Tensor) -> Tensor:
    """Move a float64 sum to the device; leave it where it is if the device has no float64 (Apple's)."""
    try:
        return total.to(device)
    except (TypeError, RuntimeError):
        return total
