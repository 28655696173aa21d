"""Keep a model's heads as records, each tensor with the heads along dim 0, to park, gather, save and restore them.

A checkpoint names every tensor by a text, and only ``to_file`` and ``from_file`` know it:

    "layer|<layer>|A", "…|prev_A", "…|stage", "…|B.<part>", "…|prev_B.<part>", "moment|<layer>.lora_A|<state key>", …
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.wrapped import state_holder, state_of
from lowrank_pretrain.lte.bare_groups import check_moment
from lowrank_pretrain.lte.heads.layer import HeadLayer, MultiheadLoRALinear, factor_name, factor_parameters, factors_of

UNBORN, LIVES, MERGED = 0.0, 1.0, 2.0  # never trained yet · trains · trains and W holds some of it

NUMBER = "#"  # ends the key of what the optimizer keeps as a Python number: as a tensor it would be computed with in float32

Moments = dict[str, Tensor]  # by state key, each (H, …)
State = dict[str, Tensor | float]  # of one parameter, as its optimizer holds it


@dataclass
class LayerHeads:
    """Hold the heads of one layer.

    Attributes:
        A: (H, ΣR, D).
        prev_A: what W holds of it; zeros: nothing.
        stage: (H,), ``UNBORN``, ``LIVES`` or ``MERGED``.
        B: per part (H, O_part, R_part).
        prev_B: likewise, what W holds of it.
        moments: optimizer state by factor: ``A``, or ``B.<part>``.
    """

    A: Tensor
    prev_A: Tensor
    stage: Tensor
    B: dict[str, Tensor]
    prev_B: dict[str, Tensor]
    moments: dict[str, Moments] = field(default_factory=dict)

    def _map(self, change: Callable[[Tensor], Tensor], moment: Callable[[str, Tensor], Tensor] | None = None) -> "LayerHeads":
        """Return a record with every tensor changed."""
        of_moment = moment or (lambda key, value: change(value))
        return LayerHeads(
            change(self.A), change(self.prev_A), change(self.stage),
            {part: change(B) for part, B in self.B.items()}, {part: change(B) for part, B in self.prev_B.items()},
            {factor: {key: of_moment(key, value) for key, value in held.items()} for factor, held in self.moments.items()},
        )  # fmt: skip

    def pick(self, first: int, count: int) -> "LayerHeads":
        """Return heads ``first`` … ``first + count − 1``, as copies; fewer if there are not enough."""
        return self._map(lambda value: value[first : first + count].clone())

    def cpu(self) -> "LayerHeads":
        """Return the record in main memory."""
        return self._map(Tensor.cpu)

    def extend(self, count: int) -> "LayerHeads":
        """Return a record with heads added until there are ``count``, as if never trained; see ``_longer_moment``."""
        return self._map(lambda value: _longer(value, count), lambda key, value: _longer_moment(key, value, count))

    @classmethod
    def stack(cls, records: Sequence["LayerHeads | None"]) -> "LayerHeads":
        """Return the heads of several records one after another; zeros for missing records and missing optimizer state."""
        there = [record for record in records if record is not None]
        like = there[0]
        absent = like._map(torch.zeros_like)
        full = [absent if record is None else record for record in records]
        states: dict[str, Moments] = {}
        for record in there:
            for factor, held in record.moments.items():
                states.setdefault(factor, {}).update({k: v for k, v in held.items() if k not in states[factor]})
        return cls(
            torch.cat([r.A for r in full]), torch.cat([r.prev_A for r in full]), torch.cat([r.stage for r in full]),
            {part: torch.cat([r.B[part] for r in full]) for part in like.B},
            {part: torch.cat([r.prev_B[part] for r in full]) for part in like.prev_B},
            {
                factor: {
                    key: torch.cat([_moment_of(r, factor, key, value) for r in records]) for key, value in held.items()
                }
                for factor, held in states.items()
            },
        )  # fmt: skip


Record = dict[str, LayerHeads]  # by layer


def _moment_of(record: LayerHeads | None, factor: str, key: str, like: Tensor) -> Tensor:
    held = {} if record is None else record.moments.get(factor, {})
    return held[key] if key in held else torch.zeros_like(like)


def _longer(value: Tensor, count: int) -> Tensor:
    """Return a tensor with zeros added along dim 0."""
    return torch.cat([value, value.new_zeros(max(0, count - len(value)), *value.shape[1:])])


def _longer_moment(key: str, value: Tensor, count: int) -> Tensor:
    """Return optimizer state extended by heads, with values that are safe to start from.

    Adam's ``step`` is one for all heads of a parameter, so a new head among old ones has no bias correction: with a second
    moment of zero its first steps would be several times too long. It starts with the others' mean square, and no momentum.
    """
    if len(value) < count and len(value) > 0 and (value.ndim == 1 or "sq" in key):
        mean = value.mean(0, keepdim=True) if value.is_floating_point() else value.amax(0, keepdim=True)
        return torch.cat([value, mean.expand(count - len(value), *value.shape[1:])])
    return _longer(value, count)


def record_of(layers: Mapping[str, HeadLayer], optimizers: Iterable[Optimizer]) -> Record:
    """Return factors, what W holds of them, and their optimizer state; the factors are views of the live ones."""
    optimizers = list(optimizers)
    return {name: _layer_heads(layer, optimizers) for name, layer in layers.items()}


def _layer_heads(layer: HeadLayer, optimizers: list[Optimizer]) -> LayerHeads:
    A = layer.lora_A.detach()
    stage = torch.full((len(A),), MERGED if layer.has_prev else LIVES, dtype=torch.float32, device=A.device)
    B = {part.name: layer.lora_B[part.name].detach() for part in layer._parts}
    prev_A, old_B = layer.prev_factors()
    found = LayerHeads(
        A, torch.zeros_like(A) if prev_A is None else prev_A, stage, B,
        {part: torch.zeros_like(b) if prev_A is None else old_B[index] for index, (part, b) in enumerate(B.items())},
    )  # fmt: skip
    for factor, p in factors_of(layer).items():
        for optimizer in optimizers:
            for key, value in state_of(optimizer, p).items():
                held = found.moments.setdefault(factor, {})
                if isinstance(value, Tensor) and value.shape == p.shape:
                    held[key] = value
                else:  # all heads of a parameter share it (``step``)
                    check_moment(type(optimizer).__name__, key, value, p)
                    number = not isinstance(value, Tensor)
                    one = torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else torch.as_tensor(value)
                    held[f"{key}{NUMBER}" if number else key] = one.repeat(len(p))
    return found


@torch.no_grad()
def put_layers(record: Record, layers: Mapping[str, MultiheadLoRALinear]) -> None:
    """Restore the factors, and the record of what W holds of them.

    Raises:
        ConfigError: a layer or a shape differs.
    """
    for name, layer in layers.items():
        there = record.get(name)
        for factor, p in factors_of(layer).items():
            value = None if there is None else there.A if factor == "A" else there.B.get(factor.removeprefix("B."))
            if value is None or value.shape != p.shape:
                shape = "is missing" if value is None else f"has shape {tuple(value.shape)}, not {tuple(p.shape)}"
                raise ConfigError("ckpt_path", f"{name}.lora_{factor}", f"{shape}: the checkpoint's heads are of another model")
            p.copy_(value)
        if there is not None and (there.stage == MERGED).any():
            layer.set_prev(there.prev_A.to(layer.lora_A), {part: B.to(layer.lora_A) for part, B in there.prev_B.items()})
        else:
            layer.set_prev(None, None)


def put_moments(record: Record, layers: Mapping[str, HeadLayer], optimizers: Iterable[Optimizer]) -> None:
    """Restore optimizer state into the optimizers that hold the factors."""
    owner = {id(p): (optimizer, group) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    states = states_of(record)
    for name, p in factor_parameters(layers).items():
        if states.get(name):
            optimizer, group = owner[id(p)]
            counts_there = group.get("fused") or group.get("capturable")  # else torch keeps the number of steps on the CPU
            state_holder(optimizer).state[p] = {  # a record from a checkpoint lies on the CPU
                key: value.to(p.device) if isinstance(value, Tensor) and (value.ndim or counts_there) else value
                for key, value in states[name].items()
            }


def states_of(record: Record) -> dict[str, State]:
    """Return optimizer state by a factor's name, as an optimizer holds it: one number where all heads share it."""
    return {
        factor_name(name, factor): dict(_as_held(key, value) for key, value in held.items())
        for name, heads in record.items()
        for factor, held in heads.moments.items()
    }


def _as_held(key: str, value: Tensor) -> tuple[str, Tensor | float]:
    if key.endswith(NUMBER):
        return key.removesuffix(NUMBER), value.max().item()
    return key, value.max() if value.ndim == 1 else value


def to_file(record: Record) -> dict[str, Tensor]:
    """Return the record as a checkpoint stores it: tensors by text keys."""
    found: dict[str, Tensor] = {}
    for name, heads in record.items():
        start = f"layer|{name}|"
        found |= {f"{start}A": heads.A, f"{start}prev_A": heads.prev_A, f"{start}stage": heads.stage}
        for part, B in heads.B.items():
            found |= {f"{start}B.{part}": B, f"{start}prev_B.{part}": heads.prev_B[part]}
    for name, heads in record.items():
        for factor, held in heads.moments.items():
            found |= {f"moment|{factor_name(name, factor)}|{key}": value for key, value in held.items()}
    return found


def from_file(entries: Mapping[str, Tensor]) -> Record:
    """Invert ``to_file``; entries of another kind are skipped."""
    fields: dict[str, dict[str, Tensor]] = {}
    moments: dict[str, Moments] = {}
    for text, value in entries.items():
        kind, name, key = text.split("|")
        if kind == "layer":
            fields.setdefault(name, {})[key] = value
        elif kind == "moment":
            moments.setdefault(name, {})[key] = value
    record: Record = {}
    for name, held in fields.items():
        B = {key.removeprefix("B."): value for key, value in held.items() if key.startswith("B.")}
        prev_B = {key.removeprefix("prev_B."): value for key, value in held.items() if key.startswith("prev_B.")}
        states = {factor: moments.get(factor_name(name, factor)) for factor in ("A", *(f"B.{part}" for part in B))}
        kept = {factor: state for factor, state in states.items() if state is not None}
        record[name] = LayerHeads(held["A"], held["prev_A"], held["stage"], B, prev_B, kept)
    return record
