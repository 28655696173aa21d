"""``prelora_glyphs``, ``width384``, ``factorize``, ``capacity`` without runs: stages, configurations that build, records."""

import re
import shutil
from pathlib import Path

import pytest
from experiments import figures
from experiments.capacity import study as capacity
from experiments.capacity import table as capacity_table
from experiments.factorize import study as factorize
from experiments.factorize import table as factorize_table
from experiments.prelora_glyphs import study as glyphs
from experiments.prelora_glyphs import table as glyphs_table
from experiments.runs import done
from experiments.tables import Missing
from experiments.width384 import study as width384
from experiments.width384 import table as width384_table
from experiments.width384.sides import PARTS

from lowrank_pretrain.run import method
from tests.test_studies import pretend


def finish(lists, where):
    """Pretend every run that a study asks for; return all of them."""
    jobs = {}
    for stage in lists:
        assert len({job.name for job in stage}) == len(stage)
        for job in stage:
            jobs[job.name] = job
            if done(job, where) is None:
                pretend(job, where)
    return list(jobs.values())


def builds(jobs, composed):
    """Every distinct set of overrides, numbers aside, is a configuration whose method can be built."""
    distinct = {re.sub(r"\d+", "0", "|".join(job.overrides)): job for job in jobs}
    for job in distinct.values():
        method.build(composed(*job.overrides).method)


def test_glyphs(tmp_path, composed, monkeypatch):
    study = glyphs.Study(tmp_path / "runs", "cuda")
    with pytest.raises(Missing):
        study.final()
    jobs = finish(study.stages(), study.where)
    builds(jobs, composed)
    assert all("++trainer.accelerator=gpu" in job.overrides for job in jobs)
    final = study.final()
    assert set(final) == {(side, seed) for side in glyphs.SIDES for seed in (1, 2, 3)}
    assert {job.facts["lr"] for job in final.values()} == {final["full", 1].facts["lr"]}
    # the tighter tolerances take the rate that was found for the looser ones
    assert final["adapters, exp1", 1].facts["ratio"] == final["adapters, exp2", 1].facts["ratio"]
    monkeypatch.setattr(figures, "save", lambda figure, path: None)
    shutil.copy(Path(glyphs_table.__file__).parent / "README.md", tmp_path)
    glyphs_table.write(study, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "No run is reported" not in text and text.count("| adapters, exp1 |") == 1
    (study.where / final["adapters, exp2", 2].name / "found.json").unlink()
    glyphs_table.write(study, tmp_path)
    assert "Not run: adapters, exp2 (seed 2)." in (tmp_path / "README.md").read_text()


def test_glyphs_are_asked_for_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study", "--runs", str(tmp_path)])
    assert glyphs.main() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "draw_glyphs --out" in said


def test_factorize(tmp_path, composed):
    where, first = tmp_path / "runs", factorize.CELLS[0]
    shutil.copy(Path(factorize_table.__file__).parent / "README.md", tmp_path)
    with pytest.raises(Missing, match="no side is finished"):
        factorize_table.write(where, tmp_path)
    lists = (stage for stage, _ in factorize.stages(where))
    jobs = []
    for stage in lists:  # cell by cell: the first one is whole before a run of the second
        if any((job.facts["task"], job.facts["width"]) != first for job in stage):
            break
        jobs += finish([stage], where)
    builds(jobs, composed)
    factorize_table.write(where, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Not run yet: text at width 128" in text and "| 128 | factored 1/4 |" in text
    assert {job.facts["seed"] for job in jobs} == {0, 1, 2, 3}
    some = finish((jobs for jobs, _ in factorize.stages(where, ["text-128"], ["factored 1/4"])), where)
    assert {job.facts["run"] for job in some} == {"full", "factored 1/4"}
    factorize_table.write(where, tmp_path)
    assert "text at width 128 (full, 0.8 of the steps; narrow; " in (tmp_path / "README.md").read_text()


def test_capacity(tmp_path, composed):
    where = tmp_path / "runs"
    shutil.copy(Path(capacity_table.__file__).parent / "README.md", tmp_path)
    with pytest.raises(Missing):
        capacity_table.write(where, tmp_path)
    builds(finish((stage for stage, _ in capacity.stages(where)), where), composed)
    capacity_table.write(where, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert all(f"| {task} | {width} |" in text for task, width in capacity.MIDDLE) and "Not run" not in text
    (where / capacity.final(where)["corpus", 256].name / "found.json").unlink()
    capacity_table.write(where, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Not run yet: corpus at width 256." in text and "| corpus | 128 |" in text


def test_width_384(tmp_path, composed):
    study = width384.Study(tmp_path / "runs")
    shutil.copy(Path(width384_table.__file__).parent / "README.md", tmp_path)
    with pytest.raises(Missing, match="no side"):
        width384_table.write(study, tmp_path)
    jobs = []
    for name in PARTS:
        for knob in width384.KNOBS:
            jobs += finish(study.search(name, knob), study.where)
        jobs += finish([[*study.reported(name).values()]], study.where)
    builds(jobs, composed)
    for name, part in PARTS.items():  # as many searched for every setting that a side has
        found = study.reported(name)
        assert {side for side, _ in found} == set(part.sides)
        assert {seed for side, seed in found if part.sides[side].headline} == {1, 2, 3}
        for job in jobs:
            if job.facts["part"] == name:
                assert ("++trainer.strategy=ddp" in job.overrides) == (part.world > 1 and part.sides[job.facts["side"]].ddp)
    assert not PARTS["composition-text"].sides["diloco"].ddp
    width384_table.write(study, tmp_path)
    assert "Not run" not in (tmp_path / "README.md").read_text()
    (study.where / study.reported("lte")["lte-h4-r96-t10", 2].name / "found.json").unlink()
    width384_table.write(study, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Not run: lte-h4-r96-t10 (`python -m" in text and "(one seed)" in text


def test_width_384_asks_for_its_data_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study", "--runs", str(tmp_path), "--parts", "gpt2"])
    assert width384.main() == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "corpus --out" in said
