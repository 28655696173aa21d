"""Build the optimizer and its schedule: AdamW with one or two rates, linear warm-up, then cosine or constant.

AdamW is torch's own. The schedule is not: see :class:`Schedule`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lowrank_pretrain.core.checks import number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import Target, find_targets
from lowrank_pretrain.models.checks import plain

SCHEDULES = ("cosine", "constant")


def undecayed_names(module: nn.Module) -> set[str]:
    """Return the full names of the tables in `module` that weight decay must leave alone.

    These are embedding tables, those that a network lists itself (timm's ``no_weight_decay()``), and parameters
    that are positions or tokens by name: a table is looked up, not multiplied, so decay has nothing to regularise.
    """
    names = set()
    for prefix, sub in module.named_modules():
        dot = prefix + "." if prefix else ""
        own = getattr(sub, "no_weight_decay", None)
        if callable(own):
            names |= {dot + name for name in own()}
        for leaf, _ in sub.named_parameters(recurse=False):
            if isinstance(sub, nn.Embedding) or any(word in leaf for word in ("pos", "embed", "token")):
                names.add(dot + leaf)
    return names


@dataclass
class Shape:
    """Compute the share of the peak learning rate at each step of a run.

    Args:
        schedule: ``"cosine"`` or ``"constant"``.
        final_lr: where the cosine ends.
        warmup: the same as :class:`Optim`'s.
        steps: optimizer steps of the whole run; ``inf``: no known end.
    """

    schedule: str
    final_lr: float
    warmup: int | float
    steps: int | float

    @property
    def warmup_steps(self) -> int:
        """Return the warm-up's steps; a share is rounded down, so that a short run has steps after it."""
        return self.warmup if isinstance(self.warmup, int) else int(self.warmup * self.steps)

    def __call__(self, step: int) -> float:
        """Return the share at `step`, counted from 0."""
        rise = self.warmup_steps
        if step < rise:
            return (step + 1) / (rise + 1)
        if self.schedule == "constant":
            return 1.0
        share = min((step - rise) / max(self.steps - rise, 1), 1.0)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * share))


SHAPE_SETTINGS = ("schedule", "warmup", "final_lr")


class Schedule(LRScheduler):
    """Set the learning rate as a function of only the step and the run's settings.

    A checkpoint holds only the run's position. After a resume the settings are those of the resumed run: a new peak rate,
    warm-up or schedule takes effect at once, and a lengthened run has the schedule that it would have
    had at its new length from the start. Torch's own schedulers take their length from the file: a cosine that has ended
    stays at its end, and all further training has rate 0.

    Args:
        optimizer: its groups' ``initial_lr`` are the peaks.
        shape: the share of the peak at each step.
        per_epoch: optimizer steps in an epoch; None: the run's length does not depend on it.
        epochs: epochs of the run, where `per_epoch` is given.
        max_steps: the run's limit in steps; -1: none.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shape: Shape,
        per_epoch: int | None = None,
        epochs: int | None = None,
        max_steps: int = -1,
    ) -> None:
        self.shape, self.per_epoch, self.epochs, self.max_steps = shape, per_epoch, epochs, max_steps
        self.anchor = (0, 0.0)  # step and epoch from which on an epoch has had `per_epoch` steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rates of the next step."""
        share = self.shape(self.last_epoch)
        # from the groups and not from `base_lrs`: groups may join in the middle of a run
        return [group.setdefault("initial_lr", group["lr"]) * share for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the run's position and length."""
        return {
            "last_epoch": self.last_epoch,
            "_step_count": self._step_count,
            "_last_lr": list(self._last_lr),
            "steps": self.shape.steps,
            "per_epoch": self.per_epoch,
            "anchor": list(self.anchor),
            "settings": {key: getattr(self.shape, key) for key in SHAPE_SETTINGS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of `state_dict`, which may also come from a torch scheduler stepped once per step."""
        step = self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict.get("_step_count", step + 1)
        old, per_epoch = state_dict.get("steps"), state_dict.get("per_epoch")
        self.anchor = tuple(state_dict.get("anchor", self.anchor))
        if self.per_epoch and per_epoch and self.per_epoch != per_epoch:  # another batch size: count from here
            epoch = self.anchor[1] + (step - self.anchor[0]) / per_epoch
            self.anchor = (step, epoch)
        if self.anchor[0] and self.per_epoch and self.epochs is not None:
            steps = self.anchor[0] + math.ceil(max(self.epochs - self.anchor[1], 0) * self.per_epoch - 1e-6)
            self.shape.steps = steps if self.max_steps == -1 else min(steps, self.max_steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        for key in SHAPE_SETTINGS:
            now = getattr(self.shape, key)
            before = state_dict.get("settings", {}).get(key, now)
            if now != before and (key != "final_lr" or self.shape.schedule == "cosine"):
                rank_zero_only(print)(f"{key} is now {now} (it was {before} in the checkpoint)", flush=True)
        if old is not None and old != self.shape.steps and self.shape.schedule == "cosine":
            says = f"the schedule is that of a run of {_steps(self.shape.steps)}, no longer of {_steps(old)}"
            rank_zero_only(print)(f"{says}: it goes on at {self.shape(step):.1%} of the peak rate", flush=True)


def _steps(steps: int | float) -> str:
    return "no known end" if math.isinf(steps) else f"{int(steps):,} steps"


# names of a group's settings here and on the command line; the method handles its own settings
REST = "rest"  # begins the names of groups that `rest_lr` moves
SETTINGS = {"initial_lr": "lr", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps", "lr_ratio": "adapter_lr"}


def has_moments(state: Mapping[str, Any], p: Tensor, *keys: str) -> bool:
    """Return whether a parameter's state has these tensors (by default AdamW's), in the parameter's shape and in no basis."""
    wanted = keys or ("exp_avg", "exp_avg_sq")
    return all(getattr(state.get(key), "shape", None) == p.shape for key in wanted) and "proj" not in state


def refuse_foreign_state(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    fits: Callable[[Mapping[str, Any], Tensor, Mapping[str, Any]], bool],
) -> None:
    """Refuse the state that another optimizer has written: torch takes it, and fails in the middle of the next step.

    Args:
        optimizer: the one to load it.
        saved: a ``state_dict`` with as many groups and parameters; another number is left to torch's own error.
        fits: returns whether a state that is not empty can be this optimizer's; from (group here, parameter, state).

    Raises:
        ConfigError: a parameter's state is another optimizer's.
    """
    for group, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        for p, index in zip(group["params"], theirs["params"], strict=False):
            state = saved["state"].get(index)
            if state and not fits(group, p, state):
                raise foreign_state(f"{_contents(state)}; for a parameter {tuple(p.shape)}")


def _contents(state: Mapping[str, Any]) -> str:
    """Return the keys of a parameter's state, with the shapes of its tensors."""
    words = []
    for key, value in state.items():
        if isinstance(value, Mapping):
            words.append(_contents(value))
        else:
            words.append(f"{key} {tuple(value.shape)}" if isinstance(value, Tensor) and value.ndim else str(key))
    return ", ".join(words)


def foreign_state(what: str) -> ConfigError:
    """Return the error for a file that another optimizer has written, which holds ``what``."""
    return ConfigError(
        "ckpt_path", "optimizer state", f"is another optimizer's or another model's ({what}): continue with the method that "
        "wrote it, or start afresh with hydra.run.dir=DIR"
    )  # fmt: skip


def changed_setting(name: str, now: Any, before: Any) -> str:
    """Return the line that names a setting whose value in the file is not the run's."""
    return f"{name} is now {now} (it was {before} in the checkpoint)"


def settings_win(optimizer: torch.optim.Optimizer) -> None:
    """Make the settings of `optimizer` survive ``load_state_dict``; torch silently takes them from the file.

    Only moments and steps are loaded. One line names each setting that differs in the file.
    """
    ours: list[dict[str, Any]] = []
    changed: dict[str, str] = {}

    def remember(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        if type(optimizer) is torch.optim.AdamW:  # the others check it themselves
            if any("betas" not in group for group in state_dict["param_groups"]):
                raise foreign_state("its groups have no betas")
            refuse_foreign_state(optimizer, state_dict, lambda _, p, state: has_moments(state, p))
        ours[:] = [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]
        changed.clear()
        for mine, theirs in zip(ours, state_dict["param_groups"], strict=False):  # the optimizer itself reports mismatches
            for key, value in mine.items():
                before = tuple(theirs[key]) if key == "betas" and key in theirs else theirs.get(key, value)
                if before != value:
                    rest = key == "initial_lr" and str(theirs.get("name", "")).startswith(REST)
                    word = "rest_lr" if rest else SETTINGS[key]
                    changed.setdefault(word, changed_setting(word, value, before))

    def put_back(optimizer: torch.optim.Optimizer) -> None:
        for group, mine in zip(optimizer.param_groups, ours, strict=True):
            group.update(mine)
        for line in changed.values():
            rank_zero_only(print)(line, flush=True)

    optimizer.register_load_state_dict_pre_hook(remember)
    optimizer.register_load_state_dict_post_hook(put_back)


@dataclass
class Optim:
    """Define a module's optimization: its ``configure_optimizers`` returns ``self.optim.configure(self)``.

    Args:
        lr: peak learning rate, > 0. With ``rest_lr`` it applies only to the targets' matrices.
        weight_decay: AdamW's decoupled decay, >= 0; matrices only.
        betas: AdamW's two averages, each in [0, 1).
        eps: AdamW's epsilon, > 0.
        warmup: an integer counts optimizer steps, a float in [0, 1) is a share of all steps. The rate rises
            linearly from lr/(warmup+1), so no step is spent at rate 0.
        schedule: ``"cosine"`` (to ``final_lr`` at the last step) or ``"constant"``.
        final_lr: where the cosine ends, as a share of each group's peak in [0, 1); ``"constant"`` does not use it.
        build: makes the optimizer instead of AdamW, from (module, this setting); the schedule stays.
        rest_lr: peak learning rate of the rest (embedding, output head, norms, biases), > 0; None: ``lr``. It holds for every
            method, so that a comparison gives each side the same two rates.

    Raises:
        ConfigError: a value outside its range.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int | float = 0
    schedule: str = "cosine"
    final_lr: float = 0.0
    build: Callable[[LightningModule, "Optim"], torch.optim.Optimizer] | None = None
    rest_lr: float | None = None

    def __post_init__(self) -> None:
        number("lr", self.lr, above=0)
        if self.rest_lr is not None:
            number("rest_lr", self.rest_lr, above=0, allowed="must be a number above 0, or null for the same as lr")
        number("weight_decay", self.weight_decay, least=0, allowed="must be a number, 0 or more")
        number("eps", self.eps, above=0)
        betas = plain(self.betas)
        if not isinstance(betas, (list, tuple)) or len(betas) != 2:
            raise ConfigError("betas", betas, "must be two numbers in [0, 1), such as [0.9, 0.999]")
        for beta in betas:
            number("betas", beta, least=0, below=1, allowed="must be two numbers in [0, 1), such as [0.9, 0.999]")
        self.betas = (float(betas[0]), float(betas[1]))
        high = math.inf if isinstance(self.warmup, int) else 1
        number(
            "warmup",
            self.warmup,
            least=0,
            below=high,
            allowed="must be a whole number of steps, or a share of all steps in [0, 1)",
        )
        if self.schedule not in SCHEDULES:
            raise ConfigError("schedule", self.schedule, f"must be one of {', '.join(SCHEDULES)}")
        number("final_lr", self.final_lr, least=0, below=1, allowed="must be a share of the peak learning rate in [0, 1)")

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Return the param groups of the trainable parameters.

        Without ``rest_lr`` they are two: ``decay`` (matrices) and ``no_decay`` (everything else). With it: see :meth:`split`.

        Raises:
            ConfigError: ``rest_lr`` is given and no matrix can be a target, so ``lr`` would have no effect.
        """
        if self.rest_lr is not None:
            try:
                return self.split(module, find_targets(module, warn=False))
            except ConfigError as error:
                if error.key != "targets":
                    raise
                raise ConfigError("rest_lr", self.rest_lr, f"needs matrices that lr moves: {error.allowed}") from None
        decay, rest = self._by_decay(module)
        groups = [
            {"params": decay, "weight_decay": self.weight_decay, "name": "decay"},
            {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
        ]
        return [group for group in groups if group["params"]]

    def split(self, module: nn.Module, targets: Mapping[str, Target]) -> list[dict[str, Any]]:
        """Return up to three param groups: ``matrices`` with ``lr``, and the rest with ``rest_lr``.

        Args:
            module: the module to train.
            targets: as ``find_targets`` returns them; a part of a fused matrix stands for all of it.

        Returns:
            ``matrices``, ``rest_decay`` (other tables and convolutions that decay) and ``rest`` (norms, biases, embeddings).
        """
        chosen = {id(target.layer.weight) for target in targets.values()}
        matrices = [p for p in module.parameters() if id(p) in chosen and p.requires_grad]
        decay, plain_rest = self._by_decay(module)
        rate = self.lr if self.rest_lr is None else self.rest_lr
        groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": self.lr, "name": "matrices"},
            {"params": [p for p in decay if id(p) not in chosen], "lr": rate, "name": f"{REST}_decay"},
            {"params": [p for p in plain_rest if id(p) not in chosen], "lr": rate, "name": REST},
        ]
        for group, decayed in zip(groups, (self.weight_decay, self.weight_decay, 0.0), strict=True):
            group["weight_decay"] = decayed
        return [group for group in groups if group["params"]]

    def _by_decay(self, module: nn.Module) -> tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]:
        """Return the trainable parameters with weight decay, and those without."""
        undecayed = undecayed_names(module)
        decay: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, param in module.named_parameters():
            if param.requires_grad:
                (decay if param.ndim >= 2 and name not in undecayed else rest).append(param)
        return decay, rest

    def configure(self, module: LightningModule) -> dict[str, Any]:
        """Return the optimizer and its schedule, stepped per optimizer step, for ``configure_optimizers``.

        Raises:
            ConfigError: the warm-up does not fit into the run, or the run has no known end to anneal to.
        """
        if self.build is not None:
            optimizer = self.build(module, self)
        else:
            optimizer = torch.optim.AdamW(
                self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
            )
        settings_win(optimizer)
        trainer = module.trainer
        steps = trainer.estimated_stepping_batches
        per_epoch = epochs = None
        if trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches):
            per_epoch = math.ceil(trainer.num_training_batches / max(trainer.accumulate_grad_batches, 1))
            epochs = trainer.max_epochs
        scheduler = self.scheduler(optimizer, steps, per_epoch, epochs, trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def scheduler(
        self,
        optimizer: torch.optim.Optimizer,
        steps: int | float,
        per_epoch: int | None = None,
        epochs: int | None = None,
        max_steps: int = -1,
    ) -> Schedule:
        """Return the schedule over `steps` optimizer steps (``inf``: no known end); the other arguments: :class:`Schedule`.

        Raises:
            ConfigError: as :meth:`configure`.
        """
        endless = math.isinf(steps)
        if endless and (self.schedule == "cosine" or isinstance(self.warmup, float)):
            key = "schedule" if self.schedule == "cosine" else "warmup"
            cure = "set trainer.max_epochs or trainer.max_steps, or use schedule=constant with a warmup in steps"
            raise ConfigError(key, getattr(self, key), f"needs a run of known length; {cure}")
        shape = Shape(self.schedule, self.final_lr, self.warmup, steps if endless else int(steps))
        if shape.warmup_steps >= steps:
            raise ConfigError("warmup", self.warmup, f"must be fewer than the run's {steps} optimizer steps")
        return Schedule(optimizer, shape, per_epoch, epochs, max_steps)
