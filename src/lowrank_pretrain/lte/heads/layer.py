"""A layer with H heads: what a linear layer becomes under LTE (arXiv 2402.16828, section 3).

Like ``lora.layer``, giving heads swaps the *class* of a layer: module, W and b stay the same objects under the same names.
Heads are ``lora_A`` (H, ΣR, D) and, per row block of a fused layer, ``lora_B.<part>`` (H, O_part, R_part). N heads in all,
H of them on this worker; s = alpha / R.

Modes. ``parallel``: head k trains on the k-th chunk of the batch. ``joint`` (the authors' MHLoRA): all heads see the whole
batch, y = W x + (s/N) Σ B_n A_n x. ``sequential``: one head at a time, on the whole batch; H is 1 and who it is changes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.core.seeds import generator
from lowrank_pretrain.core.targets import Target, is_conv1d
from lowrank_pretrain.lora.function import Part, RestPart, lora_linear
from lowrank_pretrain.lora.layer import Reclassed, has_own_forward, keep_rows, swap_class
from lowrank_pretrain.lte.heads.function import Layout, heads_linear
from lowrank_pretrain.lte.written import leaf, leaf_name

MODES = ("parallel", "joint", "sequential")


@dataclass
class Shared:
    """What all layers with heads of one model have in common.

    Attributes:
        mode: one of ``MODES``.
        total: N, the heads over which a merge averages (in ``sequential``: the workers).
        batch: samples in the batch that is being trained on; 0: not known; ``None`` outside a training step.
        viewing: W holds the merged weights for looking at: heads stay out of the way.
        seen: per layer the largest dim 0 of its inputs in the first training step; ``None`` after it.
        refused: why a layer's input cannot be shared out, as the first training step showed.
    """

    mode: str
    total: int
    batch: int | None = None
    viewing: bool = False
    seen: dict[str, int] | None = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def check_seen(self, heads: int, families: Callable[[Iterable[str]], Mapping[str, str]]) -> dict[str, str]:
        """After the first forward pass: has each layer at least one sample for each head?

        A layer passes with its family (experts, of which one or the other may see few tokens).

        Args:
            heads: on this worker.
            families: names to families (``targets.families``).

        Returns:
            Why a layer cannot have heads, by its name.

        Raises:
            ConfigError: no layer sees as many samples as there are heads.
        """
        seen, self.seen = self.seen, None
        if heads == 1 or not (seen or self.refused):
            return {}
        reasons = dict(self.refused)
        if not seen:
            return reasons
        if max(seen.values()) < heads:
            raise ConfigError(
                "heads", heads, f"a batch holds {max(seen.values())} samples on this worker: at least one per head is needed"
            )
        of = families(seen)
        for name in seen:
            size = max(n for other, n in seen.items() if of[other] == of[name])
            if size < heads:
                reasons[name] = (
                    f"its input has {size} in dim 0, fewer than the {heads} heads: leave it out of the targets, or use heads=1"
                )
        return reasons


class MultiheadLoRALinear(Reclassed):
    """What a layer's class gains by ``give_heads`` (mixed in before ``nn.Linear``, ``Conv1D`` or a subclass of them)."""

    _parts: tuple[Part, ...]
    _shared: Shared
    _name: str

    def forward(self, x: Tensor) -> Tensor:
        """(B, .., D) -> (B, .., O). Outside a training step: W as of the last merge, or the merged view if it is on."""
        shared = self._shared
        if shared.viewing or shared.batch is None:
            return self._plain_class.forward(self, x)
        weight = self.weight.detach() if self.weight.requires_grad else self.weight  # in the first step only
        rest_weight = tuple(self.rest_weight[part.name] for part in self._rest)
        factors = [self.lora_B[part.name] for part in self._parts]
        if shared.mode == "joint":
            A, B, parts = self._side_by_side(factors)
            return lora_linear(x, weight, self.bias, A, B, parts, is_conv1d(self), self._rest, rest_weight)
        prev_A, prev_B = (self.prev_A, self.prev_B) if self.has_prev else (None, [])
        layout = Layout(self._parts, self._rest, is_conv1d(self))
        if self.weight.requires_grad and self._cannot_share(x):
            return self._plain_class.forward(self, x)
        spans = self._spans(x)
        return heads_linear(x, weight, self.bias, self.lora_A, factors, prev_A, prev_B, spans, layout, rest_weight)

    def _cannot_share(self, x: Tensor) -> bool:
        """In the first step, in which W takes gradients: x has not a sample for each head, so that W itself is what learns."""
        if len(self.lora_A) == 1:
            return False
        try:
            self._spans(x)
        except ConfigError as error:
            self._shared.refused[self._name] = error.allowed
            return True
        return x.shape[0] < len(self.lora_A)

    def _spans(self, x: Tensor) -> tuple[tuple[int, int], ...]:
        """Per head its first row and the one after its last; the first heads get one sample more if it does not divide.

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
        """All heads as one adapter of H times the rank, scale / N."""
        heads = self.lora_A.shape[0]
        A = torch.cat([self.lora_A[:, p.a : p.a + p.rank].flatten(0, 1) for p in self._parts])
        B = [f.permute(1, 0, 2).flatten(1) for f in factors]
        wide = [p._replace(a=heads * p.a, rank=heads * p.rank, scale=p.scale / self._shared.total) for p in self._parts]
        return A, B, tuple(wide)

    @torch.no_grad()
    def _beyond(self) -> list[tuple[Part, Tensor]]:
        """Per part the mean over the heads here of what each has learnt and W does not hold, (O_part, D), float32 at least."""
        found = []
        for index, part in enumerate(self._parts):
            pairs = [(self.lora_A, self.lora_B[part.name], 1.0)]
            if self.has_prev:
                pairs.append((self.prev_A, self.prev_B[index], -1.0))
            total = 0.0
            for A, B, sign in pairs:  # one by one: equal factors give exactly nothing
                A, B = A[:, part.a : part.a + part.rank], B
                wide = torch.promote_types(A.dtype, torch.float32)
                product = torch.mm(B.permute(1, 0, 2).flatten(1).to(wide), A.flatten(0, 1).to(wide))
                total = total + product.mul_(sign * part.scale / len(A))
            found.append((part, total))
        return found

    def _rows_of(self, weight: Tensor, part: Part) -> Tensor:
        """A part's rows of a tensor that lies as W does, an (O_part, D) view."""
        return (weight.t() if is_conv1d(self) else weight)[part.start : part.start + part.rows]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the plain layer's: W with what this worker's heads have learnt in it, as they would merge alone.

        It asks no other worker, so one may call it alone; at a merge it is the merged W on all of them.
        """
        result = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for key in [k for k in result if k.startswith(tuple(prefix + own for own in ("lora_", "rest_weight.", "rest_bias.")))]:
            del result[key]
        name, keep_vars = prefix + leaf_name(self), kwargs.get("keep_vars", args[2] if len(args) > 2 else False)
        if not self._shared.viewing and not keep_vars and name in result:
            merged = result[name].clone()
            for part, delta in self._beyond():
                rows = self._rows_of(merged, part)
                rows.copy_(rows + delta)
            result[name] = merged
        return result

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # A plain state dict is the merged model: W is what is left of it without what the heads here hold beyond W.
        name = prefix + leaf_name(self)
        plain, given = f"{prefix}lora_A" not in state_dict, state_dict.get(name)
        if plain and given is not None and given.shape == leaf(self).shape:
            if not self._shared.viewing:
                weight = given.detach().to(leaf(self)).clone()
                for part, delta in self._beyond():
                    rows = self._rows_of(weight, part)
                    rows.copy_(rows - delta)
                state_dict[name] = weight
        if plain:
            state_dict[f"{prefix}lora_A"] = self.lora_A.detach()
            state_dict |= {f"{prefix}lora_B.{key}": B.detach() for key, B in self.lora_B.items()}
            for part in self._rest if given is not None else ():
                dim = 1 if is_conv1d(self) else 0
                state_dict.setdefault(f"{prefix}rest_weight.{part.name}", given.narrow(dim, part.start, part.rows))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def has_prev(self) -> bool:
        """Whether W holds anything of these heads."""
        return getattr(self, "prev_A", None) is not None

    def set_prev(self, A: Tensor | None, B: dict[str, Tensor] | None) -> None:
        """What of these heads W holds from now on: a copy is made; ``None``: nothing."""
        self.prev_A = None if A is None else A.detach().clone()
        for index, part in enumerate(self._parts):
            self.register_buffer(f"prev_B{index}", None if B is None else B[part.name].detach().clone(), persistent=False)

    @property
    def prev_B(self) -> list[Tensor | None]:
        """Per part (H, O_part, R_part)."""
        return [getattr(self, f"prev_B{index}") for index in range(len(self._parts))]

    def extra_repr(self) -> str:
        """The plain layer's line, heads and ranks."""
        ranks = ", ".join(f"{part.name}={part.rank}" for part in self._parts)
        return f"{super().extra_repr()}, heads={self.lora_A.shape[0]}, lora_rank({ranks})"


def draw_A(target: str, head: int, redraw: int, rank: int, cols: int, seed: int | None = None) -> Tensor:
    """A of one head, (R, D): orthogonal times √(D/R), so that every singular value is √(D/R) (the authors' initialisation).

    Args:
        target: its name.
        head: id of the head, 0 … N−1, the same whatever worker it lives on.
        redraw: how often it was drawn before.
        rank: R.
        cols: D.
        seed: the run's seed.
    """
    A = torch.empty(rank, cols)
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
) -> list[Inherit]:
    """Swap the layer's class, register heads with B = 0 for its ranked targets, and freeze W.

    Args:
        layer_name: of the layer, for messages.
        layer: an ``nn.Linear``, a ``Conv1D`` or a subclass of them.
        ranked: its targets, in the order of rows, with their ranks.
        head_ids: the H heads that live here.
        shared: common to the model's layers.
        rest: its row blocks that are no targets; they go on training in full.
        alpha: scale = alpha / rank; ``None``: scale 1.
        seed: of A.

    Returns:
        What the rest blocks' parameters take over.
    """
    if has_own_forward(layer):
        raise ConfigError("targets", layer_name, "its class has a forward of its own, which heads cannot follow")
    weight = layer.weight
    like = {"dtype": weight.dtype, "device": weight.device}
    parts, at, heads = [], 0, len(head_ids)
    for target, rank in ranked:
        parts.append(Part(target.part, target.start, target.rows, at, rank, 1.0 if alpha is None else alpha / rank))
        at += rank
    swap_class(layer, MultiheadLoRALinear)
    layer._parts, layer._rest, layer._shared, layer._name = tuple(parts), (), shared, layer_name
    none = torch.empty(0, weight.shape[0] if is_conv1d(layer) else weight.shape[1])
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
    """The heads of a layer that has its plain class back: what a checkpoint of a finished fit still needs."""

    lora_A: Tensor
    lora_B: dict[str, Tensor]
    prev_A: Tensor | None
    prev_B: list[Tensor | None]
    _parts: tuple[Part, ...]

    @property
    def has_prev(self) -> bool:
        """Whether W held anything of these heads."""
        return self.prev_A is not None


def take_heads(layer: nn.Module) -> Held:
    """Give the layer its plain class back; what the heads hold beyond W is in what is returned."""
    held = Held(layer.lora_A, dict(layer.lora_B.items()), layer.prev_A, layer.prev_B, layer._parts)
    for name in ("lora_A", "lora_B", "rest_weight", "rest_bias", *prev_names(layer)):
        if hasattr(layer, name):
            delattr(layer, name)
    layer.__class__ = layer._plain_class
    del layer._parts, layer._rest, layer._shared, layer._name
    return held


def prev_names(layer: nn.Module) -> list[str]:
    """Names of a layer's buffers that hold what W has of its heads."""
    return ["prev_A", *(f"prev_B{index}" for index in range(len(layer._parts)))]


def head_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer with heads, in the module's order."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, MultiheadLoRALinear))


def head_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every head's factor."""
    for name, layer in head_layers(module):
        for own, p in layer.named_parameters():
            if own.startswith("lora_"):
                yield f"{name}.{own}", p
