"""Every checkpoint is a plain model: merged weights under the bare names, and a side entry for an exact resume.

Adapter keys in ``state_dict`` would give strict errors, or silently wrong models, wherever a file is read without knowing
the plan: ``test(ckpt_path="best")`` from the other side of the switch, ``load_from_checkpoint``, a Trainer without our
callback. So targets' weights are stored twice, merged in ``state_dict`` and exact (W, A, B apart) in the side entry.

    checkpoint["lowrank_pretrain"] = {"format", "phase", "plan", "alpha", "groups", "exact": {name: tensor}}
"""

from functools import partial
from typing import Any

import lightning.pytorch as pl

from lowrank_pretrain import lora

SIDE = "lowrank_pretrain"  # the side entry's key
FORMAT = 1


def wrap(pl_module: pl.LightningModule) -> None:
    """Have every checkpoint of this module written plain. Lightning calls the hook last, and for ``save_weights_only`` too."""
    present = pl_module.__dict__.get("on_save_checkpoint")
    if not (isinstance(present, partial) and present.func is _write):
        pl_module.on_save_checkpoint = partial(_write, pl_module, present)


def restore_plain(pl_module: pl.LightningModule) -> None:
    """Merge and eject the adapters, restore the original ``requires_grad``: the module as the user made it, trained on."""
    lora.eject(pl_module)
    flags = pl_module.__dict__.pop("_lowrank_requires_grad", {})
    pl_module.__dict__.pop("_lowrank_keys", None)
    for name, p in pl_module.named_parameters():
        if name in flags:
            p.requires_grad_(flags[name])
    pl_module.__dict__.pop("_lowrank", None)
    unwrap(pl_module)


def unwrap(pl_module: pl.LightningModule) -> None:
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
        exact = lora.exact_state(pl_module)
        state = lora.plain_state(pl_module, checkpoint["state_dict"])
        for key in state.keys() - set(pl_module.__dict__["_lowrank_keys"]):  # what another adopter added
            exact[key] = state.pop(key)
        checkpoint["state_dict"] = state
        if "callbacks" in checkpoint:  # a file of weights only cannot be resumed from and needs no more
            checkpoint.setdefault(SIDE, {}).update(format=FORMAT, **note, exact=exact)
