"""What the ranks of test_prelora_distributed do: small fits of the toy under PreLoRA and DDP, by real Trainers."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from lowrank_pretrain import PreLoRA
from lowrank_pretrain.checkpoints.loop_state import LoopState
from lowrank_pretrain.data.loaders.epoch import EpochBatches, EpochLoader
from lowrank_pretrain.galore import GaLoreAdamW, galore_ddp_hook
from lowrank_pretrain.lora.model import own_tensors
from lowrank_pretrain.phases import transition
from tests.toy import Pairs, Toy, trainer


class Exact(Toy):
    """Float64, so that two ways to the same number show as such; no dropout, which ranks would draw alike."""

    def __init__(self, **kwargs):
        torch.manual_seed(7)
        super().__init__(**{"scheduler": "sequential", "lr_groups": 2, **kwargs})
        for block in self.blocks:
            block.drop.p = 0.0
        self.double()

    def forward(self, x):
        return super().forward(x.to(self.embed.weight.dtype))


class Projected(Exact):
    """With an optimizer that can take the targets over."""

    def configure_optimizers(self):
        return GaLoreAdamW(self.parameters(), lr=1e-2, update_proj_gap=5)


class Rows(DummyLogger):
    """Keeps every row."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


class Watch(pl.Callback):
    """Behind every step: all parameters, and the bytes that DDP handed to its communication hook."""

    def __init__(self, hook=None):
        self.weights, self.sent, self.trained, self.hook, self.last = [], [], [], hook, 0

    def on_train_start(self, trainer, module):
        self.start = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        self.bytes, self.state = 0, None
        if self.hook == "galore":
            self.state = galore_ddp_hook(trainer.strategy.model, module.optimizers(use_pl_optimizer=False))
        elif self.hook:
            state = None
            if self.hook == "powersgd":
                state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=3)
            trainer.strategy.model.register_comm_hook(state, self.count)

    def count(self, state, bucket):
        self.bytes += bucket.buffer().nbytes
        if self.hook == "powersgd":
            return powerSGD_hook.powerSGD_hook(state, bucket)
        return default_hooks.allreduce_hook(None, bucket)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.trained.append(sum(p.nbytes for p in module.parameters() if p.requires_grad))

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            self.weights.append([p.detach().clone() for p in module.parameters()])
            if self.state is not None:
                self.bytes, self.state.sent_bytes = self.state.sent_bytes, 0
            self.sent.append(self.bytes)
            self.bytes = 0

    def on_train_end(self, trainer, module):
        """While the module has its adapters: behind the fit it is plain."""
        self.model = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.trainable = {name for name, p in module.named_parameters() if p.requires_grad}
        found = transition.averages(trainer.callbacks)
        self.average = {k: v.detach().clone() for _, m, _ in found for k, v in own_tensors(m).items()}


class Save(pl.Callback):
    """Writes step=N.ckpt behind the steps named. Behind PreLoRA: a file of the switch's step holds the new phase."""

    def __init__(self, folder, steps):
        self.folder, self.steps, self.last = Path(folder), steps, 0

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            if self.last in self.steps:
                trainer.save_checkpoint(self.folder / f"step={self.last}.ckpt")


class Spoil(pl.Callback):
    """One rank's weights change behind the step named."""

    def __init__(self, rank, step, name):
        self.rank, self.step, self.name = rank, step, name

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            module.get_parameter(self.name).data[0] += 1e-7


def steps(**kwargs):
    """Full for 8 steps, joint for 6, then low-rank; as elsewhere in the tests."""
    return PreLoRA(**{"ranks": (2, 4, 8), "window": 2, "window_unit": "step", "windows": 2, "latest": 4, "warmup": 3,
                      "loss_tol": 1e-6, **kwargs})  # fmt: skip


def fit(
    world, folder, ckpt=None, save_at=(), hook="count", spoil=None, strategy=None, method=None, net=None, batch=8, epochs=4,
    ema=False, **options,
):  # fmt: skip
    """A fit of `epochs` of six global batches; what it leaves behind. `ckpt` may name one file per rank."""
    rank = int(os.environ["RANK"]) if world > 1 else 0
    kind = Projected if (method or {}).get("then") == "galore" else Exact
    module, callback, logger = kind(**(net or {})), steps(**(method or {})), Rows()
    watch = Watch(hook if world > 1 else None)
    extra = [Spoil(*spoil)] if spoil else []
    extra += [EMAWeightAveraging(decay=0.8)] if ema else []
    chosen = {"strategy": DDPStrategy(**(strategy or {}))} if world > 1 else {}
    # LoopState is what the suite's own runs have against Lightning's counting an epoch twice
    run = trainer(
        Path(folder), LoopState(), *extra, callback, watch, Save(folder, save_at), logger=logger, devices=world,
        max_epochs=epochs, use_distributed_sampler=False, log_every_n_steps=1, **chosen, **options,
    )  # fmt: skip
    data = Pairs(48)
    batches = EpochBatches(len(data), batch // world, True, rank, world, seed=0)
    run.fit(module, EpochLoader(data, batches), ckpt_path=ckpt[rank] if isinstance(ckpt, list) else ckpt)
    state = callback.state_dict()
    state["loss"] = None  # of this rank's batches
    return {
        "weights": watch.weights, "sent": watch.sent, "trained": watch.trained, "state": state, "rows": logger.rows,
        "model": watch.model, "losses": module.losses,
        "unmoved": [name for name, p in watch.model.items() if name in watch.start and torch.equal(p, watch.start[name])],
        "trainable": watch.trainable, "start": set(watch.start),
        "optimizer": [v for s in run.optimizers[0].state.values() for v in s.values()],
        "average": watch.average,
        "metrics": {k: float(v) for k, v in run.callback_metrics.items()},
    }  # fmt: skip


class OnCuda(DDPStrategy):
    """Registers its hook as Lightning does on CUDA; on a CPU it drops `ddp_comm_hook` without a word."""

    def _register_ddp_hooks(self):
        if self._ddp_comm_hook is not None:
            self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)


def strategys_hook(world, folder):
    """How many hooks each wrapper has, and in how many steps the strategy's own was called."""
    called = []

    def hook(state, bucket):
        state.append(bucket.index())
        return default_hooks.allreduce_hook(None, bucket)

    found = {}
    for kind in (DDPStrategy, OnCuda):
        seen, called = [], []

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer, module, *_, seen=seen):
                seen.append(len(trainer.strategy.model._comm_hooks))

        run = trainer(
            Path(folder), steps(), Look(), devices=world, strategy=kind(ddp_comm_hook=hook, ddp_comm_state=called),
            max_epochs=4, use_distributed_sampler=False,
        )  # fmt: skip
        data = Pairs(48)
        run.fit(Exact(), EpochLoader(data, EpochBatches(48, 4, True, int(os.environ["RANK"]), world, seed=0)))
        found[kind.__name__] = seen, called.count(0)
    return found


def sharded(world):
    """FSDP2 by Lightning's own strategy."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Sharded(Exact):
        def configure_model(self):
            raise AssertionError("refused before anything is sharded")

    run = trainer(Path("."), steps(), devices=world, strategy=ModelParallelStrategy(), use_distributed_sampler=False)
    data = Pairs(48)
    run.fit(Sharded(), EpochLoader(data, EpochBatches(48, 4, True, int(os.environ["RANK"]), world, seed=0)))


class Routed(Exact):
    """Each rank uses an expert of its own, another one by its weight alone, and none uses the last."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(12, 12, dtype=torch.float64) for _ in range(4))

    def forward(self, x):
        x = x.to(self.embed.weight.dtype)
        return super().forward(self.experts[self.global_rank](x) + x @ self.experts[2].weight)


def routed(world, folder):
    """What the ranks find out in the first step, each from its own batches."""
    module, callback = Routed(), steps()
    run = trainer(
        Path(folder), callback, devices=world, max_epochs=4, use_distributed_sampler=False,
        strategy=DDPStrategy(find_unused_parameters=True),
    )  # fmt: skip
    data = Pairs(48)
    run.fit(module, EpochLoader(data, EpochBatches(48, 4, True, int(os.environ["RANK"]), world, seed=0)))
    return callback.phase, dict(callback.plan), dict(callback.left_out), [p.detach().clone() for p in module.parameters()]


def resumed(world, folder, save_at, **how):
    """A run and its resumes from each file it wrote: by file, what does not end to the bit as in the whole run."""
    folder = Path(folder)
    whole = fit(world, folder, save_at=save_at, **how)
    unlike = {}
    for at in save_at:
        again = fit(world, folder / "again", ckpt=str(folder / f"step={at}.ckpt"), **how)
        unlike[at] = [name for name, p in whole["model"].items() if not torch.equal(p, again["model"][name])]
        unlike[at] += ["losses"] if whole["losses"][at:] != again["losses"] else []
        unlike[at] += [] if all(map(torch.equal, whole["optimizer"], again["optimizer"])) else ["moments"]
        unlike[at] += ["state"] if whole["state"] != again["state"] else []
    return unlike


def plain(world, folder, save_at):
    """Likewise without a method of ours: only what the suite's own runs have against Lightning's resumes."""

    def go(ckpt=None, save_at=()):
        module = Exact().float()
        run = trainer(
            Path(folder), LoopState(), Save(folder, save_at), devices=world, strategy=DDPStrategy(bucket_cap_mb=1e-4),
            max_epochs=2, use_distributed_sampler=False,
        )  # fmt: skip
        batches = EpochBatches(48, 12 // world, True, int(os.environ["RANK"]), world, seed=0)
        run.fit(module, EpochLoader(Pairs(48), batches), ckpt_path=ckpt)
        return module.state_dict()

    whole = go(save_at=save_at)
    again = {at: go(ckpt=str(Path(folder) / f"step={at}.ckpt")) for at in save_at}
    return {at: [n for n, v in whole.items() if not torch.equal(v, state[n])] for at, state in again.items()}


def settled(world, sparse):
    """Gradients of the same step three times under a settled wrapper, and how often a hook saw a made-up one."""
    from lowrank_pretrain.core.buckets import settle_buckets

    torch.distributed.init_process_group("gloo")
    rank, seen = torch.distributed.get_rank(), []
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Embedding(10, 7, sparse=sparse), torch.nn.Linear(7, 33), torch.nn.Linear(33, 7))
    net[1].weight.register_hook(lambda grad: seen.append("hook"))
    net[1].bias.register_post_accumulate_grad_hook(lambda p: seen.append("post"))
    wrapper = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1e-4)
    settle_buckets(wrapper)
    early, grads = list(seen), []
    assert all(p.grad is None for p in net.parameters())
    for _ in range(3):
        net.zero_grad()
        wrapper(torch.randint(10, (5,), generator=torch.Generator().manual_seed(rank))).square().mean().backward()
        grads.append([p.grad.to_dense().clone() for p in net.parameters()])
    return early, len(seen), [all(map(torch.equal, grads[0], other)) for other in grads[1:]]
