"""Who is compared on a slow network: how workers agree, on which tasks, and the one space that every side searches."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from experiments import tasks
from lowrank_pretrain.run.search import Point

WORLD, STEPS, WIDTH = 4, 300, 64
RANK = 8  # of a head; 4 workers' heads span half of the width, as 8 heads of rank 16 span a third of ViT-S
PRELORA = ["method.windows=2", "method.window_unit=step", "method.window=30", "method.weight_tol=0.05", "method.loss_tol=0.2",
           "method.warmup=1", "method.latest=4", "method.ranks=[4,8]"]  # fmt: skip
LTE = ["method=lte", "method.heads=1", f"method.rank={RANK}", "method.sync_rest=merge"]


@dataclass(frozen=True)
class Side:
    """One way to agree.

    Attributes:
        family: wires are tried for the best side of each family.
        overrides: of the command line.
        coordinates: what it searches, in this order.
        first: its first learning rate over DDP's.
        rest: its first rate of embeddings, norms and biases over its matrices'.
        wires: what it can send besides float32.
        usual: what its method sends in, if nothing is said.
        needs: name of a method's configuration, or of an argument of ``LTEStrategy``, that must be there.
    """

    family: str
    overrides: tuple[str, ...]
    coordinates: tuple[str, ...] = ("lr", "rest")
    first: float = 1.0
    rest: float = 4.0
    wires: tuple[str, ...] = ()
    usual: str = "float32"
    needs: str = ""

    @property
    def there(self) -> bool:
        """Return whether this installation can run it."""
        from lowrank_pretrain import LTEStrategy

        file = resources.files("lowrank_pretrain.conf") / "method" / f"{self.needs}.yaml"
        return not self.needs or file.is_file() or self.needs in inspect.signature(LTEStrategy).parameters


OUTER = ("lr", "outer_momentum", "rest", "outer_lr")
FULL, FACTORS = ("int8", "int4", "int2"), ("int8", "int4")


def diloco(every: int) -> Side:
    """Return DiLoCo that merges every so many steps."""
    return Side("DiLoCo", ("method=diloco", f"method.merge_every={every}"), OUTER, wires=FULL)


def lte(every: int) -> Side:
    """Return LTE that merges every so many steps."""
    return Side("LTE", (*LTE, f"method.merge_every={every}"), first=2.0, rest=2.0, wires=FACTORS)


SIDES = {
    "ddp": Side("DDP", ("method=full", "++trainer.strategy=ddp")),
    "diloco_h10": diloco(10),
    "diloco_h30": diloco(30),
    "lte_t10": lte(10),
    "lte_galore": Side("LTE × GaLore", ("method=lte_galore", "method.merge_every=10", "method.rank=16", "method.scale=1",
                                        "method.sync_rest=merge"), first=2.0, rest=2.0, wires=FACTORS),
    "diloco_h100": diloco(100),
    "lte_t30": lte(30),
    "lte_t10_outer": Side("LTE", (*LTE, "method.merge_every=10"), OUTER, first=2.0, rest=2.0, wires=FACTORS),
    "muloco_h30": Side("MuLoCo", ("method=muloco", "method.merge_every=30"), OUTER, wires=FULL, usual="int2",
                       needs="muloco"),
    "prelora_lte": Side("PreLoRA → LTE", ("method=prelora_lte", "method.heads=1", "method.before=merge",
                                          "method.merge_every=10", "method.sync_rest=merge", *PRELORA), OUTER, wires=FACTORS,
                        needs="before"),
}  # fmt: skip
TASKS = {
    "text": [*tasks.llama(width=WIDTH, batch=4, tokens=64), *tasks.length(1, STEPS), "optim.warmup=0.1"],
    "images": [*tasks.images(width=WIDTH, batch=8), *tasks.length(1, STEPS), "optim.warmup=0.1"],
}
FIRST_LR = {"text": 4e-3, "images": 2e-3}  # DDP's


@dataclass(frozen=True)
class Space:
    """Where a side may go. Learning rates go by factors, without an end; the other coordinates have lists.

    Attributes:
        lists: of ``outer_momentum``, ``outer_lr``, and ``rest`` (the rest's rate over the matrices').
        factor: a step of the learning rate.
        budget: most runs of a side's search.
        gain: the loss must fall by more than this for a step to count.
    """

    lists: Mapping[str, tuple[float, ...]] = field(default_factory=lambda: {
        "outer_momentum": (0.0, 0.5, 0.8, 0.9), "outer_lr": (0.5, 0.7, 1.0, 1.4), "rest": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    })  # fmt: skip
    factor: float = 2.0
    budget: int = 8
    gain: float = 0.005

    def start(self, side: Side) -> Point:
        """Return a side's first point."""
        begin = {"outer_momentum": 0.5, "outer_lr": 0.7, "rest": side.rest}
        return tuple((name, 0 if name == "lr" else self.lists[name].index(begin[name])) for name in side.coordinates)

    def values(self, point: Point, lr: float) -> dict[str, float]:
        """Return what a point means, if place 0 of the learning rate is `lr`."""
        return {
            name: float(f"{lr * self.factor**place:.3g}") if name == "lr" else self.lists[name][place] for name, place in point
        }

    def neighbours(self, point: Point, name: str) -> list[Point]:
        """Return the points one step off along a coordinate."""
        place = dict(point)[name]
        allowed = [p for p in (place - 1, place + 1) if name == "lr" or 0 <= p < len(self.lists[name])]
        return [tuple((key, p if key == name else old) for key, old in point) for p in allowed]


def settings(task: str, side: str, values: Mapping[str, float], wire: str = "float32") -> list[str]:
    """Return the overrides of a side with its chosen values."""
    lr = values["lr"]
    found = [*TASKS[task], f"trainer.devices={WORLD}", *SIDES[side].overrides]
    found += [f"optim.lr={lr:g}", f"optim.rest_lr={lr * values['rest']:g}"]
    found += [f"method.{name}={values[name]:g}" for name in ("outer_lr", "outer_momentum") if name in values]
    return found + [f"method.wire={wire}"] * (wire != SIDES[side].usual)
