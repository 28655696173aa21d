"""Every checkpoint is a plain model: merged weights under the bare names, and a side entry for an exact resume.

Adapter keys in ``state_dict`` would give strict errors, or silently wrong models, wherever a file is read without knowing
the plan: ``test(ckpt_path="best")`` from the other side of the switch, ``load_from_checkpoint``, a Trainer without our
callback. So targets' weights are stored twice, merged in ``state_dict`` and exact (W, A, B apart) in the side entry.

    checkpoint["lowrank_pretrain"] = {"format", "phase", "plan", "alpha", "groups", "exact": {name: tensor}}

Under Lightning's ``WeightAveraging`` the file's ``state_dict`` is the average and ``current_model_state`` the trained model;
``StochasticWeightAveraging`` keeps its average in its own state. All of them are written plain; an average's exact values are
in the side entry too, ``"averages": {"state_dict" or the callback's state key: {name: tensor}}``.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import nn

from lowrank_pretrain import lora

SIDE = "lowrank_pretrain"  # the side entry's key
FORMAT = 1


def wrap(pl_module: pl.LightningModule) -> None:
    """Have every checkpoint of this module written plain. Lightning calls the hook last, and for ``save_weights_only`` too."""
    present = pl_module.__dict__.get("on_save_checkpoint")
    if not (isinstance(present, partial) and present.func is _write):
        pl_module.on_save_checkpoint = partial(_write, pl_module, present)


def restore_plain(pl_module: nn.Module) -> None:
    """Merge and eject the adapters, restore the original ``requires_grad``: the module as the user made it, trained on."""
    lora.eject(pl_module)
    flags = pl_module.__dict__.pop("_lowrank_requires_grad", {})
    pl_module.__dict__.pop("_lowrank_keys", None)
    pl_module.__dict__.pop("_lowrank_tied", None)
    for name, p in pl_module.named_parameters():
        if name in flags:
            p.requires_grad_(flags[name])
    pl_module.__dict__.pop("_lowrank", None)
    unwrap(pl_module)


def merge(module: nn.Module) -> nn.Module:
    """Give the plain module back: adapters merged into the weights, plain classes, ``requires_grad`` as before the fit.

    After a fit the module is plain by itself. This is for a copy of it in the middle of one (to script, quantize or share it),
    and for the module itself where a fit was interrupted::

        plain = lowrank_pretrain.merge(copy.deepcopy(module))

    Args:
        module: a LightningModule that was trained, or any module given to ``lora.inject``; changed in place.

    Returns:
        The same module.

    Raises:
        RuntimeError: the module is being trained.
        ValueError: the adapters hold NaN or infinite numbers.
    """
    trainer = getattr(module, "_trainer", None)
    if trainer is not None and trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING:
        raise RuntimeError("the module is being trained: merge a copy of it, lowrank_pretrain.merge(copy.deepcopy(module))")
    restore_plain(module)
    return module


def note_plain(pl_module: pl.LightningModule) -> None:
    """Before the first change: which parameters train, which keys a state dict has, and which of them are one tensor."""
    state = pl_module.state_dict(keep_vars=True)
    tensors = [id(value) for value in state.values()]
    pl_module.__dict__["_lowrank_requires_grad"] = {name: p.requires_grad for name, p in pl_module.named_parameters()}
    pl_module.__dict__["_lowrank_keys"] = list(state)
    pl_module.__dict__["_lowrank_tied"] = [name for name, value in state.items() if tensors.count(id(value)) > 1]


def unwrap(pl_module: nn.Module) -> None:
    """Undo ``wrap``."""
    wrapper = pl_module.__dict__.get("on_save_checkpoint")
    if isinstance(wrapper, partial) and wrapper.func is _write:
        del pl_module.__dict__["on_save_checkpoint"]
        if wrapper.args[1] is not None:
            pl_module.on_save_checkpoint = wrapper.args[1]


def _write(pl_module: pl.LightningModule, inner: Any, checkpoint: dict[str, Any]) -> None:
    """``on_save_checkpoint`` of a module under a phase callback: the user's own, then merged weights and the side entry.

    A function of the module rather than a closure, so that the module stays picklable and deep-copies.
    """
    (inner or partial(type(pl_module).on_save_checkpoint, pl_module))(checkpoint)
    note = pl_module.__dict__.get("_lowrank")
    if note is not None:
        trained = "current_model_state" if "current_model_state" in checkpoint else "state_dict"
        exact, averages = {}, {}
        for where, owner, key in _state_dicts(checkpoint):
            held = lora.exact_state(pl_module, owner[key])
            # a head that came untied: in the plain model its name and the embedding's are one tensor, the last one loaded
            held = {name: owner[key][name] for name in pl_module.__dict__["_lowrank_tied"]} | held
            owner[key] = lora.plain_state(pl_module, owner[key])
            for name in owner[key].keys() - set(pl_module.__dict__["_lowrank_keys"]):  # what another adopter added
                held[name] = owner[key].pop(name)
            if key == trained:
                exact = held
            else:
                averages[where] = held
        if "callbacks" in checkpoint:  # a file of weights only cannot be resumed from and needs no more
            checkpoint.setdefault(SIDE, {}).update(format=FORMAT, **note, exact=exact, averages=averages)


def _state_dicts(checkpoint: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(name, dictionary, key) of each state dict of the module that a checkpoint holds."""
    yield "state_dict", checkpoint, "state_dict"
    if "current_model_state" in checkpoint:
        yield "current_model_state", checkpoint, "current_model_state"
    for name, state in checkpoint.get("callbacks", {}).items():
        if isinstance(state, dict) and isinstance(state.get("average_model_state"), dict):
            yield name, state, "average_model_state"
