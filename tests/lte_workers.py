"""What the ranks of test_lte_distributed and test_lte_resume do: small fits of a toy model under LTE, by real Trainers."""

import os
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lowrank_pretrain.checkpoints.loop_state import LoopState
from lowrank_pretrain.data.loaders.batch import Fetched
from lowrank_pretrain.data.loaders.epoch import EpochBatches, EpochLoader
from lowrank_pretrain.lte import LTEStrategy

WIDTH = 8


class Net(pl.LightningModule):
    """Two targets, a norm, biases and an output layer that is none. Batches are a function of their number."""

    def __init__(self, optimizer="adamw", dtype=torch.float64, dropout=0.0, lr=1e-2):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Dropout(dropout),
            nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Tanh(),
        )  # fmt: skip
        self.out = nn.Linear(2 * WIDTH, 3)
        self.kind, self.lr, self.seen, self.losses, self.scores = optimizer, lr, [], [], []
        self.to(dtype)

    def get_classifier(self):
        return self.out

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        self.seen += index.tolist()
        loss = nn.functional.cross_entropy(self.out(self.net(x)), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        index, x, y = batch
        self.scores.append(nn.functional.cross_entropy(self.out(self.net(x)), y).item())
        self.log("val/loss", self.scores[-1], sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self):
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        if self.kind == "numbers":
            return NumbersAdam(self.parameters(), lr=self.lr)
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


class NumbersAdam(torch.optim.Optimizer):
    """Adam that keeps Python numbers, as many optimizers outside of torch do, one of them for all parameters together."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.state["steps"] = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.state["steps"] += 1
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": 0, "decayed": 1.0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
                state["step"] += 1
                state["decayed"] *= 0.9
                state["mean"].lerp_(p.grad, 0.1)
                state["square"].lerp_(p.grad.square(), 0.01)
                size = (state["square"] / (1 - 0.99 ** state["step"])).sqrt() + 1e-8
                p.sub_(group["lr"] * 0.99 ** self.state["steps"] / (1 - state["decayed"]) * state["mean"] / size)
        return loss


class Samples(Dataset):
    """Sample i as (i, x, y)."""

    def __init__(self, n=64, dtype=torch.float64, order=None):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, WIDTH, generator=g).to(dtype)
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0).long()
        self.order = order or list(range(n))

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i):
        i = self.order[i]
        return i, self.x[i], self.y[i]

    def fetch(self, epoch, indices):
        chosen = torch.tensor([self.order[i] for i in indices])
        return Fetched((chosen, self.x[chosen], self.y[chosen]), [])


def in_layout(world, batch, n=64):
    """An order of samples such that rank r's b-th batch, of batch/world samples, is the r-th part of global batch b."""
    order = [0] * n
    per = batch // world
    for b in range(n // batch):
        for r in range(world):
            for i in range(per):
                # DistributedSampler without shuffling gives rank r the positions r, r + world, …
                order[(b * per + i) * world + r] = b * batch + r * per + i
    return order


def loader(data, batch_size, rank=0, world=1):
    """Resumes in the middle of an epoch."""
    return EpochLoader(data, EpochBatches(len(data), batch_size, True, rank, world, seed=0))


def fit(
    world=1, steps=12, batch=8, net=None, ckpt=None, save_at=(), folder=None, data=None, val=0, strategy=None, module=None,
    trainer=None, exact=False, **lte,
):  # fmt: skip
    """A fit of `steps` optimizer steps; returns (module, trainer, strategy)."""
    module = module or Net(**(net or {}))
    dtype = next(module.parameters()).dtype
    strategy = strategy or LTEStrategy(**{"rank": 2, "heads": 2, "merge_every": 4, **lte})
    data = data or Samples(dtype=dtype, order=in_layout(world, batch))
    rank = int(os.environ["RANK"]) if world > 1 else 0
    # a sampler of our own: Lightning's would shuffle; the other loader resumes in the middle of an epoch
    sampler = DistributedSampler(data, world, rank, shuffle=False)
    plain = DataLoader(data, batch_size=batch // world, sampler=sampler)
    batches = loader(data, batch // world, rank, world) if exact else plain
    folder = Path(folder or tempfile.mkdtemp())
    options = {"max_epochs": -1, "max_steps": steps, "limit_val_batches": val, "num_sanity_val_steps": 0, **(trainer or {})}
    save = [Save(folder, save_at)] if save_at else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    options["callbacks"] = [*([LoopState()] if exact else []), *options.get("callbacks", []), *save]
    run = pl.Trainer(
        accelerator="cpu", devices=world, strategy=strategy, default_root_dir=folder, **{**quiet, **options}
    )  # fmt: skip
    # a loader without a generator of its own draws from the global one whenever it is iterated
    scored = DataLoader(Samples(16, dtype), batch_size=8, generator=torch.Generator()) if val else None
    run.fit(module, batches, scored, ckpt_path=ckpt)
    return module, run, strategy


class Save(pl.Callback):
    """Writes step=N.ckpt behind the steps named."""

    def __init__(self, folder, steps):
        self.folder, self.steps, self.last = folder, steps, 0

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            if self.last in self.steps:
                trainer.save_checkpoint(self.folder / f"step={self.last}.ckpt")


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def layout(world, **kwargs):
    """Final weights, losses and what the strategy sent."""
    module, run, strategy = fit(world, **kwargs)
    return {
        "weights": weights(module), "losses": module.losses, "seen": module.seen, "scores": module.scores,
        "metrics": strategy.metrics(), "A": {n: p.detach().clone() for n, p in strategy.local.parameters().items()},
        "step": run.global_step, "logged": {k: float(v) for k, v in run.callback_metrics.items()},
    }  # fmt: skip


# ---- what only several ranks can show ------------------------------------------------------------------------------------


class Watch(pl.Callback):
    """After every batch: a digest of W, of the rest and of the heads."""

    def __init__(self):
        self.W, self.rest, self.heads = [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        owned = {id(p) for p in trainer.strategy.local.parameters().values()}
        targets = {id(layer.weight) for layer in trainer.strategy.local.layers.values()}
        named = list(module.parameters())
        self.W.append([p.detach().clone() for p in named if id(p) in targets])
        self.rest.append([p.detach().clone() for p in named if id(p) not in targets and id(p) not in owned])
        self.heads.append([p.detach().clone() for p in trainer.strategy.local.parameters().values()])


def watched(world, trainer=None, **kwargs):
    watch = Watch()
    trainer = trainer or {}
    module, run, _ = fit(world, trainer={**trainer, "callbacks": [*trainer.get("callbacks", []), watch]}, **kwargs)
    return {"W": watch.W, "rest": watch.rest, "heads": watch.heads, "weights": weights(module), "step": run.global_step}


def saved(world, folder, save_at, **kwargs):
    """A run that writes checkpoints; what it ends with."""
    module, run, strategy = fit(world, folder=folder, save_at=save_at, exact=True, **kwargs)
    heads = {name: p.detach().clone() for name, p in strategy.local.parameters().items()}
    owned = [(o, p) for o in run.optimizers for group in o.param_groups for p in group["params"]]
    moments = [torch.as_tensor(v).clone() for o, p in owned for v in o.state.get(p, {}).values()]
    return {"weights": weights(module), "losses": module.losses, "heads": heads, "moments": moments,
            "clock": (strategy.local.clock, strategy.local.merges)}  # fmt: skip


class Overflow(pl.Callback):
    """One rank's gradients overflow at one step."""

    def __init__(self, rank, step):
        self.rank, self.step = rank, step

    def on_after_backward(self, trainer, module):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            next(iter(trainer.strategy.local.parameters().values())).grad.view(-1)[0] = float("inf")


def overflowing(world, **kwargs):
    from lightning.pytorch.plugins import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))
    net = {"dtype": torch.float32}
    return watched(world, net=net, trainer={"callbacks": [Overflow(1, 2)], "plugins": [plugin]}, **kwargs)


class Stream(torch.utils.data.IterableDataset):
    """Samples in order; shared out by rank, or not; rank r's part may be shorter."""

    def __init__(self, rank, world, shared=True, missing=0, sized=False):
        data = Samples(48)
        mine = range(rank, 48, world) if shared else range(48)
        self.items = [data[i] for i in mine][: len(mine) - missing * rank]
        self.sized = sized

    def __iter__(self):
        return iter(self.items)


class SizedStream(Stream):
    def __len__(self):
        return len(self.items)


def streaming(world, shared=True, missing=0, sized=False):
    rank = int(os.environ["RANK"])
    module = Net()
    data = (SizedStream if sized else Stream)(rank, world, shared, missing)
    run = pl.Trainer(
        accelerator="cpu", devices=world, strategy=LTEStrategy(rank=2, heads=1, merge_every=2), max_epochs=2, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    run.fit(module, DataLoader(data, batch_size=4))
    return {"steps": run.global_step, "seen": module.seen, "weights": weights(module)}


def different_starts(world):
    module = Net()
    with torch.no_grad():
        for p in module.parameters():
            p += int(os.environ["RANK"])
    module, _, _ = fit(world, steps=1, module=module)
    return weights(module)


def counted(world, **kwargs):
    """Bytes by collective, counted at torch.distributed's door, of the steps after the first window."""
    import torch.distributed as dist

    seen = {"gather": 0, "reduce": 0}
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce

    def counting_gather(out, tensor, *args, **kw):
        if tensor.dtype != torch.int64:  # stamps: one number a target
            seen["gather"] += (world - 1) * tensor.numel() * tensor.itemsize
        return gather(out, tensor, *args, **kw)

    def counting_reduce(tensor, *args, **kw):
        if tensor.numel() > 1:  # Lightning adds up the loaders' lengths
            seen["reduce"] += 2 * (world - 1) / world * tensor.numel() * tensor.itemsize
        return reduce(tensor, *args, **kw)

    dist.all_gather_into_tensor, dist.all_reduce = counting_gather, counting_reduce
    try:
        _, _, strategy = fit(world, **kwargs)
    finally:
        dist.all_gather_into_tensor, dist.all_reduce = gather, reduce
    return {"seen": seen, "metrics": strategy.metrics(), "sent": strategy.local.workers.sent, "merges": strategy.local.merges,
            "routes": [p.route for p in strategy.local.pieces]}  # fmt: skip


class Dies(pl.Callback):
    """One rank stops answering (or its process ends) in the middle of a window."""

    def __init__(self, rank, step, how):
        self.rank, self.step, self.how = rank, step, how

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if self.how == "killed":
                os._exit(9)
            import time

            time.sleep(60)


def dying(world, how, folder, answer_within=8, **kwargs):
    # two merges, an epoch and the checkpoint behind it come before
    return saved(
        world, folder, [8], merge_timeout=answer_within, trainer={"callbacks": [Dies(1, 10, how)]}, **kwargs
    )  # fmt: skip


class Drift(pl.Callback):
    """One rank's W moves by a bit of its own accord in the middle of a window."""

    def __init__(self, name, step):
        self.name, self.step = name, step

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_rank == 1 and trainer.global_step == self.step:
            with torch.no_grad():
                module.get_parameter(self.name).view(-1)[0] += 1e-9


class Rows(pl.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def hashed(world, drift=None, **kwargs):
    """The hashes logged at merges; one rank may drift."""
    rows = Rows()
    callbacks = [Drift(*drift)] if drift else []
    fit(world, trainer={"logger": rows, "log_every_n_steps": 1, "callbacks": callbacks}, **kwargs)
    return [(step, row["lte/hash"]) for step, row in rows.rows if "lte/hash" in row]


def resumed(world, folder, save_at, steps, crossed=None, **kwargs):
    """A run and its resumes from each file it wrote: by file, what does not end to the bit as in the whole run."""
    folder = Path(folder)

    def saved_(*args, **more):
        module = None if crossed is None else Crossed(crossed)
        return saved(world, *args, steps=steps, module=module, **kwargs, **more)

    whole = saved_(folder, save_at)
    unlike = {}
    for at in save_at:
        again = saved_(folder / "again", [], ckpt=str(folder / f"step={at}.ckpt"))
        unlike[at] = [k for k in ("weights", "heads") for n, v in whole[k].items() if not torch.equal(v, again[k][n])]
        unlike[at] += ["losses"] if whole["losses"][at:] != again["losses"] else []
        unlike[at] += ["clock"] if whole["clock"] != again["clock"] else []
        same = len(whole["moments"]) == len(again["moments"]) and all(map(torch.equal, whole["moments"], again["moments"]))
        unlike[at] += [] if same else ["moments"]
    return unlike


class Crossed(Net):
    """Its layers are used in another order than they are registered in, and one of them only now and then."""

    def __init__(self, sometimes=False):
        super().__init__(dtype=torch.float32)
        self.last, self.first = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sometimes = sometimes

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        x = self.first(x.float())
        if not self.sometimes or batch_idx % 2:
            x = self.last(x)
        return super().training_step((index, x, y), batch_idx)


class Manual(Net):
    """Steps by hand: Lightning's optimizer, the raw one, the raw one with a closure, or two raw ones."""

    def __init__(self, way="raw"):
        super().__init__(dtype=torch.float64)
        self.automatic_optimization, self.way = False, way

    def configure_optimizers(self):
        if self.way != "two":
            return super().configure_optimizers()
        own = list(self.net.parameters())
        return [torch.optim.AdamW(self.out.parameters(), lr=1e-2), torch.optim.AdamW(own, lr=1e-2)]

    def training_step(self, batch, batch_idx):
        found = self.optimizers(use_pl_optimizer=self.way == "lightnings")
        optimizers = found if isinstance(found, list) else [found]

        def closure():
            loss = super(Manual, self).training_step(batch, batch_idx)
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        if self.way == "closure":
            optimizers[0].step(closure)
            return
        closure()
        for optimizer in optimizers:
            optimizer.step()


class SaveByClock(pl.Callback):
    """Writes clock=N.ckpt: Lightning counts no steps of a raw optimizer."""

    def __init__(self, folder, at):
        self.folder, self.at, self.merged = folder, at, []

    def on_train_batch_end(self, trainer, module, *_):
        heads = trainer.strategy.local
        self.merged.append(heads.merges)
        if heads.clock == self.at:
            trainer.save_checkpoint(self.folder / f"clock={self.at}.ckpt")


def by_hand(world, folder, way, ckpt=None, at=5, epochs=2, **kwargs):
    """A fit with manual optimization: merges after each step, and what it ends with."""
    save, rows = SaveByClock(Path(folder), at), Rows()
    options = {"max_epochs": epochs, "callbacks": [save], "logger": rows, "log_every_n_steps": 1}
    module, _, strategy = fit(
        world, steps=-1, module=Manual(way), exact=True, folder=folder, ckpt=ckpt, trainer=options, merge_every=3, **kwargs
    )
    logged = [step for step, row in rows.rows if "lte/merge_mib" in row]
    return {"merged": save.merged, "weights": weights(module), "clock": strategy.local.clock, "logged": logged}


def patience(world, how):
    """Seconds that the default group waits during a fit, and after it."""
    import torch.distributed as dist

    def now():
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        return backend.options._timeout.total_seconds()

    class Look(pl.Callback):
        def on_train_start(self, *_):
            found.append(now())

    found = []
    _, run, strategy = fit(world, steps=1, strategy=LTEStrategy(rank=2, heads=2, **how), trainer={"callbacks": [Look()]})
    return found[0], now(), strategy.merge_timeout


class Remember(pl.Callback):
    """Keeps what W holds of this worker's heads, after the merge and two steps later."""

    def __init__(self):
        self.held = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in (4, 6):
            layers = trainer.strategy.local.layers.values()
            self.held.append([t.clone() for layer in layers for t in (layer.prev_A, *layer.prev_B)])


def with_a_buffer(world):
    module, watch = Net(), Remember()
    module.register_buffer("table", torch.ones(3))  # DDP broadcasts it, and all else that it takes for a buffer
    fit(world, steps=6, module=module, trainer={"callbacks": [watch]})
    return watch.held


class Skips(Net):
    """On one rank a training step gives nothing."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if int(os.environ["RANK"]) == 1 and batch_idx == 2 else loss


def skipping(world, sync_rest):
    fit(world, steps=8, module=Skips(), sync_rest=sync_rest, merge_timeout=8)
