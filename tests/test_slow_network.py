"""The study of slow networks without its runs: every job composes, searches go on where they stopped, and the record is made of
the sides that are complete."""

import json
import shutil
from pathlib import Path

import pytest
from experiments import figures
from experiments.slow_network import study as study_file
from experiments.slow_network import table
from experiments.slow_network.sides import FIRST_LR, SIDES, TASKS, Space
from experiments.slow_network.study import Study, main

from lowrank_pretrain.run import method

HERE = Path(study_file.__file__).parent


def pretend(study, job):
    """What a run would have left: the best is twice the first rate; bits cost little, merging seldom more."""
    facts = job.facts
    off = abs(facts["lr"] / (2 * FIRST_LR[facts["task"]]) - 1) + facts.get("outer_momentum", 0)
    loss = 3 + 0.1 * off + 0.01 * facts["seed"] + 0.02 * list(SIDES).index(facts["side"])
    loss += {"float32": 0, "int8": 0.001, "int4": 0.01, "int2": 0.05}[facts["wire"]]
    final = {"val/loss": loss, "test/loss": loss, "test/acc1": 0.5}
    sent = 4e8 if facts["side"] == "ddp" else 1e7 / {"float32": 1, "int8": 4, "int4": 8, "int2": 16}[facts["wire"]]
    found = {"summary": {"final": final, "phases": []}, "sent": sent, "train_cpu": 5.0, "steps": 300, "optimizer_mib": 1.0}
    found |= {"overrides": job.overrides, "facts": facts, "machine": "a machine", "load": 1.0, "wall": 20.0, "cpu": 6.0}
    (study.where / job.name).mkdir(parents=True, exist_ok=True)
    (study.where / job.name / "found.json").write_text(json.dumps(found))


def run_all(study, most=10**6):
    made = 0
    for jobs in study.stages():
        for job in jobs:
            if study_file.done(job, study.where) is None:
                if made == most:
                    return made
                pretend(study, job)
                made += 1
    return made


def test_every_job_composes_and_its_method_can_be_built(composed):
    study = Study(Path("nowhere"))
    for task in TASKS:
        for side in study.sides:
            point = study.descent(task, side).point
            for wire in ("float32", *SIDES[side].wires):
                cfg = composed(*study.job(task, side, point, 1, wire).overrides)
                method.build(cfg.method)
                assert cfg.data["_target_"].startswith("experiments.held_out.")
                assert cfg.method.get("wire", "float32") == wire


def test_a_search_keeps_its_budget_and_goes_on_where_it_stopped(tmp_path):
    study = Study(tmp_path, ["text"], ["ddp", "diloco_h30", "lte_t10"])
    before = study.left()
    assert run_all(study, 5) == 5
    assert study.left() < before
    made = run_all(Study(tmp_path, ["text"], ["ddp", "diloco_h30", "lte_t10"]))
    assert study.left() == 0 and run_all(study) == 0
    assert 5 + made <= 3 * (Space().budget + 3) + 3 * (3 + 2)
    for side in study.sides:
        descent = study.best("text", side)
        assert len(descent.tried) <= Space().budget
        assert dict(descent.point)["lr"] == (1 if SIDES[side].first == 1 else 0)
    assert study.wired("text") == ["diloco_h30", "lte_t10"]


def test_the_record_is_made_of_what_is_complete_and_names_the_rest(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    monkeypatch.setattr(table, "real_sizes", lambda rows: "sizes")
    shutil.copy(HERE / "README.md", tmp_path)
    study = Study(tmp_path / "runs", ["text"], ["ddp", "diloco_h30", "lte_t10"])
    run_all(study)
    table.write(Study(tmp_path / "runs"), tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "| int8 | +0.03 % | +0.03 % (+0.03, +0.03, +0.03) | 0.2 %: kept | 1/4.0 |" in readme
    assert "`python -m experiments.slow_network.study --only images ddp`" in readme
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 3 * (3 + 3 + 2)
    (figure,) = drawn
    assert [axis.get_title() for axis in figure.axes] == ["text: loss over bytes", "text: loss over time"]


def test_nothing_complete_writes_nothing(tmp_path, capsys):
    assert main(["--table", "--runs", str(tmp_path)]) == 1
    assert "no side is complete yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--only", "nobody"])


def test_simulated_time_is_compute_and_bytes(tmp_path):
    rows = [{"train_cpu": 5.0, "sent_mib": 100.0}]
    assert table.seconds(rows, 1e9) == pytest.approx(5 + 100 * 2**20 * 8 / 1e9)
