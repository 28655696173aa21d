"""What the ranks of test_remake do: gradients of a small model with adapters under DDP, over two accumulated batches."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lowrank_pretrain.lora import model as lora


class Mlp(nn.Module):
    """norm → fc1 → gelu → fc2: both layers' inputs can be made again."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        """Map (.., dim) to (.., dim)."""
        x = self.embed(x)
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


def adapted(recompute_inputs: bool, net: nn.Module | None = None, rank: int = 2, **settings) -> nn.Module:
    """Return a frozen model with adapters that are not zero; ``embed`` trains in full."""
    torch.manual_seed(3)
    net = Mlp() if net is None else net
    plan = {"fc1": rank, "fc2": rank}
    lora.inject(net, plan, recompute_inputs=recompute_inputs, **settings)
    lora.freeze(net, plan)
    with torch.no_grad():
        for _, p in lora.adapter_parameters(net):
            p.normal_(0, 0.3)
    return net


def gradients(recompute_inputs: bool) -> dict[str, torch.Tensor]:
    """Return the averaged gradients."""
    dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(adapted(recompute_inputs))
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    with wrapped.no_sync():
        wrapped(x[0]).square().sum().backward()
    wrapped(x[1]).square().sum().backward()
    return {name: p.grad for name, p in wrapped.module.named_parameters() if p.grad is not None}
