"""Which matrices: patterns -> named targets. All three methods choose their matrices here.

A *target* is one weight matrix, or one row block of a fused one, by its qualified name counted from the module handed in:
``blocks.3.mlp.fc1``, ``blocks.3.attn.qkv.q``, ``transformer.h.0.attn.c_attn.k``. O out, D in; a matrix is O x D.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lowrank_pretrain.errors import ConfigError

PRESETS = ("all", "attention", "mlp", "head")
WHOLE = "W"  # the part name of a layer that is not fused
_FUSED = {"qkv": False, "Wqkv": False, "c_attn": True}  # leaf name -> must O be exactly 3 D? (multi-query c_attn is not)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(
    r"(^|_)(mlp|ffn|feed_forward|feedforward|intermediate|experts?)|^(fc[12]|linear[12]|c_fc|output|[wW][123])$|"
    r"^(gate|up|down|gate_up)_proj$"
)


@dataclass(frozen=True)
class Target:
    """One weight matrix, or one row block of a fused one.

    Attributes:
        name: qualified name, ``….qkv.q`` for a row block.
        layer_name: qualified name of the layer that owns the weight.
        part: ``q``, ``k`` or ``v`` of a fused layer, else ``W``.
        start: first row of the block in the O x D matrix.
        rows: number of rows O of the block.
        cols: D.
        layer: the layer itself.
    """

    name: str
    layer_name: str
    part: str
    start: int
    rows: int
    cols: int
    layer: nn.Module = field(repr=False, compare=False)

    @property
    def max_rank(self) -> int:
        """Largest rank that an update of this matrix can have: min(D, O)."""
        return min(self.rows, self.cols)

    def matrix(self) -> Tensor:
        """The weight as an (O, D) view that shares memory with the parameter."""
        return weight_rows(self.layer)[self.start : self.start + self.rows]

    def rows_of_grad(self) -> Tensor:
        """The weight's gradient as an (O, D) view."""
        grad = self.layer.weight.grad
        return (grad.t() if is_conv1d(self.layer) else grad)[self.start : self.start + self.rows]


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the layer is transformers' ``Conv1D`` (a Linear whose weight is D x O), without importing transformers."""
    hf = sys.modules.get("transformers.pytorch_utils")
    return hf is not None and isinstance(layer, hf.Conv1D)


def weight_rows(layer: nn.Module) -> Tensor:
    """The layer's weight as O x D, whatever its own layout."""
    return layer.weight.t() if is_conv1d(layer) else layer.weight


def parts(layer_name: str, layer: nn.Module) -> list[tuple[str, int, int]]:
    """Row blocks of a layer as (part, first row, number of rows); one block named ``W`` if it is not fused."""
    out_features, in_features = weight_rows(layer).shape
    exactly = _FUSED.get(layer_name.rpartition(".")[2])
    if exactly is None or out_features % 3 or (exactly and out_features != 3 * in_features):
        return [(WHOLE, 0, out_features)]
    third = out_features // 3
    return [("q", 0, third), ("k", third, third), ("v", 2 * third, third)]


def plain_name(name: str) -> str:
    """The name without what ``torch.compile`` adds to it."""
    return name.replace("_orig_mod.", "")


def all_targets(module: nn.Module) -> dict[str, Target]:
    """Every matrix that could be a target, by name, in the module's order.

    ``nn.MultiheadAttention.out_proj`` is left out: its forward is never called, so an adapter on it would be dead.
    """
    found = {}
    for layer_name, layer in module.named_modules():
        if not (isinstance(layer, nn.Linear) or is_conv1d(layer)) or _bypassed(layer):
            continue
        name = plain_name(layer_name)
        for part, start, rows in parts(name, layer):
            full = name if part == WHOLE else f"{name}.{part}"
            found[full] = Target(full, name, part, start, rows, weight_rows(layer).shape[1], layer)
    return found


def find_targets(module: nn.Module, patterns: str | Sequence[str] = "all") -> dict[str, Target]:
    """Resolve presets and globs to targets.

    Args:
        module: the module that names count from (callback and strategy: the LightningModule).
        patterns: presets ``all`` (every Linear/Conv1D but the output head), ``attention``, ``mlp``, ``head``, or globs.
            A glob matches a target's full name, its layer's, or a suffix of either that begins at a dot.

    Returns:
        Targets by name, in the module's order.

    Raises:
        ConfigError: a pattern matches nothing, or names a matrix that cannot be a target (tied weights other than the
            output head's; the never-called ``out_proj`` of ``nn.MultiheadAttention``).
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ConfigError("targets", patterns, f"name at least one of {', '.join(PRESETS)} or a glob")
    everything = all_targets(module)
    heads = output_heads(module)
    tied = tied_layers(module)
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError("targets", pattern, "each entry must be a preset or a glob, as text")
        hits = {name for name, target in everything.items() if _hit(pattern, target, heads, tied)}
        if not hits:
            raise ConfigError("targets", pattern, _nothing_matches(module, pattern, everything))
        chosen |= hits
    for target in everything.values():
        if target.name in chosen and target.layer_name in tied and id(target.layer) not in heads:
            raise ConfigError(
                "targets", target.name, f"shares its weight with {', '.join(tied[target.layer_name])}: it cannot be a target"
            )
    return {name: target for name, target in everything.items() if name in chosen}


def output_heads(module: nn.Module) -> set[int]:
    """Ids of the layers of the output head, where a model inside names one (timm and transformers models do)."""
    heads: list[nn.Module] = []
    for child in module.modules():
        for getter in ("get_classifier", "get_output_embeddings"):
            method = getattr(child, getter, None)
            if callable(method):
                try:
                    named = method()
                except (NotImplementedError, AttributeError, TypeError):
                    continue  # a model that does not name its head
                heads += [h for h in (named if isinstance(named, (tuple, list)) else [named]) if isinstance(h, nn.Module)]
    return {id(layer) for head in heads for layer in head.modules()}


def tied_layers(module: nn.Module) -> dict[str, list[str]]:
    """Layers whose weight is also another layer's, with the names of those others."""
    owners: dict[int, list[str]] = {}
    for name, child in module.named_modules():
        weight = child._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(plain_name(name))
    return {name: [other for other in names if other != name] for names in owners.values() if len(names) > 1 for name in names}


def families(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map each target name to its family: every index into a list of equal children becomes ``*``.

    ``blocks.3.mlp.fc2`` -> ``blocks.*.mlp.fc2``. The full suffix is kept, so that attention's and the MLP's ``output``
    are two families (the authors' regex makes them one, and loses one of the two).
    """
    repeated = {
        plain_name(name)
        for name, child in module.named_modules()
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in child}) == 1
    }
    result = {}
    for name in names:
        words = name.split(".")
        result[name] = ".".join(
            "*" if word.isdigit() and ".".join(words[:i]) in repeated else word for i, word in enumerate(words)
        )
    return result


def _bypassed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _hit(pattern: str, target: Target, heads: set[int], tied: dict[str, list[str]]) -> bool:
    is_head = id(target.layer) in heads
    if pattern == "head":
        return is_head
    if pattern in PRESETS:
        if is_head or target.layer_name in tied:
            return False
        words = target.layer_name.split(".")
        attention = any(_ATTENTION.search(word) for word in words)
        if pattern == "attention":
            return attention
        return pattern == "all" or (not attention and any(_MLP.search(word) for word in words))
    return any(matches(pattern, name) for name in {target.name, target.layer_name})


def matches(pattern: str, name: str) -> bool:
    """Whether a glob matches the name, or a suffix of it that begins at a dot."""
    words = name.split(".")
    return any(fnmatchcase(".".join(words[i:]), pattern) for i in range(len(words)))


def _nothing_matches(module: nn.Module, pattern: str, everything: dict[str, Target]) -> str:
    for name, layer in module.named_modules():
        if _bypassed(layer) and matches(pattern, plain_name(name)):
            return f"{plain_name(name)} belongs to nn.MultiheadAttention, which never calls it: it cannot be a target"
    names = families(module, everything)
    counts: dict[str, int] = {}
    for family in names.values():
        counts[family] = counts.get(family, 0) + 1
    listed = ", ".join(f"{family} ({n})" if n > 1 else family for family, n in counts.items()) or "none"
    return f"matches no target; allowed are {', '.join(PRESETS)} or a glob over: {listed}"
