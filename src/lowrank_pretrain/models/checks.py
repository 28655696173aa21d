"""What both models need to talk to a user: plain values in, one readable line out."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.text import one_line


def plain(value: Any) -> Any:
    """`value` with OmegaConf's containers turned into dicts and lists (checkpoints hold plain types only)."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_count(key: str, value: Any, least: int = 1) -> None:
    """Raises :class:`ConfigError` unless `value` is an int (no bool) of at least `least` that 32 bits can hold."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(key, value, f"must be an integer of at least {least}")
    if value >= 2**31:
        raise ConfigError(key, value, f"must be an integer below {2**31}")


# what the libraries call the number of layers: they build as many as they are told, for hours if need be
LAYERS = ("depth", "depths", "layers", "num_blocks", "num_layers", "n_layer", "n_layers", "num_hidden_layers")
MOST_LAYERS = 10_000


def check_layers(group: str, values: dict[str, Any]) -> None:
    """Raises :class:`ConfigError` for a number of layers in `values`, arguments of the kind `group`, that cannot be meant."""
    for key in LAYERS:
        counts = values[key] if isinstance(values.get(key), (list, tuple)) else [values.get(key)]
        for count in counts:
            if isinstance(count, (int, float)) and not (count == int(count) and 1 <= count <= MOST_LAYERS):
                raise ConfigError(f"{group}.{key}", values[key], f"must be 1 to {MOST_LAYERS:,} layers")


def run_once(network: torch.nn.Module, key: str, value: Any, call: Callable[[], Any]) -> None:
    """``call()`` in evaluation mode; blames `key` = `value` for what goes wrong. No random number is drawn.

    Raises:
        ConfigError: the network cannot run.
    """
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a library's forward raises for sizes that do not fit together
        raise ConfigError(key, value, f"a network with these cannot run: {one_line(error)}") from error
    finally:
        network.train(training)


def name_fused_experts(module: torch.nn.Module) -> None:
    """Say once which experts low-rank methods leave alone: transformers keeps them as one tensor, which is no matrix."""
    fused = {name: param for name, param in module.named_parameters() if param.ndim == 3 and "expert" in name.lower()}
    if fused:
        share = sum(param.numel() for param in fused.values()) / sum(param.numel() for param in module.parameters())
        first = next(iter(fused))
        warnings.warn(
            f"{len(fused)} weights of experts, {share:.0%} of the parameters, stay out of the targets: each holds all experts "
            f"of a layer in one tensor, e.g. {first} {tuple(fused[first].shape)}",
            stacklevel=1,
        )
