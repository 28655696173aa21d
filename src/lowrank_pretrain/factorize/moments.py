"""Measure the second moments of layers' inputs while a model trains: C = E[x xᵀ] per layer.

A layer that is measured has its class swapped, as adapters do it, so that compiled models are measured too. In each forward
pass with autograd it adds xᵀ x of some rows of its input to a D x D sum in float32, the older ones fading; nothing of what it
computes changes. (It does not ask for ``layer.training``: a pretrained model, or a part of one, may train in eval mode.)
Memory: 4 D² bytes per layer while it is measured (ViT-S: 11 MiB per block, ViT-L: 76 MiB per block). Time: at most ``ROWS``
rows of each forward's are taken, evenly spread: ROWS · D² multiplications next to the layer's own 3 N · D · O.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import is_traced, outside_transforms, runs_again, transforms_active
from lowrank_pretrain.core.targets import plain_name, weight_rows
from lowrank_pretrain.lora.function import is_exporting
from lowrank_pretrain.lora.layer import Reclassed, swap_class

ROWS = 1024  # of a forward's input rows (batch times tokens) that are looked at
FADE = 0.98  # the weight of a moment after one more forward: about the last 50 count


class MeasuredLinear(Reclassed, nn.Module):
    """Measure a layer's inputs. The sums are neither parameters nor buffers of the module."""

    _moment: Tensor  # (D, D), Σ fade · xᵀ x
    _rows_seen: Tensor  # (), Σ fade · rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Map (.., D) to (.., O) as the plain class does, and measure the input."""
        if torch.is_grad_enabled() and not is_exporting():
            x = args[0] if args else next(iter(kwargs.values()))
            if torch.compiler.is_compiling():
                self._measure(x)
            elif transforms_active():
                with outside_transforms(x) as plain:
                    self._measure(plain)
            elif isinstance(x, Tensor) and not is_traced() and not runs_again():  # torch.fx has stand-ins
                self._measure(x)
        return super().forward(*args, **kwargs)

    def _measure(self, x: Tensor) -> None:
        add_inputs(x, self._moment, self._rows_seen)

    def extra_repr(self) -> str:
        """Return the plain layer's line."""
        return f"{super().extra_repr()}, measured"


def add_inputs(x: Tensor, moment: Tensor, rows_seen: Tensor) -> None:
    """Add xᵀ x of some rows of an input (.., D) to a fading sum (D, D), and their number to another."""
    with torch.no_grad():
        x = torch.cat([one.flatten(0, -2) for one in x.detach().unbind()]) if x.is_nested else x.detach()
        x = x.reshape(-1, x.shape[-1])  # (N, D)
        x = x[:: max(1, -(-x.shape[0] // ROWS))].to(moment.dtype)  # at most ROWS of them; an expert may get none
        finite = torch.isfinite(x).all(1, keepdim=True)  # (N, 1): a step with others may be skipped, by a user or a scaler
        x = torch.where(finite, x, 0.0)
        with torch.autocast(x.device.type, enabled=False):
            moment.mul_(FADE).addmm_(x.t(), x)
        rows_seen.mul_(FADE).add_(finite.sum())


def measured_layers(module: nn.Module) -> Iterator[tuple[str, MeasuredLinear]]:
    """Yield (name, layer) of every layer that is measured, in the module's order."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, MeasuredLinear))


def begin(layer: Any) -> None:
    """Measure a layer's inputs from now on."""
    cols = weight_rows(layer).shape[1]
    swap_class(layer, MeasuredLinear)
    layer.__dict__["_rest"] = ()
    layer.__dict__["_moment"] = torch.zeros(cols, cols, dtype=torch.float32, device=layer.weight.device)
    layer.__dict__["_rows_seen"] = torch.zeros((), dtype=torch.float32, device=layer.weight.device)


def end(layer: Any) -> None:
    """Give a measured layer its plain class back, and free its moment."""
    object.__setattr__(layer, "__class__", layer._plain_class)
    for key in ("_rest", "_moment", "_rows_seen"):
        layer.__dict__.pop(key, None)


def moment_of(name: str, layer: MeasuredLinear, total: Callable[[Tensor], Tensor] = lambda local: local) -> Tensor | None:
    """Return C (D, D) of a measured layer; ``None`` if no training step called it.

    Args:
        name: the layer's, for errors.
        layer: the measured layer.
        total: sums a tensor over all processes.

    Raises:
        ConfigError: its inputs were so large that their squares are infinite.
    """
    moment, rows = total(layer._moment), float(total(layer._rows_seen))
    if rows == 0:
        return None
    if not bool(torch.isfinite(moment).all()):
        raise ConfigError(
            "targets",
            plain_name(name),
            "had NaN or infinite inputs since the switch, or huge ones: lower the learning rate, or leave it out",
        )
    return moment / rows


def exact_moments(module: nn.Module) -> dict[str, Tensor]:
    """Return the sums of every measured layer by name: what a resume in the middle of measuring needs."""
    found: dict[str, Tensor] = {}
    for name, layer in measured_layers(module):
        found |= {f"{name}.input_moment": layer._moment, f"{name}.input_rows": layer._rows_seen}
    return found


def load_moments(module: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Restore the result of ``exact_moments``."""
    for name, layer in measured_layers(module):
        layer._moment.copy_(exact[f"{name}.input_moment"])
        layer._rows_seen.copy_(exact[f"{name}.input_rows"])
