"""What the ranks of test_lte_before do: small fits of a toy model under a method file, merging from the first step."""

import lightning.pytorch as pl
import torch

from lowrank_pretrain import Plan
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.phases.callback import PhaseCallback
from lowrank_pretrain.run import method
from tests import lte_workers
from tests.lte_galore_workers import Configured, config, outcome


class Seen(pl.Callback):
    """After every batch: the phase, and all parameters that are not heads."""

    def __init__(self):
        self.W, self.phases = [], []

    def on_train_batch_end(self, trainer, module, *_):
        hidden = trainer.strategy.local.hidden(module)
        self.W.append({n: p.detach().clone() for n, p in module.named_parameters() if n not in hidden})
        self.phases.append(next((c.phase for c in trainer.callbacks if hasattr(c, "plan")), "none"))


def cell(world, name, change=None, steps=18, trainer=None, module=None, net=None, **fit):
    """A fit under a method file. Two windows of 3 steps, one joint: switch at 6, freeze at 9."""
    change = {"before": "merge", "sync_rest": "merge", "latest": 2, **(change or {})}
    built, seen = method.build(config(name, **change)), Seen()
    trainer = {**(trainer or {}), "callbacks": [*built.callbacks, *(trainer or {}).get("callbacks", []), seen]}
    module, run, strategy = lte_workers.fit(
        world, steps=steps, exact=True, strategy=built.strategy, trainer=trainer,
        module=module or Configured(built, **(net or {})), **fit,
    )  # fmt: skip
    (callback,) = (c for c in built.callbacks if hasattr(c, "plan"))
    at = callback.switch_step
    return {**outcome(module, run, strategy), "phases": [callback.phase], "at": (at, callback.freeze_step),
            "plan": dict(callback.plan or {}), "history": [(w.loss, w.norms) for w in callback.history], "W": seen.W,
            "grads": callback.grad_norms, "seen": seen.phases, "sent": strategy.sent.mebibytes()}  # fmt: skip


def cell_of(world, name, change=None, steps=18, **fit):
    """The same model under a method without phases."""
    built, seen = method.build({**config(name), **(change or {})}), Seen()
    lte_workers.fit(
        world, steps=steps, exact=True, strategy=built.strategy, trainer={"callbacks": [seen]}, module=Configured(built), **fit
    )
    return {"W": seen.W}


class AtSteps(PhaseCallback):
    """A schedule of a user's own, which knows nothing of merges."""

    def __init__(self, switch, freeze):
        super().__init__()
        self.at = switch, freeze

    def on_train_batch_end(self, trainer, module, *_):
        if self.phase == "full" and trainer.global_step >= self.at[0]:
            self.switch(trainer, module, Plan({"net.0": 2, "net.4": 3}))
        elif self.phase == "joint" and trainer.global_step >= self.at[1]:
            self.freeze(trainer, module)


def by_steps(world, at, steps=14, trainer=None, **kwargs):
    """A run that switches and freezes between two merges, which come every 4 steps."""
    lte = {k: kwargs.pop(k) for k in ("wire", "outer_lr", "outer_momentum", "sync_rest", "reset") if k in kwargs}
    phases, seen = AtSteps(*at), Seen()
    strategy = LTEStrategy(heads=2, merge_every=4, before="merge", **lte)
    module, run, _ = lte_workers.fit(
        world, steps=steps, exact=True, strategy=strategy, trainer={"callbacks": [phases, seen]}, **kwargs
    )  # fmt: skip
    return {**outcome(module, run, strategy), "W": seen.W, "seen": seen.phases, "sent": strategy.sent.mebibytes()}


def counted(world, name, **kwargs):
    """A run, and the bytes of all of it: at torch.distributed's door over the merges' group, and in DDP's buckets."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    seen, of = {"door": 0.0, "ddp": 0.0}, [None]
    shares = {"all_gather_into_tensor": world - 1, "all_reduce": 2 * (world - 1) / world, "broadcast": (world - 1) / world,
              "all_to_all_single": (world - 1) / world}  # fmt: skip
    real = {call: getattr(dist, call) for call in shares}

    def counting(call):
        def counted_call(first, *args, **kw):
            tensor = args[0] if call in ("all_gather_into_tensor", "all_to_all_single") else first
            if of[0] is not None and kw.get("group") is of[0] and tensor.dtype != torch.int64:  # flags
                seen["door"] += shares[call] * tensor.numel() * tensor.itemsize
            return real[call](first, *args, **kw)

        return counted_call

    def hook(state, bucket):
        seen["ddp"] += shares["all_reduce"] * bucket.buffer().nbytes
        return default_hooks.allreduce_hook(None, bucket)

    class Hook(pl.Callback):
        def on_train_start(self, trainer, *_):
            of[0] = trainer.strategy._group

        def on_train_end(self, *_):  # the merged model is looked at from here on
            of[0] = None

        def on_train_batch_start(self, trainer, *_):
            wrapper = trainer.strategy.model
            if wrapper is not trainer.lightning_module and not wrapper._comm_hooks:
                wrapper.register_comm_hook(None, hook)

    for call in real:
        setattr(dist, call, counting(call))
    try:
        return {**cell(world, name, trainer={"callbacks": [Hook()]}, **kwargs), "counted": seen}
    finally:
        for call, was in real.items():
            setattr(dist, call, was)


def refused(world, name, folder, first, then):
    """The error of resuming a run with other settings."""
    cell(world, name, folder=folder, save_at=[4], steps=6, change=first)
    try:
        cell(world, name, ckpt=f"{folder}/step=4.ckpt", steps=8, change=then)
    except Exception as error:
        return str(error)


def dying(world, name, folder, how):
    """What the rank that is left says when the other one ends in the middle of a window."""
    try:
        cell(world, name, folder=folder, trainer={"callbacks": [lte_workers.Dies(1, 4, how)]}, change={"merge_timeout": 8.0})
    except BaseException as error:
        return str(error)
