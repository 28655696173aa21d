"""Find frozen copies of a model that trains, which users keep inside of one module: DINO, BYOL, MoCo, mean teachers.

Their owners update them from the trained one, and most do so by the position of ``parameters()``. Adapters change number and
order of those, so the update would fail, or pair what does not belong together, after the switch; one by name from
``state_dict()`` goes on, with the merged weights. So a copy is named when the fit begins, and a ``zip`` of the two is refused
in the first step.

A copy that the module does not hold (in a list, in a callback) has no name here: it is found when the first optimizer step is
over, where an average is updated, by a ``zip`` with a module that has targets.
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
    """Notice during a step whether parameters of a student and of its teacher are taken in turn, as by ``zip``.

    Args:
        module: holds the students.
        pairs: as ``teachers`` gives them.
        targets: by name; with them, teachers outside of the module can be looked for (``outside``).
        followed: models outside of the module that follow its changes.
        others: notice any model that is paired with the whole module too, or an ``AveragedModel`` inside of it.
    """

    def __init__(
        self,
        module: nn.Module,
        pairs: Iterable[tuple[str, str]],
        targets: Mapping[str, Target] | None = None,
        followed: Iterable[nn.Module] = (),
        others: bool = False,
    ) -> None:
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
        self.outside = False  # whether teachers that the module does not hold are looked for too
        layers = {id(target.layer) for target in (targets or {}).values()}
        self._students = {  # id of a module with targets -> its name
            id(child): name or type(module).__name__
            for name, child in by_name.items()
            if any(id(inner) in layers for inner in child.modules())
        }
        self._own = _ids(module).union(*(_ids(model) for model in followed))
        self._last: list[tuple[str, nn.Parameter]] = []  # the last four: the student's name or "", and what was taken

    def start(self) -> None:
        """Begin to notice."""
        self._plain = nn.Module.named_parameters  # parameters() asks there too
        plain, this = self._plain, weakref.ref(self)

        def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, p in plain(module, *args, **kwargs):
                pairing = this()
                if pairing is not None:
                    pairing._note(module, p)
                yield name, p

        nn.Module.named_parameters = named_parameters

    def stop(self) -> None:
        """Put everything back."""
        if self._plain is not None:
            nn.Module.named_parameters, self._plain = self._plain, None

    def _note(self, module: nn.Module, p: nn.Parameter) -> None:
        for (student, teacher, of_student, of_teacher), turns in zip(self._pairs, self._turns, strict=True):
            other = of_teacher is None or id(p) in of_teacher
            turns.append(("student" if id(p) in of_student else "teacher" if other else "", id(p)))
            del turns[:-4]
            alternate = [whose for whose, _ in turns] in (["student", "teacher"] * 2, ["teacher", "student"] * 2)
            if alternate and len(set(turns)) == 4:  # and not the first one again, of which models ask dtype and device
                self.stop()
                raise ConfigError("targets", student, f"{teacher} pairs its parameters with these by position: {CURE}")
        if self.outside:
            self._note_outside(module, p)

    def _note_outside(self, module: nn.Module, p: nn.Parameter) -> None:
        student = self._students.get(id(module), "")
        self._last = [*self._last[-3:], (student, p)]
        names, taken = zip(*self._last, strict=True)
        student = max(names)
        in_turn = [bool(name) for name in names] in ([True, False] * 2, [False, True] * 2)
        if in_turn and set(names) == {"", student} and all(a.shape == b.shape for a, b in (taken[:2], taken[2:])):
            if not any(id(q) in self._own for name, q in self._last if not name):
                self.stop()
                kind = type(module).__name__
                held = f"a module outside of it ({kind}) pairs its parameters with these by position"
                raise ConfigError("targets", student, f"{held}: {CURE}")


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")
