"""Search for the best settings: one published space for every optimizer, and the rule by which a search moves through it."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lowrank_pretrain.core.checks import number, whole
from lowrank_pretrain.core.errors import ConfigError

Point = tuple[tuple[str, int], ...]  # (coordinate, place on its scale), hashable
Loss = Callable[[Point], float]
LISTS: dict[str, tuple[float, ...]] = {
    "beta1": (0.8, 0.9, 0.95, 0.98),
    "beta2": (0.95, 0.98, 0.99, 0.999),
    "weight_decay": (0.0, 0.01, 0.03, 0.1, 0.3),
    "warmup": (0.02, 0.05, 0.1, 0.2),
}
START = {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.03, "warmup": 0.1}
RATES = ("lr", "rest_lr")  # their scale has no end: a step is a factor
NAMES = (*RATES, *LISTS)


@dataclass(frozen=True)
class Space:
    """Describe where a side may go, and how far.

    Args:
        lists: values of each coordinate that is no rate, in increasing order.
        factor: a step of either rate.
        budget: most runs that a side's search may take.
        gain: the loss must fall by more than this for a step to count; what is less is noise of one seed.

    Raises:
        ConfigError: a list without an interior, or a value that cannot be.
    """

    lists: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: dict(LISTS))
    factor: float = 1.5
    budget: int = 60
    gain: float = 0.001

    def __post_init__(self) -> None:
        number("factor", self.factor, above=1)
        number("gain", self.gain, least=0)
        whole("budget", self.budget, 1, "runs")
        for name in self.lists:
            if name not in LISTS:
                raise ConfigError("lists", name, f"must be one of {', '.join(LISTS)}")
        for name in LISTS:
            values = self.lists.get(name, ())
            for value in values if isinstance(values, (tuple, list)) else ():
                share = name.startswith("beta") or (name == "warmup" and isinstance(value, float))
                number(name, value, least=0, below=1 if share else math.inf)
            if not isinstance(values, (tuple, list)) or len(values) < 3 or list(values) != sorted(set(values)):
                raise ConfigError(name, values, "must be three or more increasing values: a search space needs an interior")

    def start(self, lr: float, rest_lr: float) -> tuple[Point, dict[str, float]]:
        """Return the first point, and the rates at place 0."""
        places = {
            name: min(range(len(values)), key=lambda i: abs(values[i] - START[name])) for name, values in self.lists.items()
        }
        return tuple((name, places.get(name, 0)) for name in NAMES), {"lr": lr, "rest_lr": rest_lr}

    def values(self, point: Point, origin: Mapping[str, float]) -> dict[str, float]:
        """Return what a point means; rates to three digits."""
        return {
            name: float(f"{origin[name] * self.factor**place:.3g}") if name in RATES else self.lists[name][place]
            for name, place in point
        }

    def neighbours(self, point: Point, name: str) -> list[Point]:
        """Return the points one step off along a coordinate; at the end of a list there is one."""
        place = dict(point)[name]
        allowed = [p for p in (place - 1, place + 1) if name in RATES or 0 <= p < len(self.lists[name])]
        return [tuple((key, p if key == name else old) for key, old in point) for p in allowed]


class Steps(Protocol):
    """Describe what a search needs to know of its space."""

    @property
    def lists(self) -> Mapping[str, tuple[float, ...]]:
        """Return the values of each coordinate that is no rate, in increasing order."""

    @property
    def budget(self) -> int:
        """Return the most runs that a side's search may take."""

    @property
    def gain(self) -> float:
        """Return by how much the loss must fall for a step to count."""

    def neighbours(self, point: Point, name: str) -> list[Point]:
        """Return the points one step off along a coordinate."""


@dataclass
class Descent:
    """Go along each coordinate in turn, until no neighbour is better or the budget is spent: one side's coordinate descent.

    Args:
        space: where.
        point: where to begin.
        coordinates: which may change.
        loss: of a point that has been run; infinite where it diverged.
    """

    space: Steps
    point: Point
    coordinates: tuple[str, ...]
    loss: Loss
    tried: set[Point] = field(default_factory=set)
    settled: bool = False  # no neighbour is better; False in the end: the budget ended the search

    def requests(self) -> Iterator[list[Point]]:
        """Yield lists of points to run. When the last has been run, ``point`` is the answer.

        The same losses give the same requests, so a search that was cut off goes on where it stopped.
        """
        quiet = 0  # coordinates in a row along which nothing was better
        number_of = 0
        while quiet < len(self.coordinates):
            name = self.coordinates[number_of % len(self.coordinates)]
            wanted = [self.point, *self.space.neighbours(self.point, name)]
            new = [point for point in wanted if point not in self.tried]
            if len(self.tried) + len(new) > self.space.budget:
                return
            self.tried.update(new)
            yield wanted
            best = min(wanted, key=self.loss)
            if self.loss(best) < self.loss(self.point) - self.space.gain:
                self.point, quiet = best, 0  # and once more along the same coordinate
            else:
                quiet, number_of = quiet + 1, number_of + 1
        self.settled = True

    def at_an_edge(self) -> list[str]:
        """Return the coordinates whose best value is the first or last of its list."""
        places = dict(self.point)
        return [n for n in self.coordinates if n not in RATES and places[n] in (0, len(self.space.lists[n]) - 1)]


def from_file(values: Any) -> Space:
    """Return a space from JSON: ``{"factor": 2, "budget": 20, "lists": {"beta1": [0.8, 0.9, 0.95], …}}``.

    Raises:
        ConfigError: no object, an unknown key, or as :class:`Space`.
    """
    known = Space.__dataclass_fields__
    if not isinstance(values, Mapping):
        raise ConfigError("space", values, f"must be an object with some of {', '.join(known)}")
    for key in values:
        if key not in known:
            raise ConfigError(key, values[key], f"must be one of {', '.join(known)}")
    lists = values.get("lists", {})
    if not isinstance(lists, Mapping):
        raise ConfigError("lists", lists, f"must be values by coordinate: {', '.join(LISTS)}")
    return Space(**{**values, "lists": {**LISTS, **{name: some for name, some in lists.items()}}})
