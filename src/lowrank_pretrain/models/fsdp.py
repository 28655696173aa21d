"""Shard our modules with FSDP2, in their ``configure_model``, where Lightning's ModelParallelStrategy gives them a mesh."""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lowrank_pretrain.core.errors import ConfigError


def shard(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Shard the parameters of a model over ranks: block by block, then the remainder. A second call changes nothing.

    Args:
        model: the network; its names do not change.
        mesh: the strategy's, with dimensions ``data_parallel`` and ``tensor_parallel``. None: nothing is done.

    Raises:
        ConfigError: ``tensor_parallel`` is more than one rank, which is ModelParallelStrategy's default.
    """
    if mesh is None or isinstance(model, FSDPModule):
        return
    if mesh["tensor_parallel"].size() > 1:
        ranks = mesh.size()
        raise ConfigError(
            "tensor_parallel_size", mesh["tensor_parallel"].size(),
            f"must be 1: use ModelParallelStrategy(data_parallel_size={ranks}, tensor_parallel_size=1)",
        )  # fmt: skip
    data_parallel = mesh["data_parallel"]
    for block in blocks(model):
        fully_shard(block, mesh=data_parallel)
    fully_shard(model, mesh=data_parallel)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the repeated layers: the children of the outermost lists whose children are all of one class."""
    for child in model.children():
        layers = list(child.children()) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        if len(layers) > 1 and len({type(layer) for layer in layers}) == 1 and list(child.parameters()):
            yield from layers
        else:
            yield from blocks(child)
