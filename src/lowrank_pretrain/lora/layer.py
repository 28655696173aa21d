"""Define the LoRA layer: a linear layer with adapters (LoRA: arXiv 2106.09685).

        x (.., D) ──────────── W (O, D) ──(+)── y (.., O)        y = W x + b + scale · B (A x)
              └── A (R, D) ── B (O, R) ──┘                       A kaiming-uniform(√5), B = 0, scale = alpha / R

Giving adapters swaps the *class* of a layer and registers the factors on it: the module, W and b stay the same objects under
the same names, so optimizer state, hooks, aliases and checkpoint keys survive. Adapters are ``lora_A`` (ΣR, D) and, per row
block of a fused layer, ``lora_B.<part>`` (O_part, R_part); a layer that is not fused has the one part ``W``.
"""

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.core.targets import MatrixLayer, Target, is_conv1d
from lowrank_pretrain.lora.frozen import Stored, base_weight, store
from lowrank_pretrain.lora.function import effective_bias, effective_weight, lora_linear
from lowrank_pretrain.lora.products import Part, RestPart, merged
from lowrank_pretrain.lora.remake import Remaker
from lowrank_pretrain.lora.shown import Base, Memory, Written, consisted_of


class Unannounced:
    """Shield a class made at run time from its parent's subclass hook (registries, required arguments)."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Do nothing, instead of the parent's hook."""


if TYPE_CHECKING:
    _Plain = MatrixLayer  # the layer's former class; the mixin comes before it
else:
    _Plain = object


class Reclassed(Unannounced, _Plain):
    """Copy, pickle and move a layer whose class was made at run time, and which may hold rows of W as parameters.

    ``LoRALinear`` and LTE's ``MultiheadLoRALinear`` share it.
    """

    _plain_class: type[nn.Module]
    _mixin: "type[Reclassed]"
    _own_forward: bool
    _transposed: bool
    _parts: tuple[Part, ...]
    _rest: tuple[RestPart, ...]
    _remaker: Remaker | None = None  # with recompute_inputs
    _memory: Memory | None = None  # of state dicts; from the first one on
    _remembers = True
    lora_A: nn.Parameter
    lora_B: nn.ParameterDict
    rest_weight: nn.ParameterDict
    rest_bias: nn.ParameterDict

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        self._tie_rest()
        return self

    def _show(self, computed: Tensor, factors: Mapping[str, nn.Parameter]) -> Tensor:
        """Return a weight for a state dict; refuse if somebody wrote into the last one, which changed nothing.

        Averages that copied the module after the switch do so (``state_dict()`` of a plain layer gives the weight itself).

        Args:
            computed: the weight.
            factors: which it was computed from, by name; they are remembered for when it is loaded back.

        Raises:
            RuntimeError: with the cure.
        """
        if self.__dict__.get("_shown"):
            raise RuntimeError(
                "a weight from state_dict() of a layer with adapters or factors was written into: it is computed there, so the "
                "write was lost. Average a plain copy, lowrank_pretrain.merge(copy.deepcopy(module)), or use load_state_dict()"
            )
        self.__dict__["_shown"] = Written(computed)
        if self._remembers:
            self.__dict__["_memory"] = memory = self._memory or Memory()
            memory.note(computed, factors, list(self.parameters()))
        return computed

    def _tie_rest(self) -> None:
        """Make the rest blocks views of W and b again (moving or copying a module makes separate tensors)."""
        dim = 1 if is_conv1d(self) else 0
        for part in self._rest:
            self.rest_weight[part.name].data = self.weight.data.narrow(dim, part.start, part.rows)
            if self.bias is not None and part.name in self.rest_bias:
                self.rest_bias[part.name].data = self.bias.data.narrow(0, part.start, part.rows)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._tie_rest()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        # the class has no importable name: rebuild it from the plain one
        return _blank, (self._mixin, self._plain_class), self.__dict__

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse ``torch.jit.script``, which cannot compile what was registered at run time, with the cure.

        Returning a plain layer here would not help: ``script`` would put it into the original model.
        """
        raise RuntimeError(
            "factors and adapters cannot be scripted: script a plain copy, "
            "lowrank_pretrain.merge(copy.deepcopy(module)), in place of it"
        )


def swap_class(layer: nn.Module, mixin: type[Reclassed]) -> None:
    """Give the layer its own class: ``mixin`` before the class that it has. A ``__setattr__`` of that class is not asked."""
    object.__setattr__(layer, "__class__", _class_of(mixin, type(layer)))


def has_own_forward(layer: nn.Module) -> bool:
    """Return whether the layer (or what it was before its class was swapped) computes something other than its parent class."""
    return getattr(layer, "_plain_class", type(layer)).forward not in _known_forwards()


def with_weight(layer: Reclassed, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return the layer as its plain class sees it, but with another weight: for one call of the plain class's forward.

    It shares the layer's ``__dict__``, so what the forward reads and writes on itself (buffers, counters, children) is the
    layer's. The layer itself is not touched: other threads, and hooks that look at its weight, notice nothing.
    """
    twin_class: Any = _twin_of(layer._plain_class)
    twin = twin_class.__new__(twin_class)
    object.__setattr__(twin, "__dict__", layer.__dict__)
    twin_class._lowrank_weight.__set__(twin, weight)
    twin_class._lowrank_bias.__set__(twin, bias)
    return twin


ADDED = ("lora_A", "lora_B", "rest_weight", "rest_bias")  # what adapters register on a layer


class LoRALinear(Reclassed):
    """Add adapters to a layer's class (mixed in before ``nn.Linear``, ``Conv1D`` or a user's subclass of them)."""

    _stored: Stored | None = None  # after the freeze, where W is stored in a cheaper type
    _own: dict[str, nn.Parameter] | None = None  # W and the factors, to notice that another W is in its place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Map (.., D) to (.., O); called like the plain class's forward, and equal to it with W + scale · B A for W.

        A class with its own forward may do anything with its weight (mask it, scale the output, take more
        arguments), so its own forward runs, and finds the effective weight under the weight's name.
        """
        if not torch.compiler.is_compiling() and self._has_given_weight():
            return self._plain_class.forward(self, *args, **kwargs)
        if self._own_forward:
            return self._forward_of_its_own(args, kwargs)
        if len(args) != 1 or kwargs:
            x = _only_argument(self, *args, **kwargs)
        else:
            x = args[0]
        factors = [self.lora_B[part.name] for part in self._parts]
        rest_weight = tuple(self.rest_weight[part.name] for part in self._rest)
        rest_bias = tuple(self.rest_bias[part.name] for part in self._rest) if self.bias is not None else ()
        return lora_linear(
            x, self.weight, self.bias, self.lora_A, factors, self._parts, self._transposed, self._rest, rest_weight, rest_bias,
            self._remaker, self._stored,
        )  # fmt: skip

    def _has_given_weight(self) -> bool:
        """Return whether a caller has put another W in the place of the layer's, but no factors.

        So does ``functional_call`` with a state dict: that W is the merged one, to which no B A may be added. With the values
        of ``named_parameters()`` it replaces the factors, too.
        """
        now, own = self._parameters.get("weight"), self._own
        if own is None or now is None or now is own["weight"]:
            return False
        factors = self.lora_B._parameters
        return self._parameters.get("lora_A") is own["lora_A"] and all(factors[p.name] is own[p.name] for p in self._parts)

    def _note_own(self) -> None:
        """Note which W and factors are the layer's."""
        if self._parameters.get("weight") is not None:  # tools that compute W (pruning) take it out
            own = {"weight": self.weight, "lora_A": self.lora_A}
            self.__dict__["_own"] = own | {part.name: self.lora_B[part.name] for part in self._parts}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a W that is assigned is the layer's from then on."""
        super().register_parameter(name, param)
        if name in ("weight", "lora_A") and self._own is not None:
            self._note_own()

    @torch.compiler.disable  # dynamo knows no object that borrows another one's attributes
    def _forward_of_its_own(self, args: tuple, kwargs: dict) -> Any:
        factors = [self.lora_B[part.name] for part in self._parts]
        rest_weight = tuple(self.rest_weight[part.name] for part in self._rest)
        rest_bias = tuple(self.rest_bias[part.name] for part in self._rest) if self.bias is not None else ()
        weight = effective_weight(self.weight, self.lora_A, factors, self._parts, self._transposed, self._rest, rest_weight)
        bias = effective_bias(self.bias, self._rest, rest_bias)
        return self._plain_class.forward(with_weight(self, weight, bias), *args, **kwargs)

    def merged_weight(self, check: bool = True) -> Tensor:
        """Return W + scale · B A in the layer's own layout, a new tensor.

        Args:
            check: refuse NaN or infinite factors.

        Raises:
            ValueError: a factor holds a number that is not finite.
        """
        factors = [self.lora_B[part.name] for part in self._parts]
        if check and not all(torch.isfinite(f).all() for f in (self.lora_A, *factors)):
            raise ValueError("adapters hold numbers that are not finite: refusing to merge them into the weights")
        return merged(self.weight, self.lora_A, factors, self._parts, self._transposed, self._stored)

    def base_weight(self) -> Tensor:
        """Return W without the adapters in its own layout and dtype; of one stored in a cheaper type a new tensor."""
        return base_weight(self.weight, self._stored)

    @torch.no_grad()
    def store_weight(self, kind: str, keep_original: bool) -> None:
        """Store the frozen W in a cheaper type, in which it is multiplied from here on."""
        self.weight.data, self.__dict__["_stored"] = store(self.base_weight(), kind, self._transposed, keep_original)

    @torch.no_grad()
    def write_weight(self, weight: Tensor) -> None:
        """Write W in its own dtype. If it was stored in a cheaper one, that ends here."""
        if self._stored is None:
            self.weight.copy_(weight)
        else:
            self.weight.data = weight
            del self.__dict__["_stored"]

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        if self._stored is not None:  # they follow to another device, and keep their dtypes
            self.__dict__["_stored"] = self._stored.moved(self.weight)
        if self._own is not None:  # some moves make new parameters
            self._note_own()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plain layer's state with the merged weight, for any caller and any name that it is registered under.

        So a state dict is the trained model for a file, an average, a teacher and another process alike. The factors are among
        ``named_parameters()``; ``lora.exact_state`` has what an exact resume needs.
        """
        if kwargs.get("keep_vars", False):  # callers that want the parameters themselves (torch.jit.trace) get all of them
            return super().state_dict(*args, **kwargs)
        plain = self._plain_class.__new__(self._plain_class)
        own: dict[str, Tensor | None] = {name: p for name, p in self._parameters.items() if name != "lora_A"}
        factors = {name: p for name, p in self.named_parameters() if name.startswith("lora_")}
        if self._memory is not None and self._memory.displaced is not None and any(bool(B.any()) for B in self.lora_B.values()):
            self._memory.displaced = None  # loading has set B = 0: training goes on from what was loaded
        own["weight"] = self._show(self.merged_weight(check=False), factors)
        children = {name: child for name, child in self._modules.items() if name not in ADDED}
        object.__setattr__(plain, "__dict__", {**self.__dict__, "_parameters": own, "_modules": children})
        return plain.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        plain, given = f"{prefix}lora_A" not in state_dict, state_dict.get(f"{prefix}weight")
        if given is not None:
            self.__dict__.pop("_shown", None)  # what was written into it is loaded now, or replaced
        loaded = given if isinstance(given, Tensor) and given.shape == self.weight.shape else None
        shown = self._shown_with(loaded) if plain and loaded is not None else None
        if shown is not None:  # a weight that this layer has shown: what it consisted of
            factors, base = shown
            state_dict[f"{prefix}weight"], self.__dict__["_stored"] = base
            state_dict |= {prefix + name: factor for name, factor in factors.items()}
        elif loaded is not None and self._stored is not None:
            # also where its dtype is the stored one: an original that is kept would be that of the weight before
            kept = self._stored.original is not None
            state_dict[f"{prefix}weight"], self.__dict__["_stored"] = store(
                loaded.to(self.weight.device, self._stored.dtype), self._stored.kind, self._transposed, kept
            )
        for name, own in self.named_parameters():
            if name.startswith("lora_") and plain and shown is None:
                # another plain weight is the merged model: then B = 0, and nothing is missing. Without one A and B stay
                fresh = loaded is not None and name.startswith("lora_B")
                state_dict[prefix + name] = torch.zeros_like(own) if fresh else own.detach()
            elif name.startswith("rest_"):
                group, _, part = name.partition(".")
                span = next(p for p in self._rest if p.name == part)
                source = state_dict.get(prefix + group.removeprefix("rest_"))
                if source is not None:
                    dim = 1 if is_conv1d(self) and source.ndim == 2 else 0
                    state_dict.setdefault(prefix + name, source.narrow(dim, span.start, span.rows))
                elif plain:
                    state_dict.setdefault(prefix + name, own.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _shown_with(self, given: Tensor) -> tuple[dict[str, Tensor], Base] | None:
        """Return the factors and the W that a plain weight consisted of when the layer showed it; ``None``: it did not."""
        if self._memory is None:
            return None
        now = Base(self.weight.detach(), self._stored)
        return consisted_of(self._memory, given.detach().to(now.weight.device), now, self._parts, self._rest, self._transposed)

    def extra_repr(self) -> str:
        """Return the plain layer's line, and each part's rank."""
        ranks = ", ".join(f"{part.name}={part.rank}" for part in self._parts)
        return f"{super().extra_repr()}, lora_rank({ranks})"


def give_adapters(
    layer: nn.Module,
    ranked: list[tuple[Target, int]],
    alpha: float | None,
    train_A: bool,
    seed: int | None,
    recompute_inputs: bool = False,
) -> None:
    """Swap the layer's class and register factors for its ranked targets; ``lora.inject`` explains the arguments."""
    weight = cast(MatrixLayer, layer).weight
    # under AMP W is float32 and so are the adapters; under bf16-true they follow W
    like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    total = sum(rank for _, rank in ranked)
    cols = weight.shape[0] if is_conv1d(layer) else weight.shape[1]
    A = torch.empty(total, cols, dtype=torch.float32, device="cpu")  # as the generator, for any defaults of the process
    spans, factors, at = [], {}, 0
    for target, rank in ranked:
        bound = math.sqrt(3.0) * math.sqrt(2.0 / (1 + 5)) / math.sqrt(cols)  # kaiming-uniform, a = √5
        A[at : at + rank].uniform_(-bound, bound, generator=generator("lora_A", target.name, seed=seed))
        scale = 1.0 if alpha is None else alpha / rank
        spans.append(Part(target.part, target.start, target.rows, at, rank, scale))
        factors[target.part] = nn.Parameter(torch.zeros(target.rows, rank, **like))
        at += rank
    swap_class(layer, LoRALinear)
    layer = cast(LoRALinear, layer)
    layer.__dict__.update(_parts=tuple(spans), _rest=(), _remaker=Remaker() if recompute_inputs else None)
    layer.register_parameter("lora_A", nn.Parameter(A.to(**like), requires_grad=train_A and total > 0))
    layer.register_module("lora_B", nn.ParameterDict(factors))
    layer._note_own()


def keep_rows(layer: Reclassed, rest: list[RestPart], bias: bool = True) -> list[Inherit]:
    """Make row blocks of W (and of b, where all of it freezes) separate parameters that are views, and go on training."""
    layer.__dict__["_rest"] = tuple(rest)
    layer.register_module("rest_weight", nn.ParameterDict())
    layer.register_module("rest_bias", nn.ParameterDict())
    dim = 1 if is_conv1d(layer) else 0
    inherited = []
    for part in rest:
        rows = nn.Parameter(layer.weight.data.narrow(dim, part.start, part.rows))
        layer.rest_weight[part.name] = rows
        inherited.append(Inherit(rows, layer.weight, dim, part.start, part.rows))
        if bias and layer.bias is not None:
            rows = nn.Parameter(layer.bias.data.narrow(0, part.start, part.rows), requires_grad=layer.bias.requires_grad)
            layer.rest_bias[part.name] = rows
            inherited.append(Inherit(rows, layer.bias, 0, part.start, part.rows))
    return inherited


def take_adapters(layer: LoRALinear) -> None:
    """Give the layer its plain class back; unmerged adapters are lost."""
    for name in ADDED:
        layer._parameters.pop(name, None)
        layer._modules.pop(name, None)
    object.__setattr__(layer, "__class__", layer._plain_class)
    for key in ("_parts", "_rest", "_remaker", "_stored", "_shown", "_memory", "_remembers", "_own"):
        layer.__dict__.pop(key, None)


def lora_layers(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield (name, layer) of every layer with adapters, in the module's order."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoRALinear))


def by_layer(targets: Mapping[str, Target], plan: Mapping[str, int]) -> dict[str, list[Target]]:
    """Return the plan's targets by the layer that they are row blocks of."""
    groups: dict[str, list[Target]] = {}
    for name, target in targets.items():  # the module's order, never the plan's: optimizer state is restored by index
        if name in plan:
            groups.setdefault(target.layer_name, []).append(target)
    return groups


def _known_forwards() -> tuple:
    hf = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear.forward, hf.Conv1D.forward) if hf else (nn.Linear.forward,)


_classes: dict[tuple[type[Reclassed], type[nn.Module]], type[nn.Module]] = {}


def _class_of(mixin: type[Reclassed], plain: type[nn.Module]) -> type[nn.Module]:
    if (mixin, plain) not in _classes:
        name = mixin.__name__.removesuffix("Linear") + plain.__name__
        hf = sys.modules.get("transformers.pytorch_utils")
        known = {
            "_plain_class": plain,
            "_mixin": mixin,
            "_own_forward": plain.forward not in _known_forwards(),
            "_transposed": hf is not None and issubclass(plain, hf.Conv1D),
        }
        _classes[mixin, plain] = type(name, (mixin, plain), known)
    return _classes[mixin, plain]


_twins: dict[type[nn.Module], type] = {}


def _twin_of(plain: type[nn.Module]) -> type:
    """Return the class of ``with_weight``: ``weight`` and ``bias`` are its own, all else is in the shared ``__dict__``."""
    if plain not in _twins:
        body = {
            "__slots__": ("_lowrank_weight", "_lowrank_bias"),
            "weight": property(lambda self: self._lowrank_weight),
            "bias": property(lambda self: self._lowrank_bias),
        }
        _twins[plain] = type(plain.__name__, (Unannounced, plain), body)
    return _twins[plain]


def _only_argument(layer: Reclassed, *args: Any, **kwargs: Any) -> Any:
    """Return the input, also if it was passed by the plain class's argument name.

    Raises:
        TypeError: as the plain class would.
    """
    return inspect.signature(type(layer)._plain_class.forward).bind(layer, *args, **kwargs).args[1]


def _blank(mixin: type[Reclassed], plain: type[nn.Module]) -> nn.Module:
    cls = _class_of(mixin, plain)
    return cls.__new__(cls)
