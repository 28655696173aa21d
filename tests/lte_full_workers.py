"""What the ranks of test_lte_full do: small fits of a toy model, by real Trainers."""

import lightning.pytorch as pl
import torch

from lowrank_pretrain.lte import LTEStrategy
from tests import lte_workers
from tests.lte_workers import Net, weights

LTE = ("wire", "outer_lr", "outer_momentum", "sync_rest", "targets", "merge_every", "update", "basis", "reset", "route", "rank",
       "heads", "overlap", "mode", "merge_timeout")  # fmt: skip


def fit(world=1, net=None, module=None, **kwargs):
    settings = {key: kwargs.pop(key) for key in LTE if key in kwargs}
    defaults = {"update": "full", "merge_every": 4}
    if settings.get("update") == "lora":
        defaults |= {"rank": 2, "heads": 2}
    strategy = LTEStrategy(**{**defaults, **settings})
    if settings.get("update") == "galore" and module is None:
        from tests.lte_galore_workers import GaLoreNet

        module = GaLoreNet(**(net or {}))
    return lte_workers.fit(world, module=module or Net(**(net or {})), strategy=strategy, **kwargs)


class Seen(pl.Callback):
    """All parameters after every batch, but for heads."""

    def __init__(self):
        self.W = []

    def on_train_batch_end(self, trainer, module, *_):
        hidden = trainer.strategy.local.hidden(module)
        self.W.append({n: p.detach().clone() for n, p in module.named_parameters() if n not in hidden})


def run(world, trainer=None, **kwargs):
    seen = Seen()
    trainer = {**(trainer or {}), "callbacks": [*(trainer or {}).get("callbacks", []), seen]}
    module, run_, strategy = fit(world, trainer=trainer, **kwargs)
    local = strategy.local
    owned = [(o, p) for o in run_.optimizers for group in o.param_groups for p in group["params"]]
    moments = [v.clone() for o, p in owned for v in o.state.get(p, {}).values() if torch.is_tensor(v)]
    heads = {name: p.detach().clone() for name, p in local.parameters().items()}
    return {"weights": weights(module), "W": seen.W, "losses": module.losses, "scores": module.scores, "moments": moments,
            "heads": heads, "clock": (local.clock, local.merges), "metrics": strategy.metrics(), "sent": local.workers.sent,
            "phase": strategy.phase}  # fmt: skip


def resumed(world, folder, save_at, **kwargs):
    """A run, and what of its resume from each file does not end to the bit as the whole run."""
    whole = run(world, folder=folder, save_at=save_at, exact=True, **kwargs)
    unlike = {}
    for at in save_at:
        again = run(world, folder=f"{folder}/again", ckpt=f"{folder}/step={at}.ckpt", exact=True, **kwargs)
        unlike[at] = [n for key in ("weights", "heads") for n, v in whole[key].items() if not torch.equal(v, again[key][n])]
        unlike[at] += ["losses"] if whole["losses"][at:] != again["losses"] else []
        unlike[at] += ["clock"] if whole["clock"] != again["clock"] else []
        same = len(whole["moments"]) == len(again["moments"]) and all(map(torch.equal, whole["moments"], again["moments"]))
        unlike[at] += [] if same else ["moments"]
    return unlike


def refused(world, folder, first, then):
    """The error of resuming a run with other settings."""
    run(world, folder=folder, save_at=[2], steps=2, exact=True, **first)
    try:
        run(world, ckpt=f"{folder}/step=2.ckpt", steps=4, exact=True, **then)
    except Exception as error:
        return str(error)


class Breaks(pl.Callback):
    """One worker's weights become NaN in the middle of a window; what all hold when the run ends."""

    def __init__(self, name, step):
        self.name, self.step = name, step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            for name, p in module.named_parameters():
                if self.name in name:
                    p.data.view(-1)[-1] = float("nan")
                    return


def breaking(world, name, **kwargs):
    """The error, W as the merge before left it, and what the module holds in the end."""
    module, seen = Net(), Seen()
    try:
        fit(world, module=module, trainer={"callbacks": [Breaks(name, 6), seen]}, steps=9, **kwargs)
    except RuntimeError as error:
        return str(error), seen.W[3], weights(module)


def files(folder, at):
    return torch.load(f"{folder}/step={at}.ckpt", weights_only=True)


def counted(world, **kwargs):
    """Bytes at torch.distributed's door, by ring formulae, while merges are on (not while anyone looks)."""
    import torch.distributed as dist

    from lowrank_pretrain.lte.increments import Increments
    from lowrank_pretrain.lte.rest import SharedParameters

    seen = [0.0]
    inside = [0]
    real = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_reduce", "all_to_all_single")}
    shares = {
        "all_gather_into_tensor": world - 1,
        "all_reduce": 2 * (world - 1) / world,
        "all_to_all_single": (world - 1) / world,
    }

    def counting(name):
        def call(first, *args, **kw):
            tensor = first if name == "all_reduce" else args[0]
            if inside[0] and tensor.dtype != torch.int64:  # flags
                seen[0] += shares[name] * tensor.numel() * tensor.itemsize
            return real[name](first, *args, **kw)

        return call

    def during(kind, method):
        whole = getattr(kind, method)

        def call(*args):
            inside[0] += 1
            try:
                return whole(*args)
            finally:
                inside[0] -= 1

        setattr(kind, method, call)
        return lambda: setattr(kind, method, whole)

    undo = [during(Increments, "mean"), during(SharedParameters, "merge")]
    for name in real:
        setattr(dist, name, counting(name))
    try:
        found = run(world, **kwargs)
    finally:
        for name, call in real.items():
            setattr(dist, name, call)
        for back in undo:
            back()
    return {**found, "seen": seen[0]}
