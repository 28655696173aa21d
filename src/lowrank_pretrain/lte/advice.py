"""Warn once about LTE settings and targets that run but cannot do what is hoped for."""

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lowrank_pretrain.core.targets import families
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.projected import ProjectedSet
from lowrank_pretrain.lte.rest import Rest


def advise(heads: HeadSet | ProjectedSet, rest: Rest) -> None:
    """Warn of heads that cannot reach full rank together, and of a rest that sends more than they do."""
    settings, workers = heads.settings, heads.workers
    if isinstance(heads, HeadSet) and not settings.reset and settings.mode != "joint":
        narrow = min(min(p.part.rows, p.factors()[0].shape[2]) for p in heads.pieces)
        rank, count = max(p.part.rank for p in heads.pieces), settings.heads * workers.size
        if count * rank < narrow:
            rank_zero_warn(
                f"LTE: {count} heads of rank {rank} reach updates of rank {count * rank} only, the matrices have "
                f"{narrow} or more: use more heads, a higher rank, or reset=True"
            )
    if not rest.apart and workers.size > 1:
        heavy = rest.bytes() * settings.merge_every
        if heavy > 4 * sum(sum(f.numel() * f.itemsize for f in p.factors()) for p in heads.pieces):
            rank_zero_warn(
                f"LTE: sync_rest='step' sends {rest.bytes() / 2**20:.1f} MiB of other parameters at every step, more "
                "than the merges: sync_rest='merge' saves most of it"
            )


def name_unmoved_heads(heads: HeadSet, module: nn.Module) -> None:
    """Warn after the first merge of layers whose heads no gradient has reached, where others have moved."""
    if heads.unmoved and len(heads.unmoved) < len(heads.layers):
        names = ", ".join(dict.fromkeys(families(module, heads.unmoved).values()))
        rank_zero_warn(
            f"LTE: no gradient in the {heads.settings.merge_every} steps before the first merge reached the heads of {names}: "
            'they train only if later steps use them. If none does, leave them out ("!name")'
        )
