"""The private names of Lightning and torch that this package reads are there, and are read in one file."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, SequentialSampler

from lowrank_pretrain.core import lightning_private as private
from lowrank_pretrain.core.trainer import accumulates

PACKAGE = Path(private.__file__).parents[1]

# name -> where it lives: an attribute of the object, or a word of its source
NAMES = {
    "_should_accumulate": "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop",
    "_batches_that_stepped": "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop",
    "_average_model": "lightning.pytorch.callbacks:WeightAveraging",
    "_average_model ": "lightning.pytorch.callbacks:StochasticWeightAveraging",
    "_parameters_to_prune": "lightning.pytorch.callbacks:ModelPruning",
    "_ddp_comm_state": "lightning.pytorch.strategies:DDPStrategy",
    "_accelerator_connector": "lightning.pytorch.trainer.trainer:Trainer",
    "use_distributed_sampler": "lightning.pytorch.trainer.connectors.accelerator_connector:_AcceleratorConnector",
    "_sampler": "lightning.fabric.utilities.distributed:_DatasetSamplerWrapper",
    "_MultiProcessingLauncher": "lightning.pytorch.strategies.launchers",
    "_SubprocessScriptLauncher": "lightning.pytorch.strategies.launchers",
    "_sync_module_states": "lightning.pytorch.overrides.distributed",
    "_DummyExperiment": "lightning.fabric.loggers.logger",
    "_trainer": "lightning.pytorch.core.module:LightningModule",
    "_compiler_ctx": "lightning.pytorch.utilities.compile",
    # of loggers: what classes of ours override, or read on themselves
    "_check_log_dir_exists": "lightning.pytorch.loggers.csv_logs:ExperimentWriter",
    "_rewrite_with_new_header": "lightning.pytorch.loggers.csv_logs:ExperimentWriter",
    "_experiment": "lightning.fabric.loggers.csv_logs:CSVLogger",
    "_experiment ": "lightning.pytorch.loggers.wandb:WandbLogger",
    "_experiment  ": "lightning.pytorch.loggers.comet:CometLogger",
    "_attach_id": "lightning.pytorch.loggers.wandb:WandbLogger",
    "_offline": "lightning.pytorch.loggers.wandb:WandbLogger",
    "_wandb_init": "lightning.pytorch.loggers.wandb:WandbLogger",
    # torch's
    "_compiled_call_impl": "torch.nn:Module",
    "_non_persistent_buffers_set": "torch.nn:Module",
    "_state_dict_hooks": "torch.nn:Module",
    "_iterator": "torch.utils.data:DataLoader",
    "_shutdown_workers": "torch.utils.data.dataloader:_MultiProcessingDataLoaderIter",
    "_schedulers": "torch.optim.lr_scheduler:SequentialLR",
    "_optimizer_load_state_dict_pre_hooks": "torch.optim:Optimizer",
    "_optimizer_load_state_dict_post_hooks": "torch.optim:Optimizer",
    "_per_optimizer_states": "torch.amp:GradScaler",
    "found_inf_per_device": "torch.amp:GradScaler",
    "_foreach_norm": "torch",
    "_fused_adamw_": "torch",
    "_disable_dynamo": "torch",
    "_comm_hooks": "torch.nn.parallel:DistributedDataParallel",
    "_ddp_params_and_buffers_to_ignore": "torch.nn.parallel:DistributedDataParallel",
    "_rebuild_buckets": "torch.distributed:Reducer",
    "_set_pg_timeout": "torch.distributed.distributed_c10d",
    "_get_allowed_globals": "torch._weights_only_unpickler",
    "_get_user_allowed_globals": "torch._weights_only_unpickler",
    "_are_functorch_transforms_active": "torch:_C",
    "is_functorch_wrapped_tensor": "torch._C:_functorch",
    "maybe_get_bdim": "torch._C:_functorch",
    "get_unwrapped": "torch._C:_functorch",
    "temporarily_clear_interpreter_stack": "torch._functorch.pyfunctorch",
    "_named_member_accessor": "torch.nn.utils",
    "_is_tracing": "torch:_C",
    "is_legacy_batchedtensor": "torch._C:_functorch",
    "_current_level": "torch.autograd.forward_ad",
    "_is_view": "torch:Tensor",
    "_top_saved_tensors_default_hooks": "torch._C:_autograd",
    "_current_graph_task_id": "torch:_C",
    "_input_metadata": "torch.autograd.graph:Node",
    "FakeTensor": "torch._subclasses.fake_tensor",
    "TorchDispatchMode": "torch.utils._python_dispatch",
    "tree_leaves": "torch.utils._pytree",
    "tree_map": "torch.utils._pytree",
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.strip())
def test_a_private_name_is_still_there(name):
    module, _, path = NAMES[name].partition(":")
    owner, name = importlib.import_module(module), name.strip()
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        said = re.search(rf"\b{name}\b", inspect.getsource(owner))
        assert said, f"{NAMES[name]} no longer has {name}: mend lowrank_pretrain/core/lightning_private.py"


def reads(path: Path) -> set[str]:
    """Private names that a file reads on something else than ``self`` or ``cls``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
            owner, *rest = node.args
            if getattr(owner, "id", "") not in ("self", "cls"):
                found |= {a.value for a in rest[:1] if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "lightning"):
            found |= {*node.module.split("."), *(alias.name for alias in node.names)}
    return {name for name in found if re.match(r"_[a-zA-Z]", name)}


def test_private_names_are_read_in_one_file():
    known = {name.strip() for name in NAMES} | {"_subclasses", "_weights_only_unpickler", "_pytree", "_python_dispatch"}
    spread = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in PACKAGE.rglob("*.py")
        if path != Path(private.__file__)
        for name in reads(path) & known
    }
    assert not spread


class Callbacks:
    """A model of two layers, and a Trainer that is not started."""

    def __init__(self):
        self.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        self.module = pl.LightningModule()
        self.module.net = nn.Linear(2, 2)


def test_what_is_asked_of_lightning_is_answered():
    parts = Callbacks()
    assert accumulates(parts.trainer) in (True, False)
    assert private.trainer_of(parts.module) is None and private.trainer_of(nn.Linear(1, 1)) is None
    parts.module.trainer = parts.trainer
    assert private.trainer_of(parts.module) is parts.trainer
    assert not private.spawns_processes(parts.trainer) and not private.reruns_command(parts.trainer)
    assert private.comm_state(DDPStrategy(ddp_comm_state=3)) == 3 and private.comm_state(parts.trainer.strategy) is None
    assert private.set_sampler_injection(parts.trainer, False) is True
    assert private.set_sampler_injection(parts.trainer, True) is False
    assert private.LOGGED_STEPS in parts.trainer.fit_loop.epoch_loop.on_save_checkpoint()
    assert not private.is_compiled_whole(parts.module)


def test_what_autograd_keeps_is_read_without_calling_hooks_that_recompute():
    h = torch.ones(2, 3, requires_grad=True) * 1
    node = nn.functional.gelu(h, approximate="tanh").grad_fn
    kept = private.kept_by(node, "self")
    assert kept.data_ptr() == h.data_ptr() and private.scalar_of(node, "approximate") == "tanh"
    assert private.output_of(node) == (torch.Size([2, 3]), torch.float32) and not private.hooks_recompute()
    assert private.kept_by((h * 2).grad_fn, "self") is None
    assert private.scalar_of(nn.functional.glu(h @ torch.ones(3, 2)).grad_fn, "dim") == -1
    seen = []

    def inside(h):
        seen.append(private.hooks_recompute())
        return nn.functional.gelu(h)

    x = checkpoint(inside, h, use_reentrant=False)
    with pytest.raises(LookupError):
        private.kept_by(x.grad_fn, "self")
    assert seen == [True]


def test_averages_are_found_and_replaced():
    average, swa = WeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)
    assert private.averaged_model(average) is None and private.averaged_model(pl.Callback()) is None
    average._average_model = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    for callback in (average, swa):
        model = nn.Linear(3, 3)
        private.set_averaged_model(callback, model)
        assert private.averaged_model(callback) is model


def test_pruned_layers_and_begun_loggers(tmp_path):
    layer = nn.Linear(2, 2)
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(layer, "weight")], amount=0.1)
    assert private.pruned_layers(pruning) == [layer]
    logger = CSVLogger(tmp_path)
    assert not private.has_begun(logger)
    assert logger.experiment is not None and private.has_begun(logger)


def test_what_is_asked_of_torch_is_answered():
    module = nn.BatchNorm1d(2)
    module.register_buffer("lost", torch.zeros(1), persistent=False)
    assert private.unsaved_buffers(module) == {"lost"}
    handle = module.register_state_dict_post_hook(lambda *_: None)
    assert len(private.state_dict_hooks(module)) == 1
    handle.remove()
    assert not private.is_compiled(module)
    module.compile(backend="eager")
    assert private.is_compiled(module) and private.is_compiled(torch.compile(nn.Linear(1, 1), backend="eager"))
    private.leave_out_of_ddp(module, {"b", "a"})
    assert getattr(module, private.LEFT_OUT_OF_DDP) == ["a", "b"]
    assert private.comm_hooks(module) == []
    norms = private.tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(2)], torch.float64)
    assert [norm.item() for norm in norms] == [5, 0] and norms[0].dtype == torch.float64


def test_schedulers_of_an_optimizer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    parts = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
    assert list(private.inner_schedulers(torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [1]))) == parts
    assert not private.inner_schedulers(parts[0])


def test_infinities_that_a_scaler_has_found():
    p = nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([p], 0.1), torch.amp.GradScaler("cpu")
    scaler.scale(p.sum() * float("inf")).backward()
    scaler.unscale_(optimizer)
    assert [found.item() for found in private.found_infinities(scaler, optimizer)] == [1]


def test_worker_processes_end_at_once():
    loader = DataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert [int(x) for x in loader] == [1, 2]
    workers = loader._iterator._workers
    private.shut_down(loader)
    assert not any(worker.is_alive() for worker in workers) and loader._iterator is None
    private.shut_down(loader)  # no workers: nothing to do


def test_what_an_autograd_function_asks():
    x = torch.ones(2)
    assert not private.transforms_active() and not private.forward_mode_active() and not private.is_traced()
    seen = []
    torch.func.vmap(lambda t: (seen.append(private.transforms_active()), t)[1])(torch.ones(2, 2))
    with torch.autograd.forward_ad.dual_level():
        seen.append(private.forward_mode_active())
    assert seen == [True, True]
    assert private.is_view(x[:1]) and not private.is_view(x) and not private.is_legacy_batched(x)


def test_the_users_sampler_under_lightnings():
    sampler = SequentialSampler([1, 2])
    wrapper = importlib.import_module("lightning.fabric.utilities.distributed").DistributedSamplerWrapper
    assert private.wrapped_sampler(wrapper(sampler, num_replicas=1, rank=0)) is sampler


def test_what_torch_reads_from_a_file_of_weights():
    assert private.loadable_names()["torch._utils._rebuild_tensor_v2"] is torch._utils._rebuild_tensor_v2
