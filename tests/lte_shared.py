"""What the tests of LTE's updates share: the plain net, comparisons, and a fit that goes on after its end."""

import torch
from torch import nn

from tests.lte_workers import Samples, in_layout, weights


def close(a, b, tolerance=1e-12):
    """The same names, and values within the tolerance."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def same(results, key="weights"):
    """Every rank's result has the same weights, to the bit."""
    for other in results[1:]:
        assert all(torch.equal(results[0][key][name], other[key][name]) for name in results[0][key])


class Plain(nn.Module):
    """The net alone, without Lightning."""

    def __init__(self, net):
        super().__init__()
        self.net, self.out = net.net, net.out

    def forward(self, x):
        return self.out(self.net(x))


def after_a_fit(world, path, fit, **kwargs):
    """A run of 12 steps, and one from a checkpoint that was written when a fit of 6 was over; one batch all the time."""
    order = in_layout(world, 8, 8)
    ends = []
    for steps, ckpt in ((6, None), (12, None), (12, path)):
        module, trainer, _ = fit(world, steps=steps, ckpt=ckpt, data=Samples(8, order=order), **kwargs)
        if steps == 6:
            trainer.save_checkpoint(path)
        ends.append(weights(module))
    return ends[1:]
