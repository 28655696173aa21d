"""Change a model in the middle of a fit: note what it was, change it, and make trainer, optimizers and averages follow.

``apply`` removes the distributed wrapper, runs the change, refits the optimizers' groups and wraps again, all at an
optimizer-step boundary. **New parameters join the group that owns their base weight.** That is exact for every kind of
scheduler, for resume and for layer-wise learning rates, where ``add_param_group`` raises or silently drifts. Frozen
parameters leave their group (which may become empty, but is never removed); their state and ``.grad`` are released.

Under DDP the new wrapper has its own reducer, with the strategy's arguments and communication hook, or else with the hooks
that were registered on the old wrapper (Lightning registers ``ddp_comm_hook`` on CUDA only and drops it silently on a CPU). The
state of a hook that holds buffers by bucket (PowerSGD's) starts anew, because the buckets change.

Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging`` pair averaged and trained parameters by position. So each
averaged model becomes a copy of the changed model, and takes the old average's values back by name. Adapters join as they are
(B = 0, so the average's function does not move). From then on W, A and B are averaged separately: W₀ + avg(B) avg(A), which is
the average of the merged weights up to the factors' covariance. A factored average keeps of its W what the trained U reaches.
"""

import copy
import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lowrank_pretrain.core.agreement import agreed_hash
from lowrank_pretrain.core.buckets import settle_buckets
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import (
    COMPILED_CALL,
    averaged_model,
    comm_hooks,
    set_averaged_model,
    state_dict_hooks,
)
from lowrank_pretrain.core.protocols import Adopter, Inherit
from lowrank_pretrain.core.trainer import accumulates, callbacks_of, log_row, optimizers_inside
from lowrank_pretrain.factorize.layer import follow_weight
from lowrank_pretrain.factorize.model import factored_layers, shown_whole
from lowrank_pretrain.lora.model import own_tensors, shown_plain
from lowrank_pretrain.phases import optimizer_starts
from lowrank_pretrain.phases.inherited_state import inherit_state

Change = Callable[[], Iterable[Inherit] | None]

# -- what the module was ----------------------------------------------------------------------------------------------


@dataclass
class Note:
    """Remember a module's form before its first change, and its changes since. Kept on the module: it outlives the fit.

    Args:
        requires_grad: by parameter, before the first change.
        tied: names of parameters that had more than one name.
        before: names of all tensors.
        added: names of the tensors that an optimizer registered on the module when it took a plan over.
        phase: after the last change.
        plan: {target: rank}; None until a change has succeeded.
        alpha: of the adapters.
        frozen_dtype: in which a frozen W is stored since the freeze; None: in its own.
        keep_original: whether such a W is kept as it was, too.
        frozen: names of the parameters that a change froze, or added without training them.
    """

    requires_grad: dict[str, bool]
    tied: list[str]
    before: set[str]
    added: list[str] = field(default_factory=list)
    phase: str = "full"
    plan: dict[str, int] | None = None
    alpha: float | None = None
    frozen_dtype: str | None = None
    keep_original: bool = False
    frozen: set[str] = field(default_factory=set)

    def entry(self) -> dict[str, Any]:
        """Return the note's part of a checkpoint, as plain types."""
        stored = {"frozen_dtype": self.frozen_dtype, "keep_original": self.keep_original} if self.frozen_dtype else {}
        return {"phase": self.phase, "plan": dict(self.plan or {}), "alpha": self.alpha, **stored}


def note_of(module: nn.Module) -> Note | None:
    """Return the note on a module; None before its first change."""
    return module.__dict__.get(_NOTE)


def note_of_changed(module: nn.Module) -> Note | None:
    """Return the note on a changed module; None for an unchanged one."""
    note = note_of(module)
    return note if note is not None and note.plan is not None else None


def note_plain(module: pl.LightningModule) -> Note:
    """Note a module's form before a change. The first note is kept."""
    note = note_of(module)
    if note is not None:
        return note
    named = list(nn.Module.named_parameters(module, remove_duplicate=False))
    owned = [id(p) for _, p in named]
    module.__dict__[_NOTE] = note = Note(
        requires_grad={name: p.requires_grad for name, p in nn.Module.named_parameters(module)},
        tied=[name for name, p in named if owned.count(id(p)) > 1],
        before=set(own_tensors(module)),
    )
    for key in _WRITERS:
        if _is_own(module, key):
            module.__dict__[key] = _AsPlain(module, key)
    return note


def note_added(module: pl.LightningModule) -> None:
    """Exclude what an optimizer registered on the module from the state dict, so that it stays plain."""
    note = note_plain(module)
    added, note.before = [name for name in own_tensors(module) if name not in note.before], set(own_tensors(module))
    if added:
        note.added = added
        module.register_state_dict_post_hook(_leave_out_added)


def _leave_out_added(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    note = note_of(module)
    for name in () if note is None else note.added:
        state_dict.pop(prefix + name, None)


def forget_note(module: nn.Module) -> None:
    """Remove the note and its hook. ``restore_flags`` comes first."""
    module.__dict__.pop(_NOTE, None)
    hooks = state_dict_hooks(module)
    for key in [key for key, hook in hooks.items() if hook is _leave_out_added]:
        del hooks[key]


def restore_flags(module: nn.Module) -> None:
    """Restore the parameters' ``requires_grad`` from before the first change, and the module's own writers."""
    note = note_of(module)
    flags = {} if note is None else note.requires_grad
    for name, p in nn.Module.named_parameters(module):
        if name in flags:
            p.requires_grad_(flags[name])
    for key in _WRITERS:
        writer = module.__dict__.get(key)
        if isinstance(writer, _AsPlain):
            del module.__dict__[key]
            if writer.before is not None:
                module.__dict__[key] = writer.before


_NOTE = "_lowrank"
_WRITERS = ("state_dict", "on_save_checkpoint")


class _AsPlain:
    """Show the plain model, with its trainable flags, to a user's own code that saves the module.

    Code that saves only trainable parameters would otherwise save adapters instead of the frozen, merged weights.
    """

    def __init__(self, module: pl.LightningModule, name: str) -> None:
        self.module, self.name = module, name  # copies and pickles of the module get one that is theirs
        self.before = module.__dict__.get(name)

    @property
    def __wrapped__(self) -> Any:
        """Return the wrapped method, in which Lightning looks for a user's override."""
        return getattr(type(self.module), self.name).__get__(self.module) if self.before is None else self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        note = note_of(self.module)
        if kwargs.get("keep_vars", False):  # callers that want the parameters themselves get them unchanged
            return self.__wrapped__(*args, **kwargs)
        with shown_whole(self.module), shown_plain(self.module, {} if note is None else note.requires_grad):
            return self.__wrapped__(*args, **kwargs)


def _is_own(module: pl.LightningModule, name: str) -> bool:
    """Return whether a user's code overrides what the method writes."""
    if name in module.__dict__ or getattr(type(module), name) is not getattr(pl.LightningModule, name):
        return True
    return name == "state_dict" and any(type(child).state_dict is not nn.Module.state_dict for child in module.modules())


# -- the change -------------------------------------------------------------------------------------------------------


def apply(
    trainer: pl.Trainer, module: pl.LightningModule, change: Change, optimizer_state: str = "keep", replay: bool = False
) -> int:
    """Run ``change`` on the module, then update trainer, optimizers and wrapper.

    Args:
        trainer: the running trainer.
        module: its LightningModule.
        change: alters the module (adds parameters, sets ``requires_grad``); may return what inherits from what.
        optimizer_state: ``keep``: parameters that stay keep their moments; ``reset``: all moments are dropped, as the
            PreLoRA authors' code does.
        replay: the change is repeated before the first step of a resumed fit, so no step boundary is needed.

    Returns:
        A hash of all parameters after the change, which all ranks hold alike. Under a strategy that compares the ranks itself
        it is the hash before the change, because its workers' heads may differ from then on.

    Raises:
        RuntimeError: called between two micro-batches of one optimizer step.
        ConfigError: a new parameter has no base weight in any optimizer.
        Disagreement: the ranks drifted apart before the change or by it, on every rank.
    """
    if not replay and accumulates(trainer):
        raise RuntimeError("a model may change only between two optimizer steps, not between micro-batches of one")
    strategy: Any = trainer.strategy
    by_strategy = isinstance(strategy, Adopter) and strategy.compares_ranks

    # remove the wrapper
    wrapped = strategy.model is not strategy.lightning_module
    hooks = comm_hooks(strategy.model) if wrapped else []
    if wrapped:
        strategy.model = strategy.lightning_module  # no reference to the old wrapper is kept: its reducer goes with it
    for _, p in nn.Module.named_parameters(module):
        p.grad = None  # gradients may be views of the old reducer's buckets

    # change the module
    agreed = 0
    if by_strategy and not replay:
        strategy.before_transition()
        agreed = agreed_hash(strategy, module, f"before a change of the model behind step {trainer.global_step}")
    before = {id(p): p.requires_grad for _, p in nn.Module.named_parameters(module)}
    inherited = list(change() or ())
    if (note := note_of(module)) is not None:
        named = [*nn.Module.named_parameters(module)]
        note.frozen |= {name for name, p in named if not p.requires_grad and before.get(id(p), True)}
        note.frozen -= {name for name, p in named if p.requires_grad and not before.get(id(p), True)}  # it trains again

    # refit the optimizers
    # the state of a parameter may be kept by an optimizer that another one wraps, or holds with others
    holders = [each for optimizer in trainer.optimizers for each in (optimizer, *optimizers_inside(optimizer))]
    for optimizer in holders if inherited else ():
        inherit_state(optimizer, inherited)
    _join(trainer.optimizers, holders, module, before, inherited)
    _leave(trainer.optimizers, holders, module, before)
    if optimizer_state == "reset":
        for optimizer in holders:
            optimizer.state.clear()
            optimizer_starts.begin_again(optimizer)
    _give_memory_back()
    if isinstance(strategy, Adopter):
        strategy.after_transition()

    # let averages and compiled code follow
    follow(callbacks_of(trainer), module)
    allow_graphs(module)

    # compare the ranks, and wrap again
    if not by_strategy:  # before the new wrapper, which would give everyone rank 0's weights and hide a difference
        agreed = agreed_hash(strategy, module, f"at a change of the model behind step {trainer.global_step}")
    if wrapped:
        strategy.configure_ddp()
        settle_buckets(strategy.model)  # before the hooks, which would take made-up gradients for real ones
        if strategy.model is not strategy.lightning_module:  # nothing may be left to average at every step
            _keep_hooks(strategy.model, hooks)
    return agreed


def _give_memory_back() -> None:
    """Return freed memory to the device and to the system (glibc keeps blocks of up to 32 MiB), for figures of each phase."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def allow_graphs(module: nn.Module) -> int:
    """Raise dynamo's ``recompile_limit`` to the number that separately compiled layers need over three phases.

    Blocks compiled each by itself (``block.compile()``) share one piece of code. While all are alike they share a graph. With
    adapters of different ranks each needs its own, in each phase, for training and for evaluation. Beyond its limit (8) dynamo
    goes back to eager code with no more than a warning.

    Returns:
        How many of the module's layers are compiled (or hold compiled code); 0 leaves the limit unchanged.
    """
    dynamo = sys.modules.get("torch._dynamo")  # not imported unless something was compiled
    if dynamo is None:
        return 0
    count = sum(
        getattr(child, COMPILED_CALL, None) is not None or isinstance(child, dynamo.OptimizedModule)
        for child in module.modules()
    )
    if count:
        config = dynamo.config
        config.recompile_limit = max(config.recompile_limit, 2 * (2 * count + 1))
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * config.recompile_limit)
    return count


def _keep_hooks(wrapper: Any, hooks: Iterable[tuple[Callable, Any]]) -> None:
    """Register the old wrapper's hooks on the new one, where the strategy registered none."""
    for hook, state in hooks:
        for name in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's, by bucket
            if isinstance(getattr(state, name, None), dict):
                getattr(state, name).clear()
                state.iter = 0  # it sends whole gradients until DDP has settled its buckets
        if not comm_hooks(wrapper):
            wrapper.register_comm_hook(state, hook)


# -- optimizers -------------------------------------------------------------------------------------------------------


def _join(
    optimizers: list[Optimizer],
    holders: list[Optimizer],
    module: nn.Module,
    before: dict[int, bool],
    inherited: Iterable[Inherit],
) -> None:
    """Put new parameters into the group that owns their base weight, with what ``holders`` of state want of each.

    ``before``: who trained, by id.
    """
    groups = {id(p): group for opt in optimizers for group in opt.param_groups for p in group["params"]}
    owned = {id(p): p for opt in optimizers for group in opt.param_groups for p in group["params"]}
    origins = {id(new): id(old) for new, old, *_ in inherited}
    named = dict(nn.Module.named_parameters(module))
    for name, p in named.items():
        if id(p) in before or not p.requires_grad or id(p) in groups:
            continue
        owner = origins.get(id(p)) or _base_weight(name, named, groups, origins)
        if owner not in groups and ".rest_bias." in name:  # nothing trained the bias before
            p.requires_grad_(False)
            continue
        if owner not in groups:
            raise ConfigError(
                "targets", name.partition(".lora_")[0], "is in no optimizer: configure_optimizers must hand over its weight"
            )
        group = groups[id(p)] = groups[owner]  # a joined parameter can own later ones
        group["params"].append(p)
        if "param_names" in group:
            group["param_names"].append(name)
        base = owned.get(owner)
        for optimizer in (each for each in holders if any(group is one for one in each.param_groups)):
            start = optimizer_starts.STARTS.get(optimizer)
            if group.get("fused") or (start is not None and start.state) or (base is not None and vars(base)):
                optimizer_starts.begin(optimizer, group, p, base)  # else it wants nothing of a new parameter
        owned[id(p)] = p


def _base_weight(name: str, named: dict[str, nn.Parameter], groups: dict[int, Any], origins: dict[int, int]) -> int | None:
    """Find the nearest enclosing parameter of a new one that an optimizer owns: ``fc1.lora_B.W`` -> ``fc1.weight``."""
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):
        prefix = ".".join(words[:end])
        siblings = [f"{prefix}.weight", *(n for n in named if n.rpartition(".")[0] == prefix)]
        for sibling in siblings:
            if sibling in named:
                own = id(named[sibling])
                found = next((owner for owner in (own, origins.get(own)) if owner in groups), None)
                if found is not None:
                    return found
    return None


def _leave(optimizers: list[Optimizer], holders: list[Optimizer], module: nn.Module, before: dict[int, bool]) -> None:
    """Remove parameters that the change froze or removed from their group, with the state that ``holders`` have of them."""
    after = {id(p): p.requires_grad for _, p in nn.Module.named_parameters(module)}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            stays = [not (id(p) in before and before[id(p)] and not after.get(id(p), False)) for p in group["params"]]
            for p, stay in zip(group["params"], stays, strict=True):
                if not stay:
                    p.grad = None
                    for holder in holders:
                        holder.state.pop(p, None)
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [item for item, stay in zip(group[key], stays, strict=True) if stay]


# -- averages that Lightning's callbacks keep ---------------------------------------------------------------------------


def averages(callbacks: Iterable[pl.Callback]) -> Iterator[tuple[str, nn.Module, pl.Callback]]:
    """Yield (where its state dict lies in a checkpoint, averaged model, callback) for each callback that keeps an average."""
    for callback in callbacks:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            model = averaged_model(callback)
            if model is not None:
                yield "state_dict" if isinstance(callback, WeightAveraging) else callback.state_key, model, callback


def follow(callbacks: Iterable[pl.Callback], module: pl.LightningModule) -> None:
    """Rebuild every averaged model from the changed module, keeping its values by name.

    Raises:
        ConfigError: two of the module's parameters are views of one another: averaging both would average twice.
    """
    for _, averaged, callback in averages(callbacks):
        old = own_tensors(averaged)
        if list(old) == list(own_tensors(module)):
            continue
        storages = [p.untyped_storage().data_ptr() for _, p in nn.Module.named_parameters(module)]
        if len(set(storages)) < len(storages):
            refuse_views(callback)
        set_averaged_model(callback, copy.deepcopy(module).to(next(averaged.parameters()).device))
        new = next(model for _, model, owner in averages([callback]))
        with torch.no_grad():
            for name, value in own_tensors(new).items():
                value.copy_(old.get(name, value))
        for name, layer in factored_layers(new):  # U stays the trained one's, so that like is averaged with like
            if f"{name}.weight" in old:
                follow_weight(layer, old[f"{name}.weight"])


def restart_averages(callbacks: Iterable[pl.Callback], module: pl.LightningModule) -> None:
    """Reset every average to a copy of the present module, as at the start of a fit."""
    for _, averaged, callback in averages(callbacks):
        set_averaged_model(callback, copy.deepcopy(module).to(next(averaged.parameters()).device))


def refuse_views(callback: pl.Callback) -> None:
    """Refuse to average a fused layer with only some row blocks as targets: the others train as views of W."""
    raise ConfigError(
        "callbacks", type(callback).__name__,
        "would average the rows of a fused layer twice of which only some are targets: name all its parts as targets, or set "
        "freeze_rest=True, or remove the averaging",
    )  # fmt: skip


def log_hash(who: str, trainer: pl.Trainer, agreed: int, replay: bool) -> None:
    """Log the hash of the weights that all ranks agree on, and say it; nothing at a replay."""
    if not replay:
        log_row(trainer, {"lowrank/hash": float(agreed)})
        where = f", the same on all {trainer.world_size} processes" if trainer.world_size > 1 else ""
        rank_zero_info(f"{who}: hash of the weights {agreed:08x}{where}")
