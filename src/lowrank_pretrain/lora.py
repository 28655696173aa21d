"""LoRA layers: inject, merge, freeze, adapter state (pure torch; LoRA: arXiv 2106.09685).

        x (.., D) ──────────── W (O, D) ──(+)── y (.., O)        y = W x + b + scale · B (A x)
              └── A (R, D) ── B (O, R) ──┘                       A kaiming-uniform(√5), B = 0, scale = alpha / R

Injection swaps the *class* of a layer and registers adapters on it: the module, W and b stay the same objects under the
same names, so optimizer state, hooks, aliases and checkpoint keys survive. Adapters are ``lora_A`` (ΣR, D) and, per row
block of a fused layer, ``lora_B.<part>`` (O_part, R_part); a layer that is not fused has the one part ``W``.
"""

import copy
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.lora_function import Part, RestPart, lora_linear, merged
from lowrank_pretrain.plan import Plan
from lowrank_pretrain.seeds import generator
from lowrank_pretrain.targets import (
    Target,
    all_targets,
    is_conv1d,
    output_heads,
    parts,
    plain_name,
    tied_layers,
    weight_rows,
)


class Inherit(NamedTuple):
    """A new parameter that takes over rows ``start … start+rows`` (along ``dim``) of an old one, optimizer state and all."""

    new: nn.Parameter
    old: nn.Parameter
    dim: int
    start: int
    rows: int


class LoRALinear:
    """What a layer's class gains by injection (mixed in before ``nn.Linear``, ``Conv1D`` or a user's subclass of them)."""

    _plain_class: type[nn.Module]
    _parts: tuple[Part, ...]
    _rest: tuple[RestPart, ...]

    def forward(self, x: Tensor) -> Tensor:
        """(.., D) -> (.., O)."""
        factors = [self.lora_B[part.name] for part in self._parts]
        if self._plain_class.forward not in _known_forwards():
            # a user's subclass with a forward of its own: add to whatever it computes
            return self._plain_class.forward(self, x) + self._low_rank_output(x, factors)
        rest_weight = tuple(self.rest_weight[part.name] for part in self._rest)
        rest_bias = tuple(self.rest_bias[part.name] for part in self._rest) if self.bias is not None else ()
        return lora_linear(
            x, self.weight, self.bias, self.lora_A, factors, self._parts, is_conv1d(self), self._rest, rest_weight, rest_bias
        )

    def _low_rank_output(self, x: Tensor, factors: list[Tensor]) -> Tensor:
        """Scale · B (A x) by plain autograd, (.., O); zeros for row blocks without an adapter."""
        delta = x.new_zeros(*x.shape[:-1], weight_rows(self).shape[0])
        for part, factor in zip(self._parts, factors, strict=True):
            z = functional.linear(x, self.lora_A[part.a : part.a + part.rank])
            after = delta.shape[-1] - part.start - part.rows
            delta = delta + functional.pad(functional.linear(z, factor) * part.scale, (part.start, after))
        return delta

    def merged_weight(self) -> Tensor:
        """W + scale · B A in the layer's own layout, a new tensor.

        Raises:
            ValueError: a factor holds a number that is not finite.
        """
        factors = [self.lora_B[part.name] for part in self._parts]
        if not all(torch.isfinite(f).all() for f in (self.lora_A, *factors)):
            raise ValueError("adapters hold numbers that are not finite: refusing to merge them into the weights")
        return merged(self.weight, self.lora_A, factors, self._parts, is_conv1d(self))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # A plain state dict (no adapter keys) is the merged model: then B = 0, and nothing is missing.
        plain = f"{prefix}lora_A" not in state_dict
        for name, own in self.state_dict().items():
            if name.startswith("lora_") and plain:
                state_dict[prefix + name] = torch.zeros_like(own) if name.startswith("lora_B") else own
            elif name.startswith("rest_"):
                group, _, part = name.partition(".")
                span = next(p for p in self._rest if p.name == part)
                source = state_dict.get(prefix + group.removeprefix("rest_"))
                if source is not None:
                    dim = 1 if is_conv1d(self) and source.ndim == 2 else 0
                    state_dict.setdefault(prefix + name, source.narrow(dim, span.start, span.rows))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        self._tie_rest()
        return self

    def _tie_rest(self) -> None:
        """Make the rest blocks views of W and b again (moving or copying a module makes tensors of their own)."""
        dim = 1 if is_conv1d(self) else 0
        for part in self._rest:
            self.rest_weight[part.name].data = self.weight.data.narrow(dim, part.start, part.rows)
            if self.bias is not None:
                self.rest_bias[part.name].data = self.bias.data.narrow(0, part.start, part.rows)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._tie_rest()

    def __reduce_ex__(self, protocol: int) -> tuple:
        # the class is made at run time and has no importable name: rebuild it from the plain one
        return _blank, (self._plain_class,), self.__dict__

    def extra_repr(self) -> str:
        """The plain layer's line, and each part's rank."""
        ranks = ", ".join(f"{part.name}={part.rank}" for part in self._parts)
        return f"{super().extra_repr()}, lora_rank({ranks})"


def inject(
    module: nn.Module, plan: Mapping[str, int], alpha: float | None = None, train_A: bool = True, seed: int | None = None
) -> list[Inherit]:
    """Give every target of the plan an adapter of its rank. Outputs do not change by one bit (B = 0).

    Args:
        module: names in ``plan`` count from here.
        plan: target -> rank; rank 0 gets no adapter (and is frozen by ``freeze``).
        alpha: scale = alpha / rank; ``None``: alpha = rank, scale 1.
        train_A: ``False`` keeps A as drawn and trains B alone (LoRA-FA, arXiv 2308.03303), which saves activations.
        seed: of the private generators that draw A; default: the run's seed.

    Returns:
        For each output head that was tied to the embedding and is a target now: its own weight, a copy.

    Raises:
        ConfigError: a name that is no target, a rank above min(D, O), or a tied weight that is no output head.
    """
    targets = all_targets(module)
    plan = Plan(plan).check(targets)
    if any(True for _ in lora_layers(module)):
        raise RuntimeError("adapters are there already: call lora.eject first")
    untied = _untie(module, {targets[name].layer_name for name in plan if plan[name] > 0})
    for layer_name, group in _by_layer(targets, plan).items():
        layer = group[0].layer
        ranked = [t for t in group if plan[t.name] > 0]
        if ranked or len(group) < len(parts(layer_name, layer)):
            _give_adapters(layer, [(t, plan[t.name]) for t in ranked], alpha, train_A, seed)
    _switch_fast_path(module, off=True)
    return untied


def freeze(module: nn.Module, plan: Mapping[str, int], freeze_rest: bool = False) -> list[Inherit]:
    """Freeze W and b of the plan's targets; with ``freeze_rest`` all else but the adapters too.

    A fused layer of which only some row blocks are targets (say q and v) goes on training the others: they become
    parameters ``rest_weight.<part>`` of their own that are views of W.

    Returns:
        For those views, whose rows and optimizer state they take over.
    """
    inherited: list[Inherit] = []
    targets = all_targets(module)
    for layer_name, group in _by_layer(targets, plan).items():
        layer = group[0].layer
        chosen = {t.part for t in group}
        others = [p for p in parts(layer_name, layer) if p[0] not in chosen]
        trained = layer.weight.requires_grad
        if others and trained and not freeze_rest:
            inherited += _keep_rows(layer, [RestPart(*other) for other in others])
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
    if freeze_rest:
        adapters = {id(p) for _, p in adapter_parameters(module)}
        for p in module.parameters():
            if id(p) not in adapters:
                p.requires_grad_(False)
    return inherited


def merge(module: nn.Module) -> None:
    """Fold the adapters into W and set B = 0. The function stays the same to rounding; merging again changes nothing."""
    with torch.no_grad():
        for _, layer in lora_layers(module):
            layer.weight.copy_(layer.merged_weight())
            for factor in layer.lora_B.values():
                factor.zero_()


def eject(module: nn.Module) -> None:
    """Merge, then give every layer its plain class back. Frozen parameters stay frozen."""
    merge(module)
    for _, layer in list(lora_layers(module)):
        for name in ("lora_A", "lora_B", "rest_weight", "rest_bias"):
            if hasattr(layer, name):
                delattr(layer, name)
        layer.__class__ = layer._plain_class
        del layer._parts, layer._rest
    _switch_fast_path(module, off=False)


def lora_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer with adapters, in the module's order."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoRALinear))


def adapter_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every adapter factor."""
    for name, layer in lora_layers(module):
        for own, p in layer.named_parameters():
            if own.startswith("lora_"):
                yield f"{name}.{own}", p


def plain_state(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as the plain model would write it: merged weights under the bare names, no adapter keys.

    Args:
        module: the module that made ``state_dict``.
        state_dict: as ``module.state_dict()`` gave it; not changed.
    """
    plain = dict(state_dict)
    for name, layer in lora_layers(module):
        for key in layer.state_dict():
            if key.startswith(("lora_", "rest_")):
                del plain[f"{name}.{key}"]
        plain[f"{name}.weight"] = layer.merged_weight()
    return plain


def exact_state(module: nn.Module) -> dict[str, Tensor]:
    """The unmerged W and the factors of every layer with adapters: what a bit-exact resume needs beside ``plain_state``."""
    exact = {}
    for name, layer in lora_layers(module):
        exact[f"{name}.weight"] = layer.weight.detach()
        exact |= {f"{name}.{own}": p.detach() for own, p in layer.named_parameters() if own.startswith("lora_")}
    return exact


@torch.no_grad()
def load_exact(module: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Put what ``exact_state`` gave back into a module changed by the same plan.

    Raises:
        ConfigError: the names or shapes differ.
    """
    state = module.state_dict()
    missing = sorted(exact_state(module).keys() - exact.keys()) or sorted(exact.keys() - state.keys())
    if missing:
        raise ConfigError("ckpt_path", missing[0], "adapters of the checkpoint and of this model differ: was it another model?")
    for name, tensor in exact.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} there and {tuple(state[name].shape)} in this model"
            raise ConfigError("ckpt_path", name, f"has shape {shapes}")
        state[name].copy_(tensor)


def clone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy that no later step changes."""
    return {name: tensor.clone() for name, tensor in state.items()}


def _known_forwards() -> tuple:
    hf = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear.forward, hf.Conv1D.forward) if hf else (nn.Linear.forward,)


_classes: dict[type, type] = {}


def _lora_class(plain: type) -> type:
    if plain not in _classes:
        _classes[plain] = type(f"LoRA{plain.__name__}", (LoRALinear, plain), {"_plain_class": plain})
    return _classes[plain]


def _blank(plain: type) -> nn.Module:
    cls = _lora_class(plain)
    return cls.__new__(cls)


def _by_layer(targets: Mapping[str, Target], plan: Mapping[str, int]) -> dict[str, list[Target]]:
    groups: dict[str, list[Target]] = {}
    for name, target in targets.items():  # the module's order, never the plan's: optimizer state is restored by index
        if name in plan:
            groups.setdefault(target.layer_name, []).append(target)
    return groups


def _give_adapters(
    layer: nn.Module, ranked: list[tuple[Target, int]], alpha: float | None, train_A: bool, seed: int | None
) -> None:
    weight = layer.weight
    # under AMP W is float32 and so are the adapters; under bf16-true they follow W
    like = {"dtype": weight.dtype, "device": weight.device}
    total = sum(rank for _, rank in ranked)
    cols = weight.shape[0] if is_conv1d(layer) else weight.shape[1]
    A = torch.empty(total, cols)
    spans, factors, at = [], {}, 0
    for target, rank in ranked:
        bound = math.sqrt(3.0) * math.sqrt(2.0 / (1 + 5)) / math.sqrt(cols)  # kaiming-uniform, a = √5
        A[at : at + rank].uniform_(-bound, bound, generator=generator("lora_A", target.name, seed=seed))
        scale = 1.0 if alpha is None else alpha / rank
        spans.append(Part(target.part, target.start, target.rows, at, rank, scale))
        factors[target.part] = nn.Parameter(torch.zeros(target.rows, rank, **like))
        at += rank
    layer.__class__ = _lora_class(type(layer))
    layer._parts, layer._rest = tuple(spans), ()
    layer.lora_A = nn.Parameter(A.to(**like), requires_grad=train_A)
    layer.lora_B = nn.ParameterDict(factors)


def _keep_rows(layer: nn.Module, rest: list[RestPart]) -> list[Inherit]:
    layer._rest = tuple(rest)
    layer.rest_weight, layer.rest_bias = nn.ParameterDict(), nn.ParameterDict()
    dim = 1 if is_conv1d(layer) else 0
    inherited = []
    for part in rest:
        rows = nn.Parameter(layer.weight.data.narrow(dim, part.start, part.rows))
        layer.rest_weight[part.name] = rows
        inherited.append(Inherit(rows, layer.weight, dim, part.start, part.rows))
        if layer.bias is not None:
            rows = nn.Parameter(layer.bias.data.narrow(0, part.start, part.rows), requires_grad=layer.bias.requires_grad)
            layer.rest_bias[part.name] = rows
            inherited.append(Inherit(rows, layer.bias, 0, part.start, part.rows))
    return inherited


def _untie(module: nn.Module, layer_names: set[str]) -> list[Inherit]:
    """Give tied output heads among the layers a weight of their own."""
    heads, tied = output_heads(module), tied_layers(module)
    untied = []
    for name, layer in module.named_modules():
        if plain_name(name) in layer_names and plain_name(name) in tied:
            if id(layer) not in heads:
                raise ConfigError("targets", plain_name(name), f"shares its weight with {', '.join(tied[plain_name(name)])}")
            shared = layer.weight
            layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            untied.append(Inherit(layer.weight, shared, 0, 0, shared.shape[0]))
            warnings.warn(
                f"{plain_name(name)} is a target and no longer shares its weight with {', '.join(tied[plain_name(name)])}: "
                f"{shared.numel():,} parameters more",
                stacklevel=2,
            )
    if untied:
        for child in module.modules():
            config = getattr(child, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                child.config = copy.copy(config)
                child.config.tie_word_embeddings = False
    return untied


def _switch_fast_path(module: nn.Module, off: bool) -> None:
    """``nn.TransformerEncoderLayer`` in eval reads the weights of linear1/2 itself and would skip their adapters."""
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoderLayer):
            if off:
                child._lora_activation = child.activation_relu_or_gelu
                child.activation_relu_or_gelu = 0  # "activation was not relu or gelu": the layer takes its slow path
            elif hasattr(child, "_lora_activation"):
                child.activation_relu_or_gelu = child._lora_activation
                del child._lora_activation
