"""Compute LTE's traffic before anything runs, compared with DDP's for the same model.

Nothing is estimated here: the code of training converts and merges a copy of the model without data (on the meta device), and
what it counts as sent is reported. Per worker; rings, as in ``merge``.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core import checks
from lowrank_pretrain.core.plan import fit_ranks
from lowrank_pretrain.core.targets import all_targets, find_targets
from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lte.full import FullSet
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.local_targets import LocalTargets
from lowrank_pretrain.lte.projected import ProjectedSet
from lowrank_pretrain.lte.rest import SharedParameters
from lowrank_pretrain.lte.settings import BASES, BEFORE, ROUTES, SYNC, UPDATES, Settings
from lowrank_pretrain.lte.wire import WIRES
from lowrank_pretrain.lte.workers import Workers


class Imagined(Workers):
    """Stand in for workers that do not exist: calls are counted, and nothing is sent."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.by_merge: list[float] = []  # bytes of each merge, where there are several

    def _call(self, call: Callable) -> None:
        """Make no call."""


def traffic(
    module: nn.Module,
    targets: str | Sequence[str] = "all",
    rank: int = 16,
    heads: int = 4,
    workers: int = 1,
    merge_every: int = 10,
    sync_rest: str = "step",
    route: str | None = None,
    update: str = "lora",
    basis: str = "own",
    wire: str = "float32",
    fragments: int = 1,
) -> dict[str, Any]:
    """Return the bytes that each worker sends per optimizer step. ``module`` is not changed and may be on the meta device.

    Args:
        module: the bare model, as the strategy gets it.
        targets: presets or globs (``targets.find_targets``).
        rank: R of every head, or of GaLore's projection.
        heads: H per worker.
        workers: number of workers.
        merge_every: T, optimizer steps between merges.
        sync_rest: ``step`` or ``merge``.
        route: ``factors`` or ``dense``; ``None``: per target the fewer bytes.
        update: ``lora``; ``galore`` or ``full`` (one head to a worker).
        basis: with ``update="galore"``: ``own`` or ``shared``, the refresh's sketch included.
        wire: what merges travel in (``wire.WIRES``).
        fragments: of ``update="full"``.

    Returns:
        ``targets``, ``rest``, ``all`` (both) and ``ddp`` (every trainable parameter's gradient): bytes per step;
        ``merge``: bytes of one merge of the targets, with fragments of the largest; ``routes``: targets by route.

    Raises:
        ConfigError: a wrong value, a pattern that matches nothing, a rank above min(D, O) of a target
            that is named (where a preset chose it, the rank is cut down to that).
    """
    for key, value in {"heads": heads, "workers": workers, "merge_every": merge_every, "fragments": fragments}.items():
        checks.whole(key, value, 1)
    known: tuple[tuple[str, Any, Sequence[Any]], ...] = (
        ("sync_rest", sync_rest, SYNC),
        ("route", route, (None, *ROUTES)),
        ("update", update, UPDATES),
        ("basis", basis, BASES),
        ("wire", wire, tuple(WIRES)),
    )
    for key, given, allowed in known:
        checks.choice(key, given, allowed)
    count = Imagined(workers)
    module = without_data(module)
    ddp = SharedParameters(module, set(), set(), count, "step").sent_per_window(1)
    settings = Settings(
        heads if update == "lora" else 1, merge_every, route=route, rank=rank, targets=targets, basis=basis, wire=wire,
        fragments=fragments if update == "full" else 1,
    )  # fmt: skip
    merged = {"lora": _merged_heads, "galore": _merged_projections, "full": _merged_weights}[update]
    local = merged(module, settings, count)
    owned = {id(p) for p in local.parameters().values()}
    with torch.device("meta"):
        shared = SharedParameters(module, owned, local.hidden(module), count, sync_rest, wire=wire)
    own, rest = count.sent / merge_every, shared.sent_per_window(merge_every) / merge_every
    routes = dict(Counter(piece.route for piece in local.pieces))
    most = max(count.by_merge, default=count.sent)
    return {"targets": own, "rest": rest, "all": own + rest, "ddp": ddp, "merge": most, "routes": routes}


def traffic_of_run(
    module: nn.Module, before: str = "merge", freeze_at: float = 0.4, workers: int = 1, **settings: Any
) -> dict[str, float]:
    """Return the bytes per optimizer step of a run with a phase callback: of each phase, and the mean over all steps.

    Args:
        module: the bare model.
        before: how workers agree until the freeze, ``ddp`` or ``merge``.
        freeze_at: share of the run's steps before the freeze. The joint phase's adapters are left out: they are small.
        workers: number of workers.
        settings: further arguments of ``traffic``; those of clock and wire also hold until the freeze.

    Returns:
        ``full``: per step until the freeze; ``lowrank``: after it; ``all``: their mean over the run.

    Raises:
        ConfigError: a wrong value.
    """
    checks.choice("before", before, BEFORE)
    checks.number("freeze_at", freeze_at, least=0, most=1)
    late = traffic(module, workers=workers, **settings)
    same = {key: settings[key] for key in ("merge_every", "wire") if key in settings}
    early = late["ddp"] if before == "ddp" else traffic(module, workers=workers, update="full", **same)["all"]
    return {"full": early, "lowrank": late["all"], "all": freeze_at * early + (1 - freeze_at) * late["all"]}


def _merged_heads(module: nn.Module, settings: Settings, count: Imagined) -> LocalTargets:
    """Return a module's heads, after one merge."""
    chosen = find_targets(module, settings.targets)
    ranks, narrow = fit_ranks(module, settings.targets, chosen, settings.rank)
    if narrow is not None:
        warnings.warn(f"LTE: {narrow}", stacklevel=3)
    lora.untie(module, {target.layer_name for target in chosen.values()})
    chosen = {name: target for name, target in all_targets(module).items() if name in chosen}
    heads = HeadSet(settings, count)
    heads.convert(chosen, ranks)
    heads.exchange()
    return heads


def _merged_projections(module: nn.Module, settings: Settings, count: Imagined) -> LocalTargets:
    """Return a module's projected targets, after one refresh and one merge."""
    optimizer = GaLoreAdamW(galore_param_groups(module, settings.rank, settings.targets))
    projected = ProjectedSet(settings, count)
    projected.start([optimizer], module)
    for piece in projected.pieces:
        sketch = piece.factors()[1][0]
        if optimizer.shared is not None:
            optimizer.shared.mean(sketch)
            if piece.slot.two_sided:
                optimizer.shared.mean(piece.factors()[0][0])
    if count.size > 1:
        projected.send(settings.codec)
    return projected


def _merged_weights(module: nn.Module, settings: Settings, count: Imagined) -> LocalTargets:
    """Return a module's whole weights as targets, after one merge."""
    full = FullSet(settings, count)
    with torch.device("meta"):
        full.start(full.chosen(module, dict(nn.Module.named_parameters(module))))
        for increments in full.fragments:
            before = count.sent
            increments.mean(full.training_weights())
            count.by_merge.append(count.sent - before)
    return full


def without_data(module: nn.Module) -> nn.Module:
    """Return a copy on the meta device: same shapes, dtypes, names and ties, without memory."""
    kept: dict[int, Tensor] = {}
    for _, p in nn.Module.named_parameters(module):
        kept[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in module.buffers():
        kept[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, kept)
