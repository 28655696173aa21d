"""Loggers beside metrics.csv: what W&B is given, offline and across a resume; the workspace; TensorBoard; the model card."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_pretrain import dashboard
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.metrics import STEP, TIME
from lowrank_pretrain.export import card as model_card
from lowrank_pretrain.loggers.wandb import SECTIONS
from lowrank_pretrain.run import loggers
from tests.conftest import TINY

WANDB = {
    "_target_": "lowrank_pretrain.loggers.wandb.RunWandbLogger",
    "project": "p",
    "name": None,
    "offline": None,
    "group": None,
}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """No key, wherever one may lie, nothing on the screen, nothing in the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", os.devnull)
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(tmp_path_factory.mktemp("wandb")))
        yield


def records(run_dir: Path) -> list[dict]:
    """Everything in the newest offline run's log, by wandb's own reader."""
    reader = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", run_dir / "wandb" / "latest-run"]
    done = subprocess.run(reader, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(found: list[dict], kind: str) -> list[dict]:
    return [record[kind] for record in found if record["type"] == kind]


def rows(found: list[dict]) -> list[dict]:
    """Rows as {metric: value}."""
    return [record["item"] for record in of_kind(found, "history")]


@pytest.fixture(scope="module")
def resumed(offline, composed, tmp_path_factory):
    """A run of two epochs that then goes on to three: (directory, records of its newest log)."""
    from lowrank_pretrain.run.train import train

    directory = tmp_path_factory.mktemp("sweep") / "job"
    train(composed(*TINY, "logger=wandb", "trainer.max_epochs=2"), directory, multirun=True)
    train(composed(*TINY, "logger=wandb", "trainer.max_epochs=3", "ckpt_path=last"), directory, multirun=True)
    return directory, records(directory)


def test_the_newest_offline_run_holds_the_whole_run_under_one_id(resumed):
    directory, found = resumed
    logs = sorted((directory / "wandb").glob("offline-run-*"))
    assert len(logs) == 2 and len({log.name.rpartition("-")[2] for log in logs}) == 1
    losses = [(row[STEP], row[TIME]) for row in rows(found) if "train/loss" in row]
    assert [step for step, _ in losses] == list(range(12)), "each step once, those before the resume too"
    assert "train/loss" in (directory / "metrics.csv").read_text(), "metrics.csv beside any other logger"
    times = [time for _, time in losses]
    assert times == sorted(times) and times[0] > 0


def test_a_sweeps_jobs_are_one_group_and_each_has_its_configuration(resumed):
    (run,) = of_kind(resumed[1], "run")
    assert run["run_group"] == resumed[0].parent.name and run["display_name"] == "job"
    assert {"data", "model", "optim", "method", "trainer", "seed"} <= set(run["config"]["update"])


def test_metrics_have_axes_and_a_best_value(resumed):
    defined = {metric.get("name") or metric.get("glob_name"): metric for metric in of_kind(resumed[1], "metric")}
    for panels in SECTIONS.values():
        for _, metrics, _, _ in panels:
            for name in [metrics.replace(".*", "*")] if isinstance(metrics, str) else metrics:
                assert defined[name]["step_metric"] == STEP, name
    assert defined["val/loss"]["summary"] == {"min": True} and defined["val/acc1"]["summary"] == {"max": True}


def test_ranks_are_a_table_and_a_map_and_phases_are_events(resumed):
    directory, found = resumed
    (ranks,) = [row for row in rows(found) if "lowrank/ranks.path" in row]
    assert ranks[STEP] == 2, "the row of the switch's step"
    (map_,) = (directory / "wandb" / "latest-run" / "files" / "media" / "html" / "lowrank").glob("rank_map*")
    assert "<svg" in map_.read_text() and "attn.proj" in map_.read_text() and "http" not in map_.read_text()
    tables = (directory / "wandb" / "latest-run" / "files" / "media" / "table" / "events").glob("phases*")
    *_, last = sorted((json.loads(table.read_text())["data"] for table in tables), key=len)
    assert [event[:2] for event in last] == [[0, "full"], [3, "joint"], [6, "lowrank"]]
    assert last[0][2] > last[2][2] and last[0][3] == 0 < last[1][3]


def test_weights_and_card_are_an_artifact(resumed):
    directory, found = resumed
    (model,) = [artifact for artifact in of_kind(found, "artifact") if artifact["type"] == "model"]
    assert {file["path"] for file in model["manifest"]["contents"]} == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(model["metadata"])["switch_step"] == 3
    (page,) = (directory / "wandb" / "latest-run" / "files" / "media" / "html").glob("report*")
    assert "Training loss by time" in page.read_text()


def test_the_card_says_what_how_well_and_how_to_load(resumed, monkeypatch):
    import timm

    export = resumed[0] / "export"
    card = (export / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-classification\n")
    for words in (
        "method `prelora`",
        "Fashion-MNIST (sample of 14,000 images)",
        "| top-1 accuracy | – | ",
        "| lowrank | 6 | ",
        "ranks:\n  - 2\n  - 4\n",
    ):
        assert words in card, words
    code, _pipeline = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    found: dict = {}
    monkeypatch.chdir(export)
    exec(code, found)
    assert torch.is_tensor(found["model"](torch.zeros(1, 1, 28, 28))) and timm


def test_cards_of_text_models_and_of_foreign_modules(tmp_path):
    config = {"model": {"_target_": "a.B"}, "data": {"_target_": "x.Text"}, "method": {"name": "lte"}, "seed": 1}
    summary = {"phases": [], "final": {"val/ppl": 7.25}}
    for written, words in (("{}", "AutoModelForCausalLM"), ('{"architecture": ""}', "timm.create_model"), (None, "load_file")):
        if written is None:
            (tmp_path / "config.json").unlink()
        else:
            (tmp_path / "config.json").write_text(written)
        text = model_card.write(tmp_path, config, summary).read_text()
        assert words in text and "# B, trained with lte" in text and "| perplexity | 7.25 |" in text


def test_without_a_key_one_line_says_where_and_how_to_upload(offline, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (logger,) = loggers.more_loggers(WANDB, tmp_path / "runs" / "a", {})
    said = capsys.readouterr().out
    path = os.path.join("runs", "a", "wandb", "latest-run")
    assert said == f"wandb: no API key found, writing an offline run; upload it later with: wandb sync {path}\n"
    assert logger._wandb_init["group"] is None and logger._offline
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    (logger,) = loggers.more_loggers({**WANDB, "group": "mine"}, tmp_path / "runs" / "a", {}, multirun=True)
    assert capsys.readouterr().out == "" and not logger._offline and logger._wandb_init["group"] == "mine"
    assert logger._wandb_init["resume"] == "allow"


def test_a_failed_run_is_marked_so(monkeypatch):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    codes = []
    monkeypatch.setattr(wandb, "finish", lambda exit_code: codes.append(exit_code))
    logger = WandbLogger.__new__(WandbLogger)
    loggers.finish([logger])
    with pytest.raises(RuntimeError):
        try:
            raise RuntimeError("no step")
        finally:
            loggers.finish([logger])
    loggers.finish([])
    assert codes == [0, 1]


def test_tensorboard_writes_into_the_run_directory(run, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory, _ = run("run", "logger=tensorboard", "trainer.max_epochs=1")
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    assert {"train/loss", "val/loss", "throughput/samples_per_sec"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3]

    def absent(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr(loggers, "build", absent)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        loggers.more_loggers({"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}, directory, {})


def test_the_workspace_has_the_same_sections_and_every_panel_an_axis_and_a_unit():
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")
    made = dashboard.workspace("me", "p")
    assert [section.name for section in made.sections] == list(SECTIONS)
    for section in made.sections:
        for panel in section.panels:
            if type(panel).__name__ == "LinePlot":
                assert panel.title and panel.title_y and panel.title_x in ("optimizer steps", "seconds of training")
                assert panel.x in (STEP, TIME) and (panel.y or panel.metric_regex)
    assert "val/loss" in json.dumps(made._to_model().model_dump(mode="json"))


@pytest.mark.parametrize("project", ["p", "me/", "/p", "a/b/c", "me/p"])
def test_the_dashboard_needs_a_project_and_a_key(offline, capsys, project):
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")
    assert dashboard.main([project]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert ("wandb login" in error) == (project == "me/p")


def test_the_dashboard_saves_a_view_of_its_own(monkeypatch, capsys):
    pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")
    from wandb_workspaces.workspaces import Workspace

    monkeypatch.setattr(dashboard, "has_wandb_key", lambda: True)
    monkeypatch.setattr(
        Workspace, "save_as_new_view", lambda self: SimpleNamespace(url=f"{self.entity}/{self.project}/{self.name}")
    )
    assert dashboard.main(["me/p", "--name", "v"]) == 0
    assert capsys.readouterr().out == "workspace: me/p/v\n"
