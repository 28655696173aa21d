"""Read all the private names of Lightning and torch that this package needs; no other file reads any.

Each function says why no public name will do, and with which versions it was tried. When a new version moves a name,
``tests/test_lightning_private.py`` names it, and the fix goes here. Two kinds of names are not collected here: the dicts
``_parameters``, ``_modules`` and ``_buffers`` of ``nn.Module``, on which much code outside torch stands; and private
members that a subclass of ours overrides or reads on itself (``loggers/csv.py``, ``loggers/wandb.py``), which the test
covers too.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _SubprocessScriptLauncher
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # a tensor with a shape and no values: torch 2.14.1
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # in torch's documents, under this name only
from torch.utils._pytree import tree_leaves as tree_leaves  # torch's own walk through nested arguments: torch 2.14.1
from torch.utils._pytree import tree_map as tree_map
from torch.utils.data import DataLoader

# -- Lightning ------------------------------------------------------------------------------------------------------

LOGGED_STEPS = "_batches_that_stepped"
"""The key of the step that loggers write, in the state of ``fit_loop.epoch_loop``. Tried with Lightning 2.6.6."""

SHOULD_ACCUMULATE = "_should_accumulate"
"""The method of ``fit_loop.epoch_loop`` that ``core.trainer.accumulates`` calls. Tried with Lightning 2.6.6."""


class NoExperiment(_DummyExperiment):
    """Stand in for a logger's experiment: any attribute is a function that does nothing. Tried with Lightning 2.6.6."""


def averaged_model(callback: pl.Callback) -> nn.Module | None:
    """Return the averaged model that ``WeightAveraging`` or ``StochasticWeightAveraging`` keeps; None before the fit.

    Both hand the average over only at the end of the fit. Tried with Lightning 2.6.6.
    """
    if not isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
        return None
    model: Any = callback._average_model
    return model.module if isinstance(callback, WeightAveraging) and model is not None else model


def set_averaged_model(callback: pl.Callback, model: nn.Module) -> None:
    """Replace the averaged model that the callback keeps. Tried with Lightning 2.6.6."""
    owner: Any = callback
    if isinstance(callback, WeightAveraging):
        owner._average_model.module = model
    else:
        owner._average_model = model


def comm_state(strategy: Any) -> Any:
    """Return the state that ``DDPStrategy(ddp_comm_state=…)`` was given, or None. Tried with Lightning 2.6.6."""
    return getattr(strategy, "_ddp_comm_state", None)


def spawns_processes(trainer: pl.Trainer) -> bool:
    """Return whether training runs in processes that ``fit`` spawns or forks. Tried with Lightning 2.6.6."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def reruns_command(trainer: pl.Trainer) -> bool:
    """Return whether the strategy starts its processes by running ``sys.argv`` again. Tried with Lightning 2.6.6."""
    return isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher)


def send_module(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks, as DDP does when it wraps a module. Tried with Lightning 2.6.6."""
    _sync_module_states(module)


def pruned_layers(callback: ModelPruning) -> list[nn.Module]:
    """Return the layers that ``ModelPruning`` will prune. Tried with Lightning 2.6.6."""
    return [layer for layer, _ in callback._parameters_to_prune or ()]


def set_sampler_injection(trainer: pl.Trainer, inject: bool) -> bool:
    """Set whether Lightning adds a ``DistributedSampler`` to loaders; return the old value.

    The Trainer accepts ``use_distributed_sampler`` only in its constructor. Tried with Lightning 2.6.6.
    """
    connector = trainer._accelerator_connector
    before, connector.use_distributed_sampler = connector.use_distributed_sampler, inject
    return before


def wrapped_sampler(sampler: Any) -> Any:
    """Return the user's sampler in Lightning's ``DistributedSamplerWrapper``, or None. Tried with Lightning 2.6.6."""
    return getattr(sampler.dataset, "_sampler", None)


def trainer_of(module: Any) -> pl.Trainer | None:
    """Return the Trainer that a LightningModule is attached to; None where the public property would raise.

    Tried with Lightning 2.6.6.
    """
    return getattr(module, "_trainer", None)


def is_compiled_whole(module: Any) -> bool:
    """Return whether Lightning trains a LightningModule that ``torch.compile`` was called on. Tried with Lightning 2.6.6."""
    return getattr(module, "_compiler_ctx", None) is not None


def has_begun(logger: Any) -> bool:
    """Return whether a logger has created its experiment; the public property would create it. Tried with Lightning 2.6.6."""
    return getattr(logger, "_experiment", None) is not None


# -- torch: modules, loaders, optimizers ----------------------------------------------------------------------------


COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that ``module.compile()`` sets, else None. Tried with torch 2.14.1."""


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled, by ``module.compile()`` or ``torch.compile``. Tried with torch 2.14.1."""
    if getattr(module, COMPILED_CALL, None) is not None:
        return True
    dynamo = sys.modules.get("torch._dynamo")  # not imported unless something was compiled
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def gradient_hooks(tensor: Tensor) -> list[dict[int, Callable]]:
    """Return what a tensor calls with its gradient, and after accumulating it, by key. Tried with torch 2.14.1."""
    found = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    return [hooks for hooks in found if hooks]


def runs_compiled(frame: FrameType) -> bool:
    """Return whether a frame runs a function that ``torch.compile`` made. Tried with torch 2.14.1."""
    return frame.f_code.co_name == "compile_wrapper" and str(frame.f_globals.get("__name__")).startswith("torch._dynamo")


def unsaved_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that ``state_dict`` leaves out. Tried with torch 2.14.1."""
    return module._non_persistent_buffers_set


def state_dict_hooks(module: nn.Module) -> dict[Any, Callable]:
    """Return a module's hooks on ``state_dict``, to find ours in a copy of the module. Tried with torch 2.14.1."""
    return module._state_dict_hooks


def shut_down(loader: DataLoader) -> None:
    """End a loader's worker processes now.

    The garbage collector may run while another loader forks, and each worker then takes 5 seconds to end.
    Tried with torch 2.14.1 and torchdata's StatefulDataLoader.
    """
    workers: Any = loader
    iterator, workers._iterator = workers._iterator, None
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def inner_schedulers(scheduler: Any) -> Sequence[Any]:
    """Return the schedulers inside a ``SequentialLR`` or ``ChainedScheduler``. Tried with torch 2.14.1."""
    return getattr(scheduler, "_schedulers", ())


def found_infinities(scaler: Any, optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield a gradient scaler's flag per device: whether it met an infinite gradient. Tried with torch 2.14.1."""
    yield from scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()


# called in every step, so not wrapped in a function of ours
fused_adamw = torch._fused_adamw_
"""The kernel of ``torch.optim.AdamW(fused=True)``, without what is around it there. Tried with torch 2.14.1."""
foreach_norm = torch._foreach_norm
"""The kernel of ``tensor_norms``, for lists of tensors of one dtype and device. Tried with torch 2.14.1."""


aten_norms = torch.ops.aten._foreach_norm
"""``foreach_norm`` as a subclass of ``Tensor`` sees it. Tried with torch 2.14.1."""


def tensor_norms(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the 2-norm of each tensor; on CUDA in one kernel. Tried with torch 2.14.1."""
    return list(foreach_norm(list(tensors), 2, dtype=dtype))


def keep_out_of_graphs(function: Callable) -> Callable:
    """Hide a function from ``torch.compile``, as torch's optimizers do. The public name would import dynamo.

    Tried with torch 2.14.1.
    """
    return torch._disable_dynamo(function)


# -- torch: processes -----------------------------------------------------------------------------------------------

LEFT_OUT_OF_DDP = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a module that names the parameters and buffers which DDP leaves out. Tried with torch 2.14.1."""


def comm_hooks(wrapper: Any) -> list[tuple[Callable, Any]]:
    """Return DDP's communication hooks as (hook, state); a wrapper of another kind has none. Tried with torch 2.14.1."""
    return list(getattr(wrapper, "_comm_hooks", ()))


def leave_out_of_ddp(module: Any, names: Iterable[str]) -> None:
    """Tell DDP to ignore these parameters and buffers when it wraps the module. Tried with torch 2.14.1."""
    setattr(module, LEFT_OUT_OF_DDP, sorted(names))


def rebuild_buckets(wrapper: DistributedDataParallel) -> None:
    """Rebuild DDP's buckets in the order in which gradients came, as its next forward pass would. Tried with torch 2.14.1."""
    wrapper.reducer._rebuild_buckets()


def set_timeout(limit: timedelta) -> None:
    """Bound how long collectives on the default group may take. Tried with torch 2.14.1."""
    getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)(limit)


# -- torch: what may be read from a file, where a thread is -----------------------------------------------------------


def loadable_names() -> dict[str, Any]:
    """Return the types that ``torch.load(weights_only=True)`` allows, by full name. Tried with torch 2.14.1."""
    from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals

    return {**_get_allowed_globals(), **_get_user_allowed_globals()}


# -- torch: inside of an autograd function ----------------------------------------------------------------------------


def transforms_active() -> bool:
    """Return whether ``torch.func`` transforms (vmap, grad, jvp) are active. Tried with torch 2.14.1."""
    return torch._C._are_functorch_transforms_active()


def is_functional_call(frame: FrameType) -> bool:
    """Return whether it is ``torch.func.functional_call`` whose code runs in a frame. Tried with torch 2.14.1."""
    return frame.f_globals.get("__name__") == "torch.nn.utils._named_member_accessor"


@contextmanager
def outside_transforms(tensor: Tensor) -> Iterator[Tensor]:
    """Step out of ``torch.func``'s transforms, with the plain tensor that they passed in; batched dimensions come first.

    Tried with torch 2.14.1.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        batched = functorch.maybe_get_bdim(tensor)
        tensor = functorch.get_unwrapped(tensor)
        tensor = tensor if batched < 0 else tensor.movedim(batched, 0)
    with temporarily_clear_interpreter_stack():
        yield tensor


def forward_mode_active() -> bool:
    """Return whether forward-mode derivatives are being computed. Tried with torch 2.14.1."""
    return torch.autograd.forward_ad._current_level >= 0


def is_traced() -> bool:
    """Return whether ``torch.jit.trace`` is recording the forward pass. Tried with torch 2.14.1."""
    return torch._C._is_tracing()


def is_legacy_batched(tensor: Tensor) -> bool:
    """Return whether a tensor comes from ``autograd.grad(is_grads_batched=True)``. Tried with torch 2.14.1."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_view(tensor: Tensor) -> bool:
    """Return whether a tensor is a view of another one. Tried with torch 2.14.1."""
    return tensor._is_view()


# -- torch: what autograd keeps ---------------------------------------------------------------------------------------


def hooks_recompute() -> bool:
    """Return whether what autograd keeps now goes to activation checkpointing, which counts it. Tried with torch 2.14.1."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top is None else top(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def runs_again() -> bool:
    """Return whether activation checkpointing (not the reentrant kind) repeats a forward pass now. Tried with torch 2.14.1."""
    return torch._C._current_graph_task_id() != -1 and hooks_recompute()


def kept_by(node: Any, name: str) -> Tensor | None:
    """Return the tensor that a node of autograd's graph keeps under a name, itself and not a copy; None if it keeps none.

    A node's public attributes call the hooks of ``saved_tensors_hooks``, which may compute or move a lot. So the raw one is
    asked for hooks first. Tried with torch 2.14.1.

    Raises:
        LookupError: hooks hold something else in its place, or this version of torch does not tell.
        RuntimeError: torch's own: it was changed in place, or is freed.
    """
    raw: Any = getattr(node, f"_raw_saved_{name}")
    if not hasattr(raw, "unpack_hook"):
        raise LookupError(name)
    if raw.unpack_hook is None:
        return getattr(node, f"_saved_{name}")
    held = raw.data
    if not isinstance(held, Tensor) or raw.unpack_hook.__module__ == "torch.utils.checkpoint":
        raise LookupError(name)
    tensor = getattr(node, f"_saved_{name}")
    if tensor.data_ptr() != held.data_ptr() or tensor.shape != held.shape:
        raise LookupError(name)
    return tensor


def scalar_of(node: Any, name: str) -> Any:
    """Return a setting (no tensor) that a node of autograd's graph keeps under a name. Tried with torch 2.14.1."""
    value = getattr(node, f"_saved_{name}")
    return value - 2**64 if isinstance(value, int) and value >= 2**63 else value  # torch shows a dim of -1 as unsigned


def output_of(node: Any) -> tuple[torch.Size, torch.dtype]:
    """Return shape and dtype of the first output of a node of autograd's graph. Tried with torch 2.14.1."""
    first = node._input_metadata[0]
    return torch.Size(first.shape), first.dtype
