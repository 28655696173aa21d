"""Provide GaLoreAdamW: AdamW that steps matrices in a low-rank subspace of their gradient (Zhao et al., arXiv 2403.03507).

A drop-in for ``galore_torch.GaLoreAdamW``: same signature, same group keys. ``refresh="svd", rotate_moments=False,
stagger=False`` is that code step for step; the defaults are quicker and better.

One step, in the order of the calls: ``step`` → ``update`` → ``_step_on_device`` → ``_step_projected``.
Shapes: W, G m×n; P d×r the basis of the projected side; R = PᵀG, N, m, v r×k.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.agreement import run_seed
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Adopter, Reports
from lowrank_pretrain.galore import adam, groups, state
from lowrank_pretrain.galore.adam import PlainParameter, fit_layout
from lowrank_pretrain.galore.clock import RefreshTimer
from lowrank_pretrain.galore.dtensor import is_distributed, local_piece
from lowrank_pretrain.galore.guard import Guard, check_dense_and_real, closed, eager
from lowrank_pretrain.galore.index import Entry, make_index, resized_error
from lowrank_pretrain.galore.layerwise import Layerwise, UsedGradient
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.galore.projection import Projected, SharedBasis
from lowrank_pretrain.galore.requested import RequestedSettings


class GaLoreAdamW(Adopter, Reports, Optimizer):
    """Run AdamW on projected gradients for every group that has a ``rank``, and plain AdamW for the others.

    Works through Lightning's plain ``configure_optimizers``. Group keys, all but ``rank`` with these defaults:

    Args:
        params: parameters or groups, e.g. from :func:`galore_param_groups`; or a model, with ``rank`` and ``targets``.
        lr: learning rate; a projected matrix moves by ``lr * scale``. For matrices √(m/r) × AdamW's own is a good product.
        betas: decay of the moments.
        eps: added to √v before its bias correction, as published.
        weight_decay: decoupled, after the update, not multiplied by ``scale``.
        correct_bias: bias correction of the moments.
        no_deprecation_warning: accepted and ignored.
        update_proj_gap: steps between two refreshes of a matrix.
        scale: α of the paper.
        proj_type: ``std`` projects the shorter side, ``reverse_std`` the longer, ``left``, ``right``, or ``full`` both.
        refresh: ``subspace``: one warm-started power iteration; ``svd``: the published full SVD; ``track``: at every step one
            power iteration on the momentum's mixture with the gradient.
        rotate_moments: carry the moments over into the new basis.
        stagger: spread the refreshes of the matrices over the gap.
        layerwise: update each parameter as its gradient arrives, and free the gradient. Not with clipping, 16-mixed or DDP.
        moments: ``auto``, ``float32``, ``grad`` (the gradient's dtype) or ``8bit`` (needs bitsandbytes).
        residual: ``fira`` adds the scaled part of the gradient outside the subspace, with a limit on its growth.
            ``muon`` adds it too, and orthogonalises the whole sum: Muon's products, at this state's size.
        variant: ``apollo`` scales the whole gradient by what Adam does to a random projection of it (rank 1: APOLLO-Mini).
        second_moment: ``factored`` keeps r + k numbers for the r×k of v, with no more products: .20 of AdamW's state at d/4.
        nesterov: step on β₁m + (1−β₁)R, one step ahead of the momentum: no state, no product. Use it for text.
        rule: ``muon`` steps on the orthogonalised momentum, without a second moment: .18 of AdamW's state, two small products
            (r×r by r×k) more, an update of AdamW's size. Use it for images.
        track_every: steps between two refreshes with ``refresh="track"``, instead of ``update_proj_gap``.
        seed: of random projections; by default the run's.
        rank: if ``params`` is a model: its groups are ``galore_param_groups(model, rank, targets)``, and norms, biases and
            embeddings have no weight decay. A HF ``Trainer`` takes it as
            ``optimizer_cls_and_kwargs=(GaLoreAdamW, {"model": model, "rank": 128, "lr": 1e-3})``.
        targets: with ``rank``: the matrices to project.

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
        second_moment: str = "full",
        nesterov: bool = False,
        rule: str = "adam",
        track_every: int = 1,
        seed: int | None = None,
        rank: int | None = None,
        targets: str | Sequence[str] = "all",
    ) -> None:
        defaults = {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias,
            "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type, "refresh": refresh,
            "rotate_moments": rotate_moments, "stagger": stagger, "layerwise": layerwise, "moments": moments,
            "residual": residual, "variant": variant, "second_moment": second_moment, "nesterov": nesterov, "rule": rule,
            "track_every": track_every, "seed": run_seed() if seed is None else seed,
        }  # fmt: skip
        params = groups.groups_of_model(params, rank, targets, weight_decay)
        self._reset({})
        self._requested = RequestedSettings()
        groups.check_values(defaults)
        super().__init__(params, defaults)
        groups.warn_of_unused(inspect.signature(GaLoreAdamW), self.param_groups)

    def _reset(self, ranks: dict[Tensor, int]) -> None:
        self._ranks = ranks  # of adopted parameters, whose group has no rank
        self._guard = Guard()
        self._layerwise = Layerwise(self)
        self._index: tuple[groups.GroupsSnapshot, int, dict[Tensor, Entry]] | None = None
        self._distributed = False  # are some parameters DTensors?
        self._freed: list[Tensor] = []  # parameters of layer-wise groups, whose gradients are freed
        self._timer = RefreshTimer()
        self.rate_shares: list[float] = []  # by group, after a load: the rate in the code over the one in the file's code
        self.shared: SharedBasis | None = None  # set by galore_ddp_hook, and by LTE for basis="shared"
        self.local: dict[Tensor, LocalUpdate] = {}  # set by LTE: matrices that this worker trains separately from the others

    # ---- groups, and the index of parameters ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, after checking its values."""
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), (Tensor, set, type(None))):
            param_group["params"] = list(param_group["params"])  # a generator can be read once only
        if self.param_groups and "param_names" in self.param_groups[0]:
            groups.name_late_group(param_group, len(self.param_groups))
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            groups.check_group(group, groups.parameter_names(group, len(self.param_groups) - 1))
        except ValueError:
            del self.param_groups[-1]
            raise
        self._requested.note(group)
        if group["layerwise"]:
            self._layerwise.install(group["params"])

    def lookup(self, thorough: bool = False) -> dict[Tensor, Entry]:
        """Return the group, name and projection of each parameter; rebuilt when the groups have changed.

        Args:
            thorough: compare every parameter and setting, as at the beginning of a step; else only the lists.

        Raises:
            ConfigError: a setting that was changed in the middle of a fit, to a value that the constructor would refuse.
        """
        old: dict[Tensor, Entry] = {}
        if self._index is not None:
            known, ranks, old = self._index
            unchanged = known.is_current(self.param_groups) if thorough else known.has_same_lists(self.param_groups)
            if unchanged and ranks == len(self._ranks):
                return old
            for number in known.changed_groups(self.param_groups):
                group = self.param_groups[number]
                groups.check_group(group, groups.parameter_names(group, number), quiet=True)
                if group["layerwise"]:
                    self._layerwise.install(group["params"])
        self._requested.of(self.param_groups)  # notes groups that came in another way than add_param_group
        found = make_index(self.param_groups, self._ranks, self.state, old)
        self._index = groups.GroupsSnapshot(self.param_groups), len(self._ranks), found
        self._distributed = any(map(is_distributed, found))
        self._freed = [p for p, entry in found.items() if entry.group["layerwise"]]
        return found

    def projected(self, p: Tensor) -> Projected | None:
        """Return a parameter's projection at this step; None if plain AdamW updates it."""
        slot = self.lookup()[p].slot
        return None if slot is None else self._present(p, slot)

    def _present(self, p: Tensor, slot: Projected) -> Projected:
        """Return the slot with its state, or a new slot for a resized parameter without state."""
        kept = self.state[p]
        if p.shape != slot.shape:
            if kept:
                raise resized_error(slot, p)
            self._index = None
            slot = self.lookup()[p].slot or slot  # a rank stays where it is
        return slot.attach(kept, self.local.get(p), self.shared)

    # ---- the step -----------------------------------------------------------------------------------------------------------

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. Lightning passes a closure that runs forward and backward; without one the gradients must exist.

        Raises:
            ConfigError: a sparse or complex gradient; a rate that is NaN or infinite; a parameter that was resized.
            FloatingPointError: a gradient that is not finite.
        """
        loss = None
        if closure is not None:
            self.lookup(thorough=True)
            if self._freed:
                self._layerwise.refuse_clipping(closure)
            with torch.enable_grad(), self._layerwise.inside():
                loss = closure()
        self._guard.begin_step()
        params, waiting = self.lookup(thorough=True), self._layerwise
        for p in self.local if self.shared is not None else ():  # the other workers wait for its share of the basis
            if p.grad is None and p.requires_grad:
                p.grad = torch.zeros_like(p)
        self.update([
            p for p in params
            if (p.grad is not None and not isinstance(p.grad, UsedGradient)) or (waiting.low and waiting.waits(p))
        ])  # fmt: skip
        if self._freed or waiting.low:
            waiting.clear(free=self._freed)
        return loss

    @closed
    @torch.no_grad()
    def update(self, params: list[Tensor]) -> None:
        """Apply the gradients of these parameters (all in a normal step, or one layer's)."""
        entries, checked = self.lookup(), set[int]()
        by_device: dict[torch.device, list[Tensor]] = {}
        for p in params:
            group, grad = entries[p].group, p.grad
            if id(group) not in checked:
                checked.add(id(group))
                groups.check_rates(group)
            if grad is not None:
                check_dense_and_real(grad, entries[p].name)
            by_device.setdefault(p.device, []).append(p)
        for device, some in by_device.items():
            self._step_on_device(some, device, entries)

    def _step_on_device(self, params: list[Tensor], device: torch.device, entries: Mapping[Tensor, Entry]) -> None:
        """Check the gradients of one device's parameters, and apply them."""
        # sort: matrices to project, and the rest by group (searching thousands of groups one by one would be slow)
        slots: list[Projected] = []
        plain: dict[int, list[PlainParameter]] = {}
        owners: list[Any] = []  # the holder of each gradient, and under which name it holds it
        keys: list[str] = []
        layerwise = self._layerwise
        for p in params:
            group, name, slot = entries[p]
            if slot is None:
                assert p.grad is not None, name
                plain.setdefault(id(group), []).append(PlainParameter(p, name, p.grad, self.state[p]))
            else:
                slot = self._present(p, slot)
                slot.grad, slot.low = (layerwise.gradient(p), layerwise.take_low(p)) if layerwise.low else (p.grad, None)
                slots.append(slot)
                held = [key for key in ("grad", "low") if getattr(slot, key) is not None]
                owners += [slot] * len(held)
                keys += held

        # check every gradient before anything is changed; scale down those whose square would overflow
        matrices = len(owners)
        owners += [item for items in plain.values() for item in items]
        keys += ["grad"] * (len(owners) - matrices)
        grads = list(map(getattr, owners, keys))
        if self._distributed:
            grads = [local_piece(grad) for grad in grads]
        # a first basis replaces nothing: no mask can undo it
        wait = any(slot.cold for slot in slots)
        names, cut = [owner.name for owner in owners], params if self._distributed else []
        skip = self._guard.check(grads, names, cut, wait, layerwise.stepping, matrices)
        for i in self._guard.spikes:
            setattr(owners[i], keys[i], self._guard.limited(getattr(owners[i], keys[i]), owners[i]))

        for same in (
            adam.split_by(slots, lambda slot: (id(slot.group), slot.step, slot.p.dtype, slot.arrived.dtype)) if slots else ()
        ):
            for some in adam.kernel_batches(same, [slot.numel_low for slot in same], device):
                self._step_projected(some, skip)
        for items in plain.values():
            group = entries[items[0].p].group
            for alike in adam.split_by(items, lambda item: (adam.steps_taken(item.state), item.p.dtype, item.grad.dtype)):
                adam.adamw_step(alike, group, skip, self._distributed)

    def _step_projected(self, slots: list[Projected], skip: Tensor | None) -> None:
        """Step matrices of one group, step count and dtype."""
        group, step = slots[0].group, slots[0].step + 1
        eta = float(group["lr"]) * group["scale"]
        decay = float(group["lr"]) * group["weight_decay"]
        correction = adam.bias_correction(step, group)
        update = Projected.add_update
        if group["variant"] == "apollo":
            update = Projected.add_scaled_gradient
        elif group["residual"]:
            update = Projected.add_update_and_residual

        lows, ms, seconds = list[Tensor](), list[Tensor](), list[list[Tensor]]()
        for slot in slots:
            m, second = slot.read_moments(slot.p if slot.grad is None else slot.grad)
            # renew the basis P, where it is due, and carry the moments over into it
            if slot.due:
                began = self._timer.start(slot.p)
                m, second, overlap = slot.refresh(slot.whole_grad, m, second, skip)
                self._timer.stop(slot.p, began, step, overlap)
            # project: R = PᵀG, plus that of earlier micro-batches
            low = slot.low
            if slot.grad is not None:
                low = slot.project(slot.grad) if low is None else low.add_(slot.project(slot.grad))
            assert low is not None, slot.name
            lows.append(low)
            ms.append(fit_layout(m, low, slot.name, "first moment"))
            full = slot.second == "full"
            seconds.append([fit_layout(v, low, slot.name, "second moment") for v in second] if full else second)

        # Adam on R: the moments in place, and −N, for all of them in one call; the other rules one by one
        if group["rule"] == "adam" and group["second_moment"] == "full" and not group["nesterov"]:  # the fused kernel
            minus_n = adam.adam_directions(lows, ms, [v for second in seconds for v in second], step, group, skip)
        else:
            parts = zip(slots, lows, ms, seconds, strict=True)
            minus_n = [slot.direction(low, m, second, skip) for slot, low, m, second in parts]

        # back to W: W ← W − ηαP N; under LTE the update is added to D, of which W is formed
        for slot, low, n, m, second in zip(slots, lows, minus_n, ms, seconds, strict=True):
            if slot.local is None:
                update(slot, low, n, eta, correction, skip)
            else:
                slot.local.take(slot, n, decay)
            slot.write_moments(m, second)
            slot.grad = slot.low = None

        # decoupled weight decay, after the update, as published
        weights = [local_piece(slot.p) if slot.distributed else slot.p for slot in slots if slot.local is None]
        adam.decay_weights(weights, group, skip)

    def gradient_norm(self) -> Tensor | None:
        """Return the norm of the first gradient of the last update."""
        return None if self._guard.norms is None else self._guard.norms[0]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and those that layer-wise updates have accumulated."""
        super().zero_grad(set_to_none)
        self._layerwise.clear()

    # ---- the protocols: take a plan over, report figures ---------------------------------------------------------------------

    def check_adopt(self, names: Iterable[str], module: nn.Module) -> None:
        """Check before training that ``adopt`` will accept these targets.

        Raises:
            ConfigError: a target in no group, or projected already; layer-wise updates; APOLLO.
        """
        state.adoptable_weights(names, module, self.lookup())

    def adopt(self, plan: Mapping[str, int], module: nn.Module) -> None:
        """Project the plan's targets from now on. Their group, its schedule and their moments stay.

        The basis comes from the first gradient after this; then m ← Pᵀm, v ← (P∘P)ᵀv with ``step`` kept and scale 1, so that
        the step size is continuous. A fused matrix takes the largest rank of its parts; rank 0 leaves a matrix unchanged.

        Raises:
            ConfigError: a target that is unknown, in no group, or projected already.
        """
        entries = self.lookup()
        for p, rank in state.adoptable_ranks(plan, module, entries).items():
            entries[p].group["scale"] = 1.0
            self._ranks[p] = rank
        self._index = None

    def release(self) -> None:
        """Finish at the plan's freeze: weights continue to train in full, and only full-size moments are dropped."""
        state.drop_whole_moments(self._ranks, self.state)

    def metrics(self) -> dict[str, float]:
        """Return ``galore/refresh_ms`` and ``galore/overlap`` of the last refreshing step that the device has finished.

        It never waits for the device, so its figures may be from an earlier step.
        """
        return self._timer.metrics()

    def formula_bytes(self) -> int:
        """Return bytes of state by the paper's formula, mr + 2nr for each projected matrix, to compare with those held."""
        return state.formula_bytes(self.lookup())

    # ---- state ---------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch does; groups with adopted parameters carry their ranks."""
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
            saved.setdefault("asked", [dict(settings) for settings in self._requested.of(self.param_groups)])
        return saved

    @eager
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, hooks included, but with the mode's dtypes, and after comparing ranks, shapes and names.

        Each setting that may change between two runs is taken from the code, not from the file. A scheduler whose own state
        is loaded afterwards sets its rates again: ``state.follow_rates`` corrects them. An error changes nothing.

        Raises:
            ConfigError: the state belongs to another model, grouping, rank or projection.
        """
        saved = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, saved)
            saved = saved if changed is None else changed
        requested = self._requested.of(self.param_groups)
        loaded = state.fit_saved_state(saved, self.param_groups, self.defaults, requested)
        self._layerwise.unfold(lambda p: self.projected(p) if p in self.lookup() else None)
        states = type(self.state)(dict)  # a defaultdict, as torch's
        states.update(loaded.states)
        self._ranks = loaded.ranks
        self.__setstate__({"state": states, "param_groups": loaded.groups, "_asked": requested})
        self.rate_shares = loaded.rate_shares
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ranks": self._ranks, "_asked": self._requested.of(self.param_groups)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a deep copy or an unpickled optimizer has none of our private attributes; load_state_dict comes here as well
        super().__setstate__({key: value for key, value in state.items() if key not in ("_ranks", "_asked")})
        self.defaults = groups.MODE_DEFAULTS | self.defaults  # pickled by a version without modes
        shared, local = getattr(self, "shared", None), getattr(self, "local", {})
        self._reset(state.get("_ranks", getattr(self, "_ranks", {})))
        self.shared, self.local = shared, local
        for group in self.param_groups:
            for key in groups.KEYS:  # pickled by a version that did not have this key yet
                if key in self.defaults:
                    group.setdefault(key, self.defaults[key])
            if group["layerwise"]:
                self._layerwise.install(group["params"])
        self._requested = RequestedSettings(self.param_groups, state.get("_asked", ()))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler and Lightning ask this before they unscale gradients that layer-wise updates have already used
        if any(group["layerwise"] for group in self.param_groups):
            raise ConfigError(
                "layerwise", True, "cannot undo a loss scale (16-mixed): use precision=bf16-mixed or layerwise=False"
            )
        return False
