"""Every checkpoint is a plain model: merged weights under the bare names, and a side entry for an exact resume.

Adapter keys in ``state_dict`` would give strict errors, or silently wrong models, wherever a file is read without knowing
the plan: ``test(ckpt_path="best")`` from the other side of the switch, ``load_from_checkpoint``, a Trainer without our
callback. So a layer with adapters writes itself plain into any state dict (``LoRALinear.state_dict``), whoever asks for it and
whatever a user's own hooks leave out or rename afterwards; and the exact values (W, A, B apart) go into the side entry.

    checkpoint["lowrank_pretrain"] = {"format", "phase", "plan", "alpha", "settings", "groups", "exact": {name: tensor}}

Under Lightning's ``WeightAveraging`` the file's ``state_dict`` is the average and ``current_model_state`` the trained model;
``StochasticWeightAveraging`` keeps its average in its own state. An average's exact values are in the side entry too,
``"averages": {"state_dict" or the callback's state key: {name: tensor}}``.

When a fit has ended the module is made plain again, and what a later ``trainer.save_checkpoint`` or a
second fit needs for going on exactly is held outside of it (``Held``).
"""

import weakref
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn

from lowrank_pretrain.factorize.model import shown_whole
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.function import merged
from lowrank_pretrain.phases import layers

SIDE = "lowrank_pretrain"  # the side entry's key
FORMAT = 1


def restore_plain(pl_module: nn.Module, check: bool = True) -> None:
    """Merge and eject the adapters, restore the original ``requires_grad``: the module as the user made it, trained on."""
    layers.make_plain(pl_module, check)
    restore_flags(pl_module)
    for key in ("_lowrank_requires_grad", "_lowrank_tied", "_lowrank_added", "_lowrank_before", "_lowrank"):
        pl_module.__dict__.pop(key, None)
    for key, hook in list(pl_module._state_dict_hooks.items()):
        if hook is _leave_out_added:
            del pl_module._state_dict_hooks[key]
    forget_held(pl_module)


def restore_flags(pl_module: nn.Module) -> None:
    """Give the parameters the ``requires_grad`` that they had before the first change, and the module its own writers."""
    flags = pl_module.__dict__.get("_lowrank_requires_grad", {})
    for name, p in pl_module.named_parameters():
        if name in flags:
            p.requires_grad_(flags[name])
    for key in _WRITERS:
        writer = pl_module.__dict__.get(key)
        if isinstance(writer, _AsPlain):
            del pl_module.__dict__[key]
            if writer.before is not None:
                pl_module.__dict__[key] = writer.before


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
    """Before a change: which parameters train, and which names are of one tensor; the first note stays."""
    if "_lowrank_requires_grad" in pl_module.__dict__:
        return
    every = lora.own_tensors(pl_module)
    owned = [id(p) for _, p in pl_module.named_parameters(remove_duplicate=False)]
    pl_module.__dict__["_lowrank_requires_grad"] = {name: p.requires_grad for name, p in pl_module.named_parameters()}
    pl_module.__dict__["_lowrank_tied"] = [
        name for name, p in pl_module.named_parameters(remove_duplicate=False) if owned.count(id(p)) > 1
    ]
    pl_module.__dict__["_lowrank_added"] = []
    pl_module.__dict__["_lowrank_before"] = set(every)
    for key in _WRITERS:
        if _is_own(pl_module, key):
            pl_module.__dict__[key] = _AsPlain(pl_module, key)


_WRITERS = ("state_dict", "on_save_checkpoint")


class _AsPlain:
    """A user's own way to write the module into a file: it finds the plain model, with what it would train.

    Whoever keeps only what trains would else lose the frozen, merged weights, and find the adapters in their place.
    """

    def __init__(self, module: pl.LightningModule, name: str) -> None:
        self.module, self.name = module, name  # copies and pickles of the module get one that is theirs
        self.before = module.__dict__.get(name)

    @property
    def __wrapped__(self) -> Any:
        """Lightning asks here whether the method is a user's own."""
        return getattr(type(self.module), self.name).__get__(self.module) if self.before is None else self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("keep_vars", False):  # who wants the parameters themselves gets them as they are
            return self.__wrapped__(*args, **kwargs)
        with shown_whole(self.module), lora.shown_plain(self.module, self.module.__dict__.get("_lowrank_requires_grad", {})):
            return self.__wrapped__(*args, **kwargs)


def _is_own(module: pl.LightningModule, name: str) -> bool:
    """Return whether a user's code has a say in what the method writes."""
    if name in module.__dict__ or getattr(type(module), name) is not getattr(pl.LightningModule, name):
        return True
    return name == "state_dict" and any(type(child).state_dict is not nn.Module.state_dict for child in module.modules())


def note_added(pl_module: pl.LightningModule) -> None:
    """After an optimizer took the plan: leave what it registered on the module out of the state dict, which stays plain."""
    before = pl_module.__dict__.pop("_lowrank_before", set())
    added = [name for name in lora.own_tensors(pl_module) if name not in before]
    if added:
        pl_module.__dict__["_lowrank_added"] = added
        pl_module.register_state_dict_post_hook(_leave_out_added)


def _leave_out_added(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in module.__dict__.get("_lowrank_added", ()):
        state_dict.pop(prefix + name, None)


def exact_values(module: nn.Module, note: nn.Module | None = None) -> dict[str, Tensor]:
    """Return what the state dict does not tell exactly.

    Args:
        module: whose values: the trained module, or an average of it.
        note: the module that was changed; default: the same.
    """
    known = (module if note is None else note).__dict__
    live = lora.own_tensors(module)
    # a head that came untied: in the plain model its name and the embedding's are one tensor, the last one loaded
    names = [*known.get("_lowrank_tied", ()), *known.get("_lowrank_added", ())]
    return {name: live[name] for name in names if name in live} | layers.exact_state(module)


class Held:
    """What a module that was made plain again needs to go on exactly where its fit ended.

    Args:
        module: has adapters; it becomes plain.
        note: the module that ``note_plain`` was told of; default: the same.
    """

    def __init__(self, module: nn.Module, note: nn.Module | None = None) -> None:
        self.module = weakref.ref(module)
        self._tied = list((module if note is None else note).__dict__.get("_lowrank_tied", ()))
        self._layers = [
            (
                name,
                layer,
                layer.weight.detach().clone(),
                layer.lora_A,
                dict(layer.lora_B.items()),
                layer._parts,
                layer._transposed,
            )
            for name, layer in lora.lora_layers(module)
        ]
        self._factors = layers.HeldFactors(module)
        layers.make_plain(module, check=False)

    def show(self) -> None:
        """Leave the factors readable on their layers, as attributes that are no parameters of the module."""
        for _, layer, _, A, B, *_ in self._layers:
            layer.__dict__.update(lora_A=A, lora_B=B)

    def exact(self) -> dict[str, Tensor]:
        """Return the exact values; for a layer whose weight has changed since, the weight and B = 0."""
        module = self.module()
        live = {} if module is None else lora.own_tensors(module)
        exact = {name: live[name] for name in self._tied if name in live} | self._factors.exact()
        for name, layer, W, A, B, parts, transposed in self._layers:
            A, B = A.detach(), {part: factor.detach() for part, factor in B.items()}
            here = merged(W, A.to(W.device), [B[part.name].to(W.device) for part in parts], parts, transposed)
            if not torch.equal(here, layer.weight.to(W.device)):
                W, B = layer.weight.detach(), {part: torch.zeros_like(factor) for part, factor in B.items()}
            shared = [alias for alias in self._tied if alias in live and live[alias].data_ptr() == layer.weight.data_ptr()]
            exact |= dict.fromkeys([*shared, f"{name}.weight"], W) | {f"{name}.lora_A": A}
            exact |= {f"{name}.lora_B.{part}": factor for part, factor in B.items()}
        return exact


def forget_held(module: nn.Module) -> None:
    """Remove the factors that ``Held`` left readable on plain layers."""
    for child in module.modules():
        for key in ("lora_A", "lora_B"):
            child.__dict__.pop(key, None)
