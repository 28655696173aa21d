"""Give linear layers H heads (LTE, arXiv 2402.16828, section 3).

As in ``lora.layer``, giving heads swaps the *class* of a layer: module, W and b stay the same objects under the same names.
Heads are ``lora_A`` (H, ΣR, D) and, per row block of a fused layer, ``lora_B.<part>`` (H, O_part, R_part). N heads in all,
H of them on this worker; s = alpha / R.

Modes. ``parallel``: head k trains on the k-th chunk of the batch. ``joint`` (the authors' MHLoRA): all heads see the whole
batch, y = W x + (s/N) Σ B_n A_n x. ``sequential``: one head at a time, on the whole batch; H is 1, and which head it is
changes with every window.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.core.targets import WHOLE, Target, is_conv1d
from lowrank_pretrain.galore.guard import closed
from lowrank_pretrain.lora.frozen import store
from lowrank_pretrain.lora.function import lora_linear
from lowrank_pretrain.lora.layer import Reclassed, has_own_forward, keep_rows, swap_class
from lowrank_pretrain.lora.products import Part, RestPart
from lowrank_pretrain.lora.remake import Remaker
from lowrank_pretrain.lte.heads.function import Layout, heads_linear
from lowrank_pretrain.lte.local_targets import Shared
from lowrank_pretrain.lte.merge import Factors
from lowrank_pretrain.lte.outer import OuterStep


class MultiheadLoRALinear(Reclassed):
    """Add heads to a linear layer: ``give_heads`` mixes this in before ``nn.Linear``, ``Conv1D`` or a subclass."""

    _shared: Shared
    _name: str
    prev_A: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, …, D) to (B, …, O). Outside a training step: by W as of the last merge, or by the merged W if it is in."""
        shared = self._shared
        if shared.viewing or shared.batch is None:
            return self._plain_class.forward(self, x)
        weight, stored = self.weight.detach() if self.weight.requires_grad else self.weight, None  # in the first step only
        if shared.frozen_dtype is not None:  # merges and others write into W: cast at each call, the copy is never stale
            weight, stored = store(weight, shared.frozen_dtype, is_conv1d(self))
        rest_weight = tuple(self.rest_weight[part.name] for part in self._rest)
        factors = [self.lora_B[part.name] for part in self._parts]
        if shared.mode == "joint":
            A, B, parts = self._side_by_side(factors)
            rest = (self._rest, rest_weight, (), self._remaker, stored)
            return lora_linear(x, weight, self.bias, A, B, parts, is_conv1d(self), *rest)
        prev_A, prev_B = self.prev_factors()
        layout = Layout(self._parts, self._rest, is_conv1d(self))
        if self.weight.requires_grad and self._cannot_share(x):
            return self._plain_class.forward(self, x)
        spans = self._spans(x)
        factors_of = (self.lora_A, factors, prev_A, prev_B, spans, layout, rest_weight)
        return heads_linear(x, weight, self.bias, *factors_of, self._remaker, stored)

    def _cannot_share(self, x: Tensor) -> bool:
        """Return, in the first step, whether x has too few samples for the heads. Then W itself trains."""
        if len(self.lora_A) == 1:
            return False
        try:
            self._spans(x)
        except ConfigError as error:
            self._shared.refused[self._name] = error.allowed
            return True
        return x.shape[0] < len(self.lora_A)

    def _spans(self, x: Tensor) -> tuple[tuple[int, int], ...]:
        """Return per head its first row and the one after its last; the first heads get one sample more if it does not divide.

        Samples are what dim 0 counts, be it the batch or a part of it. Where dim 0 is several times the batch (windows of an
        image), a sample's rows stay together.
        """
        heads, batch = self.lora_A.shape[0], self._shared.batch
        if heads == 1:
            return ((0, x.numel() // x.shape[-1]),)
        size = x.shape[0] if x.ndim > 1 else 0
        if x.ndim < 2 or (x.ndim > 2 and batch and size % batch and x.shape[1] == batch):
            raise ConfigError(
                "targets", self._name, f"does not have the batch{f' of {batch}' if batch else ''} first in its input "
                f"{tuple(x.shape)}: leave it out of the targets, or use heads=1"
            )  # fmt: skip
        if not torch.compiler.is_compiling() and self._shared.seen is not None:
            self._shared.seen[self._name] = max(size, self._shared.seen.get(self._name, 0))
        if not batch or batch < heads or size % batch:
            batch = size
        if not size:  # an expert that no token was sent to
            return ((0, 0),) * heads
        per_sample, share, more = x[..., 0].numel() // batch, batch // heads, batch % heads
        ends = [per_sample * (k * share + min(k, more)) for k in range(heads + 1)]
        return tuple(zip(ends[:-1], ends[1:], strict=True))

    def _side_by_side(self, factors: list[Tensor]) -> tuple[Tensor, list[Tensor], tuple[Part, ...]]:
        """Return all heads as one adapter of H times the rank, scale / N."""
        heads = self.lora_A.shape[0]
        A = torch.cat([self.lora_A[:, p.a : p.a + p.rank].flatten(0, 1) for p in self._parts])
        B = [f.permute(1, 0, 2).flatten(1) for f in factors]
        wide = [p._replace(a=heads * p.a, rank=heads * p.rank, scale=p.scale / self._shared.total) for p in self._parts]
        return A, B, tuple(wide)

    @closed
    @torch.no_grad()
    def _beyond(self) -> list[tuple[Part, Tensor]]:
        """Return per part the mean of what the heads have learnt beyond W, (O_part, D), float32 at least."""
        found = []
        for index, part in enumerate(self._parts):
            pairs: list[tuple[Tensor, Tensor, float]] = [(self.lora_A, self.lora_B[part.name], 1.0)]
            prev_A, prev_B = self.prev_factors()
            if prev_A is not None:
                pairs.append((prev_A, prev_B[index], -1.0))
            products = []
            for A, B, sign in pairs:  # one by one: equal factors give exactly nothing
                A = A[:, part.a : part.a + part.rank]
                wide = torch.promote_types(A.dtype, torch.float32)
                product = torch.mm(B.permute(1, 0, 2).flatten(1).to(wide), A.flatten(0, 1).to(wide))
                products.append(product.mul_(sign * part.scale / len(A)))
            found.append((part, sum(products[1:], products[0] + 0.0)))
        return found

    def _rows_of(self, weight: Tensor, part: Part) -> Tensor:
        """Return a part's rows of a tensor laid out like W, an (O_part, D) view."""
        return (weight.t() if is_conv1d(self) else weight)[part.start : part.start + part.rows]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plain layer's state: W with this worker's heads merged as if alone.

        It does not communicate, so a single worker may call it; at a merge it is the merged W on all of them.
        """
        result = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for key in [k for k in result if k.startswith(tuple(prefix + own for own in ("lora_", "rest_weight.", "rest_bias.")))]:
            del result[key]
        name, keep_vars = prefix + weight_name(self), kwargs.get("keep_vars", args[2] if len(args) > 2 else False)
        if not self._shared.viewing and not keep_vars and name in result:
            result[name] = self._with_beyond(result[name])
        return result

    def _with_beyond(self, weight: Tensor) -> Tensor:
        """Return W with what the heads here hold beyond it, a new tensor."""
        whole = weight.detach().clone()
        for part, delta in self._beyond():
            rows = self._rows_of(whole, part)
            rows.copy_(rows + delta)
        return whole

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # A plain state dict is the merged model: W is what is left of it without what the heads here hold beyond W.
        name = prefix + weight_name(self)
        plain, given = f"{prefix}lora_A" not in state_dict, state_dict.get(name)
        if plain and given is not None and given.shape == weight_of(self).shape:
            if not self._shared.viewing:
                own = weight_of(self).detach()
                weight = given.detach().to(own, copy=True)
                if torch.equal(weight, self._with_beyond(own)):  # what is there already: taking it out again would round
                    weight = own.clone()
                else:
                    for part, delta in self._beyond():
                        rows = self._rows_of(weight, part)
                        rows.copy_(rows - delta)
                state_dict[name] = weight
        if plain:
            state_dict[f"{prefix}lora_A"] = self.lora_A.detach()
            state_dict |= {f"{prefix}lora_B.{key}": B.detach() for key, B in self.lora_B.items()}
            if given is not None:
                dim = 1 if is_conv1d(self) else 0
                for rest in self._rest:
                    state_dict.setdefault(f"{prefix}rest_weight.{rest.name}", given.narrow(dim, rest.start, rest.rows))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def has_prev(self) -> bool:
        """Return whether W holds anything of these heads."""
        return getattr(self, "prev_A", None) is not None

    def set_prev(self, A: Tensor | None, B: dict[str, Tensor] | None) -> None:
        """Set the factors of these heads that W holds, as copies; ``None``: nothing."""
        self.prev_A = None if A is None else A.detach().clone()
        for index, part in enumerate(self._parts):
            self.register_buffer(f"prev_B{index}", None if B is None else B[part.name].detach().clone(), persistent=False)

    def prev_factors(self) -> tuple[Tensor | None, list[Tensor]]:
        """Return what W holds of these heads: A (H, ΣR, D) and per part B (H, O_part, R_part); ``None`` and none if nothing."""
        return (self.prev_A, self.prev_B) if self.has_prev else (None, [])

    @property
    def prev_B(self) -> list[Tensor]:
        """Return per part (H, O_part, R_part); what W holds of B, where it holds anything."""
        return [getattr(self, f"prev_B{index}") for index in range(len(self._parts))]

    def extra_repr(self) -> str:
        """Return the plain layer's line, heads and ranks."""
        ranks = ", ".join(f"{part.name}={part.rank}" for part in self._parts)
        return f"{super().extra_repr()}, heads={self.lora_A.shape[0]}, lora_rank({ranks})"


def draw_A(target: str, head: int, redraw: int, rank: int, cols: int, seed: int | None = None) -> Tensor:
    """Draw A of one head, (R, D): orthogonal times √(D/R), so that each singular value is √(D/R) (as the authors do).

    Args:
        target: the target's name.
        head: id of the head, 0 … N−1, the same on any worker.
        redraw: how often it was drawn before.
        rank: R.
        cols: D.
        seed: the run's seed.
    """
    A = torch.empty(rank, cols, dtype=torch.float32, device="cpu")  # as the generator, for any defaults of the process
    nn.init.orthogonal_(A, gain=math.sqrt(cols / rank), generator=generator("lora_A", target, head, redraw, seed=seed))
    return A


def give_heads(
    layer_name: str,
    layer: nn.Module,
    ranked: list[tuple[Target, int]],
    head_ids: list[int],
    shared: Shared,
    rest: list[RestPart],
    alpha: float | None = None,
    seed: int | None = None,
    recompute_inputs: bool = False,
) -> list[Inherit]:
    """Swap the layer's class, register heads with B = 0 for its ranked targets, and freeze W.

    Args:
        layer_name: the layer's name, for messages.
        layer: an ``nn.Linear``, a ``Conv1D`` or a subclass of them.
        ranked: its targets, in the order of rows, with their ranks.
        head_ids: ids of the H heads that live here.
        shared: what the model's layers have in common.
        rest: its row blocks that are not targets; they continue to train in full.
        alpha: scale = alpha / rank; ``None``: scale 1.
        seed: the run's seed, for A.
        recompute_inputs: see ``LTEStrategy``.

    Returns:
        What the rest blocks' parameters take over.
    """
    if has_own_forward(layer):
        raise ConfigError("targets", layer_name, "its class has a forward of its own, which heads cannot follow")
    weight = cast(nn.Parameter, layer.weight)
    like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    parts, at, heads = [], 0, len(head_ids)
    for target, rank in ranked:
        parts.append(Part(target.part, target.start, target.rows, at, rank, 1.0 if alpha is None else alpha / rank))
        at += rank
    swap_class(layer, MultiheadLoRALinear)
    layer = cast(MultiheadLoRALinear, layer)
    layer._parts, layer._rest, layer._shared, layer._name = tuple(parts), (), shared, layer_name
    layer._remaker = Remaker() if recompute_inputs else None
    none = torch.empty(0, weight.shape[0] if is_conv1d(layer) else weight.shape[1], dtype=torch.float32, device="cpu")
    A = [torch.cat([none, *(draw_A(t.name, head, 0, rank, t.cols, seed) for t, rank in ranked)]) for head in head_ids]
    layer.lora_A = nn.Parameter(torch.stack(A).to(**like), requires_grad=at > 0)
    layer.lora_B = nn.ParameterDict({t.part: nn.Parameter(torch.zeros(heads, t.rows, rank, **like)) for t, rank in ranked})
    layer.register_buffer("prev_A", None, persistent=False)
    layer.set_prev(None, None)
    inherited = keep_rows(layer, rest, bias=False) if rest and weight.requires_grad else []
    weight.requires_grad_(False)
    return inherited


@dataclass
class Held:
    """Keep the heads of a layer that is plain again, for checkpoints after the fit."""

    lora_A: nn.Parameter
    lora_B: dict[str, nn.Parameter]
    prev_A: Tensor | None
    prev_B: list[Tensor]
    _parts: tuple[Part, ...]

    @property
    def has_prev(self) -> bool:
        """Return whether W held anything of these heads."""
        return self.prev_A is not None

    def prev_factors(self) -> tuple[Tensor | None, list[Tensor]]:
        """See ``MultiheadLoRALinear.prev_factors``."""
        return self.prev_A, self.prev_B


HeadLayer = MultiheadLoRALinear | Held


def take_heads(layer: MultiheadLoRALinear) -> Held:
    """Give the layer its plain class back; return a record of what the heads hold beyond W."""
    held = Held(layer.lora_A, dict(layer.lora_B.items()), *layer.prev_factors(), layer._parts)
    for name in ("lora_A", "lora_B", "rest_weight", "rest_bias", *prev_names(layer)):
        if hasattr(layer, name):
            delattr(layer, name)
    plain = layer._plain_class
    layer.__class__ = plain  # type: ignore[assignment]  # the class that ``give_heads`` found
    del layer._parts, layer._rest, layer._shared, layer._name
    layer.__dict__.pop("_remaker", None)
    return held


def prev_names(layer: HeadLayer) -> list[str]:
    """Return the names of a layer's buffers that hold its heads' factors as merged into W."""
    return ["prev_A", *(f"prev_B{index}" for index in range(len(layer._parts)))]


def factor_parameters(layers: Mapping[str, HeadLayer]) -> dict[str, nn.Parameter]:
    """Return the heads' parameters by name, as the module would name them."""
    found = {}
    for name, layer in layers.items():
        for factor, p in factors_of(layer).items():
            found[factor_name(name, factor)] = p
    return found


def factors_of(layer: HeadLayer) -> dict[str, nn.Parameter]:
    """Return a layer's parameters as ``A`` and ``B.<part>``."""
    return {"A": layer.lora_A} | {f"B.{part.name}": layer.lora_B[part.name] for part in layer._parts}


def factor_name(layer: str, factor: str) -> str:
    """Return a factor's name in the module."""
    return f"{layer}.lora_{factor}"


def weight_name(layer: nn.Module) -> str:
    """Return the name of the parameter that holds a layer's W."""
    return "weight_orig" if "weight_mask" in layer._buffers else "weight"


def weight_of(layer: nn.Module) -> nn.Parameter:
    """Return the parameter that holds a layer's W: ``weight``, or what ``torch.nn.utils.prune`` made of it in mid-fit.

    Raises:
        ConfigError: the weight is computed from something else by now.
    """
    found = layer._parameters.get(weight_name(layer))
    if found is None:
        name = getattr(layer, "_name", type(layer).__name__)
        raise ConfigError("targets", name, "its weight was parametrized while it has heads: do so before fit, or leave it out")
    return found


@dataclass
class HeadTarget:
    """Hold one target with heads.

    Attributes:
        name: the target's name.
        layer: the layer with heads; after the fit, its remains (``Held``).
        part: its row block.
        base: W₀, (O, D) in float32 at least; ``None``: W itself is what the next merge adds to.
        route: ``factors`` or ``dense``.
        held: with an outer step, (s/N) Σ BₙAₙ as of the last merge, (O, D); ``None``: nothing, as after a reset.
    """

    name: str
    layer: HeadLayer
    part: Part
    base: Tensor | None = field(default=None, repr=False)
    route: str = "factors"
    held: Tensor | None = field(default=None, repr=False)

    @property
    def weight_name(self) -> str:
        """Return the name of the layer that the target is a part of."""
        return self.name if self.part.name == WHOLE else self.name.rpartition(".")[0]

    @property
    def owner(self) -> MultiheadLoRALinear:
        """Return the layer, which must still have its heads."""
        return cast(MultiheadLoRALinear, self.layer)

    def weight(self) -> Tensor:
        """Return the layer's W that is in place now, without its gradient."""
        return weight_of(self.owner).detach()

    def live(self) -> Tensor:
        """Return W's rows, an (O, D) view."""
        return self.rows_of(self.weight())

    def rows_of(self, weight: Tensor) -> Tensor:
        """Return the target's rows of a tensor laid out like its layer's W, an (O, D) view."""
        return self.owner._rows_of(weight, self.part)

    def as_live(self, merged: Tensor) -> Tensor:
        """Return merged rows unchanged."""
        return merged

    def write(self, merged: Tensor, into: Tensor) -> None:
        """Write merged rows into a tensor laid out like the layer's W."""
        self.rows_of(into).copy_(merged)

    def merge_base(self, dtype: torch.dtype) -> Tensor:
        """Return W₀, or W in ``dtype`` where merges add to it."""
        return self.live().to(dtype) if self.base is None else self.base

    def stepped(self, total: Tensor, outer: OuterStep | None, starts_anew: bool) -> Tensor:
        """Return W after a merge's outer step, (O, D); keep what the next merge's increment starts from.

        Args:
            total: (s/N) Σ BₙAₙ.
            outer: moves W; ``None``: the increment is added unchanged.
            starts_anew: ``total`` is entirely new; else it includes what the merge before had.
        """
        increment = total.clone() if self.held is None else total - self.held
        self.held = None if starts_anew else total.clone()
        base = self.merge_base(increment.dtype).clone()
        if outer is None:
            return base.add_(increment)
        outer.step(self.name, base, increment)
        return base

    def factors(self) -> Factors:
        """Return the heads' live A (H, R, D), a view, and B (H, O, R)."""
        rows = slice(self.part.a, self.part.a + self.part.rank)
        return self.layer.lora_A.detach()[:, rows], self.layer.lora_B[self.part.name].detach()

    def prev_factors(self) -> Factors | None:
        """Return what W holds of the heads: A (H, R, D) and B (H, O, R); ``None``: nothing."""
        A, B = self.layer.prev_factors()
        if A is None:
            return None
        return A[:, self.part.a : self.part.a + self.part.rank], B[self.layer._parts.index(self.part)]

    def bytes_sent(self) -> int:
        """Return the bytes of this worker's factors."""
        return sum(factor.numel() * factor.itemsize for factor in self.factors())
