"""What the ranks of test_lte_wire do."""

from datetime import timedelta

import torch
import torch.distributed as dist

from lowrank_pretrain.lte.wire import DenseMean
from lowrank_pretrain.lte.workers import Workers


def drawn(rank, merge, n):
    """One worker's increment: normal numbers of sizes that differ by block, one block of zeros and one large outlier."""
    g = torch.Generator().manual_seed(1000 * merge + rank)
    x = torch.randn(n, generator=g) * (1 + torch.arange(n) // 64 % 7)
    x[64:128] = 0
    x[5] *= 50
    return x


def workers():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return Workers(dist.group.WORLD)


def means(wire, n, merges, keep_on="device"):
    """Each merge's mean, the bytes that were counted and promised, and what is pending at the end."""
    group = workers()
    dense = DenseMean(group, wire, n, keep_on)
    results = [dense.mean(drawn(group.rank, merge, n)) for merge in range(merges)]
    return results, group.sent / merges, dense.sent_per_mean(), dense.pending()


def goes_on(wire, n, pending):
    """What is pending after another number of workers took it over."""
    group = workers()
    dense = DenseMean(group, wire, n)
    dense.take_pending(pending)
    before = dense.pending()
    zero = torch.zeros(n)
    return before, sum(dense.mean(zero) for _ in range(30))
