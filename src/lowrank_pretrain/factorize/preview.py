"""Look, in the first training step, whether factors that keep the energy asked for would pay for any layer.

The decision comes at the freeze, perhaps days later, from the weights and inputs of that time: this look ends no run. It
measures the first layer of each family only, by hooks that change nothing of what is computed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.lightning_private import is_traced, transforms_active
from lowrank_pretrain.core.targets import families, weight_rows
from lowrank_pretrain.factorize.cost import largest_rank, largest_share
from lowrank_pretrain.factorize.decompose import damped, spectrum
from lowrank_pretrain.factorize.moments import add_inputs


class Preview:
    """Measure the inputs of a layer of each family through one optimizer step.

    Args:
        module: names count from it.
        layers: linear layers by name, none of them compiled: a hook would be compiled in.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        first: dict[str, str] = {}
        for name, family in families(module, layers).items():
            first.setdefault(family, name)
        self._layers = {name: layers[name] for name in first.values()}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def start(self) -> None:
        """Begin to measure."""
        for name, layer in self._layers.items():
            W = weight_rows(layer)
            moment = torch.zeros(W.shape[1], W.shape[1], dtype=torch.float32, device=W.device)
            self._sums[name] = moment, moment.new_zeros(())
            self._handles.append(layer.register_forward_pre_hook(_Measure(*self._sums[name]), with_kwargs=True))

    @torch.no_grad()
    def best_kept(
        self, products: torch.dtype | None, total: Callable[[Tensor], Tensor], enough: float, is_first: bool
    ) -> tuple[str, float] | None:
        """Stop measuring; return the layer that keeps most at the largest rank that pays, and the share that it keeps.

        Args:
            products: the dtype of the layers' products; None: that of the weights.
            total: sums a tensor over all processes, which must all call this.
            enough: a share at which the search ends: one layer that keeps it is proof.
            is_first: whether this process decides; the others get None.

        Returns:
            None also if no layer was called with finite inputs.
        """
        self.stop()
        best: tuple[str, float] | None = None
        for name, (moment, rows) in self._sums.items():
            moment, seen = total(moment), float(total(rows))
            if not is_first or not seen or not bool(torch.isfinite(moment).all()) or (best is not None and best[1] >= enough):
                continue
            W = weight_rows(self._layers[name]).detach()
            share = largest_share(products or W.dtype)
            W = W.to(torch.promote_types(W.dtype, torch.float32)).contiguous()
            rank = rank_that_pays(W, share)
            draws = generator("factorize", name, "preview", seed=0)
            kept = spectrum(W, damped(moment / seen).to(W), rank, draws).kept(rank) if rank else 0.0
            best = max(best or (name, kept), (name, kept), key=lambda one: one[1])
        self._sums.clear()
        return best

    def stop(self) -> None:
        """Stop measuring; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def rank_that_pays(W: Tensor, share: float) -> int:
    """Return the largest rank whose factors cost less than ``share`` of W (O, D); 0 if none does."""
    rows, cols = W.shape
    return min(largest_rank(rows, cols, share), rows, cols)


class _Measure:
    """Add a layer's inputs to two sums; copies and pickles of the layer get a hook that does nothing."""

    def __init__(self, moment: Tensor | None = None, rows: Tensor | None = None) -> None:
        self._moment, self._rows = moment, rows

    def __call__(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if self._moment is None or self._rows is None or not isinstance(x, Tensor) or not torch.is_grad_enabled():
            return
        if not transforms_active() and not is_traced():
            add_inputs(x, self._moment, self._rows)

    def __deepcopy__(self, memo: dict) -> "_Measure":
        return _Measure()

    def __reduce__(self) -> tuple:
        return _Measure, ()
