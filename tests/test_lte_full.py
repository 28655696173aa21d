"""Whole weights trained locally (DiLoCo, local SGD), the outer step of every update, and few-bit wires in real fits."""

import pytest
import torch
from torch import nn

from lowrank_pretrain import ConfigError, PreLoRA
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.increments import Increments
from lowrank_pretrain.lte.traffic import Imagined, traffic
from lowrank_pretrain.lte.wire import Codec, padded
from tests import lte_full_workers as workers
from tests import lte_workers
from tests.lte_galore_workers import GaLoreNet
from tests.lte_shared import Plain, after_a_fit, close, same
from tests.lte_workers import Net, Samples
from tests.reference.diloco import diloco
from tests.test_lte import twin as heads_twin
from tests.test_lte_galore import twin as projected_twin

OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9}


def batches(workers_, steps=12, batch=8):
    data, per = Samples(), batch // workers_
    found = []
    for b in range(steps):
        first = b % (len(data) // batch) * batch
        parts = [slice(first + n * per, first + (n + 1) * per) for n in range(workers_)]
        found.append([(data.x[part], data.y[part]) for part in parts])
    return found


def loss_of(f, batch):
    return nn.functional.cross_entropy(f(batch[0]), batch[1])


def twin(workers_, net=None, every=4, steps=12, **outer):
    net = Net(**(net or {}))

    def optimizer_of(params):
        if net.kind == "sgd":
            return torch.optim.SGD(params, lr=net.lr, momentum=0.9)
        return torch.optim.AdamW(params, lr=net.lr, weight_decay=0.1)

    return diloco(Plain(net), batches(workers_, steps), loss_of, optimizer_of, every, *outer.values())


# ---- the mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("outer", "every"), [({}, 4), (OUTER, 5)], ids=["local-sgd", "diloco"])
def test_it_is_algorithm_1(ranks, world, outer, every):
    how = {"merge_every": every, **outer}
    found = [workers.run(1, **how)] if world == 1 else ranks(world, workers.run, world, **how)
    same(found)
    close(found[0]["weights"], twin(world, every=every, **outer))
    assert found[0]["clock"] == (12, 12 // every) and found[0]["phase"] == "full"


def test_merging_at_each_step_with_sgd_is_ddp(ranks):
    merged = ranks(2, workers.run, 2, net={"optimizer": "sgd"}, merge_every=1)
    alone, _, _ = lte_workers.fit(module=Net("sgd"), strategy="auto")  # one process, both halves of each batch
    close(merged[0]["weights"], lte_workers.weights(alone))


def test_targets_limit_what_is_merged_so_and_the_rest_follows_sync_rest(ranks):
    alone, _, _ = lte_workers.fit(module=Net("sgd"), strategy="auto")
    for sync in ("step", "merge"):
        found = ranks(2, workers.run, 2, net={"optimizer": "sgd"}, merge_every=1, targets=["net.0"], sync_rest=sync)
        close(found[0]["weights"], lte_workers.weights(alone))
        assert list(found[0]["heads"]) == ["net.0.weight"]  # its bias belongs to the rest
    rest = ranks(2, workers.run, 2, targets=["net.0"], sync_rest="step", **OUTER)
    for number, (a, b) in enumerate(zip(rest[0]["W"], rest[1]["W"], strict=True), 1):
        unlike = [name for name in a if not torch.equal(a[name], b[name])]
        assert unlike == ([] if number % 4 == 0 else ["net.0.weight"])


@pytest.mark.parametrize("how", [{}, {"reset": True}, {"overlap": 2}, {"outer_lr": 0.5, "outer_momentum": 0.0}], ids=str)
def test_the_outer_step_of_heads_equals_its_twin(ranks, how):
    outer = {**OUTER, **{k: v for k, v in how.items() if k in OUTER}}
    how = {k: v for k, v in how.items() if k not in OUTER}
    expected = heads_twin(outer=tuple(outer.values()), **how)
    one = workers.run(1, update="lora", **outer, **how)
    two = ranks(2, workers.run, 2, update="lora", heads=1, **outer, **how)
    same(two)
    for found in (one, two[0]):
        close(found["weights"], expected)


def test_outer_momentum_breaks_the_rank_bound_of_heads_that_are_not_reset():
    def rank_of(**outer):
        found = workers.run(1, update="lora", rank=1, merge_every=2, steps=16, **outer)
        moved = found["weights"]["net.4.weight"] - Net().net[4].weight.detach()
        return torch.linalg.matrix_rank(moved, rtol=1e-9).item()

    assert rank_of() == 2 and rank_of(outer_lr=0.5) == 2  # N · R
    assert rank_of(outer_momentum=0.9) == 8  # all that the matrix has


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("basis", ["own", "shared"])
def test_the_outer_step_of_projected_updates_equals_its_twin(ranks, world, basis):
    how = {"update": "galore", "basis": basis, **OUTER}
    found = [workers.run(1, **how)] if world == 1 else ranks(world, workers.run, world, **how)
    same(found)
    close(found[0]["weights"], projected_twin(world, shared=basis == "shared", outer=tuple(OUTER.values())))


# ---- what is equal where -------------------------------------------------------------------------------------------------

SETTINGS = [
    {"wire": "bfloat16"}, {"wire": "int8", **OUTER}, {"wire": "int4", "net": {"dtype": torch.float32}, **OUTER},
    {"wire": "int2", "trainer": {"gradient_clip_val": 0.05}}, {"targets": ["net.4"], "sync_rest": "merge", "wire": "int2"},
    {"update": "lora", "wire": "int4"}, {"update": "lora", "wire": "bfloat16", "sync_rest": "merge", "reset": True},
    {"update": "lora", "wire": "int8", "sync_rest": "merge", "overlap": 2, **OUTER},
    {"update": "lora", "route": "dense", "net": {"dtype": torch.bfloat16}, **OUTER},
    {"update": "galore", "wire": "int8", **OUTER},
    {"update": "galore", "wire": "int4", "basis": "shared", "sync_rest": "merge"},
]  # fmt: skip


@pytest.mark.parametrize("how", SETTINGS, ids=str)
def test_w_has_the_same_bits_on_all_workers_after_each_merge(ranks, how):
    world = 3 if "update" not in how else 2
    found = ranks(world, workers.run, world, batch=12, data=Samples(60, how.get("net", {}).get("dtype", torch.float64)), **how)
    same(found)
    late = how.get("overlap", 0)
    for after in (3 + late, 7 + late):  # the merge that these batches end with
        for other in found[1:]:
            for name, W in found[0]["W"][after].items():
                moved = late and name not in ("net.0.weight", "net.4.weight")  # the rest was averaged when the merge began
                assert moved or torch.equal(W, other["W"][after][name]), name
    assert all(torch.isfinite(W).all() for W in found[0]["weights"].values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_nothing(ranks, dtype):
    for how in (
        {"wire": "int8"}, {"wire": "int2", "overlap": 2}, {"update": "lora", "sync_rest": "merge", "wire": "int4", **OUTER},
        {"update": "lora", "reset": True},
    ):  # fmt: skip
        for plain, other in ranks(2, workers.by_default_dtype, 2, dtype, **how):
            close(plain, other, 0)


@pytest.mark.parametrize("how", [SETTINGS[2], SETTINGS[4], SETTINGS[7], SETTINGS[9]], ids=str)
def test_looking_changes_nothing_and_sees_the_same_model_everywhere(ranks, how):
    blind, looking = (ranks(2, workers.run, 2, steps=10, val=val, **how) for val in (0, 2))
    close(blind[0]["weights"], looking[0]["weights"], 0)
    assert blind[0]["losses"] == looking[0]["losses"] and looking[0]["scores"]


def test_a_merge_through_a_wire_stays_near_the_exact_one(ranks):
    exact = ranks(2, workers.run, 2, steps=40)[0]["weights"]
    for update in ("full", "lora"):
        plain = exact if update == "full" else ranks(2, workers.run, 2, steps=40, update=update)[0]["weights"]
        for wire, most in (("bfloat16", 0.01), ("int8", 0.02), ("int4", 0.3)):
            found = ranks(2, workers.run, 2, steps=40, update=update, wire=wire)[0]["weights"]
            moved = sum((plain[n] - w.detach()).square().sum() for n, w in Net().named_parameters()).sqrt()
            off = sum((plain[n] - found[n]).square().sum() for n in plain).sqrt()
            assert off < most * moved, (update, wire, float(off / moved))


# ---- checkpoints ---------------------------------------------------------------------------------------------------------

RESUMED = [
    (1, OUTER), (1, {"update": "lora", **OUTER}), (1, {"update": "galore", **OUTER}), (2, {}),
    (2, {"wire": "int4", "net": {"dropout": 0.2}, **OUTER}), (2, {"targets": ["net.4"], "sync_rest": "merge", "wire": "int2"}),
    (2, {"update": "lora", "wire": "int8", "sync_rest": "merge", **OUTER}),
    (2, {"update": "lora", "wire": "int4", "overlap": 2, **OUTER}), (2, {"update": "lora", "reset": True, **OUTER}),
    (2, {"update": "galore", "wire": "bfloat16", **OUTER}), (4, {"wire": "int2", **OUTER}),
    (4, {"update": "lora", "heads": 1, "wire": "int4", "sync_rest": "merge", **OUTER}),
]  # fmt: skip


@pytest.mark.parametrize(("world", "how"), RESUMED, ids=str)
def test_resume_is_exact_at_and_between_merges(ranks, tmp_path, world, how):
    args = world, str(tmp_path), [3, 4, 6]
    found = [workers.resumed(*args, steps=10, **how)] if world == 1 else ranks(world, workers.resumed, *args, steps=10, **how)
    assert all(unlike == {3: [], 4: [], 6: []} for unlike in found), found


def pending(entry):
    errors = entry["errors"]
    return (torch.stack(errors["sent"]).mean(0) + torch.cat(errors["mean"]))[: sum(W.numel() for W in entry["base"].values())]


@pytest.mark.parametrize("update", ["full", "lora"])
def test_two_to_three_to_one_worker_loses_no_error_feedback(ranks, tmp_path, update):
    how = {"update": update, "wire": "int4", "exact": True, "batch": 12, "sync_rest": "merge", **OUTER}

    def entry(folder, at):
        state = workers.files(tmp_path / folder, at)["lte_state"]
        return state if update == "full" else state["rest"]

    ranks(2, workers.run, 2, folder=str(tmp_path / "2"), save_at=[5], steps=5, **how)
    two = pending(entry("2", 5))
    three = ranks(
        3, workers.run, 3, folder=str(tmp_path / "3"), save_at=[6, 9], steps=9, ckpt=str(tmp_path / "2/step=5.ckpt"), **how
    )
    same(three)
    assert two.norm() > 0
    torch.testing.assert_close(pending(entry("3", 6)), two, rtol=1e-5, atol=1e-7)  # no merge since
    # alone, it joins W at once: resumed without a step W is the file's and what was pending
    file = workers.files(tmp_path / "3", 9)
    one = workers.run(1, steps=9, ckpt=str(tmp_path / "3/step=9.ckpt"), **{**how, "heads": 3} if update == "lora" else how)
    owed = pending(entry("3", 9))
    sizes = [W.numel() for W in entry("3", 9)["base"].values()]
    for name, part in zip(entry("3", 9)["base"], owed.split(sizes), strict=True):
        W = file["state_dict"][name]
        torch.testing.assert_close(one["weights"][name], W + part.view(W.shape), rtol=0, atol=1e-6)
    on = workers.run(1, steps=14, ckpt=str(tmp_path / "3/step=9.ckpt"), **{**how, "heads": 3} if update == "lora" else how)
    assert on["clock"][0] == 14 and all(torch.isfinite(W).all() for W in on["weights"].values())


OTHERS = [
    ({}, {"wire": "int8"}, "wire='int8': the checkpoint was trained with float32"),
    ({"wire": "int4"}, {"wire": "bfloat16"}, "wire='bfloat16': the checkpoint was trained with int4"),
    (OUTER, {**OUTER, "outer_lr": 0.5}, "outer_lr=0.5: the checkpoint was trained with 0.7"),
    ({}, {"outer_momentum": 0.9}, "outer_momentum=0.9: the checkpoint was trained with 0.0"),
    ({"update": "lora"}, {}, "update='full': the checkpoint was trained with lora"),
    ({}, {"update": "galore"}, "update='galore': the checkpoint was trained with full"),
    ({"update": "lora"}, {"update": "lora", **OUTER}, "outer_lr=0.7: the checkpoint was trained with 1.0"),
    ({"fragments": 2}, {}, "fragments=1: the checkpoint was trained with 2"),
    ({}, {"targets": ["net.0"]}, "targets='net.0.bias': has shape [8] in the checkpoint and None here"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "then", "line"), OTHERS, ids=str)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, first, then, line):
    error = workers.refused(1, str(tmp_path), first, then)
    assert error.startswith(line) and "\n" not in error


def test_a_file_goes_on_without_lte_and_saved_after_a_fit_it_goes_on(ranks, tmp_path):
    ranks(2, workers.run, 2, folder=str(tmp_path), save_at=[6], steps=6, exact=True, **OUTER)
    module, run, _ = lte_workers.fit(strategy="auto", ckpt=str(tmp_path / "step=6.ckpt"), steps=8, exact=True)
    assert run.global_step == 8
    for whole, again in ranks(2, after_a_fit, 2, str(tmp_path / "after.ckpt"), workers.fit, **OUTER):
        close(whole, again, 0)


@pytest.mark.parametrize("how", [OUTER, {"wire": "int4", "fragments": 4, "overlap": 0}, {"update": "lora"}], ids=str)
def test_parameters_without_elements_take_part(how):
    class WithEmpty(Net):
        def __init__(self):
            super().__init__()
            self.none, self.table = (nn.Parameter(torch.zeros(shape).double()) for shape in ((0,), (0, 5)))

    module, _, strategy = workers.fit(module=WithEmpty(), **how)
    assert strategy.local.clock == 12 and module.table.shape == (0, 5)
    plain, _, _ = workers.fit(**how)
    close({name: W for name, W in lte_workers.weights(module).items() if W.numel()}, lte_workers.weights(plain), 0)


# ---- what goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "name"),
    [({"wire": "int4"}, "net.2.bias"), ({"update": "lora", "sync_rest": "merge", **OUTER}, "net.0.lora_B")],
    ids=str,
)
def test_a_worker_that_is_not_finite_is_named_before_anything_is_merged(ranks, how, name):
    for text, merged, left in ranks(2, workers.breaking, 2, name, **how):
        assert text.startswith("LTE: what worker 1 has learnt of net.") and "\n" not in text
        assert all(torch.equal(merged[n], left[n]) for n in merged if n in ("net.0.weight", "net.4.weight"))


BAD = [
    ({"update": "ful"}, "update='ful': must be one of lora, galore, full"), ({"wire": "int3"}, "wire='int3': must be one of"),
    ({"outer_lr": 0}, "outer_lr=0: must be a number above 0"), ({"outer_momentum": 1.0}, "outer_momentum=1.0: must be"),
    ({"outer_momentum": -0.1}, "outer_momentum=-0.1"), ({"rank": 8}, "rank=8: has no meaning with update=full"),
    ({"reset": True}, "reset=True: has no meaning"), ({"overlap": 10}, "overlap=10: must be below merge_every=10"),
    ({"fragments": 0}, "fragments=0: must be"), ({"fragments": 3}, "fragments=3: must divide merge_every=10"),
    ({"fragments": 5, "overlap": 2}, "overlap=2: must be below merge_every / fragments = 2"),
    ({"update": "lora", "fragments": 2}, "fragments=2: belongs to update=full"),
    ({"update": "galore", "fragments": 2}, "fragments=2: belongs to update=full"),
    ({"keep_on": "disk"}, "keep_on='disk': must be one of device, cpu"),
    ({"update": "lora", "wire": "int2"}, "wire='int2': needs error feedback"),
    ({"update": "galore", "wire": "int2"}, "wire='int2': needs error feedback"),
    ({"update": "lora", "wire": "int8", "route": "dense"}, "route='dense': cannot go with wire=int8"),
    ({"update": "lora", "wire": "int8", "mode": "sequential"}, "wire='int8': needs mode=parallel"),
    ({"update": "lora", "mode": "joint", "outer_momentum": 0.5}, "outer_momentum=0.5: has no meaning in mode=joint"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "line"), BAD, ids=str)
def test_wrong_settings_are_one_line(wrong, line):
    with pytest.raises(ConfigError) as error:
        LTEStrategy(**{"update": "full", **wrong})
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_row_block_and_a_callback_of_phases_are_refused():
    class Fused(Net):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

    with pytest.raises(ConfigError, match="targets='qkv.q': is a part of qkv.weight"):
        workers.fit(module=Fused(), targets=["qkv.q"])
    with pytest.raises(ConfigError, match="update='full': has no low-rank phase"):
        workers.fit(trainer={"callbacks": [PreLoRA()]})


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_a_wire_of_real_numbers_refuses_complex_weights_at_the_start(wire):
    weights = {"real": torch.zeros(3), "phase": torch.zeros(3, dtype=torch.complex64)}
    with pytest.raises(ConfigError, match=f"^wire='{wire}': codes real numbers, and phase is complex: use float32$"):
        Increments(weights, Imagined(2), wire)
    Increments(weights, Imagined(2), "float32")


# ---- traffic -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["float32", "bfloat16", "int8", "int4", "int2"])
def test_bytes_are_the_formulas(ranks, wire):
    for how in ({}, {"targets": ["net.4"], "sync_rest": "merge"}):
        (found, _) = ranks(2, workers.counted, 2, wire=wire, net={"dtype": torch.float32}, steps=8, **how)
        said = traffic(Net(dtype=torch.float32), workers=2, merge_every=4, update="full", wire=wire, **how)
        names = [n for n, _ in Net().named_parameters()]
        n = sum(p.numel() for name, p in Net().named_parameters() if name in ("net.4.weight" if how else names))
        formula = (
            4 * n if wire == "float32" else 2 * Codec(wire).bytes_of(padded(n, 2) // 2)
        )  # 2 (w − 1)/w · n · 4, or both ways
        assert found["metrics"]["lte/merge_mib"] * 2**20 == said["merge"] == formula
        assert found["metrics"]["lte/rest_mib"] * 2**20 == pytest.approx(4 * said["rest"])
        assert found["seen"] == pytest.approx(2 * (said["merge"] + 4 * said["rest"]))


@pytest.mark.parametrize("how", [{"update": "lora", "rank": 2, "heads": 2}, {"update": "galore", "rank": 3}], ids=str)
def test_bytes_of_factors_are_those_of_their_codes(ranks, how):
    module = GaLoreNet() if how["update"] == "galore" else Net()
    for wire in ("bfloat16", "int4"):
        found = ranks(2, workers.run, 2, update=how["update"], wire=wire, sync_rest="merge")[0]["metrics"]
        said = traffic(module, workers=2, merge_every=4, wire=wire, sync_rest="merge", **how)
        assert found["lte/merge_mib"] * 2**20 == said["merge"]
        assert found["lte/rest_mib"] * 2**20 == pytest.approx(4 * said["rest"])


def test_eight_workers_of_gpt2_and_vit_l_send_what_the_table_says():
    from tests.test_lte_traffic import model

    for name, most in (("gpt2", (27.7, 1.96, 1.11)), ("vit_large_patch16_224", (67.8, 4.77, 2.71))):
        bare = model(name)
        for wire, mib in zip(("float32", "int2", "int4"), most, strict=True):
            every = 100 if wire == "int4" else 30
            assert traffic(bare, workers=8, merge_every=every, update="full", wire=wire)["all"] / 2**20 < mib
