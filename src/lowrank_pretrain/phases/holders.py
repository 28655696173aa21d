"""Find what callbacks and modules keep of a model's parameters: hand-made averages, their copies, lists for clipping.

A switch changes number and order of the parameters. Who took them before, and pairs them by position (or asks for each name
of ``named_parameters()``) afterwards, fails then, perhaps days after the start; a list of the parameters themselves goes
stale without a word. Averages often begin late, so that no step at the start shows how they are updated. So attributes and
buffers are looked through when a fit starts, and now and then until the switch for what was made since. Lightning's own
averages follow the switch, and timm's go by ``state_dict()``.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
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
_ALIKE = 4  # tensors whose shapes alone tell that buffers are copies of parameters; fewer must be equal to these
_FLAT = 1000  # numbers of a flat copy that its length alone tells; a shorter one must be equal to the parameters
_LIGHTNINGS = frozenset(pl.LightningModule().__dict__)  # a module's attributes that are not a user's
_OTHERS = ("lightning.", "lightning_fabric.", "pytorch_lightning.", "lowrank_pretrain.", "torch.", "builtins.", "numpy.")

_SAID: MutableMapping[pl.Trainer, set[str]] = WeakKeyDictionary()  # lines that a fit has been told

_PLAIN = (str, bytes, int, float, type, type(None), ModuleType, FunctionType, MethodType, pl.Trainer)

Shapes = tuple[tuple[int, ...], ...]


class Student(NamedTuple):
    """Name a model with targets, and hold its parameters."""

    name: str
    parameters: list[nn.Parameter]


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
        if isinstance(child, AveragedModel) and (
            student := search.alike([p for _, p in nn.Module.named_parameters(child.module)], prefix)
        ):
            search.found.append(Held(prefix, student, "average"))
        if name == "" or not _is_others(child):
            for key, value in list(child.__dict__.items()):
                if key not in _LIGHTNINGS:
                    search.value(value, f"{prefix}.{key}", 1)
        search.kept(child, prefix)
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
        self._students: dict[Shapes, list[Student]] = {}
        self._flat: dict[int, Student] = {}  # by the numbers in all their parameters
        lists = [child for child in module.modules() if isinstance(child, (nn.ParameterList, nn.ParameterDict))]
        listed = {id(p) for child in lists for p in child._parameters.values()}
        for name, child in module.named_modules():
            if child._modules and any(id(inner) in layers for inner in child.modules()):
                parameters = [p for _, p in nn.Module.named_parameters(child) if not is_lazy(p)]
                variants = (
                    parameters,
                    [p for p in parameters if p.requires_grad],
                    [p for p in parameters if id(p) not in listed],
                )
                for shapes, some in {_shapes(some): some for some in variants if len(some) > 1}.items():
                    student = Student(plain_name(name) or type(module).__name__, some)
                    self._students.setdefault(shapes, []).append(student)
                    self._flat.setdefault(sum(p.numel() for p in some), student)
        self._seen: set[int] = set()
        self.found: list[Held] = []

    def alike(self, tensors: Iterable[Tensor], inside: str = "") -> str | None:
        """Return the first model with targets whose parameters have these shapes, in order; not one ``inside`` of this name."""
        found = self._students.get(_shapes([p for p in tensors if not is_lazy(p)]), [])
        return next((name for name, _ in found if not inside or not f"{name}.".startswith(f"{inside}.")), None)

    def kept(self, child: nn.Module, where: str) -> None:
        """Look at a module's own buffers, and at a list of parameters, for a value of each parameter of a model."""
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
            values = list(child._parameters.values())
            tensors = [value for value in values if value is not None and not is_lazy(value)]
            same = next(
                (each for each in self._students.get(_shapes(tensors), []) if not _share(tensors, each.parameters)), None
            )
            if same is not None and (not any(p.requires_grad for p in tensors) or _are_equal(tensors, same.parameters)):
                self.found.append(Held(where, same.name, "values"))
        elif not _is_others(child) or child is self._module:
            buffers = [value for value in child._buffers.values() if value is not None and not is_lazy(value)]
            for name, value in child._buffers.items():
                if value is not None:
                    self._flat_copy(value, f"{where}.{name}")
            if (student := self._copied(buffers)) is not None:
                self.found.append(Held(f"{where}, in its buffers,", student.name, "values"))

    def _copied(self, buffers: Sequence[Tensor]) -> Student | None:
        """Return the model of whose parameters there is a copy each among buffers, in order; others may lie between them."""
        shapes = _shapes(buffers)
        for wanted, students in self._students.items():
            if len(wanted) > len(shapes):
                continue
            places, at = [], 0
            for shape in wanted:
                while at < len(shapes) and shapes[at] != shape:
                    at += 1
                places.append(at)
                at += 1
            if at > len(shapes):
                continue
            tensors = [buffers[place] for place in places]
            for student in students:
                if (len(wanted) >= _ALIKE and len(set(wanted)) > 1) or _are_equal(tensors, student.parameters):
                    return student
        return None

    def _flat_copy(self, value: Tensor, where: str) -> None:
        """Look whether a tensor is all parameters of a model, laid end to end (``parameters_to_vector``)."""
        if is_lazy(value) or value.ndim != 1 or isinstance(value, nn.Parameter):
            return
        student = self._flat.get(value.numel())
        if student is None:
            return
        pieces = value.detach().split([p.numel() for p in student.parameters])
        if value.numel() >= _FLAT or _are_equal(pieces, [p.flatten() for p in student.parameters]):
            self.found.append(Held(where, student.name, "values"))

    def object(self, holder: Any, where: str, depth: int) -> None:
        """Look through the attributes of an object that is no tensor, module or container."""
        for key, value in list(getattr(holder, "__dict__", {}).items()):
            self.value(value, f"{where}.{key}", depth + 1)

    def value(self, value: Any, where: str, depth: int) -> None:
        """Look at an attribute or an item."""
        if depth > _DEPTH or id(value) in self._seen or isinstance(value, _PLAIN):
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._flat_copy(value, where)
        elif isinstance(value, nn.Module):
            self._model(value, where)
        elif isinstance(value, (dict, list, tuple)) and len(value) > _LONG:  # len() of anything else may raise
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
            parameters = [p for _, p in nn.Module.named_parameters(child)]
            student = self.alike(parameters)
            if student is None or any(id(p) in self._weights for p in parameters):  # none, or the model itself
                continue
            owner = model if name else child
            if type(owner).__module__.startswith("timm.") and not getattr(owner, "exclude_buffers", False):
                return
            by_position = isinstance(owner, AveragedModel) or type(owner).__module__.startswith("timm.")
            self.found.append(Held(where, student, "average" if by_position else "copy"))
            return
        for child in model.modules():
            if id(child) not in self._own:
                self.kept(child, where)

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


def _share(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Return whether a tensor is in both."""
    return not {id(tensor) for tensor in some}.isdisjoint(id(tensor) for tensor in others)


@torch.no_grad()
def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether tensors of the same shapes hold the same numbers; they are read in pairs, up to the first that differs."""
    return all(
        type(a.data) is type(b.data) and (a.device, a.dtype) == (b.device, b.dtype) and not a.is_meta and torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


def _is_others(value: Any) -> bool:
    """Return whether an object's class is Lightning's, torch's or ours: what those keep, they renew themselves."""
    return f"{type(value).__module__}.".startswith(_OTHERS)
