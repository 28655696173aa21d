"""Find what callbacks and modules keep of a model's parameters: hand-made averages, their copies, lists for clipping.

A switch changes number and order of the parameters. Who took them before, and pairs them by position (or asks for each name
of ``named_parameters()``) afterwards, fails then, perhaps days after the start; a list of the parameters themselves goes
stale without a word. Averages often begin late, so that no step at the start shows how they are updated. So attributes are
looked through when a fit starts, and now and then until the switch for what was made since. Lightning's own averages follow
the switch, and timm's go by ``state_dict()``.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import Target, plain_name
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.phases import layers
from lowrank_pretrain.phases.teachers import CURE

_DEPTH = 4  # attributes of attributes that are looked through
_ITEMS, _LONG = 64, 100_000  # of a container that are looked into; its length from which it is none of parameters
_LIGHTNINGS = frozenset(pl.LightningModule().__dict__)  # a module's attributes that are not a user's
_OTHERS = ("lightning.", "lightning_fabric.", "pytorch_lightning.", "lowrank_pretrain.", "torch.", "builtins.", "numpy.")

_SAID: MutableMapping[pl.Trainer, set[str]] = WeakKeyDictionary()  # lines that a fit has been told

_PLAIN = (Tensor, str, bytes, int, float, type, type(None), ModuleType, FunctionType, MethodType, pl.Trainer)

Shapes = tuple[tuple[int, ...], ...]


class Held(NamedTuple):
    """Describe what holds parameters.

    Attributes:
        where: attributes, from the callback or the module.
        student: name of the model whose parameters they are.
        kind: ``copy`` of the model, ``average`` that pairs by position, ``values`` by position or name, ``parameters``.
    """

    where: str
    student: str
    kind: str


def find_holders(module: pl.LightningModule, callbacks: Iterable[pl.Callback], targets: Mapping[str, Target]) -> list[Held]:
    """Return what the callbacks and the module hold of parameters that have targets.

    Args:
        module: the module; models inside of it are ``teachers``' concern, but for those that pair by position.
        callbacks: the fit's.
        targets: by name.
    """
    search = _Search(module, targets)
    for callback in callbacks:
        if not _is_others(callback):
            search.object(callback, type(callback).__name__, 0)
    for name, child in module.named_modules():
        prefix = plain_name(name) or type(module).__name__
        if isinstance(child, AveragedModel) and (student := search.alike(child.module.parameters(), prefix)):
            search.found.append(Held(prefix, student, "average"))
        if name == "" or not _is_others(child):
            for key, value in list(child.__dict__.items()):
                if key not in _LIGHTNINGS:
                    search.value(value, f"{prefix}.{key}", 1)
    return list(dict.fromkeys(search.found))


def name_holders(trainer: pl.Trainer, module: pl.LightningModule, targets: Mapping[str, Target], refuse: bool = True) -> None:
    """Warn, once in a fit, of what will not follow the switch; refuse what surely pairs parameters by position.

    Args:
        trainer: its callbacks are looked through.
        module: as for ``find_holders``.
        targets: likewise.
        refuse: ``False``: warn of such pairs too, where training has begun.

    Raises:
        ConfigError: naming it.
    """
    said = _SAID.setdefault(trainer, set())
    for line in _lines(find_holders(module, callbacks_of(trainer), targets), refuse):
        if line not in said:
            said.add(line)
            rank_zero_warn(line)


class LateHolders:
    """Look again, after steps 3 to 20 and then whenever a tenth more are done, for what was made since; until the switch.

    Args:
        trainer: the running trainer; its first optimizer's steps count.
        module: as for ``find_holders``.
        targets: likewise.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, targets: Mapping[str, Target]) -> None:
        self._watched: tuple[pl.Trainer, pl.LightningModule, Mapping[str, Target]] | None = (trainer, module, targets)
        self._steps, self._next = 0, 3
        trainer.optimizers[0].register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self._steps += 1
        if self._watched is None or self._steps < self._next:
            return
        self._next = self._steps + max(1, self._steps // 10)
        trainer, module, targets = self._watched
        if layers.has_changed(module) or not trainer.training:
            self._watched = None  # the hook stays, and does nothing: torch allows no hook to remove itself while it runs
            return
        name_holders(trainer, module, targets, refuse=False)


def _lines(held: Iterable[Held], refuse: bool) -> list[str]:
    lines = []
    for where, student, kind in held:
        if kind == "average":
            reason = (
                f"{where} pairs its parameters with these by position, which the switch changes: use Lightning's "
                "WeightAveraging or EMAWeightAveraging, which follow it"
            )
            if refuse:
                raise ConfigError("targets", student, reason)
            lines.append(f"{student}: {reason}")
        elif kind == "copy":
            lines.append(f"{where} looks like a copy of {student}, whose layers become low-rank: {CURE}")
        elif kind == "values":
            lines.append(
                f"{where} holds a value for each parameter of {student}, whose layers become low-rank, which changes number "
                "and names of its parameters: keep an average of student.state_dict(), which has the merged weights, or use "
                "Lightning's WeightAveraging"
            )
        else:
            lines.append(
                f"{where} holds parameters of {student} that low-rank training replaces: ask for parameters() anew where they "
                "are needed"
            )
    return lines


class _Search:
    """Look through attributes for parameters, copies of models and tensors of their shapes."""

    def __init__(self, module: pl.LightningModule, targets: Mapping[str, Target]) -> None:
        layers = {id(target.layer) for target in targets.values()}
        self._weights = {id(target.layer.weight): target.layer_name for target in targets.values()}
        self._module = module
        self._own = {id(child) for child in module.modules()}
        self._students: dict[Shapes, list[str]] = {}
        for name, child in module.named_modules():
            if child._modules and any(id(inner) in layers for inner in child.modules()):
                parameters = [p for p in child.parameters() if not is_lazy(p)]
                for some in (parameters, [p for p in parameters if p.requires_grad]):
                    if len(some) > 1:
                        self._students.setdefault(_shapes(some), []).append(plain_name(name) or type(module).__name__)
        self._seen: set[int] = set()
        self.found: list[Held] = []

    def alike(self, tensors: Iterable[Tensor], inside: str = "") -> str | None:
        """Return the first model with targets whose parameters have these shapes, in order; not one ``inside`` of this name."""
        names = self._students.get(_shapes([p for p in tensors if not is_lazy(p)]), [])
        return next((name for name in names if not inside or not f"{name}.".startswith(f"{inside}.")), None)

    def object(self, holder: Any, where: str, depth: int) -> None:
        """Look through the attributes of an object that is no tensor, module or container."""
        for key, value in list(getattr(holder, "__dict__", {}).items()):
            self.value(value, f"{where}.{key}", depth + 1)

    def value(self, value: Any, where: str, depth: int) -> None:
        """Look at an attribute or an item."""
        if depth > _DEPTH or id(value) in self._seen or isinstance(value, _PLAIN):
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._model(value, where)
        elif isinstance(value, Sized) and len(value) > _LONG:
            return
        elif isinstance(value, dict):
            self._tensors(list(value.values()), where)
            self._items(list(value.items()), where, depth)
        elif isinstance(value, (list, tuple)):
            self._tensors(value, where)
            self._items(list(enumerate(value)), where, depth)
        elif not _is_others(value):
            self.object(value, where, depth)

    def _items(self, items: Sequence[tuple[Any, Any]], where: str, depth: int) -> None:
        for key, item in items[:_ITEMS]:
            self.value(item, f"{where}[{key!r}]", depth + 1)

    def _model(self, model: nn.Module, where: str) -> None:
        if id(model) in self._own:
            return
        for name, child in _outermost(model):
            student = self.alike(child.parameters())
            if student is None or any(id(p) in self._weights for p in child.parameters()):  # none, or the model itself
                continue
            owner = model if name else child
            if type(owner).__module__.startswith("timm.") and not getattr(owner, "exclude_buffers", False):
                return
            by_position = isinstance(owner, AveragedModel) or type(owner).__module__.startswith("timm.")
            self.found.append(Held(where, student, "average" if by_position else "copy"))
            return

    def _tensors(self, values: Sequence[Any], where: str) -> None:
        if not values or not all(isinstance(value, Tensor) and not is_lazy(value) for value in values):
            return
        tensors: Sequence[Tensor] = values
        name = next((self._weights[id(value)] for value in tensors if id(value) in self._weights), None)
        if name is not None:
            self.found.append(Held(where, plain_name(name), "parameters"))
        elif (student := self.alike(tensors)) is not None:
            self.found.append(Held(where, student, "values"))


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model, and its children: averages are often models that hold one."""
    yield "", model
    yield from model.named_children()


def _shapes(tensors: Iterable[Tensor]) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)


def _is_others(value: Any) -> bool:
    """Return whether an object's class is Lightning's, torch's or ours: what those keep, they renew themselves."""
    return f"{type(value).__module__}.".startswith(_OTHERS)
