"""The optimizers' protocol without its runs: the space, the descent, what follows what, and the record that is written."""

import csv
import json
import math
import re
from dataclasses import replace

import pytest
from experiments import figures
from experiments.optimizers import study as study_file
from experiments.optimizers import table
from experiments.optimizers.sides import ALL, CELLS, QUICK, SIDES, Cell, settings
from experiments.optimizers.study import Study, from_arguments, main
from experiments.optimizers.table import interval, verdict
from experiments.runs import done
from experiments.tables import Missing

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.run import method
from lowrank_pretrain.run.search import LISTS, NAMES, Descent, Space, from_file

SMALL = (
    Cell("text", 0.05, 32, 2, 1, ALL, (2e-3, 1e-2), batch=4, tokens=64),
    Cell("text", 0.1, 32, 4, 1, ("lr",), (2e-3, 1e-2), batch=4, tokens=64),
)
BEST = {"lr": 3e-3, "rest_lr": 2e-2, "beta1": 0.95, "beta2": 0.98, "weight_decay": 0.1, "warmup": 0.05}


def bowl(values):
    """A loss with one minimum; the lists' values count by their place."""
    far = [math.log(values[name] / BEST[name]) for name in ("lr", "rest_lr")]
    far += [LISTS[name].index(values[name]) - LISTS[name].index(BEST[name]) for name in LISTS]
    return 3 + 0.01 * sum(x * x for x in far)


# ---- the space and the descent --------------------------------------------------------------------------------


def descend(space, loss, start=(2e-3, 1e-2), coordinates=NAMES):
    point, origin = space.start(*start)
    descent = Descent(space, point, tuple(coordinates), lambda p: loss(space.values(p, origin)))
    asked = [points for points in descent.requests()]
    return descent, space.values(descent.point, origin), asked


def test_the_descent_ends_where_no_neighbour_is_better():
    descent, values, _ = descend(Space(gain=0), bowl)
    assert descent.settled and not descent.at_an_edge()
    assert {name: values[name] for name in LISTS} == {name: BEST[name] for name in LISTS}
    assert all(1 / 1.5 < values[name] / BEST[name] < 1.5 for name in ("lr", "rest_lr"))
    space = descent.space
    around = [point for name in NAMES for point in space.neighbours(descent.point, name)]
    assert len(around) == 12 and all(descent.loss(point) >= descent.loss(descent.point) for point in around)
    assert set(around) <= descent.tried and len(descent.tried) <= space.budget


def test_the_budget_holds_for_every_side_and_is_told():
    descent, _, asked = descend(Space(budget=10), bowl)
    assert not descent.settled and len(descent.tried) <= 10 and asked


def test_noise_below_the_gain_moves_nothing():
    descent, values, _ = descend(Space(gain=0.001), lambda values: 3 - 1e-4 * values["lr"])
    assert descent.settled and values["lr"] == 2e-3 and len(descent.tried) == 13


def test_a_rate_at_which_training_diverges_is_left_alone():
    descent, values, _ = descend(
        Space(), lambda values: math.inf if values["lr"] > 2.5e-3 else 3 - values["lr"], coordinates=("lr",)
    )
    assert values["lr"] == 2e-3 and descent.settled


def test_an_edge_of_a_list_is_told():
    descent, values, _ = descend(Space(gain=0), lambda values: values["warmup"])
    assert values["warmup"] == 0.02 and descent.at_an_edge() == ["warmup"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lists": {"beta1": [0.9, 0.95]}},
            r"beta1=\[0.9, 0.95\]: must be three or more increasing values: a search space needs an",
        ),
        ({"lists": {"warmup": [0.1, 0.05, 0.02]}}, "warmup=.*increasing"),
        ({"lists": {"lr": [1, 2, 3]}}, "lists='lr': must be one of beta1, beta2, weight_decay, warmup"),
        ({"lists": [1]}, "lists=.*must be values by coordinate"),
        ({"lists": {"beta1": ["a", "b", "c"]}}, "beta1='a': must be a number"),
        ({"lists": {"beta2": [0.9, 0.99, 1.0]}}, "beta2=1.0: must be a number of 0 or more, below 1"),
        ({"lists": {"warmup": [0.0, 0.5, 1.5]}}, "warmup=1.5: must be a number of 0 or more, below 1"),
        ([1], r"space=\[1\]: must be an object with some of lists, factor, budget, gain"),
        ({"factor": 1}, "factor=1: must be a number above 1"),
        ({"budget": 0}, "budget=0: must be an integer of 1 or more runs"),
        ({"gains": 0.1}, "gains=0.1: must be one of lists, factor, budget, gain"),
    ],
)
def test_a_space_that_cannot_be_is_one_line(change, message, tmp_path, capsys):
    with pytest.raises(ConfigError, match=message):
        from_file(change)
    (tmp_path / "space.json").write_text(json.dumps(change))
    assert main(["--quick", "--table", "--space", str(tmp_path / "space.json"), "--runs", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.match(message, line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--space", "nosuch.json"], "space='nosuch.json': must be a JSON file: .*No such file"),
        (["--space", "bad.json"], "space='bad.json': must be a JSON file: Expecting property name"),
        (["--budget", "text0.05m-1tpp=many"], "budget='many': must be an integer of 1 or more runs"),
        (["--together", "0"], "together=0: must be an integer of 1 or more runs"),
        (["--precision", "half"], "precision='half': must be one of 32-true, bf16-mixed"),
        (["--runs", "bad.json"], "runs='.*bad.json': must be a folder that can be written to"),
    ],
)
def test_a_wrong_argument_is_one_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{bad")
    assert main(["--quick", "--cells", "text0.05m-1tpp", *words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.match(message, line)


def test_an_unknown_side_or_cell_is_one_line():
    for words in (["--sides", "adam"], ["--cells", "text9m"], ["--budget", "text9m=3"], ["--coordinates", "eps"]):
        with pytest.raises(SystemExit, match=r"(sides|cells|budget|coordinates)='.*': must be some of"):
            from_arguments(words)


def test_searches_may_go_along_some_coordinates_alone():
    study, _ = from_arguments(["--quick", "--coordinates", "lr", "beta1"])
    text = study.cells[0]
    assert study.descent("muon", text, study.origin("muon", text)[0]).coordinates == ("lr",)


def test_a_cell_may_have_a_budget_of_its_own_for_all_sides():
    study, _ = from_arguments(["--quick", "--budget", "images0.02m-0.02ep=3"])
    text, images = study.cells
    assert (study.budget(text), study.budget(images)) == (6, 3)
    assert {study.descent(side, images, study.origin(side, images)[0]).space.budget for side in study.sides} == {3}


# ---- what is run --------------------------------------------------------------------------------


def pretend(job, where):
    """What a run would have left: a loss of its settings, its side and its seed."""
    facts = job.facts
    loss = bowl(facts) + {"muon": -0.05, "track": -0.02}.get(facts["side"], 0.0) + 0.001 * facts["seed"]
    loss += 1e-4 * ((7 * facts["seed"] + len(facts["side"])) % 5)
    milliseconds = {"muon": 40.0, "track": 20.0}.get(facts["side"], 10.0)
    final = {"val/loss": loss, "test/loss": loss + 0.1, "train/loss": loss}
    phase = {
        "phase": "full",
        "steps": facts["steps"],
        "seconds": facts["steps"] * milliseconds / 1e3,
        "trainable": 10,
        "total": 10,
    }
    summary = {"phases": [phase], "final": final, "switch_step": None, "freeze_step": None}
    found = {"summary": summary, "wall": 1.0, "cpu": 1.0, "load": 1.0, "machine": "a machine", "facts": facts}
    found |= {
        "train_cpu": facts["steps"] * milliseconds / 1e3,
        "optimizer_mib": {"muon": 2.0, "track": 1.3}.get(facts["side"], 4.0),
    }
    found["overrides"] = [word.replace(str(where), "RUNS") for word in job.overrides]
    (where / job.name).mkdir(parents=True, exist_ok=True)
    (where / job.name / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study whose runs have all been pretended, and the stages that it asked for."""
    where = tmp_path_factory.mktemp("optimizers")
    study = Study(where, SMALL, ("adamw", "muon", "track"), seeds=(1, 2, 3), corpus=where / "corpus")
    stages = []
    for jobs, together in study.stages():
        stages.append(([job.name for job in jobs], together))
        for job in jobs:
            if done(job, where) is None:
                pretend(job, where)
    return study, stages


def test_every_side_has_the_same_budget_and_starts_where_the_last_cell_ended(finished):
    study, stages = finished
    first, second = study.cells
    for side in study.sides:
        descent = study.best(side, first)
        assert descent.settled and len(descent.tried) <= study.space.budget
        values = study.space.values(descent.point, study.origin(side, first)[1])
        assert {name: values[name] for name in LISTS} == {name: BEST[name] for name in LISTS}
        assert study.start_of(side, second) == descent.point
        assert {dict(point)["beta1"] for point in study.best(side, second).tried} == {dict(descent.point)["beta1"]}
    assert {together for _, together in stages} == {2}  # CPU time is counted: nothing has to run by itself
    searched = {name for names, together in stages for name in names if name.endswith("-seed0")}
    assert len(searched) == sum(len(study.best(side, cell).tried) for side in study.sides for cell in study.cells)


def test_reported_seeds_have_not_been_searched_on(finished):
    study, _ = finished
    for cell in study.cells:
        jobs = study.reported(cell)
        assert {seed for _, seed in jobs} == {1, 2, 3} and len(jobs) == 9
        timed = study.equal_seconds(cell)
        assert {side for side, _ in timed} == {"muon", "track"}
        full = cell.steps()
        assert timed["muon", 1].facts["steps"] == pytest.approx(full / 4, abs=10)
        assert timed["track", 1].facts["steps"] == pytest.approx(full / 2, abs=10)


def test_a_study_that_was_cut_off_goes_on_where_it_stopped(finished):
    study, _ = finished
    lost = study.job("muon", SMALL[0], study.best("muon", SMALL[0]).point)
    kept = (study.where / lost.name / "found.json").rename(study.where / "kept.json")
    try:
        asked = next(iter(study.search(SMALL[0], {side: study.start_of(side, SMALL[0]) for side in study.sides})))
        assert [job.name for job in asked if done(job, study.where) is None] == [lost.name]
        with pytest.raises(Missing, match=re.escape(lost.name)):
            study.best("muon", SMALL[0])
    finally:
        kept.rename(study.where / lost.name / "found.json")
    for jobs, _ in study.stages():
        assert all(done(job, study.where) for job in jobs)


@pytest.mark.parametrize("side", SIDES)
def test_every_side_composes_on_every_cell(side, composed, tmp_path):
    if side == "galore_torch":
        pytest.importorskip("galore_torch")
    for cell in (CELLS[0], CELLS[-1], QUICK[0]):
        study = Study(tmp_path, [cell], [side], corpus=tmp_path / "corpus" if cell in CELLS else None)
        cfg = composed(*study.job(side, cell, study.origin(side, cell)[0]).overrides)
        built = method.build(cfg.method)
        assert (built.optimizer is None) is (side == "adamw")
        assert cfg.optim.rest_lr == cell.rates[1] and list(cfg.optim.betas) == [0.9, 0.99]
        assert cfg.method.get("scale", 1) == 1 or side == "sinkgd"
        assert cfg.data._target_.endswith(("TokenData", "held_out.Images", "held_out.Text"))


def test_a_long_run_keeps_checkpoints_and_goes_on_from_them(tmp_path):
    study = Study(tmp_path, CELLS, ("adamw",))
    cells = {cell.name: cell for cell in CELLS}
    long, short = (
        study.job("adamw", cells[name], study.origin("adamw", cells[name])[0]) for name in ("text1m-20tpp", "text1m-1tpp")
    )
    assert "ckpt_path=last" in long.overrides and "++save_every=1000" in long.overrides and "save_every=0" not in long.overrides
    assert "ckpt_path=last" not in short.overrides and "save_every=0" in short.overrides


def test_momentum_of_muon_is_the_first_beta():
    words = settings("muon", SMALL[0], {**BEST, "beta1": 0.95})
    assert "method.momentum=0.95" in words and "optim.betas=[0.95,0.98]" in words
    assert "method.rank=8" in settings("track", SMALL[0], BEST)


# ---- the record --------------------------------------------------------------------------------


def test_the_rule_of_significance():
    assert verdict([-1.0, -1.1, -0.9]) == "better" and verdict([1.0, 1.1, 0.9]) == "worse"
    assert verdict([-1.0, 1.0, -0.5]) == "even" and verdict([-1.0]) == "even"
    middle, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert middle == 3 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5))


def test_the_record_is_written(finished, tmp_path, monkeypatch):
    study, _ = finished
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append((figure, path)))
    table.write(study, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert not re.search(r"<!-- ([a-z]+) -->\n<!-- /\1 -->", readme)
    rows = [line for line in readme.splitlines() if line.startswith("| muon | ")]
    assert "(better)" in rows[0] and "yes" in rows[0]
    assert any("no neighbour is better" in line for line in readme.splitlines())
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 18
    with (tmp_path / "search.csv").open() as file:
        assert sum(row["chosen"] == "True" for row in csv.DictReader(file)) == 6
    ((figure, path),) = drawn
    assert path == tmp_path / "figure.png"
    assert all(axes.get_title() and axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_a_cell_is_recorded_without_the_sides_that_are_not_done(finished, tmp_path, monkeypatch):
    study, _ = finished
    monkeypatch.setattr(figures, "save", lambda figure, path: None)
    table.write(replace(study, sides=[*study.sides, "galore_muon"], timed=False), tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.count("Not run: galore_muon.") == len(study.cells)
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 18
    assert "ms a step" not in readme and "seconds" not in readme  # which others may have disturbed


def test_nothing_is_written_before_a_cell_is_done(tmp_path, capsys):
    assert main(["--quick", "--table", "--runs", str(tmp_path / "runs")]) == 1
    assert "cannot go on without text0.05m-1tpp-adamw" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_corpus_is_made_once_and_only_for_text(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr("lowrank_pretrain.data.corpus.make_corpus", lambda out: made.append(out))
    pictures = [cell for cell in CELLS if cell.part == "images"]
    study_file.make_corpus_once(Study(tmp_path, pictures, corpus=tmp_path / "c"))
    study_file.make_corpus_once(Study(tmp_path, CELLS, corpus=None))
    assert not made
    study_file.make_corpus_once(Study(tmp_path, CELLS, corpus=tmp_path / "c"))
    assert made == [tmp_path / "c"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "SHA256SUMS").touch()
    study_file.make_corpus_once(Study(tmp_path, CELLS, corpus=tmp_path / "c"))
    assert len(made) == 1
