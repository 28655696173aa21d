"""Few-bit wires with error feedback, and the outer step, against their slow twins."""

import pytest
import torch

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lte.outer import OuterStep
from lowrank_pretrain.lte.traffic import Imagined
from lowrank_pretrain.lte.wire import BLOCK, WIRES, Codec, DenseMean, padded
from tests import lte_wire_workers as run
from tests.reference import lte_wire as twin

LOSSY = ("int8", "int4", "int2")


@pytest.mark.parametrize("wire", LOSSY)
def test_a_message_reads_as_the_definition_says(wire):
    x = run.drawn(0, 0, 5 * BLOCK)
    codec = Codec(wire)
    message = codec.encode(x)
    assert message.dtype == torch.uint8 and message.numel() == codec.bytes_of(len(x))
    torch.testing.assert_close(codec.decode(message), twin.quantised(x, WIRES[wire]), rtol=1e-6, atol=1e-6)
    assert not codec.decode(message)[64:128].any()  # a block of zeros stays zero


@pytest.mark.parametrize("wire", WIRES)
def test_rows_of_messages_are_independent_and_reading_back_changes_nothing_more(wire):
    x = torch.stack([run.drawn(rank, 1, 2 * BLOCK) for rank in range(3)])
    codec = Codec(wire)
    once = codec.decode(codec.encode(x))
    assert once.shape == x.shape
    assert all(torch.equal(codec.decode(codec.encode(row)), seen) for row, seen in zip(x, once, strict=True))
    if wire == "float32":
        assert torch.equal(once, x)
    if wire != "int2":  # whose scale is by the deviation
        torch.testing.assert_close(codec.decode(codec.encode(once)), once, rtol=1e-2, atol=1e-6)


def test_two_bits_are_the_best_four_equal_steps_for_normal_numbers():
    x = torch.randn(200 * BLOCK, generator=torch.Generator().manual_seed(0))
    codec = Codec("int2")
    error = (codec.decode(codec.encode(x)) - x).square().mean()
    assert error == pytest.approx(0.1188, rel=0.05)  # Max (1960), table II


@pytest.mark.parametrize("wire", LOSSY)
@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_over_processes_equals_its_twin_and_has_the_same_bits_everywhere(ranks, wire, world):
    n, merges = 5 * BLOCK + 7, 6
    literal = twin.Wire(world, n, WIRES[wire])
    results = ranks(world, run.means, wire, n, merges)
    for merge in range(merges):
        expected = literal.mean([run.drawn(rank, merge, n) for rank in range(world)])
        torch.testing.assert_close(results[0][0][merge], expected, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(other[0][merge], results[0][0][merge]) for other in results[1:])
    assert all(counted == promised for _, counted, promised, _ in results)


def test_a_mean_that_is_kept_keeps_no_other_memory_alive():
    dense = DenseMean(Imagined(2), "int8", 4 * BLOCK)
    messages = dense.codec.encode(torch.stack([run.drawn(rank, 0, 2 * BLOCK) for rank in range(2)]))
    mean = dense.mean_of_rows(messages)  # an overlapped merge keeps what it leaves out there
    assert mean.untyped_storage().nbytes() == mean.numel() * 4


@pytest.mark.parametrize("wire", ["bfloat16", *LOSSY])
def test_error_feedback_makes_the_sum_of_200_merges_exact_to_the_last_step(ranks, wire):
    n, merges = 3 * BLOCK, 200
    (results, _, _, pending), _ = ranks(2, run.means, wire, n, merges)
    arrived = torch.stack(results).double().sum(0)
    exact = torch.stack([(run.drawn(0, m, n) + run.drawn(1, m, n)).double() / 2 for m in range(merges)]).sum(0)
    # what is missing is what the last messages left out, which is known, and no more than a few steps of the last merge
    torch.testing.assert_close(arrived + pending.double(), exact, rtol=1e-5, atol=1e-3)
    if wire != "bfloat16":  # without feedback the errors of 200 messages add up
        codec = Codec(wire)
        alone = sum(codec.decode(codec.encode(run.drawn(r, m, n))).double() / 2 for r in (0, 1) for m in range(merges))
        assert pending.norm() < (alone - exact).norm() / 4


def test_the_exact_wire_is_an_all_reduce_and_leaves_nothing_out(ranks):
    (results, counted, promised, pending), _ = ranks(2, run.means, "float32", 100, 2)
    assert torch.equal(results[1], (run.drawn(0, 1, 100) / 2 + run.drawn(1, 1, 100) / 2))
    assert counted == promised == 400 and pending is None


def test_what_is_pending_survives_another_number_of_workers(ranks):
    n = 4 * BLOCK + 3
    pending = ranks(2, run.means, "int4", n, 5)[0][3]
    for world in (3, 1, 4):
        for before, rest in ranks(world, run.goes_on, "int4", n, pending):
            if world == 1:
                assert before is None  # alone, nothing is sent; the strategy adds it to W at once
                continue
            torch.testing.assert_close(before, pending, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rest, pending, rtol=1e-3, atol=1e-3)  # it arrives in the end


def test_error_feedback_may_lie_on_another_device(ranks):
    near = ranks(2, run.means, "int4", 200, 3)[0][0]
    far = ranks(2, run.means, "int4", 200, 3, keep_on="cpu")[0][0]
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_two_bits_cost_a_fifteenth_of_float32():
    n = padded(10**6, 8)
    assert {wire: round(Codec(wire).bytes_of(n) / n, 4) for wire in WIRES} == {
        "float32": 4, "bfloat16": 2, "int8": 1.0312, "int4": 0.5312, "int2": 0.2812,
    }  # fmt: skip


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.0), (1.0, 0.5)])
def test_the_outer_step_is_torchs_sgd_with_nesterov_momentum(lr, momentum):
    g = torch.Generator().manual_seed(1)
    base = torch.randn(6, 5, generator=g, dtype=torch.float64)
    theirs = torch.nn.Parameter(base.clone())
    sgd = torch.optim.SGD([theirs], lr=lr, momentum=momentum, nesterov=momentum > 0)
    ours, outer = base.clone(), OuterStep(lr, momentum)
    for merge in range(6):
        increment = torch.randn(6, 5, generator=g, dtype=torch.float64)
        theirs.grad = -increment
        sgd.step()
        if merge == 3:  # saved and loaded in the middle
            saved = outer.state_dict()
            outer = OuterStep(lr, momentum)
            outer.load_state_dict(saved, {"w": ours})
        outer.step("w", ours, increment.clone())
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-14, atol=1e-14)
    assert outer.plain == (lr == 1 and momentum == 0) and bool(outer.buffers) == (momentum > 0)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("outer_lr", {"lr": 0}), ("outer_lr", {"lr": float("nan")}), ("outer_momentum", {"momentum": 1.0}),
        ("outer_momentum", {"momentum": -0.1}),
    ],
)  # fmt: skip
def test_settings_of_the_outer_step_that_cannot_be_are_refused(key, settings):
    with pytest.raises(ConfigError, match=key):
        OuterStep(**settings)
