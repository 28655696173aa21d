"""Merging from the first step to a callback's freeze (before="merge"): phases, hand-over, resume, bytes, refusals."""

import pytest
import torch

from lowrank_pretrain import ConfigError, PreLoRA
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.wire import Codec, padded
from lowrank_pretrain.run import method
from tests import lte_before_workers as workers
from tests import lte_workers
from tests.lte_workers import Net

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
    (2, "prelora_lte", {"wire": "int8", "overlap": 2, "keep_on": "cpu", **OUTER}, (3, 4, 6, 8, 9, 12)),
    pytest.param(2, "prelora_lte_galore", {"basis": "shared", "sync_rest": "step"}, (8, 10), marks=pytest.mark.slow),
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


# ---- what happens in each phase -----------------------------------------------------------------------------------------


def test_until_the_switch_it_is_update_full_bit_for_bit_and_then_low_rank(ranks):
    wire = {"wire": "int8", **OUTER}
    found = ranks(2, workers.cell, 2, "prelora_lte", change=wire)
    plain = ranks(2, workers.cell_of, 2, "diloco", change={**wire, "merge_every": 3})
    for mine, theirs in zip(found, plain, strict=True):
        for here, there in zip(mine["W"][:5], theirs["W"][:5], strict=True):
            equal(here, there)
    first, second = found
    for number, (a, b) in enumerate(zip(first["W"], second["W"], strict=True), 1):
        unlike = [name for name in a if not torch.equal(a[name], b[name])]
        assert not unlike if number % 3 == 0 else "net.0.weight" in unlike or number > 9, (number, unlike)
    assert first["seen"] == ["full"] * 5 + ["joint"] * 3 + ["lowrank"] * 10
    start = first["W"][8]  # from the freeze on a target's W moves at merges only
    for number in (10, 11):
        equal(start, first["W"][number - 1], but=[n for n in start if n not in ("net.0.weight", "net.4.weight")])
    assert not torch.equal(start["net.0.weight"], first["W"][11]["net.0.weight"])


@pytest.mark.parametrize("name", LATE)
def test_looking_changes_nothing(ranks, name):
    how = {"wire": "int4", **OUTER}
    blind, looking = (ranks(2, workers.cell, 2, name, change=how, val=val) for val in (0, 2))
    equal(blind[0]["weights"], looking[0]["weights"])
    assert blind[0]["losses"] == looking[0]["losses"] and looking[0]["scores"] == looking[0]["scores"]


@pytest.mark.parametrize("signal", ["weight_norm", "grad_norm"])
def test_all_ranks_decide_from_the_same_numbers_and_a_window_ends_with_a_merge(ranks, signal):
    how = {"window": 4, "rank_signal": signal, "loss_tol": 0.9, "weight_tol": 0.9}
    first, second = ranks(2, workers.cell, 2, "prelora_lte", change=how, steps=22)
    assert first["at"] == second["at"] == (12, 18)  # due at 4, 10 and 16, merged every 3 steps
    assert first["history"] == second["history"] and first["plan"] == second["plan"] and first["grads"] == second["grads"]
    for name, norm in first["history"][-1][1].items():  # of what the merge at step 12 left; the switch changes no W
        assert norm == pytest.approx(first["W"][11][f"{name}.weight"].norm().item(), rel=1e-6)
    with pytest.raises(ConfigError, match=r"must be at least windows \* window = 12 \(a window ends with a merge, one every 3"):
        workers.cell(1, "prelora_lte", change=how, steps=10)


def test_what_a_switch_and_a_freeze_between_merges_find_is_merged_first(ranks, tmp_path):
    how = {"wire": "int4", "sync_rest": "step", **OUTER}
    whole = ranks(2, workers.by_steps, 2, (6, 9), folder=str(tmp_path), save_at=(5, 6, 7, 9, 10), **how)
    equal(whole[0]["weights"], whole[1]["weights"])
    for step in (5, 6, 7, 9, 10):
        path = str(tmp_path / f"step={step}.ckpt")
        same(whole, ranks(2, workers.by_steps, 2, (6, 9), folder=str(tmp_path / "again"), ckpt=path, **how), step)


# ---- other numbers of workers, and who fails ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "change"), [("prelora_lte", {"wire": "int4", **OUTER}), ("prelora_lte_galore", {})], ids=str)
@pytest.mark.parametrize("at", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_two_to_three_to_one_worker(ranks, tmp_path, name, change, at):
    how = {"change": change, "batch": 12}
    ranks(2, workers.cell, 2, name, folder=str(tmp_path / "2"), save_at=[at], steps=max(at, 6), **how)
    path = str(tmp_path / f"2/step={at}.ckpt")
    if at == 8:  # one worker that takes no step has the file's model: the mean of both, and what the wire owes
        file, one = torch.load(path, weights_only=True)["state_dict"], workers.cell(1, name, ckpt=path, steps=at, **how)
        for key, W in file.items():
            assert (one["weights"][key] - W).abs().max() <= (0.05 if change else 1e-9), key
    three = ranks(3, workers.cell, 3, name, folder=str(tmp_path / "3"), ckpt=path, save_at=[at + 1], steps=16, **how)
    for other in three[1:]:
        equal(three[0]["weights"], other["weights"])
    assert three[0]["at"] == (6, 9) and three[0]["phases"] == ["lowrank"]
    on = workers.cell(1, name, ckpt=str(tmp_path / f"3/step={at + 1}.ckpt"), steps=14, **how)
    assert on["at"] == (6, 9) and all(torch.isfinite(W).all() for W in on["weights"].values())


def test_a_killed_worker_is_one_line(ranks, tmp_path):
    outcomes = ranks.outcomes(2, workers.dying, 2, "prelora_lte", str(tmp_path), "killed", grace=40)
    assert outcomes[1][:2] == (False, "the process died")
    line = outcomes[0][1]
    assert line.startswith("LTE: another worker died or did not answer") and "\n" not in line, line


OTHER = [
    ("prelora_lte", {}, {"before": "ddp"}, "before='ddp': the checkpoint was trained with merge"),
    ("prelora_lte", {"before": "ddp"}, {}, "before='merge': the checkpoint was trained with ddp"),
    ("prelora_lte_galore", {"before": "ddp"}, {}, "before='merge': the checkpoint was trained with ddp"),
    ("prelora_lte", {}, {"wire": "int8"}, "wire='int8': the checkpoint was trained with float32"),
    ("prelora_lte", OUTER, {}, "outer_lr=1.0: the checkpoint was trained with 0.7"),
]


@pytest.mark.parametrize(("name", "first", "then", "line"), OTHER, ids=str)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, name, first, then, line):
    error = workers.refused(1, name, str(tmp_path), first, then)
    assert error.startswith(line) and "\n" not in error


BAD = [
    ({"before": "merg"}, "before='merg': must be one of ddp, merge"),
    ({"before": "merge", "update": "full"}, "before='merge': has no meaning with update=full"),
    ({"before": "merge", "mode": "joint"}, "before='merge': has no meaning in mode=joint"),
    ({"before": "merge", "wire": "int2"}, "wire='int2': needs error feedback"),
]


@pytest.mark.parametrize(("wrong", "line"), BAD, ids=str)
def test_wrong_settings_are_one_line(wrong, line):
    with pytest.raises(ConfigError) as error:
        LTEStrategy(**wrong)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_without_a_callback_it_is_refused():
    with pytest.raises(ConfigError, match="before='merge': says how workers agree until a phase callback's freeze") as error:
        lte_workers.fit(strategy=LTEStrategy(before="merge"))
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"method\.before='merge': .* use method=prelora_lte"):
        method.build({"uses": ["lte"], "before": "merge"})
    with pytest.raises(ConfigError, match="rank, targets=.*: the phase callback's plan decides them"):
        lte_workers.fit(strategy=LTEStrategy(before="merge", rank=4), trainer={"callbacks": [PreLoRA(ranks=(2, 4))]})


# ---- bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prelora_lte", {"wire": "int4", **OUTER}), ("prelora_lte", {"sync_rest": "step"}), ("prelora_lte", {"before": "ddp"}),
        ("prelora_lte", {"before": "ddp", "sync_rest": "step", "wire": "int8"}), ("prelora_lte_galore", {"wire": "int8"}),
    ],
    ids=str,
)  # fmt: skip
def test_the_bytes_of_a_whole_run_are_those_at_the_door(ranks, name, change):
    for found in ranks(2, workers.counted, 2, name, net={"dtype": torch.float32}, change=change):
        sent = {what: mib * 2**20 for what, mib in found["sent"].items()}
        assert sent["all"] == pytest.approx(found["counted"]["door"] + found["counted"]["ddp"])
        assert sent["all"] == pytest.approx(sum(sent.values()) - sent["all"])
        assert {"full", "joint", "lowrank", "rest"} <= sent.keys() and min(sent.values()) > 0
        if change.get("before") != "ddp":
            n = sum(p.numel() for p in Net().parameters())
            wire = change.get("wire", "float32")
            one = 4 * n if wire == "float32" else 2 * Codec(wire).bytes_of(padded(n, 2) // 2)  # both ways
            assert sent["full"] == 2 * one  # two merges
