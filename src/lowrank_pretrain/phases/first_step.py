"""Run the rehearsal of a Lightning fit: in its first step, at moments after it, until the switch. All processes agree on it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Adopter
from lowrank_pretrain.core.targets import Target, all_targets, families
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.factorize.model import Factors
from lowrank_pretrain.factorize.preview import Preview
from lowrank_pretrain.lora.frozen import OPERANDS
from lowrank_pretrain.phases.adapter_watch import check_books
from lowrank_pretrain.phases.gradient_hooks import CHANGES, UNSEEN, HookWatch, has_users_hook
from lowrank_pretrain.phases.holders import LateHolders, name_holders
from lowrank_pretrain.phases.rehearsal import Rehearsal
from lowrank_pretrain.phases.teachers import CURE, Pairing, teachers
from lowrank_pretrain.phases.transition import averages

_WRITTEN = (
    "is written into between optimizer steps (a clamp, a mask, a norm that is kept?), which would miss adapters and factors: "
    "leave it out"
)
SKIPPED = 3  # steps without any gradient to wait for
GAPS = 16  # between two optimizer steps in which writes are looked for; and as many ends of epochs


class Wrapped:
    """Run a method of a module inside of a context, until ``remove``.

    Args:
        module: has the method.
        name: of it.
        around: makes the context.
        once: remove it when it is called.
    """

    def __init__(
        self, module: nn.Module, name: str, around: Callable[[], AbstractContextManager[None]], once: bool = False
    ) -> None:
        step = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if once:
                self.remove()
            with around():
                return step(*args, **kwargs)

        watching: Any = watched
        watching.__wrapped__ = getattr(step, "__wrapped__", step)  # Lightning reads the arguments there, one level deep
        self._module, self._name, self._watching = module, name, watching
        self._before = module.__dict__.get(name)  # a step that the module itself holds, not its class
        module.__dict__[name] = watching

    def remove(self) -> None:
        """Put back what was there; may be called twice."""
        if self._module.__dict__.get(self._name) is self._watching:
            del self._module.__dict__[self._name]
            if self._before is not None:
                self._module.__dict__[self._name] = self._before


def look_at_validation(first: "FirstStep | None", module: nn.Module, plan: Mapping[str, int] | None, who: str) -> bool:
    """Watch the batch of validation that begins now: before the switch by ``first``, after it to warn. Return ``True``."""
    if first is not None:
        first.look_at_validation()
        return True
    if plan is None:  # of adapters
        return True
    rehearsal = Rehearsal(module, {name: target for name, target in all_targets(module).items() if plan.get(name)})

    @contextmanager
    def around() -> Iterator[None]:
        with rehearsal.validation():
            yield
        if rehearsal.other:
            first, reason = next(iter(rehearsal.other.items()))
            rank_zero_warn(f"{who}: validation does not see the adapters of {', '.join(rehearsal.other)}: {first} {reason}")

    Wrapped(module, "validation_step", around, once=True)
    return True


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

    Validation's first batch is watched too, and later steps that ``look_again`` names.

    Args:
        trainer: its strategy gathers what every process saw.
        pl_module: the module, whose ``training_step`` is watched.
        targets: by name.
        adapters: as for ``Rehearsal``.
        frozen_dtype: in which W will be stored at the freeze.
        adopter: of the plan; factors whose ranks an energy decides are looked at as well.
        lasting: look for writes after the first steps as well, until ``stop``: W trains on.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, targets: Mapping[str, Target], adapters: bool = True,
        frozen_dtype: str | None = None, adopter: Adopter | None = None, lasting: bool = False,
    ) -> None:  # fmt: skip
        self._trainer, self._module, self._targets, self._frozen_dtype = trainer, pl_module, targets, frozen_dtype
        self._factors = adopter if isinstance(adopter, Factors) else None
        self._preview: Preview | None = None
        self._lasting = lasting
        trained = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"] if p.requires_grad}
        super().__init__(pl_module, targets, trained, adapters)
        for student, teacher in self._pairs:
            rank_zero_warn(f"{teacher} looks like a frozen copy of {student}, whose layers become low-rank: {CURE}")
        name_holders(trainer, pl_module, targets)  # refused now, and not after the switch
        LateHolders(trainer, pl_module, targets)
        self.looking = self._again = False
        self._all_seen = False  # whether every layer was called in the first step, by any process
        self._noted: Tensor | None = None  # of the targets' weights as a step left them
        self._notes_next = self._all_written = False
        self._handles: list[Any] = []
        self._hooks = HookWatch(self._rehearsal.layers)
        self._step: Wrapped | None = None
        self._validation: Wrapped | None = None
        self.steps = 0  # optimizer steps over which uncalled layers were watched
        self._gaps = self._ends = 0  # between two steps, since the first; of epochs

    def start(self) -> None:
        """Begin to watch."""
        self._begin(self._module)
        if self._factors is not None:
            self._preview = self._factors.preview(self._module, self._rehearsal.watched)
        self.looking = True
        self._step = Wrapped(self._module, "training_step", self._forward)

    @contextmanager
    def _forward(self) -> Iterator[None]:
        with self._rehearsal.forward():
            yield
        self._hooks.begin()  # now, before the backward pass: the step may have registered some

    def look_again(self) -> None:
        """Watch the batch of training that begins now."""
        if not self.looking:
            self._remove(self._step)
            self._step = Wrapped(self._module, "training_step", self._rehearsal.forward, once=True)
        self._again = True

    def look_at_validation(self) -> None:
        """Watch the batch of validation that begins now."""
        self._validation = Wrapped(self._module, "validation_step", self._rehearsal.validation, once=True)

    def look(self) -> dict[str, str] | None:
        """Return, after a step's backward pass, why targets cannot have an adapter; ``None`` if nothing was looked at.

        All processes must call it, and get the same.
        """
        self.steps += 1
        if self.steps == 2 or self._again:
            self._again = False
            check_books(self._trainer.optimizers)  # which a step may have made
        if not self.looking:
            self._unpair()
            self._gaps += 1
            written = self._written()
            self._note_next()
            return written
        if self._pairing is not None and self.steps == 1:  # before it, a module may well be filled from another one
            name_holders(self._trainer, self._module, self._targets)  # callbacks may build some when training starts
            self._pairing.watch_outside(self._targets, [model for _, model, _ in averages(callbacks_of(self._trainer))])
        if self.steps == 1 and self._factors is not None:
            self._refuse_broken()
        if self._preview is not None and self._factors is not None:
            preview, self._preview = self._preview, None
            if (warning := self._factors.judge_preview(preview)) is not None:
                rank_zero_warn(warning)
        self._hooks.end()
        self._rehearsal.other |= dict.fromkeys(self._hooks.changed, CHANGES)
        self._rehearsal.after_backward()
        agreed, stepped = self._agreed()
        if not stepped and self.steps < SKIPPED:
            return None
        self._unwrap()
        self._note_next()
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

    def _note_next(self) -> None:
        """Arrange that the weights are noted as the next step leaves them, if the time after it is watched for writes."""
        if self._lasting:
            at_end = self._trainer.is_last_batch and self._ends < GAPS
            self._ends += at_end
            watches = self._gaps < GAPS or at_end
        else:
            watches = self._gaps < 1
        if watches and not isinstance(self._trainer.strategy, Adopter):  # which may write its merges
            self._notes_next = True
            self._handles = [o.register_step_post_hook(self._note_weights) for o in self._trainer.optimizers]

    def _note_weights(self, *_: Any) -> None:
        """Note the targets' weights as a step leaves them; called after it. The next step removes the hook."""
        if self._notes_next:  # of several optimizers the first that steps; and no step of a search for a learning rate
            self._notes_next, self._noted = False, self._figures()

    @torch.no_grad()
    def _figures(self) -> Tensor:
        """Return two norms of each target layer's weight (n, 2): others' writes change them, rounding hardly."""
        weights = [layer.weight.detach() for layer in self._rehearsal.layers.values()]
        wide = reduce(torch.promote_types, (W.dtype for W in weights), torch.float32)
        norms = [torch.linalg.vector_norm(W, order, dtype=wide) for W in weights for order in (1, 2)]
        return torch.stack(norms).view(-1, 2)

    def _written(self) -> dict[str, str] | None:
        """Return which targets' weights others than the optimizer have changed since the last step, if it was noted."""
        self._forget_hooks()
        if self._noted is None:  # the step was skipped, or looked at already
            return None
        then, now, self._noted = self._noted, self._figures(), None
        changed = ((now - then).abs() > 1e-4 * then.abs()).any(1).int()
        if self._trainer.world_size > 1:
            changed = self._trainer.strategy.all_gather(changed).amax(0)
        found = {name for name, was in zip(self._rehearsal.layers, changed.tolist(), strict=True) if was}
        if not self.early and len(found) == len(self._rehearsal.layers) and not self._all_written:
            self._all_written = True  # all of them at once: perhaps loaded from a file, which happens once
            return None
        return {name: _WRITTEN for name, target in self._targets.items() if target.layer_name in found}

    def _forget_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._notes_next = [], False

    @property
    def early(self) -> bool:
        """Return whether only the first two steps were looked at: an error ends no trained run."""
        return self._gaps <= 1

    @property
    def over(self) -> bool:
        """Return whether nothing is left to watch (the same answer on all processes)."""
        return self._all_seen and not self.looking and self._pairing is None and not self._lasting

    def late(self) -> tuple[dict[str, str], list[str]]:
        """Return, at any later step, why targets are unfit after all, and those never called.

        All processes must call it, and get the same.
        """
        for name, layer in self._rehearsal.layers.items():
            weight = layer._parameters.get("weight")
            if weight is not None and has_users_hook(weight, self._hooks.harmless):  # one that came later, or was not called
                self._rehearsal.other.setdefault(name, UNSEEN)
        return self._rehearsal.finish(self._agreed()[0]), self._rehearsal.unseen()

    def say_unseen(self, chosen: Collection[str], who: str) -> None:
        """Name layers not called so far, after a window; a single step would be no evidence. All processes must call it."""
        late, unseen = self.late()
        unseen = [name for name in unseen if name in chosen and name not in late]
        if unseen:
            names = ", ".join(dict.fromkeys(families(self._module, unseen).values()))
            rank_zero_warn(
                f"{who}: no forward pass called {names} in the {self.steps} optimizer steps so far. What none calls before the "
                "switch is left out"
            )

    def last_look(self) -> dict[str, str]:
        """Return, before the switch, why targets are unfit after all. All processes must call it, and get the same."""
        late, unseen = self.late()
        return dict.fromkeys(unseen, f"was not called in any of the {self.steps} optimizer steps watched") | late

    def stop(self) -> None:
        """Stop watching; may be called twice."""
        self._unwrap()
        self._remove(self._validation)
        self._forget_hooks()
        self._hooks.end()
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
        self.looking = False
        self._remove(self._step)
        self._step = None

    @staticmethod
    def _remove(wrapped: Wrapped | None) -> None:
        if wrapped is not None:
            wrapped.remove()
