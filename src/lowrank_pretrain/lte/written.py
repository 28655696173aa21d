"""Notice who writes into the weights between two merges, and let it join what merges add to.

Clamps, masks, re-initialisation, a teacher's average, ``load_state_dict``: users write into W where and how they like, also
through ``.data``, which no version counter sees. So a merge leaves a stamp of what it wrote, and the next one compares. What
was added joins W₀ on every worker alike: where workers wrote different things, their mean.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lowrank_pretrain.core import bits
from lowrank_pretrain.core.errors import ConfigError

if TYPE_CHECKING:
    from lowrank_pretrain.lte.workers import Workers


def leaf_name(layer: nn.Module) -> str:
    """Return the name of the parameter that holds a layer's W."""
    return "weight_orig" if "weight_mask" in layer._buffers else "weight"


def leaf(layer: nn.Module) -> nn.Parameter:
    """Return the parameter that holds a layer's W: ``weight``, or what ``torch.nn.utils.prune`` made of it in mid-fit.

    Raises:
        ConfigError: the weight is computed from something else by now.
    """
    found = layer._parameters.get(leaf_name(layer))
    if found is None:
        name = getattr(layer, "_name", type(layer).__name__)
        raise ConfigError("targets", name, "its weight was parametrized while it has heads: do so before fit, or leave it out")
    return found


@torch.no_grad()
def stamps(tensors: Sequence[Tensor]) -> list[int]:
    """Return every tensor's stamp; one read of the device."""
    if not tensors or tensors[0].is_meta:  # of what has shapes only (``traffic``) nobody writes into
        return [0] * len(tensors)
    return bits.stamps(tensors).tolist()


def everyones(mine: Sequence[int], workers: "Workers") -> list[list[int]]:
    """Return all workers' numbers, (w, n), n being equal everywhere; not counted as traffic."""
    if workers.size == 1 or not mine:
        return [list(mine)] * workers.size
    sent = workers.sent
    gathered, _ = workers.gather(torch.tensor(mine, dtype=torch.int64, device=workers._device))
    workers.sent = sent
    return gathered.tolist()


@torch.no_grad()
def mean_of(mine: Tensor, workers: "Workers") -> Tensor:
    """Return the workers' mean of a tensor, a new one; exact wherever all hold the same number. Together."""
    first = mine.clone()
    workers.spread([first])
    apart = mine - first
    workers.average([apart], counted=False)
    return first.add_(apart)


def tell(names: Sequence[str], once: set[str]) -> None:
    """Say once that weights were written between merges."""
    if names and "written" not in once:
        once.add("written")
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rank_zero_warn(
            f"LTE: {names[0]}{more} was written to between two merges: what was added stays in W, and what the heads learn "
            "is added to it at each merge"
        )
