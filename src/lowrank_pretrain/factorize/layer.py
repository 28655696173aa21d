"""Define the factored layer: a linear layer whose W is replaced by a product of two thin matrices.

        x (.., D) ── V (k, D) ── U (O, k) ──(+ b)── y (.., O)        y = U (V x) + b,   W = U V

The *class* of the layer is swapped, as for adapters: the module and its bias stay the same objects. W itself is gone: while the
layer is factored ``layer.weight`` is the product, computed whenever it is read (gradients reach the factors through it), and
the Parameter that was W is kept, empty, for when the layer becomes plain again. The factors are ``factor_V`` (Σk, D) and,
per block of rows, ``factor_U.<block>`` (O_p, k_p): one block ``W``, or one for each part of a fused layer.

Two calls of ``F.linear`` and nothing of our own: autocast, compilation, exporters, transforms and second derivatives follow.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_pretrain.core.lightning_private import is_functional_call
from lowrank_pretrain.factorize.decompose import factors
from lowrank_pretrain.factorize.ranks import Block, Cut
from lowrank_pretrain.lora.layer import Reclassed, has_own_forward, swap_class

ADDED = ("factor_V", "factor_U")  # what factoring registers on a layer
_COMPUTED = "_lowrank_computed"  # marks a W that the layer has computed


class FactoredLinear(Reclassed, nn.Module):
    """Add factors to a layer's class (mixed in before ``nn.Linear``, ``Conv1D`` or a user's subclass of them)."""

    _blocks: tuple[Block, ...]
    _transposed: bool
    _whole: nn.Parameter  # the former W: empty, kept for its identity
    factor_V: nn.Parameter  # (Σk, D)
    factor_U: nn.ParameterDict  # by block (O_p, k_p)
    bias: nn.Parameter | None
    _given: Tensor | None = None  # in place of U V, inside of functional_call

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map (.., D) to (.., O); called like the plain class's forward, and equal to it with U V for W."""
        given = (*args, *kwargs.values())
        if len(given) != 1:
            raise TypeError(f"{type(self).__name__}.forward takes one input, {len(given)} were given")
        if self._given is not None:
            return self._plain_class.forward(self, *args, **kwargs)
        z = F.linear(given[0], self.factor_V)  # (.., Σk)
        if len(self._blocks) == 1:
            return F.linear(z, self.factor_U[self._blocks[0].name], self.bias)
        outs = []
        for block in self._blocks:
            bias = None if self.bias is None else self.bias.narrow(0, block.start, block.rows)
            outs.append(F.linear(z.narrow(-1, block.at, block.rank), self.factor_U[block.name], bias))
        return torch.cat(outs, -1)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed here, a parameter in a plain layer
        """Return U V in the plain weight's layout: a new tensor on each read, through which gradients flow."""
        if self._given is not None:
            return self._given
        rows = [self.factor_U[b.name] @ self.factor_V.narrow(0, b.at, b.rank) for b in self._blocks]
        whole = rows[0] if len(rows) == 1 else torch.cat(rows)
        whole = whole.t() if self._transposed else whole
        if not torch.compiler.is_compiling():
            setattr(whole, _COMPUTED, True)
        return whole

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. For ``functional_call``, and nobody else, ``weight`` is one: with a state dict it gives W.

        It reads W before, and sets what it has read when it is over.
        """
        if name == "weight" and is_functional_call(sys._getframe(1)):
            self.__dict__["_given"] = None if getattr(value, _COMPUTED, False) else value
        else:
            super().__setattr__(name, value)

    @torch.no_grad()
    def product(self, check: bool = True) -> Tensor:
        """Return U V as the plain layer would hold it, computed in float32 or more.

        Args:
            check: refuse NaN or infinite factors.

        Raises:
            ValueError: a factor is NaN or infinite.
        """
        if check and not all(bool(torch.isfinite(p).all()) for p in self.factor_parameters().values()):
            raise ValueError("factors hold numbers that are NaN or infinite: refusing to multiply them into the weights")
        return product(self.factor_V, dict(self.factor_U.items()), self._blocks, self._transposed)

    def factor_parameters(self) -> dict[str, nn.Parameter]:
        """Return the factors by the names that they have on the layer."""
        return {"factor_V": self.factor_V} | {f"factor_U.{name}": p for name, p in self.factor_U.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the plain layer's state with W = U V: a state dict always holds the plain trained model."""
        if kwargs.get("keep_vars", False):  # callers that want the parameters themselves get all of them
            return super().state_dict(*args, **kwargs)
        plain = self._plain_class.__new__(self._plain_class)
        own: dict[str, Tensor | None] = {"weight": self._show(self.product(check=False), self.factor_parameters())}
        own |= {name: p for name, p in self._parameters.items() if name not in ADDED}
        children = {name: child for name, child in self._modules.items() if name not in ADDED}
        object.__setattr__(plain, "__dict__", {**self.__dict__, "_parameters": own, "_modules": children})
        return plain.state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        # a plain state dict (no factors) has W: its best factors of our ranks, which W must be to rounding
        whole = state_dict.get(f"{prefix}weight")
        if whole is not None:
            self.__dict__.pop("_shown", None)  # what was written into it is loaded now, or replaced
        if f"{prefix}factor_V" not in state_dict:
            shown = self._shown_with(whole) if isinstance(whole, Tensor) else None
            refusal = None
            if whole is None:
                missing.append(f"{prefix}weight")
            elif shown is None:
                rows = whole.t() if self._transposed else whole
                refusal = self._refusal(rows)
                shown = best_factors(rows, self._blocks) if refusal is None else None
            if refusal is not None:
                errors.append(f"{prefix}weight {refusal}")
            # if there is none, or it is refused, its own factors, so that torch does not call them missing as well
            found = self.factor_parameters() if shown is None else shown
            state_dict |= {prefix + name: value.detach() for name, value in found.items()}
            state_dict.pop(f"{prefix}weight", None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _shown_with(self, whole: Tensor) -> dict[str, Tensor] | None:
        """Return the factors with which the layer showed this very weight, which keep the optimizer's moments; or ``None``."""
        if self._memory is None:
            return None
        whole = whole.detach().to(self.factor_V.device)
        for found in self._memory.find(whole):
            U = {b.name: found[f"factor_U.{b.name}"] for b in self._blocks}
            if torch.equal(product(found["factor_V"], U, self._blocks, self._transposed), whole):
                return found
        return None

    def _refusal(self, rows: Tensor) -> str | None:
        """Say why a matrix (O, D) cannot be loaded; ``None`` if it has the layer's shape, and its ranks up to rounding."""
        if rows.shape != (sum(b.rows for b in self._blocks), self.factor_V.shape[1]):
            return f"has shape {tuple(rows.shape)}, which is another layer's"
        found = best_factors(rows, self._blocks)
        rounding = 1e-4 if rows.dtype in (torch.float32, torch.float64) else 2e-2
        for b in self._blocks:
            part = rows[b.start : b.start + b.rows].to(found["factor_V"])
            off = torch.linalg.vector_norm(part - found[f"factor_U.{b.name}"] @ found["factor_V"][b.at : b.at + b.rank])
            if off > rounding * torch.linalg.vector_norm(part):
                return (
                    f"has a rank above {b.rank}, which this factored layer has: load it before the switch, or after the fit "
                    "(if that was interrupted, after lowrank_pretrain.merge(module))"
                )
        return None

    def extra_repr(self) -> str:
        """Return the plain layer's line, and each block's rank."""
        ranks = ", ".join(f"{b.name}={b.rank}" for b in self._blocks)
        return f"{super().extra_repr()}, factored({ranks})"


@torch.no_grad()
def product(V: Tensor, U: Mapping[str, Tensor], blocks: tuple[Block, ...], transposed: bool) -> Tensor:
    """Return U V in a plain layer's layout and the factors' dtype, computed in float32 or more."""
    inner = torch.promote_types(V.dtype, torch.float32)
    with torch.autocast(V.device.type, enabled=False):
        wide = V.detach().to(inner)
        rows = torch.cat([U[b.name].detach().to(inner) @ wide[b.at : b.at + b.rank] for b in blocks])
    rows = rows.to(V.dtype)
    return rows.t().contiguous() if transposed else rows


@torch.no_grad()
def best_factors(rows: Tensor, blocks: tuple[Block, ...]) -> dict[str, Tensor]:
    """Return the factors nearest to a matrix, by their names on the layer; float32 or more.

    Args:
        rows: W (O, D).
        blocks: which ranks its row blocks get.
    """
    inner = torch.promote_types(rows.dtype, torch.float32)
    U, V = {}, []
    for b in blocks:
        part = rows[b.start : b.start + b.rows].to(inner)
        U[f"factor_U.{b.name}"], thin = factors(part, torch.linalg.svd(part, full_matrices=False)[0][:, : b.rank])
        V.append(thin)
    return {"factor_V": torch.cat(V)} | U


def why_not(layer: nn.Module) -> str | None:
    """Say why a layer cannot be factored although it could have adapters; ``None`` if it can."""
    if has_own_forward(layer):
        return f"has a forward of its own ({type(layer).__name__}), which needs the whole weight: leave it out"
    return None


def give_factors(layer: Any, cut: Cut) -> None:
    """Swap the layer's class and replace its weight by the factors; the weight's memory is given back."""
    whole = layer.weight
    like = {"dtype": whole.dtype, "device": whole.device}
    del layer._parameters["weight"]
    swap_class(layer, FactoredLinear)
    layer.__dict__["_rest"], layer.__dict__["_blocks"], layer.__dict__["_whole"] = (), cut.blocks, whole
    trains = whole.requires_grad
    layer.register_parameter("factor_V", nn.Parameter(cut.V.to(**like).contiguous(), requires_grad=trains))
    U = {name: nn.Parameter(u.to(**like).contiguous(), requires_grad=trains) for name, u in cut.U.items()}
    layer.add_module("factor_U", nn.ParameterDict(U))
    whole.data, whole.grad = whole.data.new_empty(0), None


def take_factors(layer: Any, check: bool = True) -> None:
    """Make the layer plain again: W, the same Parameter as before, holds U V.

    Raises:
        ValueError: the factors are NaN or infinite, and ``check`` is on.
    """
    product, whole = layer.product(check), layer._whole
    del layer._parameters["factor_V"], layer._modules["factor_U"]
    object.__setattr__(layer, "__class__", layer._plain_class)
    for key in ("_rest", "_blocks", "_whole", "_shown", "_memory", "_given"):
        layer.__dict__.pop(key, None)
    whole.data = product
    layer.__dict__["_parameters"] = {"weight": whole, **layer._parameters}  # in a plain layer's order


@torch.no_grad()
def follow_weight(layer: FactoredLinear, weight: Tensor) -> None:
    """Make a factored layer compute the nearest to another weight that its U allows: V = U⁺ W.

    Used for averages of weights. For the W that was just factored this gives V itself, and U stays the trained one, so
    that averaging the factors afterwards averages like with like.

    Args:
        layer: factored; its V is changed.
        weight: in the plain layer's layout.
    """
    inner = torch.promote_types(layer.factor_V.dtype, torch.float32)
    rows = (weight.t() if layer._transposed else weight).to(layer.factor_V.device, inner)
    for b in layer._blocks:
        U = layer.factor_U[b.name].to(inner)
        V = torch.linalg.lstsq(U, rows[b.start : b.start + b.rows]).solution  # (k, D)
        layer.factor_V[b.at : b.at + b.rank] = V.to(layer.factor_V)
