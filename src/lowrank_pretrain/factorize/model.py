"""Factor the weights of a whole model: measure, cut, expand, and save the factors' state (pure torch)."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import Adopter, Inherit, Reports
from lowrank_pretrain.core.targets import WHOLE, Target, all_targets, families, parts, plain_name, tied_layers, weight_rows
from lowrank_pretrain.factorize import moments
from lowrank_pretrain.factorize.cost import largest_rank, largest_share
from lowrank_pretrain.factorize.decompose import damped, spectrum
from lowrank_pretrain.factorize.layer import ADDED, FactoredLinear, give_factors, take_factors, why_not
from lowrank_pretrain.factorize.moments import MeasuredLinear
from lowrank_pretrain.factorize.preview import Preview, rank_that_pays
from lowrank_pretrain.factorize.ranks import Block, Cut, best_cut, rank_of_fraction, ranks_of_budget

STEPS = 8  # optimizer steps over which inputs are measured at least


class Factors(Adopter, Reports):
    """Take over a plan by factoring: measure the targets' inputs from the switch on; at the freeze W becomes U V.

    In between, W trains as before. A layer that would not get faster stays dense and trains on (``cost``), and so does
    one that was never called.

    Args:
        energy: the share of each layer's output energy that must stay, instead of the plan's ranks.
        flops: the share of the targets' FLOPs that the factors may take in all, instead of the plan's ranks.
        freeze_rest: at the freeze everything but the factors stops.
        products: the dtype of the layers' products; default: that of the weights.
        total: sums a tensor over all processes.
        from_first: broadcasts from the first process; the others pass ``None``.
        is_first: whether this is the first process.
        exact: factors of a checkpoint that is being resumed, instead of new ones.
        seed: of the range finder's private generators; default: the run's seed.
    """

    makes_adapters = True
    joint_steps = STEPS
    adapter_settings: Mapping[str, Any] = {"alpha": None, "train_A": True, "recompute_inputs": False}

    def __init__(
        self,
        energy: float | None = None,
        flops: float | None = None,
        freeze_rest: bool = False,
        products: torch.dtype | None = None,
        total: Callable[[Tensor], Tensor] = lambda local: local,
        from_first: Callable[[Any], Any] = lambda mine: mine,
        is_first: bool = True,
        exact: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
    ) -> None:
        self.energy, self.flops, self.freeze_rest, self.products = energy, flops, freeze_rest, products
        self._total, self._from_first, self._is_first, self._seed = total, from_first, is_first, seed
        self.exact = exact
        self.plan, self._module = Plan(), nn.Module()
        self.kept: dict[str, float] = {}  # share of the output energy by layer, after the freeze

    def check_adopt(self, names: Iterable[str], module: nn.Module) -> None:
        """Refuse layers that cannot be factored, or only a part of which is a target.

        Raises:
            ConfigError: naming the layer, with the cure.
        """
        names, targets = set(names), all_targets(module)
        for layer_name, layer in {targets[name].layer_name: targets[name].layer for name in names if name in targets}.items():
            reason = obstacle_to_factors(layer, tied_layers(module).get(layer_name))
            if reason is not None:
                raise ConfigError("targets", layer_name, reason)
            missing = [n for n, target in targets.items() if target.layer_name == layer_name and n not in names]
            if missing:
                raise ConfigError(
                    "targets", missing[0], f"is no target but other rows of {layer_name} are: a fused layer is factored whole, "
                    "so name all its parts or none"
                )  # fmt: skip

    def check_fraction(self, smallest: float, targets: Mapping[str, Target]) -> None:
        """Refuse, before training, ranks that can pay off for no target.

        Args:
            smallest: of the fractions that ranks are chosen from; without effect where ``energy`` or ``flops`` decide.
            targets: by name.

        Raises:
            ConfigError: keyed ``targets`` if even rank 1 pays for none of them, ``ranks`` if the smallest fraction does not, or
                ``flops`` if rank 1 exceeds the budget.
        """
        layers = {target.layer_name: target.layer for target in targets.values()}
        sizes: dict[str, tuple[int, int]] = {}
        limits: dict[str, int] = {}
        for name, layer in layers.items():
            sizes[name] = rows, cols = _size(weight_rows(layer))
            limits[name] = largest_rank(rows, cols, largest_share(self.products or layer.weight.dtype))
        if max(limits.values(), default=0) < 1:
            rows, cols = max(sizes.values(), key=lambda size: size[0] * size[1])
            reason = (
                f"layers of at most {rows} x {cols}, for which factors pay at no rank: name larger ones, or leave out `then`"
            )
            raise ConfigError("targets", len(layers), reason)
        if self.flops is not None:
            least = sum(sum(size) for size in sizes.values()) / sum(rows * cols for rows, cols in sizes.values())
            if self.flops < least:
                least = math.ceil(least * 1e4) / 1e4
                raise ConfigError(
                    "flops", self.flops, f"must be at least {least}, which factors of rank 1 take for these targets"
                )
        if self.energy is not None or self.flops is not None:
            return
        if all(rank_of_fraction(smallest, t.rows, t.cols) > limits[t.layer_name] for t in targets.values()):
            raise ConfigError("ranks", smallest, "factors of this fraction would pay for no target: give a lower one")

    def preview(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> Preview | None:
        """Begin to measure for ``judge_preview``; None where no energy decides the ranks."""
        if self.energy is None:
            return None
        preview = Preview(module, layers)
        preview.start()
        return preview

    def judge_preview(self, preview: Preview) -> str | None:
        """Return, after the first step, a warning if factors that keep ``energy`` would pay for no layer now."""
        assert self.energy is not None
        best = preview.best_kept(self.products, self._total, self.energy, self._is_first)
        if best is None or best[1] >= self.energy:
            return None
        return (
            f"energy={self.energy}: with the weights and inputs of the first step, factors that keep so much would pay for no "
            f"target; at the largest rank that pays, {best[0]} keeps most, {_down(best[1])}. If that stays so, the run ends at "
            "the freeze: give a lower energy, or ranks or flops in its place"
        )

    def adopt(self, plan: Plan, module: nn.Module) -> list[Inherit]:
        """Begin to measure the inputs of the plan's targets; nothing else changes.

        Raises:
            ConfigError: a layer that cannot be factored, or no target with a rank.
        """
        self.check_adopt(plan, module)
        self.plan, self._module = Plan(plan).check(all_targets(module)), module
        if not any(self.plan.values()):
            raise ConfigError("plan", 0, "is every target's rank: give at least one of them a rank of 1 or more to factor it")
        for _, layer, _ in self._layers(ranked=True):
            moments.begin(layer)
        return []

    def release(self) -> list[Inherit]:
        """Replace each target's W by U V where that pays off; ``plan`` then holds the ranks.

        Returns:
            The factors, each with the weight whose parameter group it joins; they take no optimizer state over.

        Raises:
            ConfigError: inputs or weights were NaN or infinite, or no target is left.
        """
        whole_targets = all_targets(self._module)
        layers = list(self._layers(ranked=True))
        for _, layer, _ in self._layers(ranked=False):
            layer.requires_grad_(False)
        uncalled, best = [], None
        if self.exact is not None:
            cuts = self._cuts_of(self.exact)
        else:
            cuts, uncalled, best = self._from_first(self._decide(layers))
        inherited, ranks = [], {name: 0 for name, rank in self.plan.items() if rank == 0}
        for name, layer, _ in layers:
            moments.end(layer)
            cut = cuts.get(name)
            if cut is None:
                continue
            whole = layer.weight
            give_factors(layer, cut)
            inherited += [Inherit(p, whole, 0, 0, 0) for p in layer.factor_parameters().values()]
            own = {target.part: target.name for target in whole_targets.values() if target.layer_name == name}
            of_block = {block.name: block.rank for block in cut.blocks}
            ranks |= {full: of_block.get(part, of_block.get(WHOLE, 0)) for part, full in own.items()}
            self.kept[name] = cut.kept
        if not inherited:
            self._refuse(len(layers), uncalled, best)
        self._say_whole(layers, cuts, uncalled)
        self.exact = None
        self.plan = Plan(ranks)
        if self.freeze_rest:
            factors = {id(p) for _, p in factor_parameters(self._module)}
            for _, p in nn.Module.named_parameters(self._module):
                p.requires_grad_(id(p) in factors)
        return inherited

    def metrics(self) -> dict[str, float]:
        """Return each target's rank, and the smallest share of output energy that any layer has kept."""
        ranks = {f"lowrank/rank/{name}": float(rank) for name, rank in self.plan.items()}
        return ranks | {"lowrank/kept_energy": min(self.kept.values(), default=1.0)}

    def before_checkpoint(self) -> None:
        """Move all processes' sums to the first process: a checkpoint holds only its values.

        The continuing run and the resumed one are then equal. (Adding in another order rounds differently:
        a run that writes no checkpoint in these steps may differ in the last bits from one that does.)
        """
        for _, layer in moments.measured_layers(self._module):
            for own in (layer._moment, layer._rows_seen):
                own.copy_(self._total(own))
        self.after_replay()

    def after_replay(self) -> None:
        """Keep the sums in the first process only, because they cover all processes."""
        for _, layer in moments.measured_layers(self._module) if not self._is_first else ():
            layer._moment.zero_()
            layer._rows_seen.zero_()

    def _layers(self, ranked: bool) -> Iterator[tuple[str, Any, int]]:
        """Yield (name, layer, its parts' largest rank) of the plan's layers, in the module's order."""
        found: dict[str, list[Target]] = {}
        for name, target in all_targets(self._module).items():
            if name in self.plan:
                found.setdefault(target.layer_name, []).append(target)
        for name, group in found.items():
            rank = max(self.plan[target.name] for target in group)
            if (rank > 0) == ranked:
                yield name, group[0].layer, rank

    @torch.no_grad()
    def _decide(self, layers: list[tuple[str, Any, int]]) -> tuple[dict[str, Cut], list[str], tuple[str, float] | None] | None:
        """Cut every layer, in the first process; the others only contribute their moments.

        Returns:
            The cuts; the layers that no step called; and, if ``energy`` allows no cut, the layer that keeps most at the largest
            rank that pays, and how much.

        Raises:
            ConfigError: weights are NaN or infinite, in any process, or inputs were.
        """
        broken = self._total(torch.stack([(~torch.isfinite(layer.weight.detach())).any().float() for _, layer, _ in layers]))
        if bool(broken.any()):
            cure = "holds weights that are NaN or infinite: resume from a checkpoint written before, with a lower learning rate"
            raise ConfigError("targets", plain_name(layers[int(broken.argmax())][0]), cure)
        share = largest_share(self.products or layers[0][1].weight.dtype)
        ranks = {name: rank for name, _, rank in layers}
        if self.flops is not None:
            ranks = self._by_budget(layers, share)
        cuts, uncalled, too_much = {}, [], {}
        for name, layer, _ in layers:
            C = self._moment(name, layer)
            if C is None:
                uncalled.append(name)
            if C is None or not self._is_first:
                continue
            rank = None if self.energy is not None else ranks[name]
            draws = generator("factorize", name, seed=self._seed)
            W = rows_of(layer)
            cut = best_cut(W, C.to(W), parts(name, layer), share, draws, rank, self.energy)
            if cut is not None:
                at_home = {part: u.cpu() for part, u in cut.U.items()}
                cuts[name] = cut._replace(U=at_home, V=cut.V.cpu())
            elif self.energy is not None and not cuts and (most := rank_that_pays(W, share)) > 0:
                too_much[name] = spectrum(W, C.to(W), most, draws).kept(most)
        if not self._is_first:
            return None
        return cuts, uncalled, max(too_much.items(), key=lambda one: one[1]) if too_much and not cuts else None

    def _by_budget(self, layers: list[tuple[str, Any, int]], share: float) -> dict[str, int]:
        found, sizes = {}, {}
        for name, layer, _ in layers:
            W, C = rows_of(layer), self._moment(name, layer)
            if C is not None:
                rows, cols = W.shape
                most = min(max(1, largest_rank(rows, cols, share)), rows, cols)
                draws = generator("factorize", name, "budget", seed=self._seed)
                found[name] = spectrum(W, C.to(W), most, draws)._replace(basis=W[:0])  # only the energies are needed now
                sizes[name] = (rows, cols)
        return {name: 1 for name, *_ in layers} | ranks_of_budget(found, sizes, self.flops or 1.0)

    def _moment(self, name: str, layer: MeasuredLinear) -> Tensor | None:
        C = moments.moment_of(name, layer, self._total)
        return None if C is None else damped(C)

    def _cuts_of(self, exact: Mapping[str, Tensor]) -> dict[str, Cut]:
        """Return a checkpoint's cuts, with its factors."""
        cuts = {}
        for name, layer, _ in self._layers(ranked=True):
            V = exact.get(f"{name}.factor_V")
            if V is None:
                continue
            U, blocks, at = {}, [], 0
            for part, start, rows in ((WHOLE, 0, weight_rows(layer).shape[0]), *parts(name, layer)):  # V's order
                u = exact.get(f"{name}.factor_U.{part}")
                if u is not None and part not in U:  # the only part of a layer that is not fused is called WHOLE, too
                    U[part] = u
                    blocks.append(Block(part, start, rows, at, u.shape[1]))
                    at += u.shape[1]
            cuts[name] = Cut(tuple(blocks), U, V, 1.0)
        return cuts

    def _refuse(self, count: int, uncalled: list[str], best: tuple[str, float] | None) -> None:
        """Say why there are no factors at all."""
        none = f"factors would pay for none of {count} layers"
        if len(uncalled) == count:
            said = ", ".join(dict.fromkeys(families(self._module, uncalled).values()))
            raise ConfigError("targets", plain_name(said), f"{none}: no step since the switch called any with finite inputs")
        if best is not None:
            reason = (
                f"that keep so much; at the largest rank that pays, {best[0]} keeps most, {_down(best[1])}: lower energy, and"
            )
            raise ConfigError("energy", self.energy, f"{none} {reason} resume from a checkpoint written before the freeze")
        ranks = sorted({rank for rank in self.plan.values() if rank})
        raise ConfigError("ranks", ranks, f"{none}: start from a checkpoint written before the switch, with lower ranks")

    def _say_whole(self, layers: list[tuple[str, Any, int]], cuts: Mapping[str, Cut], uncalled: list[str]) -> None:
        whole = [name for name, *_ in layers if name not in cuts]
        for names, why in (
            ([name for name in whole if name not in uncalled], "factors would not pay for"),
            ([name for name in whole if name in uncalled], "no step since the switch called"),
        ):
            if names and self._is_first:
                said = ", ".join(dict.fromkeys(families(self._module, names).values()))
                warnings.warn(f"{why} {said}: it stays whole and trains on", stacklevel=2)


def _size(matrix: Tensor) -> tuple[int, int]:
    rows, cols = matrix.shape
    return rows, cols


def _down(share: float) -> str:
    """Return a share, rounded down, so that whoever asks for it gets it."""
    return f"{math.floor(share * 1e4) / 1e4:.4f}"


def obstacle_to_factors(layer: nn.Module, tied_to: list[str] | None = None) -> str | None:
    """Say why a layer cannot be factored although it could have adapters; ``None`` if it can.

    Args:
        layer: a linear layer.
        tied_to: names of layers that share its weight.
    """
    if tied_to:
        return f"shares its weight with {', '.join(tied_to)}, and factors cannot be shared: leave it out"
    return why_not(layer)


def factored_layers(module: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """Yield (name, layer) of every factored layer, in the module's order."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, FactoredLinear))


def factor_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of every factor."""
    return ((f"{name}.{own}", p) for name, layer in factored_layers(module) for own, p in layer.factor_parameters().items())


def expand(module: nn.Module, check: bool = True) -> None:
    """Make every layer plain again: W = U V, and the moments are discarded.

    Args:
        module: is changed.
        check: refuse factors that are NaN or infinite.

    Raises:
        ValueError: they hold some.
    """
    for _, layer in list(factored_layers(module)):
        take_factors(layer, check)
    for _, measured in list(moments.measured_layers(module)):
        moments.end(measured)


@contextmanager
def shown_whole(module: nn.Module) -> Iterator[None]:
    """Show factored layers as plain ones with W = U V inside this block. Nothing may train meanwhile."""
    held: list[tuple[Any, type, Any, Any]] = [
        (layer, type(layer), layer._parameters, layer._modules) for _, layer in factored_layers(module)
    ]
    try:
        for layer, _, parameters, modules in held:
            own = {"weight": nn.Parameter(layer.product(check=False))}
            layer.__dict__["_parameters"] = own | {name: p for name, p in parameters.items() if name not in ADDED}
            layer.__dict__["_modules"] = {name: inner for name, inner in modules.items() if name not in ADDED}
            object.__setattr__(layer, "__class__", layer._plain_class)
        yield
    finally:
        for layer, kind, parameters, modules in held:
            object.__setattr__(layer, "__class__", kind)
            layer.__dict__.update(_parameters=parameters, _modules=modules)


def exact_factors(module: nn.Module) -> dict[str, Tensor]:
    """Return the factors by name, and the moments of layers that are measured: what a bit-exact resume needs."""
    factors = {name: p.detach() for name, p in factor_parameters(module)}
    return {plain_name(name): tensor for name, tensor in (factors | moments.exact_moments(module)).items()}


@torch.no_grad()
def load_exact_factors(module: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Restore the result of ``exact_factors`` into a module that was changed by the same plan.

    Raises:
        ConfigError: a factor is missing, or has another shape.
    """
    for name, p in factor_parameters(module):
        there = exact.get(plain_name(name))
        if there is None or there.shape != p.shape:
            said = "is missing" if there is None else f"has shape {tuple(there.shape)}"
            allowed = f"{said} in the checkpoint, and shape {tuple(p.shape)} here: another rank"
            raise ConfigError("ckpt_path", plain_name(name), allowed)
        p.copy_(there)
    moments.load_moments(module, {name: exact[plain_name(name)] for name in moments.exact_moments(module)})


def rows_of(layer: nn.Module) -> Tensor:
    """Return W as (O, D) in float32 or more, detached."""
    W = weight_rows(layer).detach()
    return W.to(torch.promote_types(W.dtype, torch.float32)).contiguous()
