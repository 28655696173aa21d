"""Handle what a model change added to layers, adapters and factors alike: values, state, and making them plain."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lowrank_pretrain.factorize import model as factorize
from lowrank_pretrain.factorize.layer import best_factors
from lowrank_pretrain.factorize.moments import measured_layers
from lowrank_pretrain.lora import model as lora

_OF_FACTORS = (".factor_V", ".input_moment", ".input_rows")


def added_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of every adapter's and every product's factor."""
    yield from lora.adapter_parameters(module)
    yield from factorize.factor_parameters(module)


def layer_of(name: str) -> str:
    """Return the name of the layer that an added parameter belongs to.

    Example:
        >>> layer_of("blocks.0.fc1.lora_B.W"), layer_of("blocks.0.fc1.factor_V")
        ('blocks.0.fc1', 'blocks.0.fc1')
    """
    return name.partition(".lora_")[0].partition(".factor_")[0]


def has_changed(module: nn.Module) -> bool:
    """Return whether any layer has adapters or factors, or is measured."""
    kinds = (lora.lora_layers(module), factorize.factored_layers(module), measured_layers(module))
    return any(True for layers in kinds for _ in layers)


def is_finite(module: nn.Module) -> bool:
    """Return whether no added parameter holds NaN or infinite numbers."""
    return all(bool(torch.isfinite(p).all()) for _, p in added_parameters(module))


def make_plain(module: nn.Module, check: bool = True) -> None:
    """Make every layer plain: merge and detach adapters, and multiply factors out.

    Raises:
        ValueError: they are NaN or infinite, and ``check`` is on.
    """
    lora.eject(module, check)
    factorize.expand(module, check)


def exact_state(module: nn.Module) -> dict[str, Tensor]:
    """Return what a bit-exact resume needs next to the plain state dict."""
    return lora.exact_state(module) | factorize.exact_factors(module)


def load_exact(module: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Restore the result of ``exact_state`` into a module changed by the same plan.

    Raises:
        ConfigError: names or shapes differ.
    """
    lora.load_exact(module, {name: t for name, t in exact.items() if not is_of_factors(name)})
    factorize.load_exact_factors(module, exact)


def is_of_factors(name: str) -> bool:
    """Return whether an exact value belongs to a factored or measured layer."""
    return name.endswith(_OF_FACTORS) or ".factor_U." in name


class HeldFactors:
    """Keep the exact values of factored and measured layers of a module that becomes plain.

    Args:
        module: as it was at the end of a fit; make it plain after this.
    """

    def __init__(self, module: nn.Module) -> None:
        self._exact = lora.clone_state(factorize.exact_factors(module))
        layers = factorize.factored_layers(module)
        self._layers = [(name, layer, layer._blocks, layer.product(check=False)) for name, layer in layers]

    def exact(self) -> dict[str, Tensor]:
        """Return the values; for a layer whose weight has changed since, its best factors of the same ranks."""
        for name, layer, blocks, product in self._layers:
            if not torch.equal(layer.weight, product.to(layer.weight)):
                found = best_factors(factorize.rows_of(layer), blocks)
                self._exact |= {f"{name}.{own}": value.to(layer.weight) for own, value in found.items()}
        return self._exact
