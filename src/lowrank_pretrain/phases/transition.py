"""Changing a model in the middle of a fit, in one place.

``apply`` takes the distributed wrapper off, runs the change, refits the optimizers' groups and wraps again, all at an
optimizer-step boundary. **New parameters join the group that owns their base weight**: that is exact for every kind of
scheduler, for resume and for layer-wise learning rates, where ``add_param_group`` raises or silently drifts. Frozen
parameters leave their group (which may become empty, but is never removed); their state and ``.grad`` are released.

Under DDP the new wrapper has a reducer of its own, with the strategy's arguments and communication hook, or else with the hooks
that were registered on the old wrapper (Lightning registers ``ddp_comm_hook`` on CUDA only and drops it silently on a CPU). A
hook's state that holds buffers by bucket (PowerSGD's) starts anew: the buckets are others.
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.agreement import agreed_hash
from lowrank_pretrain.core.buckets import settle_buckets
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.memory import give_back
from lowrank_pretrain.core.protocols import Adopter, Inherit
from lowrank_pretrain.phases import averaging, compiled

Change = Callable[[], Iterable[Inherit] | None]


def apply(
    trainer: pl.Trainer, module: pl.LightningModule, change: Change, optimizer_state: str = "keep", replay: bool = False
) -> int:
    """Run ``change`` on the module and make trainer, optimizers and wrapper follow.

    Args:
        trainer: the running trainer.
        module: its LightningModule.
        change: alters the module (adds parameters, sets ``requires_grad``); may return what inherits from what.
        optimizer_state: ``keep``: parameters that stay keep their moments; ``reset``: all moments are dropped, as the
            PreLoRA authors' code does.
        replay: the change is repeated before the first step of a resumed fit, so no step boundary is needed.

    Returns:
        A hash of all parameters behind the change, which all ranks hold alike (before it, under a strategy of ours, whose
        workers' heads may differ from then on).

    Raises:
        RuntimeError: called between two micro-batches of one optimizer step.
        ConfigError: a new parameter has no base weight in any optimizer.
        Disagreement: the ranks drifted apart before the change or by it, on every rank.
    """
    if not replay and _mid_step(trainer):
        raise RuntimeError("a model may change only between two optimizer steps, not between micro-batches of one")
    strategy = trainer.strategy
    wrapped = strategy.model is not strategy.lightning_module
    hooks = list(getattr(strategy.model, "_comm_hooks", ())) if wrapped else []
    if wrapped:
        strategy.model = strategy.lightning_module  # no reference to the old wrapper is kept: its reducer goes with it
    for p in module.parameters():
        p.grad = None  # gradients may be views of the old reducer's buckets
    adopter = strategy if isinstance(strategy, Adopter) else Adopter()
    agreed = 0
    if adopter.compares_ranks and not replay:
        agreed = agreed_hash(strategy, module, f"before a change of the model behind step {trainer.global_step}")
    before = {id(p): p.requires_grad for p in module.parameters()}
    inherited = list(change() or ())
    for optimizer in trainer.optimizers:
        _inherit_state(optimizer, inherited)
    _join(trainer.optimizers, module, before, inherited)
    _leave(trainer.optimizers, module, before)
    if optimizer_state == "reset":
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
    give_back()
    adopter.after_transition()
    averaging.follow(trainer.callbacks, module)
    compiled.allow_graphs(module)
    if not adopter.compares_ranks:  # before the new wrapper, which would give everyone rank 0's weights and hide a difference
        agreed = agreed_hash(strategy, module, f"at a change of the model behind step {trainer.global_step}")
    if wrapped:
        strategy.configure_ddp()
        settle_buckets(strategy.model)  # before the hooks, which would take made-up gradients for real ones
        _keep_hooks(strategy.model, hooks)
    return agreed


def group_names(optimizers: Iterable[Optimizer], module: nn.Module) -> list[list[list[str]]]:
    """Parameter names by optimizer and group, in order. Optimizer state is restored by position, so a resume compares."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [[[names.get(id(p), "?") for p in group["params"]] for group in opt.param_groups] for opt in optimizers]


def check_restored(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Refuse moments that landed on a parameter of another shape (loading by position does not notice).

    Raises:
        ConfigError: naming the parameter.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    for optimizer in optimizers:
        if not type(optimizer).__module__.startswith("torch.optim"):
            continue  # projected moments have shapes of their own: such an optimizer checks them itself
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim > 0 and key.startswith("exp_avg") and value.shape != p.shape:
                    raise ConfigError(
                        "ckpt_path", names.get(id(p), "?"), f"its {key} has shape {tuple(value.shape)}, not {tuple(p.shape)}: "
                        "the checkpoint's optimizer belongs to another model or another grouping of parameters"
                    )  # fmt: skip


def _mid_step(trainer: pl.Trainer) -> bool:
    # Lightning has no public way to ask; this is the one place where a private of its loops is read
    return trainer.fit_loop.epoch_loop._should_accumulate()


def _keep_hooks(wrapper: nn.Module, hooks: Iterable[tuple[Callable, Any]]) -> None:
    """DDP has no public list of its hooks, so this reads its private one; a wrapper of another kind has none."""
    for hook, state in hooks:
        for name in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's, by bucket
            if isinstance(getattr(state, name, None), dict):
                getattr(state, name).clear()
                state.iter = 0  # it sends whole gradients until DDP has settled its buckets
        if not wrapper._comm_hooks:
            wrapper.register_comm_hook(state, hook)


def _inherit_state(optimizer: Optimizer, inherited: Iterable[Inherit]) -> None:
    for new, old, dim, start, rows in inherited:
        state = optimizer.state.get(old)
        if not state or not rows:
            continue
        mine = optimizer.state[new] = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                # one parameter more than one of the old one's shape: heads that all start from the same adapter
                mine[key] = value.expand(new.shape).clone() if new.ndim > old.ndim else value.narrow(dim, start, rows).clone()
            else:
                mine[key] = value.clone() if isinstance(value, Tensor) else value


def _join(optimizers: list[Optimizer], module: nn.Module, before: dict[int, bool], inherited: Iterable[Inherit]) -> None:
    groups = {id(p): group for opt in optimizers for group in opt.param_groups for p in group["params"]}
    forebears = {id(new): id(old) for new, old, *_ in inherited}
    named = dict(module.named_parameters())
    for name, p in named.items():
        if id(p) in before or not p.requires_grad or id(p) in groups:
            continue
        owner = forebears.get(id(p)) or _base_weight(name, named, groups, forebears)
        if owner not in groups:
            raise ConfigError(
                "targets", name.partition(".lora_")[0], "is in no optimizer: configure_optimizers must hand over its weight"
            )
        group = groups[id(p)] = groups[owner]  # what joins may itself be the owner of what comes next
        group["params"].append(p)
        if "param_names" in group:
            group["param_names"].append(name)


def _base_weight(name: str, named: dict[str, nn.Parameter], groups: dict[int, Any], forebears: dict[int, int]) -> int | None:
    """The nearest parameter above a new one that an optimizer owns: ``fc1.lora_B.W`` -> ``fc1.weight``."""
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):
        prefix = ".".join(words[:end])
        siblings = [f"{prefix}.weight", *(n for n in named if n.rpartition(".")[0] == prefix)]
        for sibling in siblings:
            if sibling in named:
                own = id(named[sibling])
                found = next((owner for owner in (own, forebears.get(own)) if owner in groups), None)
                if found is not None:
                    return found
    return None


def _leave(optimizers: list[Optimizer], module: nn.Module, before: dict[int, bool]) -> None:
    """Parameters that were frozen or removed by the change leave their group, with their state."""
    after = {id(p): p.requires_grad for p in module.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            stays = [not (id(p) in before and before[id(p)] and not after.get(id(p), False)) for p in group["params"]]
            if all(stays):
                continue
            for p, stay in zip(group["params"], stays, strict=True):
                if not stay:
                    optimizer.state.pop(p, None)
                    p.grad = None
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [item for item, stay in zip(group[key], stays, strict=True) if stay]
