"""Find frozen copies of a training model that users keep in the same module: DINO, BYOL, MoCo, mean teachers.

Their owners update them from the trained one, and most do so by the position of ``parameters()``. Adapters change number and
order of those, so the update would fail, or pair what does not belong together, after the switch; one by name from
``state_dict()`` goes on, with the merged weights. So a copy is named when the fit begins, and a ``zip`` of the two is refused
in the first step.

A copy that the module does not hold (in a list, in a callback) has no name here: it is found when the first optimizer step is
over, where an average is updated, by a ``zip`` with a module that has targets.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import Target, plain_name

CURE = (
    "update it by name from student.state_dict(), which has the merged weights, and not by the position of parameters(), which "
    "adapters change"
)


def teachers(module: nn.Module, targets: Mapping[str, Target], trained: set[int]) -> list[tuple[str, str]]:
    """Return pairs (student, teacher) of modules that are alike: the first has targets, and nothing of the second trains.

    Args:
        module: holds both.
        targets: by name.
        trained: ids of the parameters that an optimizer trains.

    Returns:
        Names of the outermost such pairs. Children of one list (blocks of which some are frozen) are none.
    """
    layers = {id(target.layer) for target in (targets or {}).values()}
    named = dict(module.named_modules())
    lists = {name for name, child in named.items() if isinstance(child, (nn.ModuleList, nn.Sequential))}
    alike: dict[Any, list[str]] = {}
    for name, child in named.items():
        own_names = [(own, p) for own, p in nn.Module.named_parameters(child) if ".lora_" not in f".{own}"]
        shapes = tuple((own, () if is_lazy(p) else tuple(p.shape)) for own, p in own_names)
        if name and shapes and child._modules:
            kind = getattr(type(child), "_plain_class", type(child))
            alike.setdefault((kind, shapes), []).append(name)
    still = {name for name, child in named.items() if not any(id(p) in trained for _, p in nn.Module.named_parameters(child))}
    found: list[tuple[str, str]] = []
    for _, names in sorted(alike.items(), key=lambda item: -len(item[0][1])):  # the outermost come first
        for teacher in names:
            if teacher not in still or any(_within(teacher, other) for _, other in found):
                continue
            for student in names:
                apart = student != teacher and not (
                    student.rpartition(".")[0] == teacher.rpartition(".")[0] and student.rpartition(".")[0] in lists
                )
                if student not in still and apart and any(id(child) in layers for child in named[student].modules()):
                    found.append((plain_name(student), plain_name(teacher)))
                    break
    return found


class _Watch(NamedTuple):
    """Record parameters as they are iterated: a student's and a teacher's, in turn.

    Attributes:
        side: the student's name for what is taken of it, ``""`` for what is taken of a teacher, ``None`` for anything else.
        teacher: its name; ``None``: that of its class.
        same_shapes: whether only parameters of equal shapes make a pair.
        taken: the last four.
    """

    side: Callable[[nn.Module, nn.Parameter], str | None]
    teacher: str | None
    same_shapes: bool
    taken: list[tuple[str | None, nn.Module, nn.Parameter]]

    def note(self, module: nn.Module, p: nn.Parameter) -> tuple[str, str] | None:
        """Note that a module yields a parameter; return (student, teacher) if the last four alternated."""
        self.taken.append((self.side(module, p), module, p))
        del self.taken[:-4]
        sides = [side for side, _, _ in self.taken]
        student = max((side for side in sides if side), default="")
        if not student or sides not in ([student, ""] * 2, ["", student] * 2):
            return None
        if len({id(q) for _, _, q in self.taken}) < 4:  # the first one again, of which models ask dtype and device
            return None
        shapes = [q.shape for _, _, q in self.taken]
        if self.same_shapes and (shapes[0] != shapes[1] or shapes[2] != shapes[3]):
            return None
        kind = next(type(owner).__name__ for side, owner, _ in self.taken if side == "")
        return student, self.teacher or f"a module outside of it ({kind})"


class Pairing:
    """Detect, during a step, that parameters of a student and its teacher are iterated in turn, as by ``zip``.

    Args:
        module: holds the students.
        pairs: as ``teachers`` gives them.
    """

    def __init__(self, module: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
        self._module = module
        self._named = {plain_name(name): child for name, child in module.named_modules()}
        self._watches = [
            _Watch(_by_ids(student, _ids(self._named[student]), _ids(self._named[teacher])), teacher, False, [])
            for student, teacher in pairs
        ]
        self._plain: Callable[..., Any] | None = None

    def watch_whole(self) -> None:
        """Detect also any model that is paired with the whole module, or an ``AveragedModel`` inside of it."""
        whole, own = type(self._module).__name__, _ids(self._module)
        for name, child in self._named.items():
            if isinstance(child, AveragedModel):
                self._watches.append(_Watch(_by_ids(whole, own - _ids(child), _ids(child)), name, False, []))
        self._watches.append(_Watch(_by_ids(whole, own, None), "another model", False, []))

    def watch_outside(self, targets: Mapping[str, Target], followed: Iterable[nn.Module]) -> None:
        """Detect also an outside model that is paired with a part of the module that has targets.

        Args:
            targets: by name.
            followed: models outside of the module that follow its changes.
        """
        layers = {id(target.layer) for target in targets.values()}
        students = {
            id(child): name or type(self._module).__name__
            for name, child in self._named.items()
            if any(id(inner) in layers for inner in child.modules())
        }
        own = _ids(self._module).union(*(_ids(model) for model in followed))

        def side(module: nn.Module, p: nn.Parameter) -> str | None:
            return students.get(id(module), None if id(p) in own else "")

        self._watches.append(_Watch(side, None, True, []))

    def start(self) -> None:
        """Begin to watch."""
        self._plain = nn.Module.named_parameters  # parameters() asks there too
        plain, this = self._plain, weakref.ref(self)

        def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, p in plain(module, *args, **kwargs):
                pairing = this()
                if pairing is not None:
                    pairing._note(module, p)
                yield name, p

        _set_named_parameters(named_parameters)

    def stop(self) -> None:
        """Stop watching."""
        if self._plain is not None:
            _set_named_parameters(self._plain)
            self._plain = None

    def _note(self, module: nn.Module, p: nn.Parameter) -> None:
        for watch in self._watches:
            found = watch.note(module, p)
            if found is not None:
                self.stop()
                raise ConfigError("targets", found[0], f"{found[1]} pairs its parameters with these by position: {CURE}")


def _by_ids(student: str, of_student: set[int], of_teacher: set[int] | None) -> Callable[[nn.Module, nn.Parameter], str | None]:
    """Return a watch's ``side`` by the parameters' ids; a teacher without ids is any other model."""

    def side(_: nn.Module, p: nn.Parameter) -> str | None:
        if id(p) in of_student:
            return student
        return "" if of_teacher is None or id(p) in of_teacher else None

    return side


def _set_named_parameters(function: Callable[..., Any]) -> None:
    every: Any = nn.Module
    every.named_parameters = function


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for _, p in nn.Module.named_parameters(module)}


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")
