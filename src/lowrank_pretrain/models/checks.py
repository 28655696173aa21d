"""Check the arguments of both models, and say in one line what is wrong with them."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf

from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.text import one_line


def plain(value: Any) -> Any:
    """Turn OmegaConf's containers into dicts and lists: checkpoints hold plain types only."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_count(key: str, value: Any, least: int = 1) -> None:
    """Refuse a size of a network that is not an integer of at least `least`, or that 32 bits cannot hold.

    Raises:
        ConfigError: not such an integer.
    """
    whole(key, value, least, most=INT32, allowed=f"must be an integer of at least {least} that 32 bits can hold")


# the libraries' names for the number of layers; they build as many as they are told, even if it takes hours
LAYERS = ("depth", "depths", "layers", "num_blocks", "num_layers", "n_layer", "n_layers", "num_hidden_layers")
MOST_LAYERS = 10_000
INT32 = 2**31 - 1


def check_layers(group: str, values: dict[str, Any]) -> None:
    """Refuse an absurd number of layers.

    Args:
        group: the configuration group of the arguments.
        values: the arguments of a timm or transformers model.

    Raises:
        ConfigError: a number of layers that is not 1 to 10,000.
    """
    for key in LAYERS:
        counts = values[key] if isinstance(values.get(key), (list, tuple)) else [values.get(key)]
        for count in counts:
            if isinstance(count, (int, float)) and not (count == int(count) and 1 <= count <= MOST_LAYERS):
                raise ConfigError(f"{group}.{key}", values[key], f"must be 1 to {MOST_LAYERS:,} layers")


def run_once(network: torch.nn.Module, key: str, value: Any, call: Callable[[], Any]) -> None:
    """Run a network in evaluation mode and blame an argument for any error, without drawing random numbers.

    Args:
        network: the network that `call` runs.
        key: the argument to blame.
        value: its value.
        call: runs the network.

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
    except Exception as error:  # a library's forward raises many kinds for sizes that do not fit together
        raise ConfigError(key, value, f"a network with these cannot run: {one_line(error)}") from error
    finally:
        network.train(training)


def name_fused_experts(module: torch.nn.Module) -> None:
    """Warn once which experts low-rank methods leave out: transformers keeps them in one tensor, which is not a matrix."""
    fused = {name: param for name, param in module.named_parameters() if param.ndim == 3 and "expert" in name.lower()}
    if fused:
        share = sum(param.numel() for param in fused.values()) / sum(param.numel() for param in module.parameters())
        first = next(iter(fused))
        warnings.warn(
            f"{len(fused)} weights of experts, {share:.0%} of the parameters, stay out of the targets: each holds all experts "
            f"of a layer in one tensor, e.g. {first} {tuple(fused[first].shape)}",
            stacklevel=1,
        )
