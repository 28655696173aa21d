"""DiLoCo with Muon inside (method=muloco), and the table of what each setting sends."""

from pathlib import Path

import pytest
import torch
from benchmarks import lte_bytes
from omegaconf import OmegaConf

from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.traffic import traffic, traffic_of_run
from lowrank_pretrain.run.build import plain
from lowrank_pretrain.run.method import build
from tests import lte_muloco_workers as workers
from tests.reference.diloco import diloco
from tests.test_lte_full import OUTER, Plain, batches, close, loss_of, same

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "lte_bytes.md"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_with_muon_inside_it_is_algorithm_1_for_a_few_merges(ranks, world):
    how = {"merge_every": 4, **OUTER}
    found = [workers.run(1, **how)] if world == 1 else ranks(world, workers.run, world, **how)
    same(found)
    twin = diloco(
        Plain(workers.MuonNet()), batches(world), loss_of, lambda params: workers.muon(enumerate(params)), 4, *OUTER.values()
    )
    close(found[0]["weights"], twin)


def test_muloco_resumes_to_the_bit(ranks, tmp_path):
    how = {"wire": "int2", "outer_lr": 0.8, "outer_momentum": 0.9}
    for found in ranks(2, workers.resumed, 2, str(tmp_path), [3, 4, 6], steps=9, **how):
        assert found == {3: [], 4: [], 6: []}


def test_the_method_is_diloco_with_muon_and_two_bits(composed):
    config = plain(composed("experiment=none", "method=muloco"))["method"]
    other = plain(composed("experiment=none", "method=diloco"))["method"]
    muon = plain(composed("experiment=none", "method=muon"))["method"]
    assert config.keys() == other.keys() | muon.keys()
    changed = {key for key, value in config.items() if value != {**muon, **other}[key]}
    assert changed == {"name", "uses", "wire", "outer_lr", "momentum", "nesterov"}
    built = build(config)
    strategy = built.strategy
    assert isinstance(strategy, LTEStrategy) and built.optimizer is not None
    assert (strategy.update, strategy.merge_every, strategy.settings.wire) == ("full", 30, "int2")
    assert OmegaConf.load(ROOT / "conf" / "method" / "prelora_lte.yaml").before == "ddp"


# ---- the table of bytes -------------------------------------------------------------------------------------------------


def cells(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {name: dict(zip(rows[0][1:], map(float, values), strict=True)) for name, *values in rows[2:]}


def test_some_setting_sends_as_little_as_must_hold():
    found = cells(TABLE.read_text())
    for model, limits in (("GPT-2 124M", (2.5, 1.0)), ("ViT-L/16", (4.0, 2.0))):
        full = {name: row[model] for name, row in found.items() if name.startswith("DiLoCo")}
        assert all(any(mib <= limit for mib in full.values()) for limit in limits)
    assert found["DiLoCo (MuLoCo), H = 30, int2"]["GPT-2 124M"] <= 2.5 and found["DiLoCo, H = 100, int4"]["ViT-L/16"] <= 4
    assert found["DiLoCo (MuLoCo), H = 100, int2"]["GPT-2 124M"] <= 1
    assert found["DiLoCo (MuLoCo), H = 100, int2"]["ViT-L/16"] <= 2


def test_the_page_shows_the_tables_rows_and_the_code_still_says_so():
    lines = TABLE.read_text().splitlines()
    page = (ROOT / "docs/tutorials/lte.md").read_text().splitlines()
    shown = [line for line in page if line.startswith(("| DiLoCo", "| LTE, T", "| PreLoRA →"))]
    assert len(shown) > 10 and set(shown) <= set(lines)
    model = lte_bytes.bare(lte_bytes.MODELS["ViT-S/32"])
    rows = list(lte_bytes.settings())
    for name, how, arguments in (rows[0], rows[5], rows[13], rows[-2]):
        told = cells(TABLE.read_text())[name]["ViT-S/32"]
        assert float(lte_bytes.number(lte_bytes.mebibytes(model, how, arguments))) == told, name


@pytest.mark.slow
def test_the_whole_table_is_what_the_code_says():
    assert lte_bytes.table() == [line for line in TABLE.read_text().splitlines() if line.startswith("|")]


def test_a_run_with_phases_is_the_mean_of_them():
    net, how = workers.MuonNet(dtype=torch.float32), {"rank": 2, "heads": 1, "merge_every": 5, "sync_rest": "merge"}
    full, late = traffic(net, workers=2, update="full", merge_every=5, wire="int8"), traffic(net, workers=2, wire="int8", **how)
    merged = traffic_of_run(net, freeze_at=0.25, workers=2, wire="int8", **how)
    assert merged == {"full": full["all"], "lowrank": late["all"], "all": pytest.approx((full["all"] + 3 * late["all"]) / 4)}
    assert traffic_of_run(net, "ddp", 0.25, 2, wire="int8", **how)["full"] == late["ddp"]
