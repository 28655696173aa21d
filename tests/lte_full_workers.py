"""What the ranks of test_lte_full do: small fits of a toy model, by real Trainers."""

import lightning.pytorch as pl
import torch

from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.storage import Storage
from tests import lte_workers
from tests.lte_workers import Net, weights

LTE = ("wire", "outer_lr", "outer_momentum", "sync_rest", "targets", "merge_every", "update", "basis", "reset", "route", "rank",
       "heads", "overlap", "mode", "merge_timeout", "fragments", "keep_on")  # fmt: skip


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
    """All parameters after every batch, but for heads; with whole weights also W_base and how many bytes were sent so far."""

    def __init__(self):
        self.W, self.base, self.sent = [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        local = trainer.strategy.local
        hidden = local.hidden(module)
        self.W.append({n: p.detach().clone() for n, p in module.named_parameters() if n not in hidden})
        self.base.append({n: W.clone() for one in getattr(local, "fragments", ()) for n, W in one.base.items()})
        self.sent.append(local.workers.sent)


def run(world, trainer=None, **kwargs):
    seen = Seen()
    trainer = {**(trainer or {}), "callbacks": [*(trainer or {}).get("callbacks", []), seen]}
    module, run_, strategy = fit(world, trainer=trainer, **kwargs)
    local = strategy.local
    owned = [(o, p) for o in run_.optimizers for group in o.param_groups for p in group["params"]]
    moments = [v.clone() for o, p in owned for v in o.state.get(p, {}).values() if torch.is_tensor(v)]
    heads = {name: p.detach().clone() for name, p in local.parameters().items()}
    steps = {"W": seen.W, "base": seen.base, "sent_by": seen.sent}
    return {"weights": weights(module), **steps, "losses": module.losses, "scores": module.scores, "moments": moments,
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


def after_a_fit(world, path, **kwargs):
    """A run of 12 steps, and one from a checkpoint that was written when a fit of 6 was over; one batch all the time."""
    order = lte_workers.in_layout(world, 8, 8)
    ends = []
    for steps, ckpt in ((6, None), (12, None), (12, path)):
        module, trainer, _ = fit(world, steps=steps, ckpt=ckpt, data=lte_workers.Samples(8, order=order), **kwargs)
        if steps == 6:
            trainer.save_checkpoint(path)
        ends.append(weights(module))
    return ends[1:]


def counted(world, **kwargs):
    """Bytes at torch.distributed's door, by ring formulae, while merges are on (not while anyone looks)."""
    import torch.distributed as dist

    from lowrank_pretrain.lte.increments import Increments
    from lowrank_pretrain.lte.rest import SharedParameters
    from lowrank_pretrain.lte.underway import MeanUnderway

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

        def call(*args, **kwargs):
            inside[0] += 1
            try:
                return whole(*args, **kwargs)
            finally:
                inside[0] -= 1

        setattr(kind, method, call)
        return lambda: setattr(kind, method, whole)

    undo = [during(Increments, "mean"), during(Increments, "begin"), during(MeanUnderway, "advance"),
            during(SharedParameters, "merge")]  # fmt: skip
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


def dying(world, how, folder, answer_within, **kwargs):
    """A run whose worker 1 ends, or answers no more, after step 6: in the middle of an exchange if merges overlap."""
    callbacks = [lte_workers.Dies(1, 6, how)]
    return run(world, trainer={"callbacks": callbacks}, folder=folder, save_at=[5], exact=True, merge_timeout=answer_within,
               **kwargs)  # fmt: skip


def saved_at_once(world, folder, ckpt, **kwargs):
    """A resume that takes no step, and is saved again."""
    _, trainer, _ = fit(world, steps=5, ckpt=ckpt, **kwargs)
    trainer.save_checkpoint(f"{folder}/step=5.ckpt")


def hashed(world, **kwargs):
    """The hashes logged at merges."""
    rows = lte_workers.Rows()
    fit(world, trainer={"logger": rows, "log_every_n_steps": 1}, **kwargs)
    return [row["lte/hash"] for _, row in rows.rows if "lte/hash" in row]


class Lazy(Net):
    """Steps by hand; worker 1 leaves its optimizer out from some step on."""

    def __init__(self, until):
        super().__init__()
        self.automatic_optimization, self.until = False, until

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        if self.global_rank == 0 or batch_idx < self.until:
            optimizer.step()


def lazy(world, until, **kwargs):
    fit(world, module=Lazy(until), trainer={"max_epochs": 1, "max_steps": -1}, merge_timeout=8, **kwargs)


class Host:
    """Stands for a device of its own: what is kept is a copy, and what is got is another."""

    def __enter__(self):
        self.put, self.get = Storage.put, Storage.get
        Storage.put = lambda _, t, old=None: t.clone() if old is None else old.copy_(t)
        Storage.get = lambda _, kept, device: kept.clone()

    def __exit__(self, *_):
        Storage.put, Storage.get = self.put, self.get


def far(world, **kwargs):
    """A run whose copies for merges lie elsewhere."""
    with Host():
        return run(world, keep_on="cpu", **kwargs)


def by_default_dtype(world, dtype, **kwargs):
    """The weights of two equal runs; during the second the process has another default dtype."""
    found = []
    for default in (torch.float32, dtype):
        module, order = Net(dtype=torch.float32), lte_workers.in_layout(world, 8)
        data = lte_workers.Samples(dtype=torch.float32, order=order)
        torch.set_default_dtype(default)
        try:
            found.append(run(world, module=module, data=data, **kwargs)["weights"])
        finally:
            torch.set_default_dtype(torch.float32)
    return found
