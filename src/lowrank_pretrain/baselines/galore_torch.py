"""Run the published package ``galore-torch`` on the targets' matrices, as it is, and AdamW on the rest.

For comparisons; ``method=galore_published`` is the same code step for step, without the package. The package keeps an object
for each matrix in the optimizer's state, which no safe checkpoint can hold, and runs a closure without gradients. Here the
object is made anew for each step from plain tensors, ``proj`` and, for two sides, ``proj_right``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.baselines.muon import for_pair
from lowrank_pretrain.baselines.pair import MATRICES, MatrixPair
from lowrank_pretrain.core.checks import choice, number, whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.models.optim import Optim

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
KEYS = ("proj", "proj_right")


class GaLoreTorch(MatrixPair):
    """Step matrices by the package's ``GaLoreAdamW`` and everything else by torch's AdamW.

    Args:
        params: groups; those with ``matrices=True`` hold matrices only.
        lr: for groups that set none.
        settings: the package's keys of such a group: ``rank``, ``update_proj_gap``, ``scale``, ``proj_type``.

    Raises:
        ConfigError: the package is not installed, or cannot be imported.
    """

    fixed = ("rank", "proj_type")

    def __init__(self, params: Iterable[dict[str, Any]], lr: float = 1e-3, **settings: Any) -> None:
        self._of_matrices: torch.optim.Optimizer | None = None
        super().__init__(params, lr, {**_package()[0].defaults, "weight_decay": 0.0, "lr": lr, **settings})

    def step_matrices(self, groups: list[dict[str, Any]]) -> None:
        """Step the matrices by the package's class, with its projectors in the state for as long."""
        adamw, projector = _package()
        if self._of_matrices is None:
            self._of_matrices = adamw
        for group in groups:
            settings = {key: group[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")}
            for state in self._states(group):
                if "proj" in state:
                    state["projector"] = projector(**settings)
                    found = [state.pop(key) for key in KEYS if key in state]
                    state["projector"].ortho_matrix = found[0] if len(found) == 1 else found
        self._lend(self._of_matrices, groups)
        try:
            with ExitStack() as stack:  # inside of autocast its products would run in half precision
                for device in {p.device.type for group in groups for p in group["params"]}:
                    stack.enter_context(torch.autocast(device, enabled=False))
                self._step_other(self._of_matrices)
        finally:  # of a step that fails, too: the state may be saved
            for group in groups:
                for state in self._states(group):
                    self._put_bases_back(state)

    def _put_bases_back(self, state: dict[str, Any]) -> None:
        """Replace the package's object in a matrix' state by its tensors; a state without a basis has not begun."""
        bases: Any = getattr(state.pop("projector", None), "ortho_matrix", None)
        if bases is None:
            state.clear()
            return
        bases = [bases] if isinstance(bases, Tensor) else bases
        state |= zip(KEYS, (basis.contiguous() for basis in bases), strict=False)

    def _states(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        return [self.state[p] for p in group["params"] if self.state.get(p)]

    def takes(self, group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> bool:
        """Return whether a matrix' state from a file is the package's."""
        m, n = p.shape
        rank, kind = min(group["rank"], m, n), group["proj_type"]
        if kind in ("std", "reverse_std"):
            kind = "right" if (m >= n) == (kind == "std") else "left"
        low = (rank if kind != "right" else m, rank if kind != "left" else n)
        shapes = {"exp_avg": low, "exp_avg_sq": low, "proj": (rank, n) if kind == "right" else (m, rank)}
        if kind == "full":
            shapes["proj_right"] = (rank, n)
        return all(getattr(state.get(key), "shape", None) == shape for key, shape in shapes.items())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._of_matrices = None


def _package() -> tuple[torch.optim.Optimizer, Callable[..., Any]]:
    """Return the package's optimizer, over one empty matrix, and its class of projectors.

    Raises:
        ConfigError: the package is not installed, or cannot be imported.
    """
    try:
        from galore_torch import GaLoreAdamW
        from galore_torch.galore_projector import GaLoreProjector
    except Exception as error:  # it imports bitsandbytes and transformers, whose loaders raise many kinds
        cure = f"needs galore-torch: pip install galore-torch, or take method=galore_published ({str(error).splitlines()[0]})"
        raise ConfigError("method", "galore_torch", cure) from None
    return GaLoreAdamW([torch.zeros(0, 0)], no_deprecation_warning=True), GaLoreProjector


def galore_torch_optimizer(
    rank: int = 128,
    targets: str | Sequence[str] = "all",
    update_proj_gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
) -> Callable[[nn.Module, Optim], GaLoreTorch]:
    """Return a function (module, ``Optim``) -> :class:`GaLoreTorch`.

    Raises:
        ConfigError: a wrong value; the package is not installed.
    """
    whole("rank", rank, 1)
    whole("update_proj_gap", update_proj_gap, 1, "steps")
    number("scale", scale, least=0)
    choice("proj_type", proj_type, PROJ_TYPES)
    _package()

    def make(module: nn.Module, optim: Optim) -> GaLoreTorch:
        groups = for_pair(optim.split(module, find_targets(module, targets)), optim)
        for group in groups:
            if group[MATRICES]:
                group["betas"] = optim.betas
        settings = {"update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        return GaLoreTorch(groups, optim.lr, rank=rank, **settings)

    return make
