"""The averages that Lightning's callbacks keep of a model (EMA, SWA), taken through a change of that model.

``WeightAveraging`` and ``StochasticWeightAveraging`` pair averaged and trained parameters by position. So at a transition each
averaged model becomes a copy of the changed model, which has the same parameters in the same order, and takes the old
average's values back by name; adapters join as they are (B = 0, so the average's function does not move). From then on W, A
and B are averaged apart: W₀ + avg(B) avg(A), which is the average of the merged weights up to the factors' covariance.
A factored average keeps of its W what the trained U reaches.

Lightning keeps the averaged model in a private attribute; this is the one place that reads it.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.factorize.layer import follow_weight
from lowrank_pretrain.factorize.model import factored_layers
from lowrank_pretrain.lora.model import own_tensors


def averages(callbacks: Iterable[pl.Callback]) -> Iterator[tuple[str, nn.Module, pl.Callback]]:
    """(where its state dict lies in a checkpoint, averaged model, callback) for each callback that keeps one."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            yield "state_dict", callback._average_model.module, callback
        elif isinstance(callback, StochasticWeightAveraging) and callback._average_model is not None:
            yield callback.state_key, callback._average_model, callback


def follow(callbacks: Iterable[pl.Callback], module: pl.LightningModule) -> None:
    """Give every averaged model the changed module's shape; it keeps its values by name.

    Raises:
        ConfigError: two of the module's parameters are views of one another: averaging both would average twice.
    """
    for _, averaged, callback in averages(callbacks):
        old = own_tensors(averaged)
        if list(old) == list(own_tensors(module)):
            continue
        storages = [p.untyped_storage().data_ptr() for p in module.parameters()]
        if len(set(storages)) < len(storages):
            refuse_views(callback)
        _replace(callback, copy.deepcopy(module).to(next(averaged.parameters()).device))
        new = next(model for _, model, owner in averages([callback]))
        with torch.no_grad():
            for name, value in own_tensors(new).items():
                value.copy_(old.get(name, value))
        for name, layer in factored_layers(new):  # U stays the trained one's, so that like is averaged with like
            if f"{name}.weight" in old:
                follow_weight(layer, old[f"{name}.weight"])


def restart(callbacks: Iterable[pl.Callback], module: pl.LightningModule) -> None:
    """Every average becomes the module as it is, as at the start of a fit."""
    for _, averaged, callback in averages(callbacks):
        _replace(callback, copy.deepcopy(module).to(next(averaged.parameters()).device))


def refuse_views(callback: pl.Callback) -> None:
    """A fused layer of which only some row blocks are targets goes on training the others as views of W."""
    raise ConfigError(
        "callbacks", type(callback).__name__,
        "would average the rows of a fused layer twice of which only some are targets: name all its parts as targets, or set "
        "freeze_rest=True, or remove the averaging",
    )  # fmt: skip


def _replace(callback: Any, model: pl.LightningModule) -> None:
    if isinstance(callback, WeightAveraging):
        callback._average_model.module = model
    else:
        callback._average_model = model
