"""PreLoRA under DDP on two gloo processes: what is equal, what is sent, what a resume restores, what is refused."""

import pytest
import torch

from tests import prelora_workers as workers


def assert_same(results):
    """Every parameter on every rank, behind every step, to the bit."""
    first, *others = results
    for other in others:
        for step, (a, b) in enumerate(zip(first["weights"], other["weights"], strict=True), 1):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), f"behind step {step}"
        assert first["state"] == other["state"]


def assert_close(a, b, tolerance=1e-9):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(a, b):
    assert a["state"] == b["state"]
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert len(a["optimizer"]) == len(b["optimizer"])
    assert all(torch.equal(x, y) for x, y in zip(a["optimizer"], b["optimizer"], strict=True))


VARIANTS = [
    {},
    {"accumulate_grad_batches": 2, "method": {"window": 1, "latest": 3, "warmup": 2}},
    {"gradient_clip_val": 0.05, "method": {"freeze_rest": True, "adapter_lr": 2.0}},
    {"strategy": {"static_graph": True}, "method": {"targets": ["q", "v", "fc1"], "rank_signal": "grad_norm"}},
    {"strategy": {"find_unused_parameters": True, "gradient_as_bucket_view": True}, "method": {"optimizer_state": "reset"}},
]


@pytest.mark.parametrize("how", VARIANTS, ids=lambda how: "-".join(how) or "default")
def test_two_processes_are_one_through_all_phases_and_send_what_trains(ranks, tmp_path, how):
    one, two = workers.fit(1, tmp_path, **how), ranks(2, workers.fit, 2, tmp_path, **how)
    assert one["state"]["phase"] == "lowrank"
    assert_same(two)
    for result in two:
        assert {k: result["state"][k] for k in ("plan", "switch_step", "freeze_step")} == {
            k: one["state"][k] for k in ("plan", "switch_step", "freeze_step")
        }
        assert_close(one["model"], result["model"])
        # a communication hook that the user registered on the first wrapper counts through both transitions
        assert result["sent"] == result["trained"]
        full, joint, low = (result["trained"][at] for at in (0, one["state"]["switch_step"], -1))
        assert low < full < joint
        hashes = [row["lowrank/hash"] for _, row in result["rows"] if "lowrank/hash" in row]
        assert len(hashes) == 2 and hashes == [r["lowrank/hash"] for _, r in two[0]["rows"] if "lowrank/hash" in r]


def test_resume_is_bit_exact_and_everything_that_trains_moves(ranks, tmp_path):
    whole = ranks(2, workers.fit, 2, tmp_path, save_at=[5, 8, 11, 14, 19])
    for at in (5, 8, 11, 14, 19):
        again = ranks(2, workers.fit, 2, tmp_path / "again", ckpt=str(tmp_path / f"step={at}.ckpt"))
        assert_same(again)
        for a, b in zip(whole, again, strict=True):
            assert_equal(a, b)
            assert a["losses"][at:] == b["losses"]
            assert b["start"] and not b["unmoved"]  # Lightning #21901


MORE = [{}, {"strategy": {"find_unused_parameters": True}}, {"ema": True, "gradient_clip_val": 0.05}]


@pytest.mark.parametrize("how", MORE, ids=lambda how: "-".join(how) or "default")
@pytest.mark.parametrize("world", [3, 4])
def test_resume_is_exact_on_more_than_two_processes(ranks, tmp_path, world, how):
    """From full, joint and low-rank training; each transition wraps the model anew, and so does a resume."""
    how = {"batch": 12, "hook": None, **how, "strategy": {"bucket_cap_mb": 1e-3, **how.get("strategy", {})}}
    for unlike in ranks(world, workers.resumed, world, tmp_path, [5, 11, 15], **how):
        assert unlike == {5: [], 11: [], 15: []}


def test_a_run_without_a_method_resumes_exactly_on_three_processes(ranks, tmp_path):
    for unlike in ranks(3, workers.plain, 3, tmp_path, [3, 6]):
        assert unlike == {3: [], 6: []}


@pytest.mark.parametrize("at", [5, 11, 19])
def test_one_process_goes_on_where_two_were_and_two_where_one_was(ranks, tmp_path, at):
    two = ranks(2, workers.fit, 2, tmp_path / "2", save_at=[at])
    one = workers.fit(1, tmp_path / "1", save_at=[at])
    alone = workers.fit(1, tmp_path, ckpt=tmp_path / "2" / f"step={at}.ckpt")
    both = ranks(2, workers.fit, 2, tmp_path, ckpt=str(tmp_path / "1" / f"step={at}.ckpt"))
    assert_same(both)
    for result in (alone, *both):
        assert_close(result["model"], one["model"])
        assert_close(result["model"], two[0]["model"])
        assert result["start"] and not result["unmoved"]


def test_an_average_is_the_same_on_all_ranks_and_resumes(ranks, tmp_path):
    whole = ranks(2, workers.fit, 2, tmp_path, ema=True, save_at=[11])
    again = ranks(2, workers.fit, 2, tmp_path / "again", ema=True, ckpt=str(tmp_path / "step=11.ckpt"))
    assert any("lora_B" in name for name in whole[0]["average"])
    for result in (*whole, *again):
        assert all(torch.equal(value, whole[0]["average"][name]) for name, value in result["average"].items())
        assert_equal(whole[0], result)


def test_a_hook_with_buffers_by_bucket_starts_anew_with_the_new_buckets(ranks, tmp_path):
    results = ranks(2, workers.fit, 2, tmp_path, hook="powersgd")
    assert_same(results)
    assert results[0]["sent"] == results[0]["trained"] and results[0]["state"]["phase"] == "lowrank"


def test_the_targets_that_galore_takes_over_travel_projected_by_the_hook_that_was_there_before(ranks, tmp_path):
    how = {"method": {"then": "galore", "ranks": [2]}}
    one = workers.fit(1, tmp_path, **how)
    two = ranks(2, workers.fit, 2, tmp_path, hook="galore", **how)
    assert_same(two)
    assert one["state"]["phase"] == "lowrank" and not any("lora_" in name for name in one["model"])
    for result in two:
        assert_close(one["model"], result["model"])
        assert result["sent"][:8] == result["trained"][:8]
        assert all(sent < 0.6 * whole for sent, whole in zip(result["sent"][-4:], result["trained"][-4:], strict=True))


def test_the_strategys_own_hook_is_registered_once_by_each_wrapper_where_lightning_registers_it(ranks, tmp_path):
    for found in ranks(2, workers.strategys_hook, 2, tmp_path):
        assert found["DDPStrategy"] == ([0] * 24, 0)  # Lightning's way on a CPU, before the switch as after it
        assert found["OnCuda"] == ([1] * 24, 24)


@pytest.mark.parametrize(("name", "step"), [("blocks.1.fc1.weight", 6), ("head.bias", 12)])
def test_ranks_that_drifted_apart_are_named_on_every_rank_at_the_next_transition(ranks, tmp_path, name, step):
    for fine, value, _ in ranks.outcomes(2, workers.fit, 2, tmp_path, spoil=(1, step, name)):
        assert not fine and value.startswith("Disagreement: ranks disagree at a change of the model behind step"), value
        assert f"{name} on rank 1 is not that of rank 0" in value


def test_ranks_that_read_different_files_are_told_before_training(ranks, tmp_path):
    ranks(2, workers.fit, 2, tmp_path, save_at=[18, 19])
    files = [str(tmp_path / f"step={at}.ckpt") for at in (18, 19)]
    for fine, value, _ in ranks.outcomes(2, workers.fit, 2, tmp_path, ckpt=files):
        assert not fine and "Disagreement: ranks disagree at the start of training" in value, value


def test_fsdp2_is_refused_before_anything_is_sharded(ranks):
    for fine, value, _ in ranks.outcomes(2, workers.sharded, 2):
        assert not fine and value.startswith("ConfigError: strategy='ModelParallelStrategy': PreLoRA") and "use ddp" in value


def test_ranks_agree_on_what_the_first_step_showed_and_on_who_was_called(ranks, tmp_path):
    """A layer that one rank does not call has a gradient all the same there: DDP's average."""
    (phase, plan, left_out, weights), other = ranks(2, workers.routed, 2, tmp_path)
    assert (phase, plan, left_out) == other[:3] and phase == "lowrank"
    assert {name for name in plan if "experts" in name} == {"experts.0", "experts.1"}
    assert "is never called" in left_out["experts.2"] and "in any of the 8 optimizer steps" in left_out["experts.3"]
    assert all(torch.equal(a, b) for a, b in zip(weights, other[3], strict=True))


@pytest.mark.parametrize("sparse", [False, True])
def test_buckets_are_settled_without_a_trace(ranks, sparse):
    """The made-up gradients come to no hook of the user's, and none is left; sparse ones are of the kind that DDP expects."""
    assert ranks(3, workers.settled, 3, sparse) == [([], 6, [True, True])] * 3
