"""Resolve patterns to named targets. All three methods choose their matrices here.

A *target* is one weight matrix, or one row block of a fused one, by its qualified name relative to the module passed in:
``blocks.3.mlp.fc1``, ``blocks.3.attn.qkv.q``, ``transformer.h.0.attn.c_attn.k``. O out, D in; a matrix is O x D.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_pretrain.core.errors import ConfigError

PRESETS = ("all", "attention", "mlp", "head")
WHOLE = "W"  # the part name of a layer that is not fused
_FUSED = {"qkv": False, "Wqkv": False, "c_attn": True}  # leaf name -> must O be exactly 3 D? (multi-query c_attn is not)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(
    r"(^|_)(mlp|ffn|feed_forward|feedforward|intermediate|experts?)|^(fc[12]|linear[12]|c_fc|output|[wW][123])$|"
    r"^(gate|up|down|gate_up)_proj$"
)
_ALLOWED = f"must be one of {', '.join(PRESETS)}, a glob, or a list of these; with ! before it to leave out"


class MatrixLayer(nn.Module):
    """Declare, for type checking, the attributes of a layer that holds targets: ``nn.Linear``, ``Conv1D``, or a subclass."""

    weight: nn.Parameter
    bias: nn.Parameter | None


@dataclass(frozen=True)
class Target:
    """Describe one weight matrix, or one row block of a fused one.

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
    layer: MatrixLayer = field(repr=False, compare=False)

    @property
    def max_rank(self) -> int:
        """Return the largest rank that an update of this matrix can have: min(D, O)."""
        return min(self.rows, self.cols)

    def matrix(self) -> Tensor:
        """Return the weight as an (O, D) view that shares memory with the parameter."""
        return weight_rows(self.layer)[self.start : self.start + self.rows]

    def rows_of_grad(self) -> Tensor:
        """Return the weight's gradient as an (O, D) view."""
        grad = cast(Tensor, self.layer.weight.grad)
        return (grad.t() if is_conv1d(self.layer) else grad)[self.start : self.start + self.rows]


def is_conv1d(layer: nn.Module) -> bool:
    """Return whether the layer is transformers' ``Conv1D`` (its weight is D x O), without importing transformers."""
    hf = sys.modules.get("transformers.pytorch_utils")
    return hf is not None and isinstance(layer, hf.Conv1D)


def weight_rows(layer: nn.Module) -> Tensor:
    """Return the layer's weight as O x D, however the layer stores it."""
    weight = cast(MatrixLayer, layer).weight
    return weight.t() if is_conv1d(layer) else weight


def parts(layer_name: str, layer: nn.Module) -> list[tuple[str, int, int]]:
    """Return the row blocks of a layer as (part, first row, number of rows); one block named ``W`` if it is not fused."""
    out_features, in_features = weight_rows(layer).shape
    exactly = _FUSED.get(layer_name.rpartition(".")[2])
    if exactly is None or out_features % 3 or (exactly and out_features != 3 * in_features):
        return [(WHOLE, 0, out_features)]
    third = out_features // 3
    return [("q", 0, third), ("k", third, third), ("v", 2 * third, third)]


def plain_name(name: str) -> str:
    """Return the name without the parts that ``torch.compile`` adds."""
    return name.replace("_orig_mod.", "")


@dataclass(frozen=True)
class Selection:
    """Hold the result of resolving patterns.

    Attributes:
        targets: by name, in the module's order.
        left_out: by name, why a matrix that a preset or a wider glob matches cannot be a target.
    """

    targets: dict[str, Target]
    left_out: dict[str, str]


def all_targets(module: nn.Module) -> dict[str, Target]:
    """Return every matrix that can be a target (``obstacle`` finds none), by name, in the module's order."""
    return {name: target for name, (target, reason) in _survey(module).items() if reason is None}


def obstacle(layer: nn.Module) -> str | None:
    """Say why a linear layer's weight can never be a target, and the cure; ``None`` if it can.

    Frozen and tied weights are not checked here: some methods accept them (see ``select``).
    """
    if _bypassed(layer):
        return "belongs to nn.MultiheadAttention, which never calls it: it cannot be a target"
    if "weight" not in layer._parameters and hasattr(layer, "_plain_class"):
        return None  # factored: its weight is a product of ours
    for own in ("weight", "bias"):
        if own not in layer._parameters:
            return _computed(layer, own)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight is None:
        return "has no weight: it cannot be a target"
    if is_lazy(weight) or (bias is not None and is_lazy(bias)):
        return "is lazy and has no shape yet: call it once (in setup or configure_model), or leave it out"
    if weight.is_complex():
        return f"is complex ({weight.dtype}): only real matrices can be targets, so leave it out"
    if getattr(layer, "_stored", None) is None and (not weight.is_floating_point() or weight.itemsize < 2):
        return f"holds {weight.dtype}: only weights of 16 bits or more can be trained, so leave it out"
    if weight.ndim != 2 or not weight.numel():
        return f"has shape {tuple(weight.shape)}: only a matrix can be a target, so leave it out"
    return None


def obstacles(module: nn.Module, frozen: bool = False) -> dict[str, str]:
    """Return why matrices of linear layers cannot be targets, by the names that they would have.

    Args:
        module: the module that names start from.
        frozen: accept frozen matrices.
    """
    heads, tied = output_heads(module), tied_layers(module)
    found = {}
    for name, (target, reason) in _survey(module).items():
        if reason is None and target.layer_name in tied and id(target.layer) not in heads:
            reason = f"shares its weight with {', '.join(tied[target.layer_name])}: it cannot be a target"
        adapted = hasattr(target.layer, "_plain_class")  # it trains by its adapters
        if reason is None and not frozen and not adapted and not target.layer.weight.requires_grad:
            reason = "is frozen (requires_grad=False): leave it out, or set requires_grad before the fit"
        if reason is not None:
            found[name] = reason
    return found


def find_targets(
    module: nn.Module,
    patterns: str | Sequence[str] = "all",
    warn: bool = True,
    frozen: bool = False,
    unfit: Callable[[Target], str | None] | None = None,
) -> dict[str, Target]:
    """Resolve presets, globs and exclusions to targets; see ``select``, which also returns what was left out.

    Args:
        module: the module that names start from (callback and strategy: the LightningModule).
        patterns: presets ``all`` (every Linear/Conv1D but the output head), ``attention``, ``mlp``, ``head``, or globs.
            A glob matches a target's full name, its layer's, or a suffix of either that begins at a dot. With ``!`` before
            it, a preset or a glob is removed from what the others choose (from ``all``, if there are no others).
        warn: warn in one line of what was left out.
        frozen: take frozen matrices too.
        unfit: a further reason why a matrix cannot be a target, or ``None``.

    Returns:
        Targets by name, in the module's order. Raises as ``select`` does.
    """
    chosen = select(module, patterns, frozen, unfit)
    if warn and chosen.left_out:
        warnings.warn(say_left_out(module, patterns, chosen.left_out), stacklevel=2)
    return chosen.targets


def select(
    module: nn.Module,
    patterns: str | Sequence[str] = "all",
    frozen: bool = False,
    unfit: Callable[[Target], str | None] | None = None,
) -> Selection:
    """Resolve patterns to targets, and to the matrices left out because they cannot be targets.

    A matrix that cannot be a target is left out if a preset, or a glob that also matches others, chooses it. It is refused
    if it is named: by its full name, or by a pattern that matches nothing else.

    Args:
        module: as for ``find_targets``.
        patterns: as for ``find_targets``.
        frozen: take frozen matrices too.
        unfit: a further reason why a matrix cannot be a target, or ``None``.

    Raises:
        ConfigError: a pattern matches nothing; it names a matrix that cannot be a target (frozen, tied weights other than the
            output head's, parametrized, lazy, complex, the never-called ``out_proj`` of ``nn.MultiheadAttention``); nothing
            is left.
    """
    patterns, wanted, unwanted = _split(patterns)
    matching = _Matching(module)
    without = set().union(*(matching.hits(pattern, excluding=True) for pattern in unwanted))
    reasons = obstacles(module, frozen)
    for name, target in matching.everything.items():
        further = unfit(target) if unfit is not None and name not in reasons else None
        if further is not None:
            reasons[name] = further
    chosen: set[str] = set()
    for pattern in wanted:
        hits = matching.hits(pattern) - without
        refused = matching.named(pattern, hits, reasons)
        if refused is not None:
            raise ConfigError("targets", refused, reasons[refused])
        chosen |= hits
    # the out_proj of nn.MultiheadAttention belongs to no preset and no glob: not reported
    left_out = {name: reasons[name] for name in matching.everything if name in chosen and name in reasons}
    left_out = {name: reason for name, reason in left_out.items() if not _bypassed(matching.everything[name].layer)}
    targets = {name: target for name, target in matching.everything.items() if name in chosen and name not in reasons}
    if not targets:
        shown = patterns[0] if len(patterns) == 1 else patterns
        raise ConfigError("targets", shown, f"leaves no target: {_listed(module, left_out) or 'everything is excluded'}")
    return Selection(targets, left_out)


def first_named(module: nn.Module, patterns: str | Sequence[str], unfit: Iterable[str]) -> str | None:
    """Return the first ``unfit`` matrix that a pattern names, rather than matches among others (see ``select``)."""
    _, wanted, unwanted = _split(patterns)
    matching = _Matching(module)
    without = set().union(*(matching.hits(pattern, excluding=True) for pattern in unwanted))
    reasons = dict.fromkeys(unfit, "")
    every = obstacles(module, frozen=True) | reasons
    for pattern in wanted:
        named = matching.named(pattern, matching.hits(pattern) - without, every)
        if named in reasons:
            return named
    return None


def say_left_out(module: nn.Module, patterns: str | Sequence[str], left_out: Mapping[str, str]) -> str:
    """Return one line that names what the patterns leave out, and why."""
    return f"targets={patterns!r} leaves out what cannot be a target: {_listed(module, left_out)}"


def check_patterns(patterns: Any, key: str = "targets") -> str | list[str]:
    """Return patterns as a word or a list of words.

    Raises:
        ConfigError: anything else, an empty list, or an exclusion of nothing.
    """
    words = [patterns] if isinstance(patterns, str) else patterns
    if isinstance(words, (Mapping, bytes)) or not isinstance(words, Iterable):
        raise ConfigError(key, patterns, _ALLOWED)
    words = [*words]
    if not words:
        raise ConfigError(key, words, f"name at least one of {', '.join(PRESETS)} or a glob")
    for word in words:
        if not isinstance(word, str) or not word.removeprefix("!") or word.startswith("!!"):
            raise ConfigError(key, word, "each entry must be a preset or a glob, as text; with one ! before it to leave it out")
    return str(patterns) if isinstance(patterns, str) else [str(word) for word in words]


def output_heads(module: nn.Module) -> set[int]:
    """Return the ids of the layers of the output head, if a model inside names one (timm and transformers models do)."""
    heads: list[nn.Module] = []
    for child in module.modules():
        for getter in ("get_classifier", "get_output_embeddings"):
            method = getattr(child, getter, None)
            if callable(method):
                try:
                    named = method()
                except Exception:  # it is the model's own code, which may refuse in its own way
                    continue  # a model that does not name its head
                heads += [h for h in (named if isinstance(named, (tuple, list)) else [named]) if isinstance(h, nn.Module)]
    return {id(layer) for head in heads for layer in head.modules()}


def tied_layers(module: nn.Module) -> dict[str, list[str]]:
    """Return the layers that share their weight, each with the names of the other layers."""
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


def _survey(module: nn.Module) -> dict[str, tuple[Target, str | None]]:
    """Return the matrices of every linear layer, each with its obstacle if any; a layer with one counts as one matrix."""
    found: dict[str, tuple[Target, str | None]] = {}
    for layer_name, child in module.named_modules():
        if not (isinstance(child, nn.Linear) or is_conv1d(child)):
            continue
        layer = cast(MatrixLayer, child)
        name, reason = plain_name(layer_name), obstacle(layer)
        if reason is not None:
            found[name] = Target(name, name, WHOLE, 0, 0, 0, layer), reason
            continue
        for part, start, rows in parts(name, layer):
            full = name if part == WHOLE else f"{name}.{part}"
            found[full] = Target(full, name, part, start, rows, weight_rows(layer).shape[1], layer), None
    return found


class _Matching:
    """Match patterns with one module's matrices, those that cannot be targets included."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.everything = {name: target for name, (target, _) in _survey(module).items()}
        self.tied = tied_layers(module)
        heads = output_heads(module)
        self.heads = {name for name, target in self.everything.items() if id(target.layer) in heads}
        paths: dict[int, list[str]] = {}
        for name, layer in _paths(module):
            paths.setdefault(id(layer), []).append(plain_name(name))
        self._names: dict[str, set[str]] = {}  # full names and layers' names, also those of modules registered twice
        for name, target in self.everything.items():
            layers = {target.layer_name, *paths[id(target.layer)]}
            self._names[name] = layers | ({f"{layer}.{target.part}" for layer in layers} if target.part != WHOLE else set())

    def hits(self, pattern: str, excluding: bool = False) -> set[str]:
        """Return the names that the pattern matches.

        Raises:
            ConfigError: it matches none.
        """
        found = {name for name, target in self.everything.items() if self._in_preset(pattern, target)}
        if not found:  # a layer may be called like a preset: `head`, where no model inside names its output head
            found = {name for name, own in self._names.items() if any(matches(pattern, word) for word in own)}
        if not found:
            raise ConfigError("targets", "!" * excluding + pattern, _nothing_matches(self.module, self.everything))
        return found

    def named(self, pattern: str, hits: set[str], reasons: Mapping[str, str]) -> str | None:
        """Return the first unfit matrix that the pattern names, rather than matches among others."""
        spoilt = [name for name in self.everything if name in hits and name in reasons]
        if not spoilt or (pattern in PRESETS and any(self._in_preset(pattern, self.everything[name]) for name in hits)):
            return None
        exact = [name for name in spoilt if pattern in self._names[name]]
        return exact[0] if exact else spoilt[0] if len(spoilt) == len(hits) else None

    def _in_preset(self, pattern: str, target: Target) -> bool:
        if pattern not in PRESETS:
            return False
        if pattern == "head":
            return target.name in self.heads
        if target.name in self.heads or _bypassed(target.layer):
            return False
        words = target.layer_name.split(".")
        attention = any(_ATTENTION.search(word) for word in words)
        if pattern == "attention":
            return attention
        return pattern == "all" or (not attention and any(_MLP.search(word) for word in words))


def _paths(module: nn.Module, prefix: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Yield every name of every module: one that is registered twice comes twice (``named_modules`` names it once)."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and child is not module and id(child) not in above:
            yield from _paths(child, f"{prefix}.{name}" if prefix else name, (*above, id(module)))


def _split(patterns: Any) -> tuple[list[str], list[str], list[str]]:
    """Return all patterns, those that include, and those that exclude; exclusions alone are taken from ``all``."""
    words = check_patterns(patterns)
    words = [words] if isinstance(words, str) else words
    unwanted = [word.removeprefix("!") for word in words if word.startswith("!")]
    return words, [word for word in words if not word.startswith("!")] or ["all"], unwanted


def _bypassed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _computed(layer: nn.Module, own: str) -> str:
    """Say why a weight or bias is not a parameter of its layer."""
    if own in getattr(layer, "parametrizations", {}):
        each = cast(nn.ModuleDict, layer.parametrizations)[own]
        kinds = ", ".join(dict.fromkeys(type(p).__name__.strip("_") for p in each.children()))
        how, cure = f"is parametrized ({kinds})", "leave it out, or call parametrize.remove_parametrizations before the fit"
    elif f"{own}_mask" in layer._buffers:
        how, cure = "is pruned by a mask", "leave it out, or call prune.remove before the fit"
    elif f"{own}_g" in layer._parameters:
        how, cure = "has weight_norm", "leave it out, or call remove_weight_norm before the fit"
    elif f"{own}_orig" in layer._parameters:
        how, cure = "has spectral_norm", "leave it out, or call remove_spectral_norm before the fit"
    else:
        how, cure = f"has a {own} that is no parameter of its own (a view of a flat one?)", "leave it out"
    return f"{how}: its {own} is computed at every forward and cannot be a target; {cure}"


def matches(pattern: str, name: str) -> bool:
    """Return whether a glob matches the name, or a suffix of it that begins at a dot; a name itself may hold ``[x]``."""
    ends = (name[at:] for at in (0, *(dot.end() for dot in re.finditer(r"\.", name))))
    return any(end == pattern or fnmatchcase(end, pattern) for end in ends)


def _listed(module: nn.Module, reasons: Mapping[str, str]) -> str:
    """List names by family, with their reason (without the cure)."""
    names = families(module, reasons)
    counts: dict[tuple[str, str], int] = {}
    for name, family in names.items():
        key = (family, re.split(": | \\(", reasons[name])[0])
        counts[key] = counts.get(key, 0) + 1
    return "; ".join(f"{family}{f' ({n})' if n > 1 else ''} {reason}" for (family, reason), n in counts.items())


def _nothing_matches(module: nn.Module, everything: Mapping[str, Target]) -> str:
    names = families(module, [name for name, target in everything.items() if not _bypassed(target.layer)])
    counts: dict[str, int] = {}
    for family in names.values():
        counts[family] = counts.get(family, 0) + 1
    listed = ", ".join(f"{family} ({n})" if n > 1 else family for family, n in counts.items()) or "none"
    return f"matches no target; allowed are {', '.join(PRESETS)} or a glob over: {listed}"
