"""Merges of whole weights that overlap with training, in fragments, with their copies kept elsewhere (Streaming DiLoCo)."""

import pytest
import torch

from lowrank_pretrain import ConfigError
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.full import fragments_of
from lowrank_pretrain.lte.traffic import traffic
from lowrank_pretrain.lte.wire import Codec, padded
from tests import lte_full_workers as workers
from tests import lte_workers
from tests.lte_workers import Net, Samples
from tests.reference.diloco import streaming_diloco
from tests.test_lte_full import OUTER, Plain, batches, close, loss_of, same

SIZES = {name: p.numel() for name, p in Net().named_parameters()}


def twin(world, fragments=1, overlap=0, **outer):
    return streaming_diloco(
        Plain(Net()), batches(world), loss_of, lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1), 4,
        fragments_of(SIZES, fragments), overlap, *outer.values(),
    )  # fmt: skip


# ---- the mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "how"),
    [(2, {"overlap": 2}), (2, {"overlap": 3, **OUTER}), (2, {"fragments": 2, **OUTER}),
     (4, {"fragments": 2, "overlap": 1, **OUTER}), (1, {"fragments": 2, "overlap": 1, **OUTER})],
    ids=str,
)  # fmt: skip
def test_it_is_streaming_diloco(ranks, world, how):
    found = [workers.run(1, **how)] if world == 1 else ranks(world, workers.run, world, **how)
    same(found)
    close(found[0]["weights"], twin(world, **how))
    merges = 12 // 4 * how.get("fragments", 1)
    assert found[0]["clock"] == (12, merges - bool(how.get("overlap")))  # the last was still under way


def test_merging_at_each_step_is_ddp_wherever_copies_are(ranks):
    alone, _, _ = lte_workers.fit(module=Net("sgd"), strategy="auto")
    for how in ({"fragments": 1}, {"keep_on": "cpu"}):
        close(
            ranks(2, workers.run, 2, net={"optimizer": "sgd"}, merge_every=1, **how)[0]["weights"], lte_workers.weights(alone)
        )


def test_fragments_are_nearly_equal_and_hold_each_target_once():
    sizes = {f"w{i}": 1 + (i * 37) % 100 for i in range(40)}
    for count in (1, 2, 7, 40):
        parts = fragments_of(sizes, count)
        assert sorted(name for part in parts for name in part) == sorted(sizes) and all(parts)
        loads = [sum(sizes[name] for name in part) for part in parts]
        assert max(loads) - min(loads) <= max(sizes.values())
        assert all(part == [name for name in sizes if name in part] for part in parts)


# ---- what is equal where -------------------------------------------------------------------------------------------------

SETTINGS = [
    {"overlap": 2, "wire": "int4", **OUTER}, {"fragments": 2, "wire": "int8"},
    {"fragments": 4, "net": {"dtype": torch.bfloat16}},
    {"fragments": 2, "overlap": 1, "wire": "int2", "targets": ["net.0", "net.4"], "sync_rest": "merge", **OUTER},
]  # fmt: skip


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_w_base_has_the_same_bits_on_all_workers_at_every_step(ranks, how):
    data = Samples(60, how.get("net", {}).get("dtype", torch.float64))
    found = ranks(3, workers.run, 3, batch=12, data=data, **how)
    same(found)
    names = list(found[0]["base"][0])
    every, late = 4 // how.get("fragments", 1), how.get("overlap", 0)
    divided = fragments_of({name: n for name, n in SIZES.items() if name in names}, how.get("fragments", 1))
    moved = []
    for step in range(1, 12):
        now, before = found[0]["base"][step], found[0]["base"][step - 1]
        assert all(torch.equal(now[name], other["base"][step][name]) for other in found[1:] for name in names)
        fresh = {name for name in names if not torch.equal(now[name], before[name])}
        moved += [step + 1] if fresh else []
        if fresh and not late:  # who merges without a delay continues from it
            part = divided[((step + 1) // every - 1) % len(divided)]
            assert fresh == set(part)
            for other in found:
                assert all(torch.equal(other["W"][step][name], now[name].to(other["W"][step][name])) for name in part)
    assert moved == [step + late for step in range(every, 13, every) if 1 < step + late <= 12]


@pytest.mark.parametrize("how", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_looking_changes_nothing_and_sees_the_same_model_everywhere(ranks, how):
    blind, looking = (ranks(2, workers.run, 2, steps=10, val=val, **how) for val in (0, 2))
    close(blind[0]["weights"], looking[0]["weights"], 0)
    assert blind[0]["losses"] == looking[0]["losses"] and looking[0]["scores"]


@pytest.mark.parametrize("how", [{"overlap": 2, "wire": "int4", **OUTER}, {"fragments": 2, **OUTER}], ids=str)
def test_where_copies_are_kept_changes_nothing(ranks, how):
    close(ranks(2, workers.run, 2, **how)[0]["weights"], ranks(2, workers.far, 2, **how)[0]["weights"], 0)


@pytest.mark.parametrize("update", ["lora", "galore"])
def test_it_changes_nothing_for_factors_either(ranks, update):
    how = {"update": update, "wire": "int8", "sync_rest": "merge", **OUTER}
    close(ranks(2, workers.run, 2, **how)[0]["weights"], ranks(2, workers.far, 2, **how)[0]["weights"], 0)


def test_a_hash_of_w_base_is_logged(ranks):
    first, second = ranks(2, workers.hashed, 2, overlap=1, fragments=2)
    assert first == second and len(set(first)) == len(first) == 5


# ---- checkpoints ---------------------------------------------------------------------------------------------------------

RESUMED = [
    (1, {"overlap": 2, "fragments": 2, "merge_every": 6, **OUTER}), (2, {"overlap": 3}),
    (2, {"overlap": 2, "wire": "int4", "net": {"dropout": 0.2}, **OUTER}),
    (2, {"fragments": 2, "wire": "int2", "keep_on": "cpu", **OUTER}),
    (4, {"fragments": 2, "overlap": 1, "wire": "int8", "targets": ["net.0", "net.4"], "sync_rest": "merge", **OUTER}),
]  # fmt: skip


@pytest.mark.parametrize(("world", "how"), RESUMED, ids=str)
def test_resume_is_exact_at_between_and_during_merges(ranks, tmp_path, world, how):
    args = world, str(tmp_path), [3, 4, 5, 6]
    found = [workers.resumed(*args, steps=10, **how)] if world == 1 else ranks(world, workers.resumed, *args, steps=10, **how)
    assert all(unlike == {3: [], 4: [], 5: [], 6: []} for unlike in found), found


def owed(state):
    """By name, what all messages of a checkpoint have left out, in the mean."""
    errors = state["errors"] if isinstance(state["errors"], list) else [state["errors"]]
    found = {}
    for part, of in zip(fragments_of(SIZES, len(errors)), errors, strict=True):
        sizes = [SIZES[name] for name in part]
        flat = (torch.stack(of["sent"]).mean(0) + torch.cat(of["mean"]))[: sum(sizes)]
        found |= dict(zip(part, flat.split(sizes), strict=True))
    return found


@pytest.mark.parametrize("how", [{"fragments": 2}, {"overlap": 2}], ids=str)
def test_two_to_three_to_one_worker_loses_nothing(ranks, tmp_path, how):
    how = {"wire": "int4", "exact": True, "batch": 12, **OUTER, **how}
    ranks(2, workers.run, 2, folder=str(tmp_path / "2"), save_at=[5], steps=5, **how)
    two = workers.files(tmp_path / "2", 5)["lte_state"]
    ckpt = str(tmp_path / "2/step=5.ckpt")
    three = ranks(3, workers.run, 3, folder=str(tmp_path / "3"), save_at=[5, 9], steps=9, ckpt=ckpt, **how)
    same(three)
    # between the merges: the wire owes what it owed, and what is under way still is
    ranks(3, workers.saved_at_once, 3, folder=str(tmp_path / "3"), ckpt=ckpt, **how)
    again = workers.files(tmp_path / "3", 5)["lte_state"]
    assert sum(part.norm() for part in owed(two).values()) > 0 and ("pending" in two) == ("overlap" in how)
    for name, part in owed(two).items():
        torch.testing.assert_close(owed(again)[name], part, rtol=1e-5, atol=1e-7)
        assert torch.equal(two["base"][name], again["base"][name])
    assert all(torch.equal(two["pending"]["mean"][n], W) for n, W in again.get("pending", {"mean": {}})["mean"].items())
    # alone, what is owed joins W at once, and a merge under way arrives as it would have
    file = workers.files(tmp_path / "3", 9)
    one = workers.run(1, steps=9, ckpt=str(tmp_path / "3/step=9.ckpt"), **how)
    for name, part in owed(file["lte_state"]).items():
        W = file["state_dict"][name]
        torch.testing.assert_close(one["weights"][name], W + part.view(W.shape), rtol=0, atol=1e-6)
    on = workers.run(1, steps=14, ckpt=str(tmp_path / "3/step=9.ckpt"), **how)
    assert on["clock"][0] == 14 and all(torch.isfinite(W).all() for W in on["weights"].values())


def test_a_merge_under_way_reaches_a_worker_that_merges_with_nobody(ranks, tmp_path):
    how = {"overlap": 3, "exact": True}
    ranks(2, workers.run, 2, folder=str(tmp_path), save_at=[5], steps=5, **how)
    file = workers.files(tmp_path, 5)
    one = workers.run(1, steps=5, ckpt=str(tmp_path / "step=5.ckpt"), **how)
    close(one["weights"], file["state_dict"])  # a plain mean: there is nothing that the mean of the weights lacks


def test_copies_may_move_and_the_delay_may_change_between_runs(ranks, tmp_path):
    how = {"exact": True, "folder": str(tmp_path), **OUTER}
    whole = ranks(2, workers.run, 2, save_at=[4], overlap=2, **how)[0]["weights"]
    ckpt = str(tmp_path / "step=4.ckpt")
    close(whole, ranks(2, workers.run, 2, ckpt=ckpt, overlap=2, keep_on="cpu", **how)[0]["weights"], 0)
    same(ranks(2, workers.run, 2, ckpt=ckpt, overlap=0, **how))


def test_saved_after_a_fit_it_goes_on(ranks, tmp_path):
    for whole, again in ranks(2, workers.after_a_fit, 2, str(tmp_path / "after.ckpt"), overlap=3, **OUTER):
        close(whole, again, 0)


# ---- what goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"overlap": 2}, {"fragments": 2, "wire": "int4"}], ids=str)
def test_a_worker_that_is_not_finite_is_named_before_anything_is_merged(ranks, how):
    found = ranks(2, workers.breaking, 2, "net.2.bias", **how)
    for text, _, left in found:
        assert text.startswith("LTE: what worker 1 has learnt of ") and "is NaN or infinite" in text and "\n" not in text
        assert all(torch.isfinite(W).all() for W in left.values())
    close(found[0][2], found[1][2], 0)  # what the merges before it left


def test_a_killed_worker_ends_the_job_with_one_line_and_a_restart_resumes(ranks, tmp_path):
    how = {"overlap": 2, "wire": "int4", "merge_every": 5, "steps": 12, "folder": str(tmp_path), **OUTER}
    whole = ranks(2, workers.run, 2, exact=True, **how)
    fine, text, _ = ranks.outcomes(2, workers.dying, 2, how="killed", answer_within=60, **how)[0]
    assert not fine and text.startswith("RuntimeError: LTE: another worker died or did not answer") and "\n" not in text
    ranks.close()
    again = ranks(2, workers.run, 2, ckpt=str(tmp_path / "step=5.ckpt"), exact=True, **how)
    for a, b in zip(whole, again, strict=True):
        close(a["weights"], b["weights"], 0)


@pytest.mark.parametrize("until", [0, 6])
def test_a_worker_whose_optimizer_has_no_step_is_one_line(ranks, until):
    outcomes = ranks.outcomes(2, workers.lazy, 2, until)
    assert all(not fine and text.startswith("RuntimeError: LTE: ") and "\n" not in text for fine, text, _ in outcomes), outcomes
    assert any("optimizer steps" in text for _, text, _ in outcomes)


def test_more_fragments_than_targets_are_one_line():
    for how in ({"fragments": 12, "merge_every": 12}, {"fragments": 2, "targets": ["net.0"]}):
        with pytest.raises(ConfigError, match="fragments=.*must be at most the number of targets") as error:
            workers.fit(**how)
        assert "\n" not in str(error.value)


def test_settings_of_streaming_are_taken():
    assert LTEStrategy(update="full", merge_every=100, fragments=5, overlap=5, keep_on="cpu").settings.interval == 20


# ---- traffic -------------------------------------------------------------------------------------------------------------


SOME = {"targets": ["net.0", "net.4", "out"], "sync_rest": "merge"}


@pytest.mark.parametrize("wire", ["float32", "int4"])
@pytest.mark.parametrize("how", [{"fragments": 2}, {"overlap": 2}, {"fragments": 2, **SOME}], ids=["parts", "late", "some"])
def test_bytes_are_the_formulas_and_the_peak_falls_with_the_mean(ranks, wire, how):
    (found, _) = ranks(2, workers.counted, 2, wire=wire, net={"dtype": torch.float32}, steps=11, **how)
    plan = {key: value for key, value in how.items() if key != "overlap"}
    said = traffic(Net(dtype=torch.float32), workers=2, merge_every=4, update="full", wire=wire, **plan)
    chosen = SIZES if "targets" not in how else {f"{name}.weight": SIZES[f"{name}.weight"] for name in how["targets"]}
    parts = fragments_of(chosen, how.get("fragments", 1))
    loads = [sum(chosen[name] for name in part) for part in parts]
    formula = [4 * n if wire == "float32" else 2 * Codec(wire).bytes_of(padded(n, 2) // 2) for n in loads]
    assert said["merge"] == max(formula) and said["targets"] == sum(formula) / 4
    # two whole windows, and with two fragments the first of the third
    assert found["seen"] == pytest.approx(sum([*formula, *formula, *formula[: len(parts) - 1]]) + 2 * 4 * said["rest"])
    if "targets" not in how:  # no rest
        halves = 2 if wire == "int4" and "overlap" in how else 1  # sent at different steps
        by_step = [after - before for before, after in zip([0, *found["sent_by"]], found["sent_by"], strict=False)]
        assert max(by_step) == max(formula) / halves


def test_the_peak_of_vit_s_in_fragments_is_a_fifth():
    from tests.test_lte_traffic import model

    bare = model("vit_small_patch32_224")
    whole, parts = (traffic(bare, workers=8, merge_every=100, update="full", wire="int4", fragments=k) for k in (1, 5))
    assert parts["targets"] == pytest.approx(whole["targets"], rel=0.001) and parts["merge"] < 1.02 * whole["merge"] / 5
