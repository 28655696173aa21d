"""What the ranks of test_lte_muloco do: the toy with Muon inside."""

import torch

from lowrank_pretrain.baselines.muon import Muon
from tests import lte_full_workers
from tests.lte_workers import Net


def muon(named):
    """Muon for matrices, AdamW for everything else."""
    named = list(named)
    matrices = [p for _, p in named if p.ndim == 2]
    rest = [p for _, p in named if p.ndim != 2]
    groups = [{"params": matrices, "matrices": True, "weight_decay": 0.1}, {"params": rest, "betas": (0.9, 0.95), "eps": 1e-8}]
    return Muon(groups, lr=2e-2, momentum=0.9, nesterov=False)


class MuonNet(Net):
    """The toy, optimized so."""

    def configure_optimizers(self):
        return muon(self.named_parameters())


def run(world, net=None, **kwargs):
    return lte_full_workers.run(world, module=MuonNet(**(net or {})), **kwargs)


def resumed(world, folder, at, **kwargs):
    """A run, and the names of what its resume ends with otherwise."""
    whole = run(world, folder=folder, save_at=at, exact=True, **kwargs)
    found = {}
    for step in at:
        again = run(world, folder=f"{folder}/again", ckpt=f"{folder}/step={step}.ckpt", exact=True, **kwargs)
        found[step] = [name for name, W in whole["weights"].items() if not torch.equal(W, again["weights"][name])]
        found[step] += ["losses"] if whole["losses"][step:] != again["losses"] else []
    return found
