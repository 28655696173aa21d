"""Several runs on one page: seeds as one row and a band, curves over steps, time and bytes sent, and runs that still go on."""

import json
import re
from datetime import datetime
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lowrank_pretrain.core.ownership import is_owned, owned
from lowrank_pretrain.report import find_runs, render
from lowrank_pretrain.report.collection import Entry, by_seed, entries
from lowrank_pretrain.report.curves import SECONDS, SENT, STEPS, curve
from lowrank_pretrain.report.runs import Run, phases_so_far, read_run
from lowrank_pretrain.report.tables import equal_cost_table, results_table
from lowrank_pretrain.report.traffic import sent
from tests.test_report import Page, make, seeds, undrawn  # noqa: F401 - a fixture


def one(config: dict | None = None, **series: list) -> Run:
    """A run of these points, without a directory."""
    names = {key.replace("__", "/"): points for key, points in series.items()}
    return Run(Path("run"), config=config or {}, series=names, summary={"phases": []})


# -- seeds --------------------------------------------------------------------------------------------------------------


def test_seeds_are_one_entry_in_the_order_of_their_first_run(tmp_path):
    runs = find_runs([seeds(tmp_path / "sweep")])
    found = entries(runs)
    assert [(entry.label, len(entry.runs)) for entry in found] == [("full", 3), ("lora", 3), ("galore, seed=0", 1)]
    runs[1].failure = "error: x"  # its row stays, next to the two that finished
    assert [(entry.label, len(entry.runs)) for entry in entries(runs)][:2] == [("full", 2), ("full, seed=1", 1)]


def test_the_curve_of_seeds_is_their_mean_with_a_band_of_one_deviation():
    each = [one(val__loss=[(10.0, y), (20.0, 2 * y)]) for y in (1.0, 2.0, 3.0)]
    drawn = curve(Entry("x", each), STEPS, "val/loss", factor=10)
    assert drawn.points == [(10.0, 20.0), (20.0, 40.0)]
    assert drawn.band == [(10.0, 10.0, 30.0), (20.0, 20.0, 60.0)], "±10 and ±20"
    alone = curve(Entry("x", each[:1]), STEPS, "val/loss")
    assert alone.points == [(10.0, 1.0), (20.0, 2.0)] and alone.band == []
    assert curve(Entry("x", [*each, one()]), STEPS, "val/loss") is None, "a run without values has no share in a mean"


def test_seeds_of_other_speed_are_averaged_over_the_time_that_all_of_them_cover():
    points = [(float(step), float(step)) for step in range(1, 11)]
    slow, fast = (one(val__loss=points, time__train_seconds=[(10.0, end)]) for end in (19.0, 10.0))
    drawn = curve(Entry("x", [slow, fast]), SECONDS, "val/loss")
    assert len(drawn.points) == 10 and (drawn.points[0][0], drawn.points[-1][0]) == (1.9, 10.0)
    assert drawn.points[-1][1] == pytest.approx((10 / 1.9 + 10) / 2), "one is at step 10 after 19 seconds, the other after 10"
    assert drawn.band[-1][2] - drawn.points[-1][1] == pytest.approx((10 - 10 / 1.9) / 2**0.5)


def test_the_band_is_drawn_and_explained(tmp_path):
    text = render(find_runs([seeds(tmp_path / "sweep")]), "sweep")
    assert "Band: mean ± standard deviation over seeds." in text
    chart = text[text.index('aria-label="train/loss by step"') :]
    chart = chart[: chart.index("</svg>")]
    assert len(set(re.findall(r"opacity: 0.18", chart))) == 1 and chart.count("FillBetweenPolyCollection") in (0, 2)
    assert len(re.findall(r"fill: var\(--s[01]\); fill-opacity: 0.18", chart)) >= 2, "in the lines' colours"


# -- bytes --------------------------------------------------------------------------------------------------------------

TRAINABLE = {"params__trainable": [(5.0, 2.0**20), (10.0, 2.0**20), (20.0, 2.0**18)]}


@pytest.mark.parametrize(("trainer", "expected"), [
    ({"devices": 2}, [(5.0, 20.0), (10.0, 40.0), (20.0, 50.0)]),  # a ring of two sends each gradient once
    ({"devices": 2, "num_nodes": 2, "strategy": "ddp"}, [(5.0, 30.0), (10.0, 60.0), (20.0, 75.0)]),
    ({"devices": [0, 1], "precision": "bf16-true"}, [(5.0, 10.0), (10.0, 20.0), (20.0, 25.0)]),
    ({"devices": 1}, []), ({"devices": "auto"}, []), ({"devices": -1}, []), ({}, []),
    ({"devices": 2, "strategy": "fsdp"}, []),
])  # fmt: skip
def test_what_data_parallel_training_sends_is_computed_from_its_gradients(trainer, expected):
    assert sent(one({"trainer": trainer}, **TRAINABLE)) == expected


def test_the_processes_that_a_run_had_count_more_than_those_that_were_asked_for():
    run = one({"trainer": {"devices": "auto"}}, **TRAINABLE)
    run.summary = {"phases": [{"phase": "full", "steps": 20, "seconds": 1.0, "world_size": 2}]}
    assert sent(run)[-1] == (20.0, 50.0)


def test_what_lte_sends_was_counted_at_its_merges():
    merges = {"lte__merge_mib": [(5.0, 1.0), (20.0, 2.0)], "lte__rest_mib": [(5.0, 4.0), (20.0, 4.0)]}
    config = {"method": {"merge_every": 5}, "trainer": {"devices": 2}}
    assert sent(one(config, **merges)) == [(5.0, 5.0), (20.0, 23.0)], "merges between two logged ones cost as the later"
    halves = {"method": {"merge_every": 10, "fragments": 2}}
    assert sent(one(halves, **merges)) == [(5.0, 3.0), (20.0, 15.0)], "each half merges once in ten steps, and the rest once"
    late = {key: [(step + 5, mib) for step, mib in points] for key, points in merges.items()}
    assert sent(one(config, **late, **TRAINABLE))[:2] == [(5.0, 20.0), (10.0, 25.0)], "before its heads, gradients"
    idle = {key: [(step, 0.0) for step, _ in points] for key, points in merges.items()}
    assert sent(one(config, **idle)) == [], "one worker sends nothing"


def test_a_curve_over_bytes_stands_at_what_was_sent_by_then():
    run = one({"trainer": {"devices": 2}}, val__loss=[(5.0, 3.0), (15.0, 2.0)], **TRAINABLE)
    assert curve(Entry("x", [run]), SENT, "val/loss").points == [(20.0, 3.0), (45.0, 2.0)]


def test_the_choice_of_axes_is_there_where_there_are_several(undrawn, tmp_path):  # noqa: F811
    make(tmp_path / "a", devices=2)
    make(tmp_path / "b", loss=2.0)
    text = render(find_runs([tmp_path]), "x")
    assert Page(text).ids == ["over-steps", "over-time", "over-bytes"] and text.count(" checked>") == 1
    assert "Without b: nothing sent, or not known." in text
    assert text.count("<figure class=bytes>") == text.count("<figure class=steps>") == 3
    for name in "ab":
        path = tmp_path / name / "metrics.csv"
        path.write_text(path.read_text().replace("time/train_seconds", "x").replace("params/trainable", "y"))
        (tmp_path / name / "summary.json").unlink()
    assert Page(render(find_runs([tmp_path]), "x")).ids == []


def test_values_are_compared_at_equal_steps_seconds_and_bytes():
    points = [(float(step), 10.0 - step) for step in range(1, 9)]
    long = one(
        {"trainer": {"devices": 2}}, val__loss=points, time__train_seconds=[(8.0, 80.0)], params__trainable=[(8.0, 2.0**20)]
    )
    short = one(
        {"trainer": {"devices": 2}}, val__loss=points[:4], time__train_seconds=[(4.0, 60.0)], params__trainable=[(4.0, 2.0**18)]
    )
    page = Page(equal_cost_table([Entry("long run", [long]), Entry("short run", [short])]))
    assert page.cells == [
        "run", "val/loss after 4 steps", "val/loss after 60.0 s of training", "val/loss after 4.0 MiB sent",
        "long run", "6", "4 ★", "9", "short run", "6", "6", "6 ★",
    ]  # fmt: skip
    assert equal_cost_table([Entry("long run", [long])]) == ""


# -- one run, and one that goes on -----------------------------------------------------------------------------------------


def test_one_runs_tables_stand_upright(undrawn, tmp_path):  # noqa: F811
    run = find_runs([make(tmp_path / "run")])[0]
    assert Page(results_table(run)).cells[:7] == ["last", "best", "at step", "val/loss", "0.05", "0.05", "20"]
    text = render([run], "one")
    assert text.count('<table class="upright">') == 2 and '"cards"' not in text
    found = Page(text).cells
    assert found[found.index("full") :][:3] == ["full", "lowrank", "whole run"]
    assert found[found.index("seconds") :][:4] == ["seconds", "10.0", "5.0", "15.0"]


def test_a_run_that_a_process_owns_is_still_running(undrawn, tmp_path):  # noqa: F811
    directory = make(tmp_path / "run", rows=12)
    (directory / "summary.json").unlink()
    with owned(directory):
        run = find_runs([directory])[0]
        assert is_owned(directory) and run.state == "running", "asking does not take the directory away"
        assert is_owned(directory)
    written = datetime.fromtimestamp((directory / "metrics.csv").stat().st_mtime)
    expected = f"still running: step 12, epoch 3 of 4, 11.0 s of training, last row written at {written:%Y-%m-%d %H:%M:%S}"
    assert run.reason == expected
    text = render([run], "one")
    assert "<h2>Still running</h2>" in text and expected in text and "Unfinished" not in text and "writes it anew" in text
    cells = Page(text).cells
    assert cells[cells.index("full") :][:3] == ["full", "joint", "whole run"], "phases so far"
    assert cells[cells.index("optimizer steps") :][:4] == ["optimizer steps", "10", "2", "12"]
    assert not is_owned(directory) and read_run(directory).state == "unfinished", "killed, or on another machine"


def test_a_run_among_finished_ones_is_listed_as_running_and_is_no_failure(undrawn, tmp_path):  # noqa: F811
    make(tmp_path / "done")
    going = make(tmp_path / "going", rows=3)
    (going / "summary.json").unlink()
    empty = tmp_path / "begun"
    (empty / ".hydra").mkdir(parents=True)
    OmegaConf.save({"seed": 1}, empty / ".hydra" / "config.yaml")
    with owned(going), owned(empty):
        text = render(find_runs([tmp_path]), "x")
    assert "3 runs: 1 finished, 2 running." in text and "Failed, damaged" not in text
    assert "<b>begun</b> · still running, before its first logged step" in text
    assert '<small class="running">running</small>' in text


def test_another_processs_run_is_seen_and_its_lock_is_left(tmp_path):
    import multiprocessing

    def hold(path, ready, end):
        with owned(path):
            ready.set()
            end.wait(60)

    fork = multiprocessing.get_context("fork")
    ready, end = fork.Event(), fork.Event()
    holder = fork.Process(target=hold, args=(tmp_path, ready, end))
    holder.start()
    try:
        assert ready.wait(60) and is_owned(tmp_path) and is_owned(tmp_path)
        holder.kill()
        holder.join()
        assert (tmp_path / ".lock").is_file() and not is_owned(tmp_path), "a killed process owns nothing"
    finally:
        holder.kill()


def test_the_phases_of_a_run_that_goes_on_come_from_its_rows():
    series = {
        "lowrank/phase": [(5.0, 0.0), (10.0, 0.0), (15.0, 2.0)],
        "time/train_seconds": [(5.0, 5.0), (10.0, 9.0), (15.0, 11.0)],
        "throughput/samples_per_sec": [(5.0, 8.0), (10.0, 10.0), (15.0, 20.0)],
        "memory/peak_gib": [(5.0, 2.0), (10.0, 3.0), (15.0, 1.0)],
    }
    full, lowrank = phases_so_far(series)
    assert full == {"phase": "full", "steps": 10, "seconds": 9.0, "samples_per_sec": 9.0, "peak_gib": 3.0}
    assert lowrank == {"phase": "lowrank", "steps": 5, "seconds": 2.0, "samples_per_sec": 20.0, "peak_gib": 1.0}
    assert phases_so_far({"lowrank/phase": series["lowrank/phase"]}) == []


def test_processes_are_noted_in_the_summary(tmp_path):
    directory = make(tmp_path / "run")
    summary = json.loads((directory / "summary.json").read_text())
    summary["phases"][0]["world_size"] = 2
    (directory / "summary.json").write_text(json.dumps(summary))
    assert sent(read_run(directory))[-1] == (20.0, 80.0)
    assert by_seed([read_run(directory)]) == []
