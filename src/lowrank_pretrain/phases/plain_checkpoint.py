"""Write every checkpoint as a plain model: merged weights under the bare names, and a side entry for an exact resume.

Adapter keys in ``state_dict`` would give strict errors, or silently wrong models, wherever a file is read without knowing
the plan: ``test(ckpt_path="best")`` from the other side of the switch, ``load_from_checkpoint``, a Trainer without our
callback. So a layer with adapters writes itself plain into any state dict (``LoRALinear.state_dict``), for any caller and
any hooks of a user's own leave out or rename afterwards. The exact values (W, A, B separately) go into the side entry.

    checkpoint["lowrank_pretrain"] = {"format", "phase", "plan", "alpha", "settings", "groups", "exact": {name: tensor}}

Under Lightning's ``WeightAveraging`` the file's ``state_dict`` is the average and ``current_model_state`` the trained model;
``StochasticWeightAveraging`` keeps its average in its own state. An average's exact values are in the side entry too,
``"averages": {"state_dict" or the callback's state key: {name: tensor}}``.

When a fit has ended the module is made plain again, and what a later ``trainer.save_checkpoint`` or a
second fit needs for going on exactly is held outside of it (``Held``).
"""

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn

from lowrank_pretrain.core.lightning_private import trainer_of
from lowrank_pretrain.core.targets import MatrixLayer
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.frozen import Stored
from lowrank_pretrain.lora.products import Part, merged
from lowrank_pretrain.lora.storing import stored_tensors
from lowrank_pretrain.phases import layers
from lowrank_pretrain.phases.transition import Note, averages, forget_note, note_of, restart_averages, restore_flags


def restore_plain(pl_module: nn.Module, check: bool = True) -> None:
    """Merge and eject the adapters, and restore the original ``requires_grad``: the module as its user made it, trained."""
    layers.make_plain(pl_module, check)
    restore_flags(pl_module)
    forget_note(pl_module)
    forget_held(pl_module)


def merge(module: nn.Module) -> nn.Module:
    """Make a module plain: merge adapters into the weights, restore plain classes and ``requires_grad``.

    After a fit the module is plain by itself. This is for a copy of it in the middle of one (to script, quantize or share it),
    and for the module itself if a fit was interrupted::

        plain = lowrank_pretrain.merge(copy.deepcopy(module))

    Args:
        module: a LightningModule that was trained, or any module given to ``lora.inject``; changed in place.

    Returns:
        The same module.

    Raises:
        RuntimeError: the module is being trained.
        ValueError: the adapters hold NaN or infinite numbers.
    """
    trainer = trainer_of(module)
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING:
        raise RuntimeError("the module is being trained: merge a copy of it, lowrank_pretrain.merge(copy.deepcopy(module))")
    restore_plain(module)
    return module


def exact_values(module: nn.Module, noted: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the values that the state dict does not hold exactly.

    Args:
        module: the trained module, or an average of it.
        noted: the module that was changed; default: the same.
    """
    note = note_of(module if noted is None else noted)
    live = lora.own_tensors(module)
    # a head that came untied: in the plain model its name and the embedding's are one tensor, the last one loaded
    names = [] if note is None else [*note.tied, *note.added]
    return {name: live[name] for name in names if name in live} | layers.exact_state(module)


class _HeldLayer(NamedTuple):
    name: str
    layer: MatrixLayer  # plain by now
    weight: Tensor  # W before the merge, as it was stored
    stored: Stored | None
    lora_A: nn.Parameter
    lora_B: dict[str, nn.Parameter]
    parts: tuple[Part, ...]
    transposed: bool


class Held:
    """Make a module plain, and hold what it needs for an exact resume.

    Args:
        module: has adapters; it becomes plain.
        noted: the module that has the note; default: the same.
    """

    def __init__(self, module: nn.Module, noted: nn.Module | None = None) -> None:
        self.module = weakref.ref(module)
        note = note_of(module if noted is None else noted)
        self._tied = [] if note is None else list(note.tied)
        self._layers = [
            _HeldLayer(name, layer, layer.weight.detach().clone(), layer._stored, layer.lora_A, dict(layer.lora_B.items()),
                       layer._parts, layer._transposed)
            for name, layer in lora.lora_layers(module)
        ]  # fmt: skip
        self._factors = layers.HeldFactors(module)
        layers.make_plain(module, check=False)

    def show(self) -> None:
        """Leave the factors readable on their layers, as attributes that are not parameters of the module."""
        for held in self._layers:
            held.layer.__dict__.update(lora_A=held.lora_A, lora_B=held.lora_B)

    def exact(self) -> dict[str, Tensor]:
        """Return the exact values; for a layer whose weight has changed since, the weight and B = 0."""
        module = self.module()
        live = {} if module is None else lora.own_tensors(module)
        exact = {name: live[name] for name in self._tied if name in live} | self._factors.exact()
        for held in self._layers:
            W, A = held.weight, held.lora_A.detach()
            B = {part: factor.detach() for part, factor in held.lora_B.items()}
            factors = [B[part.name].to(W.device) for part in held.parts]
            now, stored = held.layer.weight, held.stored
            if not torch.equal(merged(W, A.to(W.device), factors, held.parts, held.transposed, stored), now.to(W.device)):
                W, B, stored = now.detach(), {part: torch.zeros_like(factor) for part, factor in B.items()}, None
            shared = [alias for alias in self._tied if alias in live and live[alias].data_ptr() == now.data_ptr()]
            exact |= dict.fromkeys([*shared, f"{held.name}.weight"], W) | {f"{held.name}.lora_A": A}
            exact |= {f"{held.name}.lora_B.{part}": factor for part, factor in B.items()}
            exact |= stored_tensors(held.name, stored)
        return exact


@dataclass
class Brought:
    """Hold a checkpoint's side entry until the replay has used it.

    Args:
        exact: values by name; None where the file has none.
        averages: the same by average.
        groups: names of the optimizers' parameters; None where the file has none.
        settings: arguments of the run that the file is of.
    """

    exact: dict[str, Tensor] | None = None
    averages: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    groups: list[list[list[str]]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ended:
    """Hold the results of a fit, for a later file or fit.

    Args:
        model: the adapters, which the module no longer has.
        averages: likewise, by average.
        note: the module's, as it was.
        groups: names of the optimizers' parameters.
    """

    model: Held
    averages: dict[str, Held]
    note: Note
    groups: list[list[list[str]]]


def forget_held(module: nn.Module) -> None:
    """Remove the factors that ``Held`` left readable on plain layers."""
    for child in module.modules():
        for key in ("lora_A", "lora_B"):
            child.__dict__.pop(key, None)


def restore_averages(brought: Brought, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Restore a file's averages of the weights; begin those anew that it does not have."""
    for where, averaged, callback in averages(callbacks_of(trainer)):
        if where in brought.averages:
            layers.load_exact(averaged, brought.averages[where])
        elif brought.exact is not None:
            restart_averages([callback], pl_module)
