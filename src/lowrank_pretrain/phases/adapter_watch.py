"""Watch adapters after a change of the model: does a gradient reach each of them, and does the optimizer move it?

New parameters were put into the optimizer's groups, but some optimizers keep their own records: over a partition of the
parameters, over one flat copy of them, over a list made when they were built. An optimizer that cannot follow is refused before
training where its kind is known. Otherwise it is found in the first steps after the switch, by an adapter that has a gradient
and a learning rate, and does not move while other parameters do.
"""

from collections.abc import Container, Iterable, Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Adopter
from lowrank_pretrain.core.targets import families
from lowrank_pretrain.core.trainer import optimizers_inside
from lowrank_pretrain.factorize.model import factored_layers
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.phases import optimizer_starts
from lowrank_pretrain.phases.layers import added_parameters, layer_of
from lowrank_pretrain.phases.rehearsal import Hook, compiled_parts, in_autograd_function

# by the names of their classes, so that none need be installed
KNOWN = {
    "LBFGS": "keeps directions over all parameters laid end to end, which new parameters break: use a first-order optimizer",
    "ZeroRedundancyOptimizer": "steps its own partition of the parameters and would never train adapters: use the optimizer "
    "that it wraps",
    "DistributedOptimizer": "steps parameters that other processes hold: use the optimizer that it wraps",
}
CUT_OFF = (
    "checkpointing of activations cuts it off from the loss: its input needs no gradient once everything before it is frozen "
    "(use_reentrant=False)"
)
STEPS = 3  # that an adapter may stand still while others move
PATIENCE = 50  # optimizer steps after which watching stops


def check_optimizers(optimizers: Sequence[Optimizer], adapter_lr: float = 1.0, rewarm: int = 0) -> None:
    """Refuse optimizers that are known not to follow parameters added later; note with what the others begin.

    Args:
        optimizers: at the start of a fit.
        adapter_lr: the adapters' learning rate over that of their base weight.
        rewarm: optimizer steps of a ramp of the learning rate.

    Raises:
        ConfigError: keyed ``optimizer``, with the optimizer's name; or ``adapter_lr`` or ``rewarm``, for one without a rate.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        for kind in type(optimizer).__mro__:
            if kind.__name__ in KNOWN:
                raise ConfigError("optimizer", name, KNOWN[kind.__name__])
        if any("lr" in group and group["lr"] is None for group in optimizer.param_groups):
            for key, value, default in (("adapter_lr", adapter_lr, 1.0), ("rewarm", rewarm, 0)):
                if value != default:
                    raise ConfigError(
                        key, value, f"{name} has lr=None and chooses its own rate: leave {key} out, or give it an lr"
                    )
        for inner in optimizers_inside(optimizer):
            outside = {id(group) for group in optimizer.param_groups}
            if any(id(group) not in outside for group in inner.param_groups):
                raise ConfigError(
                    "optimizer", name, f"steps a {type(inner).__name__} with parameter groups of its own, which adapters would "
                    f"never join: use {type(inner).__name__} itself, or share its param_groups"
                )  # fmt: skip
        for each in () if isinstance(optimizer, Adopter) else (optimizer, *optimizers_inside(optimizer)):
            optimizer_starts.note_start(each)
    check_books(optimizers)


def check_books(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that keep copies of their parameters by position. Some make them in the first step.

    Raises:
        ConfigError: keyed ``optimizer``, with the optimizer's name.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, Adopter):  # nothing joins it
            continue
        books = next((found for each in (optimizer, *optimizers_inside(optimizer)) if (found := _books(each))), None)
        if books is not None:
            raise ConfigError(
                "optimizer", type(optimizer).__name__, f"keeps copies of its parameters by position ({books}), which what "
                "joins and leaves would put out of step: use one that keeps them in its state, by parameter"
            )  # fmt: skip


def _books(optimizer: Optimizer) -> str | None:
    """Return the attribute in which an optimizer keeps copies of its parameters by position, or one flat copy."""
    # a lazy parameter has no shape yet, and could not be copied
    groups = [[p for p in group["params"] if isinstance(p, Tensor) and not is_lazy(p)] for group in optimizer.param_groups]
    every = [p for group in groups for p in group]
    owned = {id(p) for p in every}
    shapes = [[p.shape for p in group] for group in (*groups, every) if len(group) > 1]
    for name, value in vars(optimizer).items():
        if isinstance(value, Tensor):
            total = sum(p.numel() for p in every)
            if len(every) > 1 and value.ndim == 1 and value.numel() == total and id(value) not in owned:
                return name
            continue
        lists = [value, *value] if isinstance(value, (list, tuple)) else []
        for items in lists:
            if not isinstance(items, (list, tuple)) or not all(isinstance(item, Tensor) for item in items):
                continue
            if [item.shape for item in items] in shapes and not any(id(item) in owned for item in items):
                return name
    return None


class AdapterWatch:
    """Watch fresh adapters (B = 0, so that any update shows) until each has moved once, or for a few steps at most.

    Args:
        module: has adapters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.waiting = {name: p for name, p in lora.adapter_parameters(module) if ".lora_B" in name and p.requires_grad}
        self.still = dict.fromkeys(self.waiting, 0.0)
        self.steps = 0
        self._asked: list[str] = []  # adapters that the step under way should move
        self._other: tuple[Tensor, Tensor] | None = None  # another parameter that it should move, and a copy from before

    @property
    def over(self) -> bool:
        """Return whether nothing is left to watch."""
        return not self.waiting

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Judge the previous step, then note what this one should move.

        Raises:
            ConfigError: an adapter stood still for too long; keyed ``optimizer``.
        """
        self.after_step(optimizer)
        self.steps += 1
        if self.steps > PATIENCE:
            self.waiting = {}
        fresh = {id(p): name for name, p in self.waiting.items()}
        self._asked, self._other = [], None
        for group in optimizer.param_groups:
            lr = group.get("lr", 0.0)
            if lr is not None and not lr > 0:  # None: the optimizer chooses its own
                continue
            for p in group["params"]:
                if p.grad is None or p.grad.is_sparse:
                    continue
                if id(p) in fresh:
                    if bool(torch.isfinite(p.grad).all()) and bool(p.grad.any()):
                        self._asked.append(fresh[id(p)])
                elif self._other is None and bool(p.grad.any()):
                    self._other = (p, p.detach().clone())

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Judge the last step that was noted.

        Raises:
            ConfigError: see ``before_step``.
        """
        asked, other, self._asked, self._other = self._asked, self._other, [], None
        moved = {name for name, p in self.waiting.items() if bool(p.any())}
        self.waiting = {name: p for name, p in self.waiting.items() if name not in moved}
        # where nothing else moved either the step was skipped (a gradient scaler, an optimizer that gathers gradients)
        if other is not None and torch.equal(*other):
            return
        for name in asked:
            if name in self.waiting:
                self.still[name] += 1 if other is not None else 1 / 4
        stuck = [name for name in self.waiting if self.still[name] >= STEPS]
        if stuck:
            who = stuck[0].partition(".lora_")[0] + (f" and {len(stuck) - 1} more" if len(stuck) > 1 else "")
            raise ConfigError(
                "optimizer", type(optimizer).__name__, f"does not train the adapters of {who}: they had a gradient and a "
                "learning rate and did not move; it keeps books of its own on its parameters, use one that steps param_groups"
            )  # fmt: skip


class GradientWatch:
    """Watch whether a gradient reaches every adapter after the model changed: without one it never trains.

    One step without a gradient is no evidence (experts, LayerDrop, one task a batch, a loss that begins later), but for
    activations that are checkpointed with ``use_reentrant=True``: where nothing below a block trains any more, its input needs
    no gradient, and the block is never run again with autograd.

    Args:
        module: has adapters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.steps, self._module = 0, module
        self.without = {name: p for name, p in added_parameters(module) if p.requires_grad}
        self.every = len(self.without)
        kinds = (*lora.lora_layers(module), *factored_layers(module))
        self._weights = {name: layer._parameters.get("weight") for name, layer in kinds}
        self._fed: set[str] = set()  # layers whose W had a gradient
        self._only_cut_off: dict[str, bool] = {}  # by layer that was called: only inside of a checkpoint, without autograd
        compiled = compiled_parts(module)
        self._handles = [
            layer.register_forward_pre_hook(_CutOff(self, name), with_kwargs=True)
            for name, layer in kinds
            if id(layer) not in compiled
        ]

    def check_loss(self, loss: Tensor) -> None:
        """Refuse a loss that nothing trainable reaches any more; call it before a backward pass.

        Raises:
            ConfigError: layers are cut off (see above), so that torch would refuse the backward pass.
        """
        cut_off = [name for name in self.layers() if self._only_cut_off.get(name)]
        if cut_off and not loss.requires_grad:
            raise ConfigError("targets", ", ".join(sorted(cut_off)), CUT_OFF)

    def look(self) -> list[str]:
        """Stop watching adapters that have a gradient; call it after a backward pass.

        Returns:
            Names of the layers that reentrant checkpointing cuts off from the loss (after the first backward pass only).
        """
        if not any(p.grad is not None for _, p in nn.Module.named_parameters(self._module)):  # the step was skipped
            return []
        self.steps += 1
        self.without = {name: p for name, p in self.without.items() if p.grad is None}
        for name in self.layers():
            weight = self._weights.get(name)
            if weight is not None and weight.grad is not None:
                self._fed.add(name)
        cut_off, self._only_cut_off = self._only_cut_off, {}
        self.stop()
        return [layer for layer in self.layers() if cut_off.get(layer)]

    def judge(self, who: str, patience: int, said: set[str], from_start: bool) -> bool:
        """Call `look`, after a backward pass, and warn once of adapters without a gradient for too long.

        A run may train something else for a while (one part per epoch, say), and no adapter has a gradient then. That is a
        fault only if a gradient reaches W and not its adapter, or if adapters train from the start.

        Args:
            who: the callback's name, for the warning.
            patience: optimizer steps to wait.
            said: layers that a warning has named; they are added to.
            from_start: the adapters have been there from the first step.

        Returns:
            Whether nothing is left to watch.

        Raises:
            ConfigError: checkpointing of activations cuts an adapter off; or no adapter at all had a gradient (see above).
        """
        cut_off = self.look()
        if cut_off:
            raise ConfigError("targets", ", ".join(sorted(cut_off)), CUT_OFF)
        if self.without and self.steps < patience:
            return False
        if set(self.layers()) - said:
            said |= set(self.layers())
            family = ", ".join(dict.fromkeys(families(self._module, self.layers()).values()))
            steps = f"in the {self.steps} optimizer steps since the model changed"
            fed = self._fed.intersection(self.layers())
            if len(self.without) == self.every and (from_start or fed):
                why = (
                    "and their weights had: does anything read these without their layers?"
                    if fed
                    else "does the loss depend on them?"
                )
                raise ConfigError("targets", family, f"no adapter had a gradient {steps}{', ' if fed else ': '}{why}")
            rank_zero_warn(
                f"{who}: no gradient {steps} reached the adapters of {family}: they train only if later steps "
                'use them. If none does, leave them out ("!name")'
            )
        return True

    def layers(self) -> list[str]:
        """Return the names of the layers whose adapters had no gradient so far."""
        return list(dict.fromkeys(layer_of(name) for name in self.without))

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class FlagWatch:
    """Keep frozen what a change of the model froze: ``unfreeze()``, around a validation say, turns all flags on.

    Args:
        module: was changed.
        frozen: names of what changes froze; what its user froze, its user may unfreeze.
    """

    def __init__(self, module: nn.Module, frozen: Container[str]) -> None:
        own = {id(p) for _, layer in lora.lora_layers(module) for p in (layer.weight, layer.bias)}
        self._frozen = {
            name: p
            for name, p in nn.Module.named_parameters(module)
            if name in frozen or (id(p) in own and not p.requires_grad)
        }
        self._said = False

    def freeze_again(self, who: str) -> None:
        """Freeze them again where needed; call it before a batch.

        Args:
            who: the callback's name, for the warning.
        """
        turned_on = [name for name, p in self._frozen.items() if p.requires_grad]
        for name in turned_on:
            self._frozen[name].requires_grad_(False)
        if turned_on and not self._said:
            self._said = True
            more = f" and {len(turned_on) - 1} more" if len(turned_on) > 1 else ""
            rank_zero_warn(
                f"{who}: {turned_on[0]}{more} had requires_grad=True again, by unfreeze() perhaps: low-rank training freezes "
                "them again before each batch"
            )


class _CutOff(Hook):
    """Note whether a layer is called only inside of a reentrant checkpoint, without autograd."""

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        watch = self._watcher()
        if watch is not None:
            cut_off = not torch.is_grad_enabled() and in_autograd_function()
            watch._only_cut_off[self._name] = cut_off and watch._only_cut_off.get(self._name, True)
