"""LTE and those who look at a model: averages that are swapped in for an evaluation, forward passes outside of a step."""

import pytest
import torch

from tests import lte_habits_workers as workers

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


@pytest.mark.parametrize(
    "how", [{}, {"sync_rest": "merge"}, {"update": "full", "rank": 16, "heads": 4}, {"galore": True, "sync_rest": "merge"}], ids=str
)
def test_nor_on_two_workers(ranks, how):
    for plain, *after in ranks(2, workers.averaged_and_not, 2, **how):
        for each in after:
            same(plain, each)
