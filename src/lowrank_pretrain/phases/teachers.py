"""Frozen copies of a model that trains, which users keep inside of one module: DINO's, BYOL's, MoCo's, mean teachers.

Their owners update them from the trained one, and most do so by the position of ``parameters()``. Adapters change number and
order of those, so the update would fail, or pair what does not belong together, after the switch; one by name from
``state_dict()`` goes on, with the merged weights. So a copy is named when the fit begins, and a ``zip`` of the two is refused
in the first step.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

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
    """Pairs (student, teacher) of modules that are alike, where only the first has targets and nothing of the second trains.

    Args:
        module: holds both.
        targets: by name.
        trained: ids of the parameters that an optimizer trains.

    Returns:
        Names of the outermost such pairs. Children of one list (blocks of which some are frozen) are none.
    """
    layers = {id(target.layer) for target in targets.values()}
    named = dict(module.named_modules())
    lists = {name for name, child in named.items() if isinstance(child, (nn.ModuleList, nn.Sequential))}
    alike: dict[Any, list[str]] = {}
    for name, child in named.items():
        own_names = [(own, p) for own, p in child.named_parameters() if ".lora_" not in f".{own}"]
        shapes = tuple((own, () if is_lazy(p) else tuple(p.shape)) for own, p in own_names)
        if name and shapes and child._modules:
            kind = getattr(type(child), "_plain_class", type(child))
            alike.setdefault((kind, shapes), []).append(name)
    still = {name for name, child in named.items() if not any(id(p) in trained for p in child.parameters())}
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


class Pairing:
    """Notices for the length of a step whether parameters of a student and of its teacher are taken in turn, as by ``zip``.

    Args:
        module: holds both.
        pairs: as ``teachers`` gives them.
        others: notice it of the module and any model outside of it too, or an ``AveragedModel`` inside.
    """

    def __init__(self, module: nn.Module, pairs: Iterable[tuple[str, str]], others: bool = False) -> None:
        by_name = {plain_name(name): child for name, child in module.named_modules()}
        self._pairs: list[tuple[str, str, set[int], set[int] | None]] = [
            (student, teacher, _ids(by_name[student]), _ids(by_name[teacher])) for student, teacher in pairs
        ]
        if others:
            whole, own = type(module).__name__, _ids(module)
            inside = {name: child for name, child in by_name.items() if isinstance(child, AveragedModel)}
            self._pairs += [(whole, name, own - _ids(child), _ids(child)) for name, child in inside.items()]
            self._pairs.append((whole, "another model", own, None))
        self._turns: list[list[tuple[str, int]]] = [[] for _ in self._pairs]
        self._plain: Callable[..., Any] | None = None

    def start(self) -> None:
        """Begin to notice."""
        self._plain = nn.Module.parameters
        plain, this = self._plain, weakref.ref(self)

        def parameters(module: nn.Module, recurse: bool = True) -> Iterator[nn.Parameter]:
            for p in plain(module, recurse):
                pairing = this()
                if pairing is not None:
                    pairing._note(p)
                yield p

        nn.Module.parameters = parameters

    def stop(self) -> None:
        """Put everything back."""
        if self._plain is not None:
            nn.Module.parameters, self._plain = self._plain, None

    def _note(self, p: nn.Parameter) -> None:
        for (student, teacher, of_student, of_teacher), turns in zip(self._pairs, self._turns, strict=True):
            other = of_teacher is None or id(p) in of_teacher
            turns.append(("student" if id(p) in of_student else "teacher" if other else "", id(p)))
            del turns[:-4]
            alternate = [whose for whose, _ in turns] in (["student", "teacher"] * 2, ["teacher", "student"] * 2)
            if alternate and len(set(turns)) == 4:  # and not the first one again, of which models ask dtype and device
                self.stop()
                raise ConfigError("targets", student, f"{teacher} pairs its parameters with these by position: {CURE}")


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")
