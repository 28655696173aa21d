"""LTE and those who look at a model: averages that are swapped in for an evaluation, forward passes outside of a step."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from tests import lte_habits_workers as workers
from tests.lte_workers import WIDTH, Net, fit

HOWS = [{}, {"reset": True}, {"outer_momentum": 0.9}, {"overlap": 1}, {"mode": "joint"}, {"mode": "sequential"}]


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---- an average in the model's place during an evaluation ------------------------------------------------------------


@pytest.mark.parametrize("average", [{}, {"of": "state_dict"}, {"start": "on_validation_epoch_start"}], ids=str)
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_an_average_that_is_swapped_in_for_an_evaluation_changes_no_training(how, average):
    plain, _, _ = workers.averaged(1, **how)
    after, seen, callbacks = workers.averaged(1, average=average, **how)
    same(plain, after)
    assert len(seen) == 4 and "SwapIn" not in callbacks


FULL = {"update": "full", "rank": 16, "heads": 4}


@pytest.mark.parametrize("how", [{}, {"sync_rest": "merge"}, FULL, {"galore": True, "sync_rest": "merge"}], ids=str)
def test_nor_on_two_workers(ranks, how):
    for plain, *after in ranks(2, workers.averaged_and_not, 2, **how):
        for each in after:
            same(plain, each)


# ---- forward passes outside of a step, as a generator's samples -------------------------------------------------------


class ByHand(Net):
    """Steps by hand, twice a batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()


class Skips(Net):
    """Gives no loss for every third batch."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


class Samples(pl.Callback):
    """Asks a layer after every batch, by batches of other sizes: how far its output is from that of its W."""

    def __init__(self):
        self.off = []

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        layer = module.net[0]
        for x in (torch.ones(WIDTH), torch.ones(3, WIDTH), torch.ones(0, WIDTH)):
            y = layer(x.double())
            self.off.append((y - F.linear(x.double(), layer.weight, layer.bias)).abs().sum().item())


@pytest.mark.parametrize("kind", [Net, ByHand, Skips])
def test_a_forward_pass_outside_of_a_step_sees_w_alone(kind):
    asks = Samples()
    fit(module=kind(), trainer={"callbacks": [asks]}, steps=6)
    assert len(asks.off) >= 9 and not any(asks.off)


# ---- who freezes in the middle of a fit -------------------------------------------------------------------------------


class Freezes(pl.Callback):
    """Freezes a layer after a step, and thaws everything after another."""

    def __init__(self, thaws=False):
        self.thaws = thaws

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 2:
            module.net[0].requires_grad_(False)
        if trainer.global_step == 4 and self.thaws:
            module.requires_grad_(True)


@pytest.mark.parametrize("thaws", [False, True])
@pytest.mark.parametrize("how", [{}, FULL], ids=str)
def test_what_was_frozen_in_the_middle_of_a_fit_stays_so(how, thaws):
    module, _, _ = fit(steps=6, trainer={"callbacks": [Freezes(thaws)]}, **how)
    trains = {name: p.requires_grad for name, p in module.named_parameters()}
    assert trains == {name: thaws or not name.startswith("net.0.") for name in trains}
