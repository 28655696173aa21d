"""What people do with their models under LTE, in small fits: shared by test_lte_habits and the ranks that it starts."""

import os
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F

from tests import lte_galore_workers
from tests.lte_workers import WIDTH, Net, Save, fit, weights

STEPS = 6


class Writes(pl.Callback):
    """Adds to a target's W after the steps named: in place, through ``.data``, or by another tensor in its place."""

    def __init__(self, at, how="in place", by=0.25, name="net.0.weight"):
        self.at, self.how, self.by, self.name = at, how, by, name

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step not in self.at:
            return
        p = module.get_parameter(self.name)
        if self.how == "in place":
            p.add_(self.by)
        elif self.how == "data":
            p.data.lerp_(p.data + 2 * self.by, 0.5)
        else:
            p.data = p.data + self.by


class Clamps(pl.Callback):
    """Keeps every weight small, as a critic's."""

    def __init__(self, hook="on_train_batch_end"):
        setattr(self, hook, self._clamp)

    @torch.no_grad()
    def _clamp(self, trainer, module, *_):
        for p in (module.net[0].weight, module.net[4].weight):
            p.clamp_(-0.05, 0.05)


def written(world, at=(1,), how="in place", by=(0.25,), galore=False, **kwargs):
    """A fit that learns nothing (rate 0) while someone writes: what W gained. ``by``: on each worker."""
    rank = int(os.environ["RANK"]) if world > 1 else 0
    net = {"lr": 0.0}
    options = {"merge_every": 2, "trainer": {"callbacks": [Writes(at, how, by[rank % len(by)])]}, "steps": STEPS, **kwargs}
    if galore:
        module = lte_galore_workers.GaLoreNet(settings={"lr": 0.0}, **net)
        before = weights(module)
        lte_galore_workers.fit(world, module=module, **options)
    else:
        module = Net(**net)
        before = weights(module)
        fit(world, module=module, **options)
    return {name: value - before[name] for name, value in weights(module).items() if name.endswith("weight")}


def clamped(world, galore=False, **kwargs):
    options = {"steps": 8, "merge_every": 4, "trainer": {"callbacks": [Clamps()]}, **kwargs}
    module, _, strategy = (lte_galore_workers.fit if galore else fit)(world, **options)
    return max(float(module.net[i].weight.abs().max()) for i in (0, 4)), weights(module)


def resumed_after_writing(world, folder, galore=False, **kwargs):
    """Someone writes between two merges, then a checkpoint: the run that goes on and the one that resumes."""
    ends = []
    for ckpt in (None, Path(folder) / "step=6.ckpt"):
        # seen after step 5, and again after step 9, of a window of four
        options = {
            "merge_every": 4,
            "steps": 10,
            "exact": True,
            "folder": folder,
            "ckpt": ckpt,
            "save_at": () if ckpt else (6,),
        }
        rank = int(os.environ["RANK"]) if world > 1 else 0
        options["trainer"] = {"callbacks": [Writes((5, 9), by=0.1 * (1 + rank))]}
        module, _, _ = (lte_galore_workers.fit if galore else fit)(world, **options, **kwargs)
        ends.append(weights(module))
    return ends


class Bypassed(Net):
    """``net.4`` computes by its weight, as timm's BEiT does with qkv, or transformers' Mamba with dt_proj."""

    how = "linear"

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        x = self.net[3](self.net[2](self.net[1](self.net[0](x))))
        W = self.net[4].weight
        x = F.linear(x, W) if self.how == "linear" else x @ W.t() if self.how == "product" else F.linear(x, F.normalize(W))
        loss = F.cross_entropy(self.out(torch.tanh(x)), y)
        self.losses.append(loss.item())
        return loss


class Penalised(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.01 * self.net[4].weight.square().sum()


def bypassed(world, targets="all", how="linear", folder=None, ckpt=None, exact=False, **kwargs):
    module = Bypassed()
    module.how = how
    more = {"folder": folder, "save_at": (3,)} if folder else {}
    more["exact"] = exact or bool(folder or ckpt)
    module, _, strategy = fit(world, module=module, targets=targets, ckpt=ckpt, **more, **kwargs)
    return {"weights": weights(module), "losses": module.losses, "targets": [p.name for p in strategy.local.pieces]}


class Buffers(Net):
    """Buffers of every kind; ``by_rank`` and ``score`` say how the cache grows."""

    def __init__(self, kind="", **net):
        super().__init__(**net)
        self.kind = kind
        self.norm = nn.BatchNorm1d(WIDTH).double()
        self.register_buffer("mask", torch.full((3, 3), torch.finfo(torch.float32).min))
        self.register_buffer("table", torch.linspace(0, 1, 7), persistent=kind != "other names")
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("whole", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(1), persistent=kind == "kept")

    def training_step(self, batch, batch_idx):
        rank = int(os.environ["RANK"])
        self.count += 1
        self.whole += 1 + rank
        if self.kind == "none":
            self.cache = None
        elif self.kind == "other names" and rank:
            self.register_buffer("extra", torch.ones(2))
        else:
            self.register_buffer("cache", torch.arange(2.0 + rank), persistent=self.kind == "kept")
        index, x, y = batch
        return super().training_step((index, self.norm(x), y), batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.kind == "grows":
            self.cache = torch.arange(9.0)
        super().validation_step(batch, batch_idx)


def buffers(world, kind="", **kwargs):
    module, _, _ = fit(world, module=Buffers(kind), steps=5, merge_every=2, **kwargs)
    return {name: b.clone() for name, b in module.named_buffers()}


class OnlyTargets(pl.LightningModule):
    """Nothing but targets trains; there are running statistics all the same."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH, affine=False), nn.Linear(WIDTH, 4, bias=False)
        )
        self.seen, self.losses = [], []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[1].float()), batch[2])

    def validation_step(self, batch, batch_idx):
        self.seen.append(self.net[1].running_mean.clone())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.1)


def statistics(world):
    module, _, _ = fit(world, module=OnlyTargets(), steps=7, merge_every=4, val=1, trainer={"val_check_interval": 3})
    return {"seen": module.seen, "weights": weights(module)}


class ByChance(Net):
    """A layer that only worker 0 uses."""

    def __init__(self, rest=False, **net):
        super().__init__(**net)
        self.more = nn.LayerNorm(WIDTH).double() if rest else nn.Linear(WIDTH, WIDTH).double()

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        return super().training_step((index, self.more(x) if int(os.environ["RANK"]) == 0 else x, y), batch_idx)


def by_chance(world, folder, rest=False, **kwargs):
    """The run that goes on, and the one that resumes from step 6."""
    ends = []
    for ckpt in (None, Path(folder) / "step=6.ckpt"):
        options = {"steps": 10, "exact": True, "folder": folder, "save_at": () if ckpt else (6,), "ckpt": ckpt}
        module, run, _ = fit(world, module=ByChance(rest), find_unused_parameters=True, **options, **kwargs)
        ends.append((weights(module), [v.clone() for s in run.optimizers[0].state.values() for v in s.values()]))
    return ends


class CallbackAsks(pl.Callback):
    """The model as it is, asked by worker 0 alone after a step of a window."""

    def __init__(self, at):
        self.at, self.state, self.files = at, None, []

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.at and trainer.global_rank == 0:
            self.state = {name: value.clone() for name, value in module.state_dict().items()}

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.files.append("lte_state" in checkpoint)


def asked(world, at=3, folder=None):
    asks = CallbackAsks(at)
    fit(world, steps=5, trainer={"callbacks": [asks]})
    return asks.state


class ClipsByHand(Net):
    def on_before_optimizer_step(self, optimizer):
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1e-3)


class Drifts(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 5 and trainer.global_rank == 1:
            with torch.no_grad():
                module.net[0].bias.add_(1e-6)


def clips(world):
    fit(world, module=ClipsByHand(), merge_every=2)


def drifts(world):
    fit(world, merge_every=2, steps=40, trainer={"callbacks": [Drifts()]})


class OwnParameter(Net):
    """A parameter of each worker's own."""

    def __init__(self, **net):
        super().__init__(**net)
        self.mine = nn.Parameter(torch.full((WIDTH,), float(os.environ["RANK"]), dtype=torch.float64))
        self._ddp_params_and_buffers_to_ignore = ["mine"]

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        return super().training_step((index, x + self.mine, y), batch_idx)


def own_parameter(world, **kwargs):
    module, _, _ = fit(world, module=OwnParameter(), **kwargs)
    return {"mine": module.mine.detach().clone(), "list": module._ddp_params_and_buffers_to_ignore, "weights": weights(module)}


class TwoWidths(Net):
    """A target of float32 between those of float64."""

    def __init__(self, **net):
        super().__init__(**net)
        self.narrow = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        return super().training_step((index, self.narrow(x.float()).double(), y), batch_idx)


def two_widths(world, **kwargs):
    module = TwoWidths()
    before = module.narrow.weight.detach().clone()
    module, _, _ = fit(world, module=module, **kwargs)
    return {**weights(module), "moved": (module.narrow.weight - before).abs().max()}


def means(world):
    """``Workers``: a mean of the largest numbers, and tensors of other shapes from each worker."""
    import torch.distributed as dist

    from lowrank_pretrain.lte.workers import Workers

    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=world)
    workers = Workers(dist.group.WORLD)
    huge, small = torch.full((3,), torch.finfo(torch.float32).max), torch.tensor([0.1, 1.0 + workers.rank])
    workers.average([huge, small])
    own = {("a", workers.rank): torch.arange(3.0), "both": torch.full((1 + workers.rank, 2), float(workers.rank)),
           "empty": torch.zeros(0), "step": torch.tensor(workers.rank)}  # fmt: skip
    return huge, small, workers.to_first(own)


def saving(world, folder):
    asks = CallbackAsks(-1)
    fit(world, steps=6, merge_every=4, trainer={"callbacks": [asks, Save(Path(folder), (6,))]})
    return asks.files


class Thaws(pl.Callback):
    """Trains a frozen layer from the second epoch on, in a group of its own, as ``BackboneFinetuning`` does."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            group = {"params": list(pl_module.pre.requires_grad_(True).parameters())}
            trainer.optimizers[0].add_param_group(group)


class Pretrained(Net):
    """A frozen layer comes first."""

    def __init__(self):
        super().__init__()
        self.pre = nn.Linear(WIDTH, WIDTH, dtype=torch.float64).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        return super().training_step((index, self.pre(x), y), batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def thawed(world, **lte):
    """What a layer that thaws ends as, whether it moved, and the lengths of the groups in a checkpoint of it."""
    folder, module = tempfile.mkdtemp(), Pretrained()
    before = module.pre.weight.clone()
    callbacks = [Thaws()]
    fit(world, steps=12, module=module, save_at=(10,), folder=folder, trainer={"callbacks": callbacks}, **lte)
    file = next(iter(Path(folder).glob("**/*.ckpt")), None)  # one worker writes
    groups = [] if file is None else torch.load(file, weights_only=False)["optimizer_states"][0]["param_groups"]
    return module.pre.weight.detach().clone(), not torch.equal(before, module.pre.weight), [len(g["params"]) for g in groups]


class Average(pl.Callback):
    """Keeps an average of the weights, and puts it in their place while the model is looked at, as many do."""

    def __init__(self, start="on_validation_start", end="on_validation_end", of="parameters"):
        self.of, self.kept, self.mean, self.seen = of, {}, None, []
        setattr(self, start, self._put_in)
        setattr(self, end, lambda trainer, module: self._put(module, self.kept))

    def _weights(self, module):
        named = module.state_dict() if self.of == "state_dict" else {n: p.data for n, p in module.named_parameters()}
        return {name: value.clone() for name, value in named.items()}

    @torch.no_grad()
    def _put(self, module, values):
        if self.of == "state_dict":
            module.load_state_dict(values)
            return
        for name, p in module.named_parameters():
            p.data.copy_(values[name])

    def _put_in(self, trainer, module):
        self.kept = self._weights(module)
        self._put(module, self.mean)

    def on_validation_batch_end(self, trainer, module, *_):
        self.seen.append(module.net[0].weight.detach().clone())

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        now = self._weights(module)
        self.mean = now if self.mean is None else {n: mean.lerp(now[n], 0.1) for n, mean in self.mean.items()}


def averaged(world, galore=False, average=None, **kwargs):
    """A fit that is looked at in the middle of windows, with another model or without: its weights, and what was seen."""
    callbacks = [] if average is None else [Average(**average)]
    options = {"steps": 9, "val": 1, "trainer": {"val_check_interval": 2, "callbacks": callbacks}, **kwargs}
    module, trainer, _ = (lte_galore_workers.fit if galore else fit)(world, **options)
    return weights(module), callbacks[0].seen if callbacks else [], [type(c).__name__ for c in trainer.callbacks]


def averaged_and_not(world, **kwargs):
    return [averaged(world, average=average, **kwargs)[0] for average in (None, {}, {"of": "state_dict"})]


class Wraps(torch.optim.Optimizer):
    """An optimizer whose steps another one takes, which holds the state too."""

    def __init__(self, params, inner=torch.optim.AdamW):
        super().__init__(params, {"lr": 1e-2})
        self.inner = inner(self.param_groups) if inner is Wraps else inner(self.param_groups, lr=1e-2)
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)
        self.param_groups = self.inner.param_groups


class Wrapped(Net):
    """The toy, with such an optimizer."""

    def configure_optimizers(self):
        return Wraps(self.parameters())


def resumed_with_a_wrapper(world, folder, **kwargs):
    """The run that goes on, and the one that resumes in the middle of a window."""
    options = {"steps": 9, "exact": True, **kwargs}
    on, _, _ = fit(world, module=Wrapped(), folder=folder, save_at=(6,), **options)
    resumed, _, _ = fit(world, module=Wrapped(), ckpt=Path(folder) / "step=6.ckpt", **options)
    return weights(on), weights(resumed)
