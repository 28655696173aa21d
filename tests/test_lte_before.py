"""Merging from the first step to a callback's freeze (before="merge"): phases, hand-over, resume, bytes, refusals."""

import pytest
import torch

from lowrank_pretrain import ConfigError, PreLoRA
from lowrank_pretrain.lte import LTEStrategy
from tests import lte_before_workers as workers
from tests import lte_full_workers

OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9}
LATE = ("prelora_lte", "prelora_lte_galore")
# steps of a run of 18: switch at 6, freeze at 9, merges every 3
AT = (2, 4, 6, 8, 9, 10, 13)


def equal(a, b, but=()):
    assert a.keys() == b.keys()
    for name in a:
        assert name in but or torch.equal(a[name], b[name]), name


def same(whole, again, step):
    for before, after in zip(whole, again, strict=True):
        assert before["losses"][step:] == after["losses"], step
        equal(before["weights"], after["weights"])
        assert all(torch.equal(a, b) for a, b in zip(before["moments"], after["moments"], strict=True)), step
        assert before["sent"] == pytest.approx(after["sent"])


RESUMED = [
    (1, "prelora_lte", OUTER, AT),
    (2, "prelora_lte", {"wire": "int4", **OUTER}, AT), (2, "prelora_lte", {"sync_rest": "step", "wire": "int8"}, (4, 8, 10)),
    (2, "prelora_lte_galore", {"wire": "int8", **OUTER}, AT),
    (2, "prelora_lte_galore", {"basis": "shared", "sync_rest": "step"}, (8, 10)),
]  # fmt: skip


@pytest.mark.parametrize(("world", "name", "change", "at"), RESUMED, ids=str)
def test_resume_is_exact_before_at_and_after_the_hand_over(ranks, tmp_path, world, name, change, at):
    def cell(**how):
        return [workers.cell(1, name, **how)] if world == 1 else ranks(world, workers.cell, world, name, **how)

    whole = cell(folder=str(tmp_path), save_at=at, change=change)
    equal(whole[0]["weights"], whole[-1]["weights"])
    assert whole[0]["phases"] == ["lowrank"] and whole[0]["at"] == (6, 9)
    for step in at:
        again = cell(folder=str(tmp_path / "again"), ckpt=str(tmp_path / f"step={step}.ckpt"), change=change)
        same(whole, again, step)
