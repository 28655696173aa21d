"""Apply LoRA to a whole model: inject, freeze, merge, eject, and save the adapters' state (pure torch)."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import state_dict_hooks
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import Adopter, Inherit
from lowrank_pretrain.core.targets import all_targets, output_heads, parts, plain_name, tied_layers
from lowrank_pretrain.lora import storing
from lowrank_pretrain.lora.layer import ADDED, LoRALinear, by_layer, give_adapters, keep_rows, lora_layers, take_adapters
from lowrank_pretrain.lora.products import RestPart


def inject(
    module: nn.Module,
    plan: Mapping[str, int],
    alpha: float | None = None,
    train_A: bool = True,
    seed: int | None = None,
    recompute_inputs: bool = False,
) -> list[Inherit]:
    """Give every target of the plan an adapter of its rank. Outputs do not change by one bit (B = 0).

    Args:
        module: names in ``plan`` start from here.
        plan: target -> rank; rank 0 gets no adapter (and is frozen by ``freeze``).
        alpha: scale = alpha / rank; ``None``: alpha = rank, scale 1.
        train_A: ``False`` keeps A as drawn and trains B alone (LoRA-FA, arXiv 2308.03303), which saves activations.
        seed: of the private generators that draw A; default: the run's seed.
        recompute_inputs: make a layer's input again in backward, from what the operation before it keeps anyway (GELU, SiLU,
            norms, products such as SwiGLU's), in place of keeping it for A's gradient.

    Returns:
        For each target that was an output head tied to the embedding: its own weight, a copy.

    Raises:
        ConfigError: a name that is not a target, a rank above min(D, O), or a tied weight that is not an output head.
    """
    targets = all_targets(module)
    plan = Plan(plan).check(targets)
    if any(True for _ in lora_layers(module)):
        raise RuntimeError("adapters are there already: call lora.eject first")
    untied = untie(module, {targets[name].layer_name for name in plan if plan[name] > 0})
    for layer_name, group in by_layer(targets, plan).items():
        layer = group[0].layer
        ranked = [t for t in group if plan[t.name] > 0]
        if ranked or len(group) < len(parts(layer_name, layer)):
            give_adapters(layer, [(t, plan[t.name]) for t in ranked], alpha, train_A, seed, recompute_inputs)
    switch_fast_path(module, off=True)
    _merge_where_shared(module)
    return untied


def freeze(
    module: nn.Module,
    plan: Mapping[str, int],
    freeze_rest: bool = False,
    frozen_dtype: str | None = None,
    keep_original: bool = False,
) -> list[Inherit]:
    """Freeze W and b of the plan's targets; with ``freeze_rest`` also everything else but the adapters.

    A fused layer of which only some row blocks are targets (say q and v) continues to train the others: they become
    parameters ``rest_weight.<part>`` that are views of W.

    Args:
        module: has adapters by the same plan.
        plan: target -> rank.
        freeze_rest: see above.
        frozen_dtype: store each frozen W in this type (``frozen.KINDS``) and multiply in it, but for the layers that
            ``storing.frozen_layers`` leaves out; ``None``: as it is.
        keep_original: keep W itself in the host's memory: merges add to it.

    Returns:
        For those views, the rows and optimizer state that they take over.

    Raises:
        ConfigError: a W that the type cannot hold.
    """
    inherited: list[Inherit] = []
    targets = all_targets(module)
    for layer_name, group in by_layer(targets, plan).items():
        layer = group[0].layer
        chosen = {t.part for t in group}
        others = [p for p in parts(layer_name, layer) if p[0] not in chosen]
        trained = layer.weight.requires_grad
        if others and trained and not freeze_rest:
            inherited += keep_rows(cast(LoRALinear, layer), [RestPart(*other) for other in others])
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
    if freeze_rest:
        adapters = {id(p) for _, p in adapter_parameters(module)}
        for _, p in nn.Module.named_parameters(module):
            if id(p) not in adapters:
                p.requires_grad_(False)
    if frozen_dtype is not None:
        storing.store_frozen(module, plan, freeze_rest, frozen_dtype, keep_original)
    return inherited


def merge(module: nn.Module) -> None:
    """Fold the adapters into W and set B = 0. The function stays the same to rounding; merging again changes nothing.

    A W that was stored in a cheaper type has its own again: the cheaper one would round the update away.

    Raises:
        ValueError: the adapters hold NaN or infinite numbers.
    """
    with torch.no_grad():
        for _, layer in lora_layers(module):
            layer.write_weight(layer.merged_weight())
            for factor in layer.lora_B.values():
                factor.zero_()


def eject(module: nn.Module, check: bool = True) -> None:
    """Merge, then give every layer its plain class back. Frozen parameters stay frozen.

    Args:
        module: is changed.
        check: refuse adapters that are NaN or infinite; without it W becomes NaN or infinite too.

    Raises:
        ValueError: they hold some.
    """
    with torch.no_grad():
        for _, layer in list(lora_layers(module)):
            layer.write_weight(layer.merged_weight(check))
            take_adapters(layer)  # the factors keep their values: code that holds them can resume exactly
    switch_fast_path(module, off=False)
    for child in module.modules():
        hooks = state_dict_hooks(child)
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Shared)]:
            del hooks[key]


@contextmanager
def shown_plain(module: nn.Module, flags: Mapping[str, bool]) -> Iterator[None]:
    """Show the module in this block as the plain model with merged weights, without adapters.

    Args:
        module: nothing may train it meanwhile.
        flags: ``requires_grad`` by name of a plain parameter.
    """
    now = [(p, p.requires_grad) for _, p in nn.Module.named_parameters(module)]
    layers = [(layer, type(layer)) for _, layer in lora_layers(module)]
    plain = {id(layer.weight): nn.Parameter(layer.merged_weight(check=False), False) for layer, _ in layers}
    held = [
        (child, child._parameters, child._modules)
        for child in module.modules()
        if isinstance(child, LoRALinear) or any(id(p) in plain for p in child._parameters.values())
    ]
    try:
        for child, parameters, modules in held:
            own = {name: plain.get(id(p), p) for name, p in parameters.items()}
            if isinstance(child, LoRALinear):
                own.pop("lora_A")
                child.__dict__["_modules"] = {name: inner for name, inner in modules.items() if name not in ADDED}
            child.__dict__["_parameters"] = own
        for layer, _ in layers:
            object.__setattr__(layer, "__class__", layer._plain_class)
        for name, p in nn.Module.named_parameters(module):
            if name in flags:
                p.requires_grad_(flags[name])
        for weight in plain.values():  # also for a frozen W: it holds the trained result
            weight.requires_grad_(True)
        yield
    finally:
        for layer, adapted in layers:
            object.__setattr__(layer, "__class__", adapted)
        for child, parameters, modules in held:
            child.__dict__.update(_parameters=parameters, _modules=modules)
        for p, trains in now:
            p.requires_grad_(trains)


def is_finite(module: nn.Module) -> bool:
    """Return whether no adapter holds NaN or infinite numbers."""
    return all(bool(torch.isfinite(p).all()) for _, p in adapter_parameters(module))


def adapter_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of every adapter factor."""
    for name, layer in lora_layers(module):
        for own, p in layer.named_parameters():
            if own.startswith("lora_"):
                yield f"{name}.{own}", p


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model with merged weights; the module with adapters returns the same.

    Raises:
        ValueError: the adapters hold NaN or infinite numbers.
    """
    for _, layer in lora_layers(module):
        layer.merged_weight()  # looks
    return dict(module.state_dict())


def exact_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the unmerged W and the factors of every layer with adapters, which a bit-exact resume needs."""
    exact = {}
    for name, layer in lora_layers(module):
        exact[f"{name}.weight"] = layer.weight.detach()
        exact |= {f"{name}.{own}": p.detach() for own, p in layer.named_parameters() if own.startswith("lora_")}
        exact |= storing.stored_tensors(name, layer._stored)
    return exact


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer under each of its names, adapters and unmerged weights included."""
    # a user's class may hide some of them: its own named_parameters() is not asked
    parameters = nn.Module.named_parameters(module, remove_duplicate=False)
    named = [*parameters, *nn.Module.named_buffers(module, remove_duplicate=False)]
    return {name: tensor if is_lazy(tensor) else tensor.detach() for name, tensor in named}


@torch.no_grad()
def load_exact(module: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Restore the result of ``exact_state`` into a module changed by the same plan.

    Raises:
        ConfigError: the names or shapes differ.
    """
    exact = {**exact, **storing.stored_again(module, exact)}
    state = own_tensors(module)
    for name, layer in lora_layers(module):
        if layer._memory is not None:
            layer._memory.displaced = None  # W comes with these values
        state |= storing.stored_tensors(name, layer._stored)
    missing = sorted(exact_state(module).keys() - exact.keys()) or sorted(exact.keys() - state.keys())
    if missing:
        raise ConfigError("ckpt_path", missing[0], "adapters of the checkpoint and of this model differ: was it another model?")
    for name, tensor in exact.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} there and {tuple(state[name].shape)} in this model"
            raise ConfigError("ckpt_path", name, f"has shape {shapes}")
        state[name].copy_(tensor)


def clone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy that no later step changes."""
    return {name: tensor.clone() for name, tensor in state.items()}


class Adapters(Adopter):
    """Take over a plan as LoRA adapters: used if neither strategy nor optimizer is an ``Adopter``."""

    makes_adapters = True
    adapter_settings: Mapping[str, Any] = MappingProxyType({})  # it takes them all from the callback

    def __init__(
        self,
        alpha: float | None = None,
        train_A: bool = True,
        freeze_rest: bool = False,
        recompute_inputs: bool = False,
        frozen_dtype: str | None = None,
        keep_original: bool = False,
    ) -> None:
        self.alpha, self.train_A, self.freeze_rest = alpha, train_A, freeze_rest
        self.recompute_inputs = recompute_inputs
        self.frozen_dtype, self.keep_original = frozen_dtype, keep_original
        self._checked = frozen_dtype is None

    def check_adopt(self, names: Iterable[str], module: nn.Module) -> None:
        """Refuse a ``frozen_dtype`` in which the device, or the kernel for a target's shape, cannot multiply."""
        if self.frozen_dtype is not None:
            left_out = storing.check_frozen(module, dict.fromkeys(names, 0), self.freeze_rest, self.frozen_dtype)
            if left_out is not None:
                warnings.warn(left_out, stacklevel=2)
        self._checked = True

    def adopt(self, plan: Plan, module: nn.Module) -> list[Inherit]:
        """Give every target of the plan an adapter, at the switch."""
        self.plan, self.module = plan, module
        if not self._checked:  # a callback that names its targets only now
            self.check_adopt(plan, module)
        return inject(module, plan, self.alpha, self.train_A, recompute_inputs=self.recompute_inputs)

    def release(self) -> list[Inherit]:
        """Stop training the targets' W and b, at the freeze."""
        return freeze(self.module, self.plan, self.freeze_rest, self.frozen_dtype, self.keep_original)


class _Shared:
    """Put the merged weight into the state dict of a module that holds a layer's W as its own parameter."""

    _from_public_api = True  # torch looks for it where a hook is no function

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer, self.name = layer, name

    def __call__(self, owner: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        if not isinstance(self.layer, LoRALinear):  # shown as the plain layer, with the merged weight everywhere
            return
        if not isinstance(state_dict.get(prefix + self.name, self.layer.weight), nn.Parameter):  # keep_vars: unchanged
            state_dict[prefix + self.name] = self.layer.merged_weight(check=False)


def _merge_where_shared(module: nn.Module) -> None:
    """Make the state dict hold merged weights also where a ParameterList or another module holds W itself."""
    layers = {id(layer.weight): layer for _, layer in lora_layers(module)}
    for child in module.modules():
        for name, p in child._parameters.items():
            if id(p) in layers and not isinstance(child, LoRALinear):
                child.register_state_dict_post_hook(_Shared(layers[id(p)], name))
                layers[id(p)].__dict__["_remembers"] = False  # the other module would load the merged weight into W itself


def untie(module: nn.Module, layer_names: set[str]) -> list[Inherit]:
    """Give tied output heads among the layers their own weight."""
    heads, tied = output_heads(module), tied_layers(module)
    untied = []
    for name, layer in module.named_modules():
        if plain_name(name) in layer_names and plain_name(name) in tied:
            if id(layer) not in heads:
                raise ConfigError("targets", plain_name(name), f"shares its weight with {', '.join(tied[plain_name(name)])}")
            shared = layer.weight
            layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            untied.append(Inherit(layer.weight, shared, 0, 0, shared.shape[0]))
            warnings.warn(
                f"{plain_name(name)} is a target and no longer shares its weight with {', '.join(tied[plain_name(name)])}: "
                f"{shared.numel():,} parameters more. Files of this run hold two weights: load them into a model that is built "
                "untied (tie_word_embeddings=False, or without the line that ties); a tied one would take the last for both, "
                "without an error, and be another model",
                stacklevel=2,
            )
    if untied:
        for child in module.modules():
            config: Any = getattr(child, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config = copy.copy(config)
                config.tie_word_embeddings = False
                child.config = config
    return untied


def switch_fast_path(module: nn.Module, off: bool) -> None:
    """Switch off the eval fast path of ``nn.TransformerEncoderLayer``, which would skip the adapters of linear1/2."""
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoderLayer):
            layer: Any = child
            if off:
                layer._lora_activation = layer.activation_relu_or_gelu
                layer.activation_relu_or_gelu = 0  # "activation was not relu or gelu": the layer takes its slow path
            elif hasattr(layer, "_lora_activation"):
                layer.activation_relu_or_gelu = layer._lora_activation
                del layer._lora_activation
