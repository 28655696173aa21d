"""PreLoRA as a Lightning callback (arXiv 2509.21619): *when* training becomes low-rank."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lowrank_pretrain import refusals
from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.phases import PhaseCallback
from lowrank_pretrain.plan import Plan, check_rank
from lowrank_pretrain.prelora.convergence import Verdict, Window, check_convergence
from lowrank_pretrain.prelora.ranks import assign_ranks, check_ranks
from lowrank_pretrain.targets import Target, families, find_targets


class PreLoRA(PhaseCallback):
    r"""Train in full, notice partial convergence, give each layer a rank by how far it has converged, finish low-rank.

    Example::

        trainer = Trainer(callbacks=[PreLoRA(targets="all", ranks=(4, 8, 16, 32))])

    At the end of each window the mean training loss and the targets' weight norms are noted. When the last ``windows`` of
    them differ by at most ``loss_tol`` and less than ``weight_tol`` (Algorithm 1), every target gets an adapter with a rank
    from its own change (Algorithm 2) and both train for ``warmup`` windows; then W freezes.

    Args:
        targets: presets (``all``, ``attention``, ``mlp``, ``head``) or globs, counted from the LightningModule.
        ranks: increasing powers of two to choose from; may begin with 0 (frozen without an adapter).
        window: length of a window, in units of ``window_unit``.
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
        then: ``lora``, or ``galore``: the optimizer (GaLoreAdamW) takes the targets over, without adapters.

    Raises:
        ConfigError: a wrong value; at the start of fit, a pattern without a match, a rank above min(D, O) of a target, or a
            run too short to ever switch.
    """

    def __init__(
        self,
        targets: str | Sequence[str] = "all",
        ranks: Sequence[int] = (4, 8, 16, 32),
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
    ) -> None:
        super().__init__(alpha, train_A, freeze_rest, optimizer_state, rewarm, then, adapter_lr, adapter_weight_decay)
        self.targets = targets if isinstance(targets, str) else [*targets]
        self.ranks = check_ranks(ranks)
        for key, value, least in (
            ("window", window, 1),
            ("windows", windows, 2),
            ("warmup", warmup, 0),
            ("earliest", earliest, 0),
            ("latest", latest, 1),
        ):
            if key == "latest" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(key, value, f"must be an integer of {least} or more")
        for key, value in (("weight_tol", weight_tol), ("loss_tol", loss_tol)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
                raise ConfigError(key, value, "must be a fraction above 0 and below 1 (1 % is 0.01)")
        if window_unit not in ("epoch", "step"):
            raise ConfigError("window_unit", window_unit, "must be epoch or step")
        if rank_signal not in ("weight_norm", "grad_norm"):
            raise ConfigError("rank_signal", rank_signal, "must be weight_norm or grad_norm")
        self.window, self.window_unit, self.windows, self.warmup = window, window_unit, windows, warmup
        self.weight_tol, self.loss_tol = float(weight_tol), float(loss_tol)
        self.earliest, self.latest, self.rank_signal = earliest, latest, rank_signal

    def _reset(self) -> None:
        super()._reset()
        self.history: list[Window] = []  # the last `windows` windows
        self.grad_norms: list[dict[str, float]] = []  # at the end of the last two, for rank_signal="grad_norm"
        self.verdict = Verdict(False, 0.0, {})
        self.windows_done = 0  # in the present phase
        self._units = 0  # of the present window that have passed: optimizer steps, or epochs
        self._due = False  # a window is over, but the last batch took no optimizer step
        self._loss = torch.zeros(2, dtype=torch.float64)  # sum and number of this rank's micro-batch losses, on the device
        self._restored: list[list[float]] | None = None  # the same by rank, from a checkpoint
        self._seen_step = 0

    @property
    def state_key(self) -> str:
        """Pinned: a subclass must find this state too."""
        return "PreLoRA"

    # -- Lightning's hooks ------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Resolve the targets and check the plan's limits, so that a mistake shows before anything runs."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        targets = find_targets(pl_module, self.targets)
        for name, target in targets.items():
            check_rank(name, self.ranks[-1], target, key="ranks")
        refusals.check_targets(self, trainer, pl_module, targets)
        self._check_length(trainer.max_epochs if self.window_unit == "epoch" else trainer.max_steps, trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count where the trainer stands."""
        super().on_train_start(trainer, pl_module)
        if self.window_unit == "step" and trainer.max_steps == -1 and trainer.estimated_stepping_batches != float("inf"):
            self._check_length(int(trainer.estimated_stepping_batches), trainer)
        self._seen_step = trainer.global_step
        if self._restored is not None:
            by_rank, self._restored = self._restored, None
            if len(by_rank) != trainer.world_size:  # another number of processes: all there is goes to the first
                by_rank = [[sum(column) for column in zip(*by_rank, strict=True)]] + [[0.0, 0.0]] * trainer.world_size
            self._loss = torch.tensor(by_rank[trainer.global_rank], dtype=torch.float64)
        self._loss = self._loss.to(pl_module.device) if pl_module.device.type != "mps" else self._loss

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """At the last step of a window, note gradient norms (unscaled, before clipping) if ranks come from them."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self.rank_signal == "grad_norm" and self.phase == "full" and self._closes_window(trainer):
            grads = {n: t for n, t in find_targets(pl_module, self.targets).items() if t.layer.weight.grad is not None}
            self.grad_norms = [*self.grad_norms[-1:], _norms(grads, grad=True)]

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
        stepped = trainer.global_step != self._seen_step
        self._seen_step = trainer.global_step
        self._units += int(stepped if self.window_unit == "step" else trainer.is_last_batch)
        self._due = self._due or self._units >= self.window
        if self._due and stepped:
            self._due, self._units = False, 0
            self._end_of_window(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so when a run ended before its last phase."""
        super().on_train_end(trainer, pl_module)
        if self.phase != "lowrank":
            changes = {family: round(change, 4) for family, change in self.verdict.family_changes.items()}
            rank_zero_warn(
                f"PreLoRA: the run ended in phase {self.phase}. Last window: loss moved by {self.verdict.loss_change:.4f} "
                f"(loss_tol={self.loss_tol}), norms by {changes} (weight_tol={self.weight_tol}). Train longer, loosen the "
                "tolerances or set latest."
            )

    # -- the method -------------------------------------------------------------------------------------------------

    def _end_of_window(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.windows_done += 1
        if self.phase == "joint":
            if self.windows_done >= self.warmup:
                self.freeze(trainer, pl_module)
            return
        targets = find_targets(pl_module, self.targets)
        family_of = families(pl_module, targets)
        total, count = trainer.strategy.reduce(self._loss, reduce_op="sum").tolist()
        self._loss.zero_()
        self.history = [*self.history, Window(total / max(count, 1.0), _norms(targets))][-self.windows :]
        self.verdict = check_convergence(self.history, family_of, self.windows, self.loss_tol, self.weight_tol)
        self._log(trainer, {f"lowrank/weight_change/{f}": c for f, c in self.verdict.family_changes.items()})
        due = self.verdict.converged and self.windows_done >= self.earliest
        forced = self.latest is not None and self.windows_done >= self.latest
        # every rank must do the same, whatever its rounding: rank 0 decides
        if trainer.strategy.broadcast(due or forced):
            if not due:
                rank_zero_info(f"PreLoRA: not converged by window {self.windows_done}, switching because of latest")
            plan = Plan(trainer.strategy.broadcast(dict(self._assign(family_of))))
            self.switch(trainer, pl_module, plan)
            self.windows_done = 0
            self._log(trainer, {f"lowrank/rank/{name}": float(rank) for name, rank in plan.items()})
            if self.warmup == 0:
                self.freeze(trainer, pl_module)

    def _assign(self, family_of: dict[str, str]) -> Plan:
        signal = [w.norms for w in self.history] if self.rank_signal == "weight_norm" else self.grad_norms
        if len(signal) < 2 or any(name not in norms for norms in signal[-2:] for name in family_of):
            rank_zero_warn(f"PreLoRA: fewer than two windows of {self.rank_signal}: every target gets rank {self.ranks[0]}")
            plan = Plan(dict.fromkeys(family_of, self.ranks[0]))
        else:
            plan = assign_ranks(signal[-2], signal[-1], family_of, self.ranks)
        if not any(plan.values()):  # every family changed evenly, and the smallest rank is 0: nothing would train
            rank_zero_warn(f"PreLoRA: every target would get rank 0: they get {self.ranks[1]}")
            plan = Plan(dict.fromkeys(plan, self.ranks[1]))
        return plan

    def _add_loss(self, trainer: pl.Trainer, outputs: Any) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:  # None: training_step skipped this batch
            # Lightning's outputs["loss"] is divided by accumulate_grad_batches; added on the device, no sync per step
            self._loss[0] += loss.detach().double().to(self._loss.device) * trainer.accumulate_grad_batches
            self._loss[1] += 1

    def _closes_window(self, trainer: pl.Trainer) -> bool:
        passed = 1 if self.window_unit == "step" else int(trainer.is_last_batch)
        return self._due or self._units + passed >= self.window

    def _check_length(self, available: int | None, trainer: pl.Trainer) -> None:
        needed = min(self.windows, self.latest or self.windows) * self.window
        if available is not None and 0 <= available < needed and not trainer.fast_dev_run:
            key = "max_epochs" if self.window_unit == "epoch" else "max_steps"
            raise ConfigError(key, available, f"must be at least windows * window = {needed}, else the run can never switch")

    # -- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next decision depends on, as plain types."""
        return super().state_dict() | {
            "history": [[w.loss, w.norms] for w in self.history],
            "grad_norms": self.grad_norms,
            "verdict": [self.verdict.converged, self.verdict.loss_change, self.verdict.family_changes],
            "windows_done": self.windows_done,
            "units": self._units,
            "due": self._due,
            "loss": self._loss.tolist(),
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
        loss = state_dict["loss"]
        self._restored = loss if isinstance(loss[0], list) else [loss]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning writes rank 0's state; a window's loss so far is of all ranks."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["callbacks"][self.state_key]["loss"] = trainer.strategy.all_gather(self._loss).reshape(-1, 2).tolist()


def _norms(targets: dict[str, Target], grad: bool = False) -> dict[str, float]:
    """‖·‖_F of each target's weight, or of its gradient, in float32 and read from the device at once."""
    if not targets:
        return {}
    blocks = [(t.rows_of_grad() if grad else t.matrix()).detach() for t in targets.values()]
    dtype = torch.promote_types(blocks[0].dtype, torch.float32)
    norms = torch.stack([torch.linalg.vector_norm(block, dtype=dtype) for block in blocks])
    return dict(zip(targets, norms.tolist(), strict=True))
