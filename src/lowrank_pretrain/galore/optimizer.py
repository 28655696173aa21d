"""GaLoreAdamW: AdamW whose matrices step inside a low-rank subspace of their gradient (Zhao et al., arXiv 2403.03507).

A drop-in for ``galore_torch.GaLoreAdamW``: same signature, same group keys. ``refresh="svd", rotate_moments=False,
stagger=False`` is that code step for step; the defaults are quicker and better.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Adopter, Reports
from lowrank_pretrain.core.seeds import run_seed
from lowrank_pretrain.galore import adopt as transition
from lowrank_pretrain.galore import checkpoint, memory, stepping
from lowrank_pretrain.galore.clock import RefreshClock
from lowrank_pretrain.galore.groups import KEYS, asked, check_group, check_values, galore_param_groups
from lowrank_pretrain.galore.guard import Guard
from lowrank_pretrain.galore.index import Entry, Snapshot, make_index, parameter_name, settings
from lowrank_pretrain.galore.layerwise import Layerwise
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.galore.moments import steps_taken
from lowrank_pretrain.galore.projection import Projected, SharedBasis
from lowrank_pretrain.galore.surroundings import closed, eager

_PROJECTED = ("update_proj_gap", "scale", "proj_type", "refresh", "residual", "variant")  # settings of projected groups alone


class GaLoreAdamW(Adopter, Reports, Optimizer):
    """AdamW with projected gradients for every group that has a ``rank``; plain AdamW for the others.

    Works through Lightning's plain ``configure_optimizers``. Group keys, all but ``rank`` with the defaults given here:

    Args:
        params: parameters or groups, e.g. from :func:`galore_param_groups`; or a model, with ``rank`` and ``targets``.
        lr: learning rate; a projected matrix moves by ``lr * scale``. For matrices √(m/r) × AdamW's own is a good product.
        betas: decay of the moments.
        eps: added to √v before its bias correction, as published.
        weight_decay: decoupled, after the update, not multiplied by ``scale``.
        correct_bias: bias correction of the moments.
        no_deprecation_warning: accepted and ignored.
        update_proj_gap: steps between two refreshes of a matrix (``refresh="track"`` refreshes at every step).
        scale: α of the paper.
        proj_type: ``std`` projects the shorter side, ``reverse_std`` the longer, ``left``, ``right``, or ``full`` both.
        refresh: ``subspace``: one warm-started power iteration; ``svd``: the published full SVD; ``track``: at every step one
            power iteration on the momentum's mixture with the gradient.
        rotate_moments: carry the moments over into the new basis.
        stagger: spread the refreshes of the matrices over the gap.
        layerwise: update each parameter as soon as its gradient is there and free it. Not with clipping, 16-mixed or DDP.
        moments: ``auto``, ``float32``, ``grad`` (the gradient's dtype) or ``8bit`` (needs bitsandbytes).
        residual: ``fira`` adds the scaled part of the gradient outside the subspace, with a limit on its growth.
        variant: ``apollo`` scales the whole gradient by what Adam does to a random projection of it (rank 1: APOLLO-Mini).
        seed: of the random parts; by default the run's.
        rank: with a model for ``params``: its groups are ``galore_param_groups(model, rank, targets)``, and norms, biases and
            embeddings have no weight decay. So a HF ``Trainer`` takes it as
            ``optimizer_cls_and_kwargs=(GaLoreAdamW, {"model": model, "rank": 128, "lr": 1e-3})``.
        targets: with ``rank``: which matrices.

    Raises:
        ConfigError: a wrong value.
        FloatingPointError: from ``step``, naming a parameter whose gradient is not finite.
    """

    def __init__(
        self,
        params: Iterable[Any] | nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        refresh: str = "subspace",
        rotate_moments: bool = True,
        stagger: bool = True,
        layerwise: bool = False,
        moments: str = "auto",
        residual: str | None = None,
        variant: str = "galore",
        seed: int | None = None,
        rank: int | None = None,
        targets: str | Sequence[str] = "all",
    ) -> None:
        defaults = {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias,
            "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, "refresh": refresh,
            "rotate_moments": rotate_moments, "stagger": stagger, "layerwise": layerwise, "moments": moments,
            "residual": residual, "variant": variant, "seed": run_seed() if seed is None else seed,
        }  # fmt: skip
        if isinstance(params, nn.Module):
            if rank is None:
                raise ConfigError("rank", None, "is needed with a model: GaLoreAdamW(model, rank=128)")
            params = galore_param_groups(params, rank, targets, weight_decay=weight_decay)
        elif rank is not None or targets != "all":
            key, value = ("targets", targets) if rank is None else ("rank", rank)
            cure = (
                "needs the model: GaLoreAdamW(model, rank=…, targets=…), or groups of galore_param_groups(model, rank, targets)"
            )
            raise ConfigError(
                key, value, f"{cure}; in a HF Trainer optimizer_cls_and_kwargs=(GaLoreAdamW, {{'model': model, …}})"
            )
        self._setup({})
        self._asked: list[
            dict[str, Any]
        ] = []  # of each group what the code has asked for, whatever a schedule or file made of it
        check_values(defaults)
        super().__init__(params, defaults)
        usual = inspect.signature(GaLoreAdamW).parameters
        changed = [key for key in _PROJECTED if defaults[key] != usual[key].default]
        if changed and not any(group.get("rank") for group in self.param_groups):
            warnings.warn(
                f"{changed[0]}={defaults[changed[0]]!r} has no effect yet: no parameter group has a rank, so all are plain "
                "AdamW (until a plan projects some: PreLoRA with then=galore)",
                stacklevel=2,
            )

    def _setup(self, ranks: dict[Tensor, int]) -> None:
        self._ranks = ranks  # of adopted parameters, whose group has no rank
        self._guard = Guard()
        self._layerwise = Layerwise(self)
        self._index: tuple[Snapshot, int, dict[Tensor, Entry]] | None = None
        self._clock = RefreshClock()
        self._rates: list[float] = []  # by group, after a load: the rate asked for over the one asked for in the file
        self.shared: SharedBasis | None = None  # set by galore_ddp_hook, and by LTE for basis="shared"
        self.local: dict[Tensor, LocalUpdate] = {}  # set by LTE: matrices that this worker trains apart from the others

    # ---- groups -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's; its values are checked."""
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), (Tensor, set, type(None))):
            param_group["params"] = list(param_group["params"])  # a generator can be read once only
        if self.param_groups and "param_names" in self.param_groups[0]:
            _name_unnamed(param_group, len(self.param_groups))
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], self._names(len(self.param_groups) - 1))
        except ValueError:
            del self.param_groups[-1]
            raise
        group = self.param_groups[-1]
        self._asked.append(asked(group))
        if group["layerwise"]:
            self._layerwise.install(group["params"])

    def lookup(self, thorough: bool = False) -> dict[Tensor, Entry]:
        """What is known of each parameter; made anew when the groups have changed.

        Args:
            thorough: compare every parameter and setting, as at the beginning of a step; else only the lists.
        """
        if self._index is not None:
            known, ranks, found = self._index
            unchanged = known.same(self.param_groups) if thorough else known.same_lists(self.param_groups)
            if unchanged and ranks == len(self._ranks):
                return found
            self._check_again(known)
        old = {} if self._index is None else self._index[2]
        found = make_index(self.param_groups, self._ranks, self.state, old)
        self._index = Snapshot(self.param_groups), len(self._ranks), found
        return found

    def _check_again(self, known: Snapshot) -> None:
        """Check the settings of groups that were changed in the middle of a fit.

        Raises:
            ConfigError: a value that the constructor would refuse.
        """
        for number, group in enumerate(self.param_groups):
            if number >= len(known.settings) or settings(group) != known.settings[number]:
                check_group(group, self._names(number), quiet=True)
                if group["layerwise"]:
                    self._layerwise.install(group["params"])

    def _names(self, number: int) -> dict[int, str]:
        group = self.param_groups[number]
        return {id(p): parameter_name(group, number, i) for i, p in enumerate(group["params"])}

    def projected(self, p: Tensor) -> Projected | None:
        """The projection of a parameter as it stands at this step; None for one that AdamW updates."""
        slot = self.lookup()[p].slot
        return None if slot is None else self._present(p, slot)

    def _present(self, p: Tensor, slot: Projected) -> Projected:
        state = self.state[p]  # states may have been dropped or replaced since
        if p.shape != slot.shape:
            if state:
                raise ConfigError(
                    "params", slot.name, f"had shape {tuple(slot.shape)} and has {tuple(p.shape)} now: a parameter that was "
                    "resized needs a new optimizer, or no state (optimizer.state.pop(p))"
                )  # fmt: skip
            self._index = None
            slot = self.lookup()[p].slot
        slot.state = state
        slot.local, slot.shared = self.local.get(p), self.shared
        slot.step = steps_taken(state)
        if "proj" in state and state["proj"].device != p.device:  # the model was moved after the optimizer was made
            for key, value in state.items():
                if isinstance(value, Tensor) and key != "step":
                    state[key] = value.to(p.device)
        return slot

    # ---- step ---------------------------------------------------------------------------------------------------------

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Lightning passes a closure that runs forward and backward; without one the gradients must be there."""
        loss = None
        if closure is not None:
            self.lookup(thorough=True)
            self._layerwise.refuse_clipping(closure)
            with torch.enable_grad(), self._layerwise.inside():
                loss = closure()
        self._guard.raise_arrived()
        lookup = self.lookup(thorough=True)
        for p in self.local if self.shared is not None else ():  # the others wait for its share of the basis
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
        self.update([p for p in lookup if self._layerwise.waits(p)])
        self._layerwise.clear(free=[p for p, entry in lookup.items() if entry.group["layerwise"]])
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and what layer-wise updates have accumulated of them."""
        super().zero_grad(set_to_none)
        self._layerwise.clear()

    @closed
    @torch.no_grad()
    def update(self, params: list[Tensor]) -> None:
        """Step with the gradients of these parameters (all of a normal step's, or one layer's)."""
        stepping.apply(self, params)

    # ---- the protocol of ARCHITECTURE.md: who takes a plan over ------------------------------------------------------

    def check_adopt(self, names: Iterable[str], module: nn.Module) -> None:
        """Whether ``adopt`` will be able to take these targets, asked before training begins.

        Raises:
            ConfigError: a target in no group, or projected already; layer-wise updates; APOLLO.
        """
        transition.check(self, names, module)

    def adopt(self, plan: Mapping[str, int], module: nn.Module) -> None:
        """Project the plan's targets from now on. Their group, its schedule and their moments stay.

        The basis comes from the first gradient after this; then m ← Pᵀm, v ← (P∘P)ᵀv with ``step`` kept and scale 1, so that
        the step size is continuous. A fused matrix takes the largest rank of its parts; rank 0 leaves a matrix as it is.

        Raises:
            ConfigError: a target that is unknown, in no group, or projected already.
        """
        transition.adopt(self, plan, module)

    def release(self) -> None:
        """The plan's freeze: projected weights go on training in full, so only moments still of full size are dropped."""
        transition.release(self)

    def metrics(self) -> dict[str, float]:
        """``galore/refresh_ms`` and ``galore/overlap`` of the last step that refreshed and that the device has passed.

        It never waits for the device: asked at every tenth step, say, it answers there of an earlier tenth.
        """
        return self._clock.metrics()

    def formula_bytes(self) -> int:
        """Bytes of state by the paper's formula, mr + 2nr for each projected matrix, to set beside what is really held."""
        return memory.formula_bytes(self)

    # ---- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's; groups with adopted parameters carry their ranks."""
        for group in self.param_groups:
            ranks = [self._ranks.get(p, 0) for p in group["params"]]
            if any(ranks):
                group["ranks"] = ranks  # while torch packs the groups, so that hooks see them
        try:
            saved = super().state_dict()
        finally:
            for group in self.param_groups:
                group.pop("ranks", None)
        if isinstance(saved, dict):
            saved.setdefault("asked", [dict(one) for one in self._asked])
        return saved

    @eager
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, hooks and all, but tensors have the mode's dtype, and ranks, shapes and names are compared first.

        What the code asks for wins over the file, for each setting that may change between two runs. A scheduler whose own
        state is loaded afterwards sets its rates again: ``checkpoint.follow_rates`` puts that right.

        Raises:
            ConfigError: the state belongs to another model, grouping, rank or projection.
        """
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ranks": self._ranks, "_asked": self._asked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a deep copy or an unpickled optimizer has none of our private attributes; load_state_dict comes here as well
        super().__setstate__({key: value for key, value in state.items() if key not in ("_ranks", "_asked")})
        shared, local = getattr(self, "shared", None), getattr(self, "local", {})
        self._setup(state.get("_ranks", getattr(self, "_ranks", {})))
        self.shared, self.local = shared, local
        for group in self.param_groups:
            for key in KEYS:  # pickled by a version that did not have this key yet
                if key in self.defaults:
                    group.setdefault(key, self.defaults[key])
            if group["layerwise"]:
                self._layerwise.install(group["params"])
        self._asked = state.get("_asked") or getattr(self, "_asked", None) or [asked(group) for group in self.param_groups]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler and Lightning ask this before they unscale gradients that layer-wise updates have already used
        if any(group["layerwise"] for group in self.param_groups):
            raise ConfigError(
                "layerwise", True, "cannot undo a loss scale (16-mixed): use precision=bf16-mixed or layerwise=False"
            )
        return False


def _name_unnamed(param_group: dict[str, Any], number: int) -> None:
    """Name the parameters of a late group by position: Lightning's BaseFinetuning unfreezes without names."""
    given = param_group["params"]
    given = [given] if isinstance(given, Tensor) else given
    if "param_names" in param_group or isinstance(given, set) or any(isinstance(p, tuple) for p in given):
        return  # a set is refused by torch
    param_group["params"] = [(f"parameter {i} of group {number}", p) for i, p in enumerate(given)]
    if not given:  # torch takes names from the parameters
        param_group["param_names"] = []
