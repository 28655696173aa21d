"""LTE × GaLore: the form W = C·W_base + P·D, the merge, both bases, what travels, and resume on other numbers."""

import copy

import pytest
import torch
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import GaLoreAdamW
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.lte.traffic import traffic
from tests import lte_galore_workers as workers
from tests import lte_workers
from tests.lte_shared import Plain, after_a_fit, close
from tests.lte_workers import Samples
from tests.reference.lte_galore import lte_galore

TARGETS = {"net.0.weight": workers.RANK, "net.4.weight": workers.RANK}


def twin(workers_, steps=12, every=4, shared=False, batch=8, outer=None):
    """The same run by the slow twin: dense weights, one loop."""
    data = Samples()
    per = batch // workers_
    batches = []
    for b in range(steps):
        first = b % (len(data) // batch) * batch
        parts = [slice(first + n * per, first + (n + 1) * per) for n in range(workers_)]
        batches.append([(None, data.x[part], data.y[part]) for part in parts])
    s = workers.SETTINGS

    def rest_optimizer(params):
        groups = [{"params": [p for p in params if (p.ndim >= 2) is wide]} for wide in (True, False)]
        return GaLoreAdamW(groups, lr=s["lr"], weight_decay=s["weight_decay"])

    return lte_galore(
        Plain(workers.GaLoreNet()), TARGETS, batches, lambda f, b: nn.functional.cross_entropy(f(b[1]), b[2]), rest_optimizer,
        every, shared, outer=outer, lr=s["lr"], scale=s["scale"], weight_decay=s["weight_decay"],
    )  # fmt: skip


# ---- the mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}], ids=str)
def test_one_worker_is_galore_with_the_same_clock(how):
    one = workers.run(1, trainer=how)
    plain = workers.GaLoreNet(settings={"update_proj_gap": 4, "stagger": False})
    module, _, _ = lte_workers.fit(module=plain, strategy="auto", trainer=how)
    close(one["weights"], workers.weights(module), 0)
    if not how:
        close(one["weights"], twin(1))
    assert one["merges"] == 3 and one["sent"] == 0


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 3, 2, 2)], ids=str)
def test_the_form_is_what_galore_does_to_the_weight(proj_type, shape):
    """W = C·W_base + P·D against W ← (W − ηα P N)(1 − ηλ), step for step, with a rate that moves."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    theirs = copy.deepcopy(ours)
    settings = {"weight_decay": 0.7, "update_proj_gap": 10, "stagger": False, "proj_type": proj_type, "seed": 0}
    optimizers = [GaLoreAdamW([{"params": [p], "rank": 2}], lr=0.05, **settings) for p in (ours, theirs)]
    form = optimizers[0].local[ours] = LocalUpdate(ours)
    for step in range(10):
        grad = torch.randn(*shape, dtype=torch.float64)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
            p.grad = grad.clone()
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    assert 0.5 < form.C < 0.95 and not form.fresh


@pytest.mark.parametrize("shared", [False, True])
def test_two_workers_follow_the_dense_twin(ranks, shared):
    found = ranks(2, workers.run, 2, basis="shared" if shared else "own")
    close(found[0]["weights"], found[1]["weights"], 0)
    close(found[0]["weights"], twin(2, shared=shared))
    assert all(w.is_contiguous() for w in found[0]["weights"].values())  # of a matrix projected from the right, too


def test_merging_at_each_step_in_one_basis_is_data_parallel_projection():
    """ρ = identity, one P, T = 1: the mean of the workers' forms is the step with the mean gradient."""
    g = torch.Generator().manual_seed(0)
    W, grads = torch.randn(9, 7, generator=g, dtype=torch.float64), torch.randn(4, 9, 7, generator=g, dtype=torch.float64)
    P = torch.linalg.qr(torch.randn(9, 3, generator=g, dtype=torch.float64))[0]
    eta, decay = 0.1, 0.3
    forms = [(1 - eta * decay, -eta * (P.T @ grad) * (1 - eta * decay)) for grad in grads]  # (C, D) after one step
    merged = sum(C for C, _ in forms) / 4 * W + P @ sum(D for _, D in forms) / 4
    together = (W - eta * P @ (P.T @ grads.mean(0))) * (1 - eta * decay)
    torch.testing.assert_close(merged, together, rtol=0, atol=1e-14)


def test_both_routes_and_half_precision(ranks):
    factors, dense = (ranks(2, workers.run, 2, route=route) for route in ("factors", "dense"))
    close(factors[0]["weights"], dense[0]["weights"])
    half = ranks(2, workers.run, 2, net={"dtype": torch.float32}, trainer={"precision": "bf16-true"})
    close(half[0]["weights"], half[1]["weights"], 0)


# ---- what is equal where -------------------------------------------------------------------------------------------------

KEPT_EQUAL = [
    {}, {"basis": "shared"}, {"trainer": {"gradient_clip_val": 0.01}}, {"trainer": {"accumulate_grad_batches": 3}, "steps": 8},
    {"trainer": {"precision": "bf16-mixed"}, "net": {"dtype": torch.float32}, "val": 1},
    {"sync_rest": "merge", "basis": "shared"},
]  # fmt: skip


@pytest.mark.parametrize("how", KEPT_EQUAL, ids=str)
def test_w_is_equal_after_each_merge_and_the_rest_as_promised(ranks, how):
    found = ranks(2, workers.watched, 2, **how)
    accumulate = how.get("trainer", {}).get("accumulate_grad_batches", 1)
    every = 4 * accumulate  # batches

    def equal_at(key):
        pairs = zip(found[0][key], found[1][key], strict=True)
        return [n for n, pair in enumerate(pairs, 1) if all(torch.equal(a, b) for a, b in zip(*pair, strict=True))]

    merges = [n for n in equal_at("W") if n % accumulate == 0]
    assert merges == list(range(every, len(found[0]["W"]) + 1, every))
    rest = equal_at("rest")
    assert (len(rest) == len(found[0]["rest"])) is (how.get("sync_rest") != "merge") and every in rest
    close(found[0]["weights"], found[1]["weights"], 0)


def test_behind_an_exception_w_is_that_of_the_last_merge(ranks):
    (one, merged), (other, _) = ranks(2, workers.failing, 2)
    close(one, other, 0)
    assert all(torch.equal(one[name], W) for name, W in zip(TARGETS, merged, strict=True))


@pytest.mark.parametrize("basis", ["own", "shared"])
def test_a_target_may_be_left_out_on_one_worker(ranks, basis):
    """At a refresh, behind it, in the middle of a window: nobody waits for nobody, and W is equal at merges."""
    found = ranks(2, workers.sometimes, 2, (0, 1, 4, 6), basis=basis, timeout=30)
    for n in (3, 7, 11):
        assert all(torch.equal(a, b) for a, b in zip(found[0]["W"][n], found[1]["W"][n], strict=True))
    close(found[0]["weights"], found[1]["weights"], 0)


def test_the_hook_that_averages_projections_is_refused(ranks):
    with pytest.raises(AssertionError, match="galore_ddp_hook out"):
        ranks(2, workers.hooked, 2)


def test_looking_changes_nothing_and_sees_the_merged_model(ranks):
    blind, looking = (ranks(2, workers.run, 2, steps=8, merge_every=3, val=val) for val in (0, 2))
    close(blind[0]["weights"], looking[0]["weights"], 0)
    assert blind[0]["losses"] == looking[0]["losses"]
    module = workers.GaLoreNet()
    module.load_state_dict(looking[0]["weights"])  # the fit ends between two merges, behind the last validation
    data = Samples(16)
    score = nn.functional.cross_entropy(Plain(module)(data.x), data.y).item()
    seen = [s for rank in looking for s in rank["scores"]]
    assert sum(seen) / len(seen) == pytest.approx(score, rel=1e-12)


# ---- traffic -------------------------------------------------------------------------------------------------------------

SIZE = 8  # bytes of a float64
SUM = sum(workers.RANK * (m + n) for m, n in ((8, 8), (16, 8)))  # r (m + n) of both targets


def test_own_bases_send_r_times_m_plus_n_per_merge(ranks):
    found = ranks(2, workers.counted, 2, route="factors")[0]
    assert found["seen"]["gather"] == [SUM * SIZE] * 4  # (w − 1) times what is its own: three merges, and a look at the end
    scalars = 2 * SIZE  # C of two targets, once around the ring
    assert found["metrics"]["lte/merge_mib"] * 2**20 == SUM * SIZE + scalars
    assert found["sent"] == 3 * (SUM * SIZE + scalars)


def test_a_shared_basis_sends_d_and_at_the_refresh_a_sketch(ranks):
    found = ranks(2, workers.counted, 2, basis="shared")[0]
    P, D = workers.RANK * (8 + 8) * SIZE, workers.RANK * (8 + 16) * SIZE  # r·Σm and r·Σn: the shorter side is projected
    assert found["metrics"]["lte/merge_mib"] * 2**20 == P + D + 2 * SIZE  # all-reduces: 2 (w − 1)/w = 1 for two workers
    assert not found["seen"]["gather"] and sum(found["seen"]["broadcast"]) >= P / 2  # the first bases are worker 0's


def test_traffic_is_what_is_sent(ranks):
    for how in ({}, {"basis": "shared"}, {"route": "dense"}, {"sync_rest": "merge"}):
        found = ranks(2, workers.run, 2, **how)[0]["metrics"]
        said = traffic(workers.GaLoreNet(), rank=workers.RANK, workers=2, merge_every=4, update="galore", **how)
        assert said["merge"] == found["lte/merge_mib"] * 2**20, how
        assert said["rest"] * 4 == found["lte/rest_mib"] * 2**20, how


# ---- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save_at", [4, 6])
def test_other_numbers_of_workers_go_on_from_the_merged_model(ranks, tmp_path, save_at):
    ranks(2, workers.run, 2, folder=str(tmp_path), save_at=(save_at,), steps=save_at, exact=True)
    path = str(tmp_path / f"step={save_at}.ckpt")
    saved = torch.load(path, weights_only=True)["state_dict"]
    alone = workers.run(1, ckpt=path, steps=save_at, exact=True)
    close(alone["weights"], saved, 0)
    four = ranks(4, workers.run, 4, ckpt=path, steps=12, exact=True)
    close(four[0]["weights"], four[3]["weights"], 0)
    assert all(torch.isfinite(value).all() for value in four[0]["weights"].values())
    module, _, _ = lte_workers.fit(module=workers.GaLoreNet(), strategy="auto", ckpt=path, steps=12, exact=True)
    assert not torch.equal(module.net[0].weight, saved["net.0.weight"])  # plain GaLore goes on from it too


def test_a_checkpoint_from_behind_a_fit_goes_on_exactly(ranks, tmp_path):
    found = ranks(2, after_a_fit, 2, str(tmp_path / "x.ckpt"), workers.fit, sync_rest="merge")
    for whole, again in found:
        close(whole, again, 0)


def test_bases_of_each_worker_do_not_become_one(ranks, tmp_path):
    ranks(2, workers.run, 2, folder=str(tmp_path), save_at=(2,), steps=2, exact=True)
    with pytest.raises(AssertionError, match="basis='shared': the checkpoint's workers"):
        ranks(2, workers.run, 2, ckpt=str(tmp_path / "step=2.ckpt"), steps=4, exact=True, basis="shared")


def test_a_checkpoint_of_heads_is_refused(tmp_path):
    lte_workers.fit(folder=tmp_path, save_at=(3,), steps=3, exact=True)
    with pytest.raises(ConfigError, match="lora"):
        workers.run(1, ckpt=str(tmp_path / "step=3.ckpt"), steps=6, exact=True)
