"""LTE on two and four gloo processes: what must be equal on all of them, what must not, and what it costs on the wire."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lowrank_pretrain.lte.workers import Workers, lost
from tests import lte_workers as workers
from tests.lte_shared import close, same


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_any_layout_of_four_heads_is_the_same_run(ranks, optimizer):
    net = {"optimizer": optimizer}
    one = workers.layout(1, heads=4, net=net)
    two = ranks(2, workers.layout, 2, heads=2, net=net)
    four = ranks(4, workers.layout, 4, heads=1, net=net)
    for several in (two, four):
        same(several)
        close(one["weights"], several[0]["weights"])
    seen = [set(rank["seen"]) for rank in four]
    assert all(not a & b for i, a in enumerate(seen) for b in seen[:i])  # the sampler really shares out
    A = [rank["A"]["net.0.lora_A"] for rank in four]
    assert all(not torch.equal(a, b) for i, a in enumerate(A) for b in A[:i])


@pytest.mark.parametrize("how", [{}, {"reset": True}, {"mode": "sequential", "heads": 2}, {"overlap": 2}], ids=str)
def test_both_routes_give_the_same_weights(ranks, how):
    factors, dense = (ranks(2, workers.layout, 2, steps=9, route=route, **how) for route in ("factors", "dense"))
    same(factors), same(dense)
    close(factors[0]["weights"], dense[0]["weights"])


def drift(results, key):
    """Steps after which the ranks differ."""
    steps = zip(*(r[key] for r in results), strict=True)
    return [n for n, ranks in enumerate(steps, 1) if any(not torch.equal(a, b) for a, b in zip(*ranks, strict=True))]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"trainer": {"gradient_clip_val": 0.01}},
        {"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}},
        {"trainer": {"accumulate_grad_batches": 3}},
        {"trainer": {"precision": "bf16-mixed"}, "net": {"dtype": torch.float32}},
        {"trainer": {"limit_train_batches": 3}, "steps": 10},
        {"net": {"dropout": 0.3}, "overlap": 1, "val": 1},
        {"mode": "sequential"},
        {"reset": True},
        {"mode": "joint"},
        {"heads": 3, "data": workers.Samples(44), "steps": 11},  # batches of 4 and at last 2 samples for three heads
        {"val": 1, "steps": 40, "trainer": {"callbacks": [EarlyStopping("val/loss", min_delta=10.0, patience=1)]}},
    ],
    ids=lambda how: "-".join(how) + str(how.get("trainer", ""))[:60],
)
def test_nothing_drifts(ranks, how):
    results = ranks(2, workers.watched, 2, **how)
    assert drift(results, "W") == [] and drift(results, "rest") == []
    apart = drift(results, "heads")
    assert apart == [] if how.get("mode") == "joint" else len(apart) >= 9
    same(results)


def test_the_rest_that_is_merged_differs_only_between_merges(ranks):
    results = ranks(2, workers.watched, 2, sync_rest="merge", steps=9)
    assert drift(results, "W") == []
    assert drift(results, "rest") == [1, 2, 3, 5, 6, 7, 9]
    same(results)


def test_a_step_skipped_on_one_rank_is_skipped_on_all(ranks):
    results = ranks(2, workers.overflowing, 2, steps=9)
    assert drift(results, "W") == [] and drift(results, "rest") == []
    rest = results[0]["rest"]
    assert all(torch.equal(a, b) for a, b in zip(rest[1], rest[2], strict=True))  # the third step was skipped
    assert results[0]["step"] == 9
    same(results)


def test_every_rank_scores_the_same_merged_model_and_looking_changes_nothing(ranks):
    often = {"val_check_interval": 1, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}
    looked = ranks(2, workers.layout, 2, steps=7, val=2, trainer=often)
    plain = ranks(2, workers.layout, 2, steps=7)
    assert looked[0]["logged"] == looked[1]["logged"]
    for a, b in zip(looked, plain, strict=True):
        assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"]) and a["losses"] == b["losses"]
    apart = ranks(2, workers.layout, 2, steps=7, val=2, trainer=often, sync_rest="merge")
    silent = ranks(2, workers.layout, 2, steps=7, sync_rest="merge")
    for a, b in zip(apart, silent, strict=True):
        assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"]) and a["losses"] == b["losses"]


def test_bytes_are_the_formulas(ranks):
    """Counted where torch.distributed is called: f = R (D+O) numbers per head and worker to gather, 2(N−1)/N to reduce."""
    width, rank, heads, world, itemsize = workers.WIDTH, 1, 1, 2, 8
    own = heads * rank * ((width + width) + (width + 2 * width)) * itemsize
    rest = (width + 2 * width + 3 * 2 * width + 3) * itemsize
    dense = (width * width + 2 * width * width) * itemsize
    for route, per_merge in (("factors", (world - 1) * own), ("dense", 2 * (world - 1) / world * dense)):
        for result in ranks(world, workers.counted, world, steps=8, rank=rank, heads=heads, route=route, sync_rest="merge"):
            assert result["merges"] == 2
            assert result["metrics"]["lte/merge_mib"] * 2**20 == pytest.approx(per_merge)
            assert result["metrics"]["lte/rest_mib"] * 2**20 == pytest.approx(2 * (world - 1) / world * rest)
            seen = result["seen"]["gather"] + result["seen"]["reduce"]
            # two merges of heads and rest, and one look at the end of the fit
            assert seen == pytest.approx(3 * (per_merge + 2 * (world - 1) / world * rest))
    (auto, _) = ranks(world, workers.counted, world, steps=4, rank=8, heads=2)
    assert auto["routes"] == ["dense", "dense"]  # 2 · 8 · (D+O) > DO


def test_streams_must_share_themselves_out_and_end_together(ranks):
    fine = ranks(2, workers.streaming, 2)
    assert not set(fine[0]["seen"]) & set(fine[1]["seen"]) and fine[0]["steps"] == 12
    for sized in (False, True):
        outcomes = ranks.outcomes(2, workers.streaming, 2, missing=8, sized=sized)
        assert [value["steps"] for _, value, _ in outcomes] == [8, 8]  # 24 and 16 samples, batches of 4, two epochs
        told = [text for _, _, warnings in outcomes for text in warnings]
        assert any("stop" in text for text in told)
        same([value for _, value, _ in outcomes])
    for fine_, value, _ in ranks.outcomes(2, workers.streaming, 2, shared=False):
        assert not fine_ and value.startswith("ConfigError") and "the same first batch" in value


def test_rank_zeros_weights_are_everyones(ranks):
    outcomes = ranks.outcomes(2, workers.different_starts, 2)
    same([{"weights": value} for _, value, _ in outcomes])
    assert any("workers start with different weights" in text for text in outcomes[0][2])


@pytest.mark.parametrize(("how", "sync_rest"), [("killed", "step"), ("stuck", "merge")])
def test_a_dead_or_stuck_worker_ends_the_job_and_a_restart_resumes(ranks, tmp_path, how, sync_rest):
    common = {"folder": tmp_path, "sync_rest": sync_rest, "steps": 16}
    whole = ranks(2, workers.saved, 2, save_at=[], **common)
    outcomes = ranks.outcomes(2, workers.dying, 2, how=how, answer_within=60 if how == "killed" else 8, **common)
    fine, value, _ = outcomes[0]
    assert not fine and value.startswith("RuntimeError"), value
    ranks.close()  # the processes are as dead as the job's would be
    again = ranks(2, workers.saved, 2, save_at=[], ckpt=str(tmp_path / "step=8.ckpt"), **common)
    for a, b in zip(whole, again, strict=True):
        assert all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])


@pytest.mark.parametrize("how", [{}, {"sync_rest": "merge", "overlap": 2}, {"mode": "sequential"}, {"reset": True}], ids=str)
def test_a_hash_of_what_all_hold_is_logged_at_each_merge(ranks, how):
    first, second = ranks(2, workers.hashed, 2, **how)
    assert first == second and len({value for _, value in first}) == len(first) == (2 if how.get("overlap") else 3)


def test_a_worker_that_drifts_is_named_at_the_next_merge(ranks):
    outcomes = ranks.outcomes(2, workers.hashed, 2, drift=("out.weight", 5))
    assert all(
        not fine and "ranks disagree after the merge at step 8: out.weight on rank 1" in text for fine, text, _ in outcomes
    )


@pytest.mark.parametrize("way", ["raw", "closure", "lightnings", "two"])
def test_whoever_calls_the_optimizers_step_the_clock_goes_on(ranks, tmp_path, way):
    one = workers.by_hand(1, tmp_path, way, heads=2, batch=8)
    two = ranks(2, workers.by_hand, 2, tmp_path, way, heads=1, batch=8)
    assert one["merged"] == [n // 3 for n in range(1, 17)] and one["clock"] == 16  # two epochs of eight batches
    assert len(one["logged"]) == 5 and one["logged"] == sorted(set(one["logged"]))
    same(two)
    for result in two:
        assert result["merged"] == one["merged"] and result["logged"] == one["logged"]
    again = ranks(2, workers.by_hand, 2, tmp_path, way, heads=1, batch=8, ckpt=str(tmp_path / "clock=5.ckpt"), at=-1)
    for a, b in zip(two, again, strict=True):
        assert a["clock"] == b["clock"] and all(torch.equal(a["weights"][k], b["weights"][k]) for k in a["weights"])


def test_the_patience_that_was_asked_for_is_kept_and_ours_ends_with_the_fit(ranks):
    usual, asked = 1800.0, timedelta(hours=3)
    assert ranks(2, workers.patience, 2, {}) == [(600.0, usual, 600.0)] * 2
    assert ranks(2, workers.patience, 2, {"merge_timeout": 20}) == [(20.0, usual, 20)] * 2
    assert ranks(2, workers.patience, 2, {"timeout": asked}) == [(10800.0, 10800.0, 10800.0)] * 2
    assert ranks(2, workers.patience, 2, {"timeout": asked, "merge_timeout": 20}) == [(10800.0, 10800.0, 20)] * 2


LOST = [
    "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234",
    "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete",
    "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error, NCCL version 2.21",
    "Application timeout caused pair closure",
]
OTHERS = [
    "[enforce fail at ../gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 3108 vs 2588",
    "The size of tensor a (7) must match the size of tensor b (5) at non-singleton dimension 0",
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "NCCL error in: ProcessGroupNCCL.cpp:1, invalid usage, NCCL version 2.21\nDuplicate GPU detected",
]


@pytest.mark.parametrize(("text", "dead"), [*[(t, True) for t in LOST], *[(t, False) for t in OTHERS]])
def test_only_what_a_lost_worker_causes_is_put_down_to_one(text, dead):
    def fail():
        raise RuntimeError(text)

    with pytest.raises(RuntimeError) as error:
        Workers(timeout=8)._call(fail)
    assert ("another worker died or did not answer within 8 s" in str(error.value)) == dead == lost(RuntimeError(text))
    assert not lost(torch.OutOfMemoryError("Socket Timeout"))
    group = Workers(timeout=8)
    group.hint = " (another reason)"
    with pytest.raises(RuntimeError) as error:
        group._call(fail)
    assert str(error.value).endswith("(another reason)") == dead


@pytest.mark.parametrize("sync_rest", ["step", "merge"])
def test_a_worker_that_leaves_a_step_out_is_named(ranks, sync_rest):
    outcomes = ranks.outcomes(2, workers.skipping, 2, sync_rest, grace=30)
    assert not outcomes[1][0] and outcomes[1][1].startswith("ConfigError: training_step=None: is what worker 1 returned")
    assert not outcomes[0][0]


def test_a_models_own_buffers_do_not_make_ddp_broadcast_what_w_holds_of_a_workers_heads(ranks):
    first, second = ranks(2, workers.with_a_buffer, 2)
    for merged, later in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(merged, later, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
