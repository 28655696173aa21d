"""Run the rehearsal of a Lightning fit, from its first batch to its second optimizer step; all processes agree on it."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Adopter
from lowrank_pretrain.core.targets import Target, families
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.factorize.model import Factors
from lowrank_pretrain.factorize.preview import Preview
from lowrank_pretrain.lora.frozen import OPERANDS
from lowrank_pretrain.phases import layers
from lowrank_pretrain.phases.adapter_watch import check_books
from lowrank_pretrain.phases.holders import LateHolders, name_holders
from lowrank_pretrain.phases.rehearsal import Rehearsal
from lowrank_pretrain.phases.teachers import CURE, Pairing, teachers
from lowrank_pretrain.phases.transition import averages

_WRITTEN = (
    "is written into between optimizer steps (a clamp, a mask, a norm that is kept?), which would miss adapters and factors: "
    "leave it out"
)
SKIPPED = 3  # steps without any gradient to wait for


class FirstStepWatch:
    """Watch the targets, and copies paired with the module, through the first optimizer step.

    Args:
        module: holds both.
        targets: by name.
        trained: ids of the parameters that an optimizer trains.
        adapters: as for ``Rehearsal``.
    """

    def __init__(self, module: nn.Module, targets: Mapping[str, Target], trained: set[int], adapters: bool) -> None:
        self._rehearsal = Rehearsal(module, targets, adapters)
        self._pairs = teachers(module, targets, trained)
        self._pairing: Pairing | None = None

    def _begin(self, module: nn.Module) -> Pairing:
        """Begin to watch."""
        self._rehearsal.start()
        self._pairing = Pairing(module, self._pairs)
        self._pairing.start()
        return self._pairing

    def _unpair(self) -> None:
        """Stop watching pairs, which users may form after a step."""
        if self._pairing is not None:
            self._pairing.stop()
            self._pairing = None

    def stop(self) -> None:
        """Stop watching; may be called twice."""
        self._unpair()
        self._rehearsal.stop()


class FirstStep(FirstStepWatch):
    """Wrap ``training_step`` until the first optimizer step, and ask a ``Rehearsal`` what it saw.

    Args:
        trainer: its strategy gathers what every process saw.
        pl_module: the module, whose ``training_step`` is watched.
        targets: by name.
        adapters: as for ``Rehearsal``.
        frozen_dtype: in which W will be stored at the freeze.
        adopter: of the plan; factors whose ranks an energy decides are looked at as well.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, targets: Mapping[str, Target], adapters: bool = True,
        frozen_dtype: str | None = None, adopter: Adopter | None = None,
    ) -> None:  # fmt: skip
        self._trainer, self._module, self._targets, self._frozen_dtype = trainer, pl_module, targets, frozen_dtype
        self._factors = adopter if isinstance(adopter, Factors) else None
        self._preview: Preview | None = None
        self._before: Any = None  # a training_step that the module itself holds, not its class
        trained = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"] if p.requires_grad}
        super().__init__(pl_module, targets, trained, adapters)
        for student, teacher in self._pairs:
            rank_zero_warn(f"{teacher} looks like a frozen copy of {student}, whose layers become low-rank: {CURE}")
        name_holders(trainer, pl_module, targets)  # refused now, and not after the switch
        LateHolders(trainer, pl_module, targets)
        self.looking = False
        self._all_seen = False  # whether every layer was called in the first step, by any process
        self._noted: Tensor | None = None  # of the targets' weights after the first step
        self._handles: list[Any] = []
        self.steps = 0  # optimizer steps over which uncalled layers were watched

    def start(self) -> None:
        """Begin to watch."""
        self._begin(self._module)
        if self._factors is not None:
            self._preview = self._factors.preview(self._module, self._rehearsal.watched)
        step = self._module.training_step
        self._before = self._module.__dict__.get("training_step")
        self.looking = True

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._rehearsal.forward():
                return step(*args, **kwargs)

        watching: Any = watched
        watching.__wrapped__ = getattr(step, "__wrapped__", step)  # Lightning reads the arguments there, one level deep
        self._module.__dict__["training_step"] = watching

    def look(self) -> dict[str, str] | None:
        """Return, after the first and the second step's backward pass, why targets cannot have an adapter. Later: ``None``.

        All processes must call it, and get the same.
        """
        self.steps += 1
        if self.steps > 1 and not layers.has_changed(self._module):
            check_books(self._trainer.optimizers)  # which the first step may have made
        if not self.looking:
            self._unpair()
            return self._written()
        if self._pairing is not None and self.steps == 1:  # before it, a module may well be filled from another one
            name_holders(self._trainer, self._module, self._targets)  # callbacks may build some when training starts
            self._pairing.watch_outside(self._targets, [model for _, model, _ in averages(callbacks_of(self._trainer))])
        if self.steps == 1 and self._factors is not None:
            self._refuse_broken()
        if self._preview is not None and self._factors is not None:
            preview, self._preview = self._preview, None
            if (warning := self._factors.judge_preview(preview)) is not None:
                rank_zero_warn(warning)
        self._rehearsal.after_backward()
        agreed, stepped = self._agreed()
        if not stepped and self.steps < SKIPPED:
            return None
        self._unwrap()
        if not isinstance(self._trainer.strategy, Adopter):  # which may write its merges
            self._handles = [o.register_step_post_hook(self._note_weights) for o in self._trainer.optimizers]
        if self._rehearsal.asked and self._frozen_dtype in OPERANDS:
            asked = ", ".join(dict.fromkeys(families(self._module, self._rehearsal.asked).values()))
            rank_zero_warn(
                f"frozen_dtype={self._frozen_dtype}: the model asks for the dtype of the weight of {asked}, to be int8: "
                "an input cast to it would be lost (then use bfloat16, or leave it out)"
            )
        reasons = self._rehearsal.finish(agreed)
        self._all_seen = not self._rehearsal.unseen()
        return reasons

    def _refuse_broken(self) -> None:
        """Refuse inputs of which no second moment can be made; all processes agree.

        Raises:
            ConfigError: naming the first layer, in the process that has it.
        """
        broken = self._rehearsal.broken()
        flag = torch.tensor([int(broken is not None)], device=self._module.device)
        if self._trainer.world_size > 1:
            flag = self._trainer.strategy.all_gather(flag).amax()
        if bool(flag):
            which = broken or next(iter(self._rehearsal.layers))
            whose = "has" if broken else "or another target has, on another process,"
            line = f"{whose} inputs that are NaN or infinite in the first step: mend the data, or what comes before it"
            raise ConfigError("targets", which, line)

    def _note_weights(self, *_: Any) -> None:
        """Note the targets' weights as the first step leaves them; called after it. The second step removes the hook."""
        self._noted = self._figures()

    @torch.no_grad()
    def _figures(self) -> Tensor:
        """Return two norms of each target layer's weight (n, 2): others' writes change them, rounding hardly."""
        weights = [layer.weight.detach() for layer in self._rehearsal.layers.values()]
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        norms = [torch.linalg.vector_norm(W, order, dtype=wide) for W in weights for order in (1, 2)]
        return torch.stack(norms).view(-1, 2)

    def _written(self) -> dict[str, str] | None:
        """Return, in the second step, which targets' weights others than the optimizer have changed since the first."""
        self._forget_hooks()
        if self._noted is None:  # the step was skipped, or looked at already
            return None
        then, now, self._noted = self._noted, self._figures(), None
        changed = ((now - then).abs() > 1e-4 * then.abs()).any(1).int()
        if self._trainer.world_size > 1:
            changed = self._trainer.strategy.all_gather(changed).amax(0)
        found = {name for name, was in zip(self._rehearsal.layers, changed.tolist(), strict=True) if was}
        return {name: _WRITTEN for name, target in self._targets.items() if target.layer_name in found}

    def _forget_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def over(self) -> bool:
        """Return whether nothing is left to watch (the same answer on all processes)."""
        return self._all_seen and not self.looking and self._pairing is None

    def late(self) -> tuple[dict[str, str], list[str]]:
        """Return, at any later step, why late-called layers are unfit, and the targets never called.

        All processes must call it, and get the same.
        """
        return self._rehearsal.finish(self._agreed()[0]), self._rehearsal.unseen()

    def stop(self) -> None:
        """Stop watching; may be called twice."""
        self._unwrap()
        self._forget_hooks()
        if self._preview is not None:
            self._preview.stop()
        super().stop()

    def _agreed(self) -> tuple[list[list[int]], bool]:
        """Return what any process saw, and whether there is any gradient (a ``training_step`` may return ``None``)."""
        seen = self._rehearsal.evidence()
        stepped = any(p.grad is not None for _, p in nn.Module.named_parameters(self._module))
        table = torch.tensor([[int(stepped)] * len(seen[0]), *seen], device=self._module.device)
        if self._trainer.world_size > 1:
            table = self._trainer.strategy.all_gather(table).amax(0)
        rows = table.tolist()
        return rows[1:], bool(rows[0][0])

    def _unwrap(self) -> None:
        if self.looking:
            self.looking = False
            del self._module.__dict__["training_step"]
            if self._before is not None:
                self._module.__dict__["training_step"] = self._before
