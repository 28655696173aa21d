"""Studies without their runs: every job's configuration is one that can be built, stages follow one another, tables and figures
come out of what runs leave behind, and nothing is written where a run is missing."""

import csv
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiments import again, claims, figures, mixers, rates, runs  # noqa: F401  mixers registers a network
from experiments.runs import Job, done, run
from experiments.tables import Missing, fill, need, series, spread

from lowrank_pretrain.run import method

STUDIES = ("prelora_vit", "lte_vit", "cs744_gpt2", "cs744_galore", "cs744_pathmnist", "composition")
FAMILIES = ("model.blocks.*.attn.qkv.q", "model.blocks.*.mlp.fc1")


def load(name):
    return importlib.import_module(f"experiments.{name}.study"), importlib.import_module(f"experiments.{name}.table")


def value_of(job, key, default=None):
    return next((o.partition("=")[2] for o in reversed(job.overrides) if o.lstrip("+").startswith(f"{key}=")), default)


def trained(job, where):
    """What a training run would have left: found.json and metrics.csv. The middle learning rate of three is the best."""
    epochs, steps = int(value_of(job, "trainer.max_epochs")), int(value_of(job, "trainer.limit_train_batches"))
    prelora = value_of(job, "method") == "prelora" and "watched" not in job.name
    lr = float(value_of(job, "optim.lr"))
    loss = 1.0 + abs(lr - 3e-3) + 0.01 * int(value_of(job, "seed"))
    switch, freeze = (epochs // 3 * steps, epochs // 2 * steps) if prelora else (None, None)
    cuts = [0, switch, freeze, epochs * steps] if prelora else [0, epochs * steps]
    names = ["full", "joint", "lowrank"] if prelora else ["full"]
    phases = [
        {"phase": name, "steps": b - a, "seconds": 0.02 * (b - a), "samples_per_sec": 900.0, "peak_gib": 0.5, "trainable": 1000,
         "total": 5000, "optimizer_gib": 0.001, "adapters": 10}
        for name, a, b in zip(names, cuts, cuts[1:], strict=False)
    ]  # fmt: skip
    final = {"val/loss": loss, "val/acc1": 0.7, "test/loss": loss, "test/acc1": 0.7}
    summary = {"phases": phases, "switch_step": switch, "freeze_step": freeze, "plan": None, "final": final}
    found = {"summary": summary, "wall": 20.0, "cpu": 18.0, "optimizer_mib": 1.5, "peak_gib": 0.6, "steps": epochs * steps}
    found |= {"wire": dict.fromkeys(names, 2048.0), "sent": 4096}
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"step": epoch * steps - 1, "val/acc1": 1 - 1 / (epoch + 1), "val/loss": 1 + 1 / epoch, "train/loss": ""}
        row |= {f"lowrank/weight_norm/{f}": 5 + epoch for f in FAMILIES}
        row |= {f"lowrank/{kind}_norm/{f}": 1 + epoch for kind in ("base", "adapter") for f in FAMILIES if prelora}
        if epoch > 1:
            row |= {f"lowrank/weight_change/{f}": 0.5 / epoch**2 for f in FAMILIES}
        row |= {f"lte/effective_rank/gradient{f}": 10 + epoch for f in ("", *(f"/{f}" for f in FAMILIES))}
        row |= {"lte/orthogonality": 0.1, "lte/row_space_overlap": 0.25}
        rows += [{"step": (epoch - 1) * steps, "train/loss": 2 + 1 / epoch}, row]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (where / job.name / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return found


def worked(job):
    """What a measurement would have found."""
    facts = job.facts
    if "rounds" in facts:
        sides = ["full", *(f"{kind}, rank {r}" for kind in ("sequential", "parallel", "joint") for r in facts["ranks"])]
        counts = {name: {"trainable": 80, "base": 100} for name in ("full", *(f"rank {r}" for r in facts["ranks"]))}
        return {"milliseconds": dict.fromkeys(sides, 7.0), "parameters": counts}
    if "steps" in facts and "heads" in facts:
        return {"cosines": {f"{n} {r} {t}": 0.5 for n, r in facts["heads"] for t in facts["steps"]}}
    size = {"weights": 10**9, "gradients": 10**9, "states": 10**9 + facts.get("rank", 0), "formula": 10**9, "peak": 3 * 10**9}
    return {**size, "largest_gradient": 10**8, "parameters": 10**8, "trainable": 10, "total": 100}


def pretend(job, where):
    (where / job.name).mkdir(parents=True, exist_ok=True)
    found = worked(job) if job.work else trained(job, where)
    overrides = [override.replace(str(where), "RUNS") for override in job.overrides]
    found |= {"overrides": overrides, "facts": job.facts, "machine": "a machine", "load": 1.0, "wall": 20.0, "cpu": 18.0}
    (where / job.name / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module", params=STUDIES)
def finished(request, tmp_path_factory):
    """A study whose runs have all been pretended: (name, where they are, all its jobs)."""
    where = tmp_path_factory.mktemp(request.param)
    jobs = []
    for stage, together in load(request.param)[0].stages(where):
        assert together in (1, 2)
        assert len({job.name for job in stage}) == len(stage)
        for job in stage:
            if not (where / job.name / "found.json").is_file():
                pretend(job, where)
                jobs.append(job)
    return request.param, where, jobs


def test_names_and_sizes(finished):
    _, _, jobs = finished
    by_name = {}
    for job in jobs:  # a name is a run: what it is called and what it does go together
        assert by_name.setdefault(job.name, (job.overrides, job.work)) == (job.overrides, job.work)
        assert len({o.partition("=")[0] for o in job.overrides}) >= len(job.overrides) - 1, job.overrides
    assert len(by_name) == len(jobs) < 180  # of 40 s on one core, two at a time: two hours at most would be 360
    seeds = {job.facts.get("seed") for job in jobs if not job.work}
    assert {0, 1, 2, 3} <= seeds


def test_jobs_compose(finished, composed):
    """Numbers aside, every distinct set of overrides is a configuration, its method can be built and its data are held out."""
    distinct = {}
    for job in finished[2]:
        if not job.work:
            distinct.setdefault(re.sub(r"\d+", "0", re.sub(r"targets=\S+", "", "|".join(job.overrides))), job)
    for job in distinct.values():
        cfg = composed(*job.overrides)
        method.build(cfg.method)
        assert cfg.data["_target_"].startswith("experiments.held_out.") or cfg.data["_target_"].endswith("MedMNIST")
        assert cfg.trainer.limit_val_batches == cfg.trainer.limit_test_batches == 1.0
        assert cfg.save_every == 0
    for job in finished[2]:
        if job.work:
            module, _, function = job.work.rpartition(".")
            assert callable(getattr(importlib.import_module(module), function))


def test_tables_and_figures(finished, tmp_path, monkeypatch):
    name, where, jobs = finished
    table = load(name)[1]
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append((figure, path)))
    shutil.copy(Path(table.__file__).parent / "README.md", tmp_path)
    table.write(where, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "a machine" in readme
    assert not re.search(r"<!-- ([a-z][^>]*) -->\n<!-- /\1 -->", readme)  # no place is left empty
    for path in re.findall(r"\]\(([a-z_]+\.csv)\)", readme):
        with (tmp_path / path).open() as file:
            assert len(list(csv.reader(file))) > 1
    ((figure, path),) = drawn
    assert path == tmp_path / "figure.png"
    for axes in figure.axes:
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()

    lost = next(job for job in reversed(jobs) if not job.work)
    kept = (where / lost.name / "found.json").rename(where / "kept.json")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Missing, match=re.escape(lost.name)):
        table.write(where, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    kept.rename(where / lost.name / "found.json")


def test_another_run_of_the_same_name_is_not_taken_for_done(tmp_path):
    for folder in ("here", "there"):  # where runs lie is no part of what they are
        (tmp_path / folder / "a").mkdir(parents=True)
        (tmp_path / folder / "a" / "found.json").write_text(json.dumps({"overrides": ["x=1", "y=RUNS/z"], "facts": {"f": 1}}))
        where = tmp_path / folder
        assert done(Job("a", ["x=1", f"y={where}/z"], {"f": 2}), where)
        assert done(Job("a", ["x=2", f"y={where}/z"]), where) is None
        assert done(Job("a", [], {"f": 1}, "some.work"), where)
        assert done(Job("a", [], {"f": 2}, "some.work"), where) is None
    assert done(Job("b", []), tmp_path / "here") is None


def test_two_studies_do_not_share_a_folder(tmp_path):
    code = "import sys; from pathlib import Path; from experiments.runs import run; run([], Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    run([], tmp_path)
    run([], tmp_path)  # its own stages may follow one another
    other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode == 1 and other.stderr.count("\n") == 1
    assert f"--runs={tmp_path}: must be a folder in which no other study runs, and process {os.getpid()}" in other.stderr
    os.close(runs._HELD.pop(tmp_path.resolve()))
    assert subprocess.run(command).returncode == 0


def test_a_best_rate_at_an_edge_asks_for_more(tmp_path):
    def make(side, lr):
        return Job(f"{side}-{lr:g}", [])

    def put(job, loss):
        (tmp_path / job.name).mkdir()
        final = {"summary": {"final": {"val/loss": loss}}} if loss is not None else {"diverged": "diverged (NaN)"}
        (tmp_path / job.name / "found.json").write_text(json.dumps(final))

    sides = [("inside", 1.0), ("edge", 1.0)]
    seen = []
    for jobs in rates.rounds(sides, make, tmp_path):
        seen.append([job.name for job in jobs])
        for job in jobs:
            if not (tmp_path / job.name).exists():
                side, lr = job.name.split("-")
                put(job, abs(float(lr) - 1) if side == "inside" else -float(lr) if float(lr) < 8 else None)
    assert [len(names) for names in seen] == [6, 7, 8] and "edge-8" in seen[-1]
    assert rates.chosen("inside", 1.0, make, tmp_path) == 1.0
    assert rates.chosen("edge", 1.0, make, tmp_path) == 4.0  # 8 diverged
    with pytest.raises(Missing, match="edge-8"):
        need([make("edge", 8.0)], tmp_path)
    with pytest.raises(Missing, match="other-1"):
        rates.chosen("other", 1.0, make, tmp_path)
    with pytest.raises(Missing, match="other-1"):  # asked for, and still not there: it failed
        list(rates.rounds([("other", 1.0)], make, tmp_path))


def test_tolerances_follow_their_rule():
    from experiments.prelora_vit.tolerances import pairs, switch_window, tolerances

    losses = [2 + 3 * 0.8**e for e in range(24)]
    changes = [0.2 * 0.8**e for e in range(23)]
    found = tolerances(losses, changes)
    windows = {name: switch_window(pairs(losses), changes, loss, weight, 3) for name, (weight, loss) in found.items()}
    assert windows["exp1"] <= 6 < windows["exp2"] < windows["exp3"] <= 18
    assert found["exp1"] == pytest.approx(tuple(2 * x for x in found["exp2"]))
    assert found["exp2"] == pytest.approx(tuple(2 * x for x in found["exp3"]))
    flat = [0.2 * 0.95**e for e in range(23)]  # so slow that a quarter of the tolerance would come too late
    slow = tolerances(losses, flat)
    assert slow["exp1"][0] > max(flat[3:5]) * 1.05
    assert switch_window(pairs(losses), flat, slow["exp3"][1], slow["exp3"][0], 3) <= 18
    with pytest.raises(ValueError, match="24 losses, 24 changes"):
        tolerances(losses, [*changes, 0.0])


def test_heads_of_full_rank_move_a_matrix_as_full_training_does():
    from experiments.lte_vit.updates import cosines

    found = cosines({"width": 16, "heads": [[1, 16], [1, 4], [4, 4]], "steps": [1]})["cosines"]
    assert found["1 16 1"] == pytest.approx(1, abs=1e-9)
    assert found["1 4 1"] == pytest.approx(0.5, abs=0.1) and found["1 4 1"] < found["4 4 1"] < 0.9


def test_shapes_are_what_a_network_holds(monkeypatch):
    from experiments.cs744_galore import memory

    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(memory.LLAMA, "small", {**small, "num_key_value_heads": 2})
    facts = {"network": "small", "dtype": "float32", "batch": 1, "steps": 1, "tokens": 8}
    monkeypatch.setattr("torch.randint", lambda low, high, size: __import__("torch").zeros(size, dtype=int))
    for rank in (0, 4):
        shapes, live = memory.shapes({**facts, "rank": rank}), memory.live({**facts, "rank": rank})
        assert shapes["weights"] == live["weights"] == 4 * shapes["parameters"]
        assert shapes["formula"] == live["formula"] and shapes["states"] == live["states"]
        assert 0 <= live["states"] - live["formula"] < 4 * 4 * 20  # step counters
    assert live["states"] < 2 * live["weights"]


def test_made_images_have_the_formats_keys_types_and_shapes(tmp_path, monkeypatch):
    import numpy as np
    from experiments.cs744_pathmnist import made

    from lowrank_pretrain.data.images.medmnist import MedMNIST

    monkeypatch.setattr(made, "COUNTS", {"train": 40, "val": 12, "test": 12})
    for folder in ("a", "b"):
        made.write({"seed": 0}, tmp_path / folder)
    with np.load(tmp_path / "a" / "pathmnist.npz") as a, np.load(tmp_path / "b" / "pathmnist.npz") as b:
        assert set(a) == {f"{split}_{kind}" for split in ("train", "val", "test") for kind in ("images", "labels")}
        assert a["train_images"].dtype == np.uint8 and a["train_images"].shape == (40, 28, 28, 3)
        assert a["val_labels"].dtype == np.uint8 and a["val_labels"].shape == (12, 1)
        assert all((a[key] == b[key]).all() for key in a)
        assert not (a["val_images"][0] == a["test_images"][0]).all()
    data = MedMNIST(str(tmp_path / "a"), size=28, img_size=28, batch_size=8)
    data.setup()
    x, y = data.train_set.fetch(0, [0, 1]).batch
    assert x.shape == (2, 3, 28, 28) and y.shape == (2,)


def test_norms_of_base_and_adapters_are_told_apart(monkeypatch):
    from types import SimpleNamespace

    import torch
    from lightning.pytorch.trainer.states import TrainerFn

    from lowrank_pretrain.lora.model import inject
    from lowrank_pretrain.observe import norms

    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    inject(model, {"0": 2}, seed=0)
    torch.nn.init.ones_(model[0].lora_B["W"])
    seen = {}
    monkeypatch.setattr(norms, "log_row", lambda trainer, metrics, row=None: seen.update(metrics))
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    norms.WeightNorms().on_validation_end(
        SimpleNamespace(state=state, sanity_checking=False, is_global_zero=True, global_step=1), model
    )
    added = model[0].lora_B["W"] @ model[0].lora_A
    for kind, matrix in (("base", model[0].weight), ("adapter", added), ("weight", model[0].weight + added)):
        (key,) = (key for key in seen if key.startswith(f"lowrank/{kind}_norm/") and (kind != "weight" or key.endswith("0")))
        assert seen[key] == pytest.approx(matrix.norm().item(), rel=1e-5)


def test_fill_needs_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- x y -->\nold\n<!-- /x y -->\nb\n")
    fill(readme, "x y", "1 \\1 | 2")
    assert readme.read_text() == "a\n<!-- x y -->\n1 \\1 | 2\n<!-- /x y -->\nb\n"
    with pytest.raises(ValueError, match="no place <!-- z -->"):
        fill(readme, "z", "")
    assert spread([1.0, 3.0], "{:.1f}") == "2.0 ± 1.4" and spread([1.0], "{:.1f}") == "1.0"
    (tmp_path / "metrics.csv").write_text("step,a\n4,0.5\n9,\n")
    assert series(tmp_path, "a") == [(5, 0.5)]


def test_the_results_say_what_the_records_say():
    page = (Path(claims.__file__).parents[1] / "docs" / "results.md").read_text()
    for source, some in claims.CLAIMS.items():
        for claim in some:
            line = claim.line(source)
            assert line[3], f"{claim.words}: no record"
            assert f"| {' | '.join(line)} |" in page, "python -m experiments.claims was not run again"


def test_a_run_ends_with_its_study():
    """Otherwise the study that is started next would do the same run beside it, in the same folder."""
    study = subprocess.Popen([sys.executable, "-c", ""])
    study.wait()
    child = os.fork()
    if child == 0:
        runs._end_with(study.pid)
        time.sleep(60)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_run_is_repeated_and_compared_bit_for_bit(tmp_path, monkeypatch, capsys):
    """Times may differ, nothing else may."""
    row = {"step": "0", "train/loss": "2.5", "lte/merge_ms": "1.0", "time/train_seconds": "3.0", "val/loss": ""}

    def leave(folder, **other):
        folder.mkdir()
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row | other)
        (folder / "found.json").write_text(
            json.dumps({"overrides": ["data.root=RUNS/corpus", "trainer.devices=2"], "facts": {}})
        )

    leave(tmp_path / "one")
    asked, loss = [], "2.5"

    def repeat(jobs, where, world):
        asked.append((jobs[0].overrides, world))
        leave(where / jobs[0].name, **{"lte/merge_ms": "9.0", "time/train_seconds": "4.0", "train/loss": loss})

    monkeypatch.setattr(again, "run", repeat)
    assert again.main([str(tmp_path / "one")]) == 0 and "equal, 2 numbers of 1 rows" in capsys.readouterr().out
    assert asked == [([f"data.root={tmp_path}/corpus", "trainer.devices=2"], 2)]
    loss = "2.5000001"
    assert again.main([str(tmp_path / "one")]) == 1
    assert "differs: train/loss at step 0: 2.5 then, 2.5000001 now" in capsys.readouterr().out
    assert again.main([str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1
