"""What LTE sends, computed before anything runs, beside what DDP sends for the same model.

Nothing is estimated here: a copy of the model without data (the meta device) is converted and merged by the very code that
does so in training, and what that code counts as sent is reported. Per worker; rings, as in ``merge``.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import fit_ranks
from lowrank_pretrain.core.targets import all_targets, find_targets
from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lte.heads.head_set import HeadSet, Settings, head_names
from lowrank_pretrain.lte.merge import ROUTES
from lowrank_pretrain.lte.projected import BASES, ProjectedSet
from lowrank_pretrain.lte.rest import SYNC, Rest
from lowrank_pretrain.lte.settings import UPDATES
from lowrank_pretrain.lte.workers import Workers


class Imagined(Workers):
    """So many workers of whom none exists: calls are counted, and nothing is sent."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def _call(self, call: Callable) -> None:
        return None


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
) -> dict[str, Any]:
    """Bytes that each worker sends per optimizer step. ``module`` is left alone and may lie on the meta device.

    Args:
        module: the bare model, as the strategy gets it.
        targets: presets or globs (``targets.find_targets``).
        rank: R of every head, or of GaLore's projection.
        heads: H per worker.
        workers: how many.
        merge_every: T, optimizer steps between merges.
        sync_rest: ``step`` or ``merge``.
        route: ``factors`` or ``dense``; ``None``: per target the fewer bytes.
        update: ``lora`` or ``galore`` (one worker, one head).
        basis: of ``update="galore"``: ``own`` or ``shared``, the refresh's sketch included.

    Returns:
        ``targets``, ``rest``, ``all`` (both) and ``ddp`` (every trainable parameter's gradient): bytes per step;
        ``merge``: bytes of one merge of the targets; ``routes``: targets by route.

    Raises:
        ConfigError: a wrong value, a pattern that matches nothing, a rank above min(D, O) of a target
            that is named (where a preset chose it, the rank is cut down to that).
    """
    for key, value in {"heads": heads, "workers": workers, "merge_every": merge_every}.items():
        if value < 1:
            raise ConfigError(key, value, "must be a whole number of 1 or more")
    known = (
        ("sync_rest", sync_rest, SYNC),
        ("route", route, (None, *ROUTES)),
        ("update", update, UPDATES),
        ("basis", basis, BASES),
    )
    for key, value, allowed in known:
        if value not in allowed:
            raise ConfigError(key, value, f"must be one of {', '.join(map(str, allowed))}")
    count = Imagined(workers)
    module = without_data(module)
    ddp = Rest(module, set(), set(), count, "step").sent_per_window(1)
    if update == "galore":
        set_ = _projected(module, targets, rank, count, Settings(merge_every=merge_every, route=route), basis)
    else:
        set_ = _heads(module, targets, rank, count, Settings(heads=heads, merge_every=merge_every, route=route))
    owned = {id(p) for p in set_.factors().values()}
    rest = Rest(module, owned, head_names(module, set_.layers), count, sync_rest).sent_per_window(merge_every)
    own, rest = count.sent / merge_every, rest / merge_every
    routes = dict(Counter(piece.route for piece in set_.pieces))
    return {"targets": own, "rest": rest, "all": own + rest, "ddp": ddp, "merge": count.sent, "routes": routes}


def _heads(module: nn.Module, targets: Any, rank: int, count: Imagined, settings: Settings) -> HeadSet:
    """A module's heads, behind one merge."""
    chosen = find_targets(module, targets)
    ranks, narrow = fit_ranks(module, targets, chosen, rank)
    if narrow is not None:
        warnings.warn(f"LTE: {narrow}", stacklevel=3)
    lora.untie(module, {target.layer_name for target in chosen.values()})
    chosen = {name: target for name, target in all_targets(module).items() if name in chosen}
    heads = HeadSet(settings, count)
    heads.convert(chosen, ranks)
    heads.exchange()
    return heads


def _projected(module: nn.Module, targets: Any, rank: int, count: Imagined, settings: Settings, basis: str) -> ProjectedSet:
    """A module's projected targets, behind one refresh and one merge."""
    optimizer = GaLoreAdamW(galore_param_groups(module, rank, targets))
    projected = ProjectedSet(settings, count, [optimizer], module, basis)
    for piece in projected.pieces:
        sketch = piece.factors()[1][0]
        if optimizer.shared is not None:
            optimizer.shared.mean(sketch)
            if piece.slot.two_sided:
                optimizer.shared.mean(piece.factors()[0][0])
    projected.send()
    return projected


def without_data(module: nn.Module) -> nn.Module:
    """A copy on the meta device: shapes, dtypes, names, ties, and no memory."""
    kept: dict[int, Tensor] = {}
    for p in module.parameters():
        kept[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for b in module.buffers():
        kept[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, kept)
