"""What the ranks of test_lte_galore and test_composition do: small fits of a toy model, by real Trainers."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups
from lowrank_pretrain.galore.ddp_hook import galore_ddp_hook
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.models.optim import Optim
from lowrank_pretrain.run import method
from tests import lte_workers
from tests.lte_workers import Net, Watch, weights

RANK, SETTINGS = 3, {"lr": 1e-2, "scale": 0.5, "weight_decay": 0.3, "seed": 0}
METHODS = Path(__file__).parents[1] / "conf" / "method"


class GaLoreNet(Net):
    """The toy; its two wide matrices are projected."""

    def __init__(self, groups=None, settings=None, **net):
        super().__init__(**net)
        self.groups, self.settings = groups or {}, {**SETTINGS, **(settings or {})}

    def configure_optimizers(self):
        groups = galore_param_groups(self, **{"rank": RANK, **self.groups})
        return GaLoreAdamW(groups, **self.settings)


def fit(world=1, net=None, groups=None, settings=None, module=None, **kwargs):
    module = module or GaLoreNet(groups, settings, **(net or {}))
    lte = {k: kwargs.pop(k) for k in ("basis", "sync_rest", "route", "merge_every") if k in kwargs}
    strategy = LTEStrategy(**{"update": "galore", "merge_every": 4, **lte})
    return lte_workers.fit(world, module=module, strategy=strategy, **kwargs)


def outcome(module, trainer, strategy):
    params = [(o, p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    moments = [v.clone() for o, p in params for v in o.state.get(p, {}).values() if torch.is_tensor(v)]
    return {"weights": weights(module), "losses": module.losses, "scores": module.scores, "moments": moments,
            "step": trainer.global_step}  # fmt: skip


def run(world, **kwargs):
    module, trainer, strategy = fit(world, **kwargs)
    heads = strategy.local
    return {**outcome(module, trainer, strategy), "metrics": strategy.metrics(), "sent": heads.workers.sent,
            "merges": heads.merges, "clock": heads.clock}  # fmt: skip


class WatchTargets(Watch):
    """After every batch the targets and the rest."""

    def on_train_batch_end(self, trainer, module, *_):
        heads = trainer.strategy.local
        targets = {id(piece.p) for piece in heads.pieces}
        self.W.append([piece.p.detach().clone() for piece in heads.pieces])
        self.rest.append([p.detach().clone() for p in module.parameters() if id(p) not in targets])


def watched(world, trainer=None, **kwargs):
    watch = WatchTargets()
    trainer = {**(trainer or {}), "callbacks": [*(trainer or {}).get("callbacks", []), watch]}
    module, _, _ = fit(world, trainer=trainer, **kwargs)
    return {"W": watch.W, "rest": watch.rest, "weights": weights(module), "losses": module.losses}


class Fails(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6:
            raise KeyError("of the user's")


def failing(world, **kwargs):
    """What an exception between two merges leaves, and the targets as the merge before it left them."""
    module, watch = GaLoreNet(), WatchTargets()
    try:
        fit(world, module=module, trainer={"callbacks": [watch, Fails()]}, **kwargs)
    except KeyError:
        return weights(module), watch.W[3]


class Sometimes(GaLoreNet):
    """A target that rank 1 leaves out of some steps."""

    def __init__(self, out_at):
        super().__init__()
        self.branch, self.out_at = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64), out_at
        torch.nn.init.eye_(self.branch.weight)

    def training_step(self, batch, batch_idx):
        index, x, y = batch
        left_out = self.trainer.global_rank == 1 and self.trainer.global_step in self.out_at
        return super().training_step((index, x if left_out else self.branch(x), y), batch_idx)


def sometimes(world, out_at, **kwargs):
    return watched(world, module=Sometimes(out_at), **kwargs)


def hooked(world):
    class Hook(pl.Callback):
        def on_train_start(self, trainer, module):
            galore_ddp_hook(trainer.strategy.model, trainer.optimizers[0])

    fit(world, trainer={"callbacks": [Hook()]})


def counted(world, **kwargs):
    """Bytes handed to each collective of torch.distributed, by ring formulae, and what the strategy says it sent."""
    import torch.distributed as dist

    seen = {"gather": [], "reduce": [], "broadcast": []}
    real = dist.all_gather_into_tensor, dist.all_reduce, dist.broadcast

    def gather(out, tensor, *args, **kw):
        if tensor.dtype != torch.int64:  # flags: one number a target
            seen["gather"].append((world - 1) * tensor.numel() * tensor.itemsize)
        return real[0](out, tensor, *args, **kw)

    def reduce(tensor, *args, **kw):
        seen["reduce"].append(2 * (world - 1) / world * tensor.numel() * tensor.itemsize)
        return real[1](tensor, *args, **kw)

    def broadcast(tensor, *args, **kw):
        seen["broadcast"].append((world - 1) / world * tensor.numel() * tensor.itemsize)
        return real[2](tensor, *args, **kw)

    dist.all_gather_into_tensor, dist.all_reduce, dist.broadcast = gather, reduce, broadcast
    try:
        result = run(world, **kwargs)
    finally:
        dist.all_gather_into_tensor, dist.all_reduce, dist.broadcast = real
    return {**result, "seen": seen}


# ---- the cells of the matrix when × where × how ---------------------------------------------------------------------------


def config(name, **change):
    """A method file with what it inherits, cut down to the toy."""
    found = OmegaConf.to_container(OmegaConf.load(METHODS / f"{name}.yaml"))
    merged = {}
    for base in found.pop("defaults", []):
        merged |= {} if base == "_self_" else config(base)
    merged |= found
    small = {"rank": 2, "heads": 2, "ranks": [2, 4], "windows": 2, "window": 3, "window_unit": "step", "latest": 1, "warmup": 1,
             "merge_every": 3, "update_proj_gap": 3, "loss_tol": 0.5, "weight_tol": 0.5}  # fmt: skip
    if merged.get("then") == "factorize":
        small |= {"ranks": [0.25], "rewarm": 2}
    return merged | {key: value for key, value in small.items() if key in merged} | change


class Configured(Net):
    """The toy, optimized as a run from the command line is: by the method's optimizer or AdamW, with a schedule."""

    def __init__(self, built, **net):
        super().__init__(**net)
        self.optim = Optim(lr=2e-2, weight_decay=0.1, warmup=2, build=built.optimizer)

    def configure_optimizers(self):
        return self.optim.configure(self)


def cell(world, name, folder=None, ckpt=None, save_at=(), steps=16, change=None, trainer=None, val=0, net=None):
    """A fit under a method file; plain DDP where the method brings no strategy."""
    built = method.build(config(name, **(change or {})))
    strategy = built.strategy or ("ddp" if world > 1 else "auto")
    trainer = {**(trainer or {}), "callbacks": [*built.callbacks, *(trainer or {}).get("callbacks", [])]}
    module, run, _ = lte_workers.fit(
        world, steps=steps, folder=folder, ckpt=ckpt, save_at=save_at, exact=True, strategy=strategy, trainer=trainer, val=val,
        module=Configured(built, **(net or {})),
    )  # fmt: skip
    phases = [callback.phase for callback in built.callbacks if hasattr(callback, "phase")]
    return {**outcome(module, run, strategy), "phases": phases, "names": list(module.state_dict())}
