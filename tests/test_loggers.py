"""Loggers next to metrics.csv never end a run: several, none, disabled, unreachable, misnamed, missing, failing halfway."""

import os
import pickle
import sys
import types
import warnings

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import LogsPhases
from lowrank_pretrain.loggers import wandb as wandb_sections
from lowrank_pretrain.loggers.guarded import TRIES, give_up, guard
from lowrank_pretrain.loggers.wandb import RunWandbLogger
from lowrank_pretrain.run import loggers
from lowrank_pretrain.run.build import plain
from lowrank_pretrain.run.interrupts import Interrupted
from tests.conftest import SHORT, VIT
from tests.test_cli import ONE_STEP, cli  # noqa: F401  a fixture

KEY = "k" * 40
OURS = "lowrank_pretrain.loggers.wandb.RunWandbLogger"
BROKEN = "tests.test_loggers.Broken"
ONE = [*SHORT, *VIT, "method=full", "trainer.max_epochs=1", "trainer.limit_train_batches=2"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    """No account, no settings and no server of the machine's."""
    for key in [key for key in os.environ if key.startswith(("WANDB_", "MLFLOW_", "COMET_"))]:
        if "SERVICE" not in key:  # where the process's own W&B service listens; put back later, it would be another's
            monkeypatch.delenv(key)
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-settings"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))


@pytest.fixture(autouse=True, scope="module")
def _forgotten():
    """W&B keeps the first settings that a process had, and its service: those of these tests end here."""
    yield
    import wandb

    wandb.teardown()


class Broken(LogsPhases, DummyLogger):
    """Fails where it is told to."""

    def __init__(self, where: str = "log_metrics", after: int = 0) -> None:
        super().__init__()
        self.where, self.after, self.calls = where, after, 0
        if where == "__init__":
            raise ConnectionError("no server answers")

    def _call(self, where: str) -> None:
        if where == self.where:
            self.calls += 1
            if self.calls > self.after:
                raise ConnectionError(f"the server went away in\n{where}")

    @property
    def experiment(self):
        self._call("experiment")
        return super().experiment

    @property
    def name(self):
        self._call("name")
        return "x"

    def log_metrics(self, metrics, step=None):
        self._call("log_metrics")

    def log_hyperparams(self, *args, **kwargs):
        self._call("log_hyperparams")

    def log_phase(self, *args):
        self._call("log_phase")

    def save(self):
        self._call("save")

    def finalize(self, status):
        self._call("finalize")

    def after_save_checkpoint(self, callback):
        self._call("after_save_checkpoint")


# -- a logger that fails in the middle ----------------------------------------------------------------------------------


PLACES = ("experiment", "name", "log_metrics", "log_hyperparams", "log_phase", "save", "finalize", "after_save_checkpoint")


@pytest.mark.parametrize("where", PLACES)
def test_a_failing_call_is_one_warning(where):
    logger = guard(Broken(where), "mine")
    calls = {"log_metrics": ({},), "log_phase": ("full", 0, {}), "finalize": ("success",), "after_save_checkpoint": (None,)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(TRIES + 3):
            found = getattr(logger, where)
            if where not in ("experiment", "name"):
                found = found(*calls.get(where, ()))
    assert [str(warning.message).count("\n") for warning in said] == [0]
    assert str(said[0].message).startswith(f"logger mine: {where} failed (ConnectionError: the server went away in {where})")
    assert logger.calls == (1 if where == "experiment" else TRIES), "not asked for ever"


@pytest.mark.parametrize("where", ["experiment", "log_metrics", "log_phase", "save", "finalize", "after_save_checkpoint"])
def test_training_goes_on_and_metrics_csv_is_whole(run, where):
    with pytest.warns(UserWarning, match=f"logger Broken: {where} failed") as said:
        directory, summary = run("run", f"logger._target_={BROKEN}", f"+logger.where={where}", "save_every=1", base=ONE)
    assert sum("Broken" in str(warning.message) for warning in said) == 1
    assert summary["final"]["test/loss"] and (directory / "metrics.csv").read_text().count("\n") >= 4


def test_a_logger_that_recovers_is_used_again():
    logger = guard(Broken(after=2), "mine")
    logger.log_metrics({})
    logger.log_metrics({})
    with pytest.warns(UserWarning, match="mine"):
        logger.log_metrics({})
    logger.after = 10
    logger.log_metrics({})
    assert logger.calls == 4


def test_a_signal_that_comes_while_a_logger_works_still_ends_the_run():
    class Told(DummyLogger):
        def log_metrics(self, *args, **kwargs):
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        guard(Told(), "mine").log_metrics({})


def test_a_guarded_logger_is_of_its_class_still_and_can_be_sent_to_a_process(tmp_path):
    logger = guard(TensorBoardLogger(tmp_path), "tensorboard")
    assert isinstance(logger, TensorBoardLogger) and type(logger).__name__ == "TensorBoardLogger"
    broken = guard(Broken(), "mine")
    with pytest.warns(UserWarning, match="mine"):
        give_up(broken, "start", OSError("x"))
    sent = pickle.loads(pickle.dumps(broken))
    assert sent.log_metrics({}) is None and sent.calls == 0 and type(sent).__mro__[1] is Broken
    assert pickle.loads(pickle.dumps(logger)).save_dir == logger.save_dir


# -- which loggers a run has --------------------------------------------------------------------------------------------


def made(composed, tmp_path, *overrides: str, multirun: bool = False) -> list[Logger]:
    config = plain(composed(*overrides))
    return loggers.more_loggers(config.get("logger") or {}, tmp_path / "run", {}, multirun)


def classes(found: list[Logger]) -> list[str]:
    return [type(logger).__name__ for logger in found]


@pytest.mark.parametrize(("overrides", "expected"), [
    (["logger=csv"], []), (["logger=none"], []), (["~logger"], []), (["logger=[]"], []), (["logger=[csv]"], []),
    (["logger=[csv,none]"], []), (["logger=wandb"], ["RunWandbLogger"]), (["logger=tensorboard"], ["TensorBoardLogger"]),
    (["logger=[wandb]"], ["RunWandbLogger"]),
    (["logger=[csv,wandb,tensorboard]"], ["RunWandbLogger", "TensorBoardLogger"]),
    (["logger=[tensorboard,wandb]"], ["TensorBoardLogger", "RunWandbLogger"]),
    (["logger=[wandb,tensorboard,csv]"], ["RunWandbLogger", "TensorBoardLogger"]),
    (["logger=many"], ["RunWandbLogger", "TensorBoardLogger"]),
    (["logger=wandb", f"+logger.mine._target_={BROKEN}"], ["RunWandbLogger", "Broken"]),
    ([f"+logger.a._target_={BROKEN}", f"+logger.b._target_={BROKEN}"], ["Broken", "Broken"]),
    ([f"logger._target_={BROKEN}"], ["Broken"]),
    (["logger=[wandb,csv]", f"logger._target_={BROKEN}"], ["RunWandbLogger", "Broken"]),
    (["logger._target_=lightning.pytorch.loggers.CSVLogger"], ["CSVLogger"]),
])  # fmt: skip
def test_one_several_or_no_loggers(composed, tmp_path, overrides, expected):
    if "tensorboard" in str(overrides) or "many" in str(overrides):
        pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    assert classes(made(composed, tmp_path, *overrides)) == expected


def test_each_of_several_gets_its_own_keys(composed, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    both = ["logger=[wandb,tensorboard]", "logger.project=p", "+logger.wandb.entity=me", "logger.default_hp_metric=true"]
    wandb, board = made(composed, tmp_path, *both)
    assert (wandb._wandb_init["project"], wandb._wandb_init["entity"]) == ("p", "me")
    assert "default_hp_metric" not in wandb._wandb_init and board._default_hp_metric is True
    (alone,) = made(composed, tmp_path, "logger=wandb", "logger.project=q", "+logger.entity=me")
    assert (alone._wandb_init["project"], alone._wandb_init["entity"]) == ("q", "me")


@pytest.mark.parametrize(("overrides", "key", "words"), [
    (["logger=[wandb,tensorboard]", "+logger.entity=me"], "logger.entity", "logger.NAME.entity"),
    (["+logger.entity=me"], "logger.entity", "unknown key"),
    (["logger=wandb", "logger.project='a/b c'"], "logger.project", "cannot contain"),
    (["logger=[wandb,csv]", "logger.project='a#b'"], "logger.project", "cannot contain"),
    (["logger=[wandb,tensorboard]", "logger.project='a?b'"], "logger.wandb.project", "cannot contain"),
    (["logger=wandb", f"logger.project={'x' * 200}"], "logger.project", "128"),
    (["logger=wandb", "logger.tags=5"], "logger.tags", "W&B"),
    (["logger=wandb", "logger.init_timeout=0"], "logger.init_timeout", "above 0"),
    (["logger._target_=no.such.Logger"], "logger._target_", "dotted name"),
    (["logger._target_=torch.nn.Linear"], "logger._target_", "Logger"),
    (["logger=wandb", "logger.wandb._target_=torch.nn.Linear"], "logger.wandb._target_", "Logger"),
    (["logger._target_=lightning.pytorch.loggers.CometLogger"], "logger._target_", "pip install comet-ml"),
    ([f"logger._target_={BROKEN}", "+logger.nosuch=1"], "logger.nosuch", "unknown key"),
    ([f"logger._target_={BROKEN}", "+logger.after=nan"], "logger.after", "finite"),
])  # fmt: skip
def test_a_wrong_logger_is_one_line_before_training(composed, tmp_path, monkeypatch, overrides, key, words):
    monkeypatch.setattr("lightning.pytorch.loggers.comet._COMET_AVAILABLE", Absent("Requirement 'comet-ml>=3.44.4' not met"))
    with pytest.raises(ConfigError, match=words) as error:
        made(composed, tmp_path, *overrides)
    assert error.value.key == key and "\n" not in str(error.value)


class Absent(str):
    """As Lightning marks a package that is not there."""

    def __bool__(self) -> bool:
        return False


def test_a_server_that_does_not_answer_when_a_logger_is_made_leaves_it_out(composed, tmp_path):
    with pytest.warns(UserWarning, match="logger Broken: left out .ConnectionError: no server answers.; training goes on"):
        assert made(composed, tmp_path, f"logger._target_={BROKEN}", "+logger.where=__init__") == []


def test_logger_null_on_the_command_line(cli, tmp_path):  # noqa: F811
    code, _, err = cli(*ONE_STEP, "logger=null", "hydra.run.dir=run")
    assert code == 0, err
    assert (tmp_path / "run" / "metrics.csv").is_file()


def test_a_logger_group_of_none_is_metrics_csv_alone(run):
    directory, _ = run("run", "~logger", base=ONE)
    assert (directory / "metrics.csv").is_file() and not (directory / "wandb").exists()


def test_two_loggers_in_one_run(run):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    directory, _ = run("run", "logger=[csv,wandb,tensorboard]", base=ONE)
    assert list((directory / "wandb").glob("offline-run-*")) and list((directory / "tensorboard").glob("events*"))
    assert "train/loss" in (directory / "metrics.csv").read_text()


# -- W&B ----------------------------------------------------------------------------------------------------------------


def host() -> str:
    from wandb import Settings

    return Settings().base_url.partition("//")[2]


@pytest.mark.parametrize("where", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_key_in_the_environment_is_found(monkeypatch, where):
    assert not loggers.has_wandb_key()
    monkeypatch.setenv(where, KEY)
    assert loggers.has_wandb_key()


@pytest.mark.parametrize(("machine", "base_url", "found"), [
    (None, None, True), (None, "https://wandb.my.org", False), ("wandb.my.org", "https://wandb.my.org", True),
    ("localhost:8080", "http://localhost:8080", True), ("example.com", None, False),
])  # fmt: skip
def test_a_key_of_wandb_login_is_found_for_the_host_that_wandb_asks(tmp_path, monkeypatch, machine, base_url, found):
    (tmp_path / "netrc").write_text(f"machine {machine or host()}\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    assert loggers.has_wandb_key() is found


def test_without_wandbs_own_search_the_netrc_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.wbauth", None)  # an older wandb
    assert not loggers.has_wandb_key()
    (tmp_path / "netrc").write_text(f"machine {host()}\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert loggers.has_wandb_key()
    (tmp_path / "netrc").write_text("machine")
    assert not loggers.has_wandb_key(), "a netrc that cannot be read holds no key"


@pytest.mark.parametrize(("key", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true"), ("WANDB_DISABLED", "1")])
def test_disabled_means_nothing_is_written(composed, tmp_path, monkeypatch, capsys, key, value):
    monkeypatch.setenv(key, value)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert made(composed, tmp_path, "logger=wandb") == []
    assert capsys.readouterr().out == "wandb: disabled by the environment or its settings; nothing is written\n"


@pytest.mark.parametrize(("mode", "override", "offline"), [
    ("offline", None, True), ("dryrun", None, True), ("offline", "false", True), ("online", None, False), (None, "true", True),
    (None, None, False),
])  # fmt: skip
def test_an_offline_mode_is_ours_too(composed, tmp_path, monkeypatch, mode, override, offline):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    (logger,) = made(composed, tmp_path, "logger=wandb", *([f"logger.offline={override}"] if override else []))
    assert logger._offline is offline and (logger._wandb_init.get("mode") == "offline") is offline


def test_a_mode_that_there_is_not_is_one_line(composed, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "nosuch")
    with pytest.raises(ConfigError, match="WANDB_MODE='nosuch': must be one of online, offline, disabled"):
        made(composed, tmp_path, "logger=wandb")


@pytest.fixture
def refusing(monkeypatch):
    """A W&B whose server cannot be reached; what it was asked for."""
    import wandb

    asked = []

    def init(**kwargs):
        asked.append(kwargs)
        if kwargs.get("mode") != "offline":
            raise wandb.errors.CommError("Timed out while retrying:\nconnection refused")
        return real(**kwargs)

    real = wandb.init
    monkeypatch.setattr(wandb, "init", init)
    return asked


def test_a_server_that_does_not_answer_makes_an_offline_run(run, refusing, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with pytest.warns(
        UserWarning, match="wandb: CommError: Timed out .* refused; writing an offline run; upload it .*wandb sync"
    ):
        directory, _ = run("run", "logger=wandb", base=ONE)
    assert [asked.get("mode") for asked in refusing] == [None, "offline"]
    assert refusing[0]["settings"] == {"init_timeout": 15.0}, "not W&B's minute and a half"
    assert list((directory / "wandb").glob("offline-run-*")) and "WANDB_MODE" not in os.environ


def test_where_not_even_an_offline_run_can_be_made_training_goes_on(run, monkeypatch):
    import wandb

    def init(**kwargs):
        raise wandb.errors.UsageError("nothing works today")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.warns(UserWarning, match="logger wandb: experiment failed .UsageError: nothing works today"):
        directory, summary = run("run", "logger=wandb", base=ONE)
    assert summary["final"] and (directory / "metrics.csv").is_file()


def test_a_timeout_of_the_users_own_wins(monkeypatch, tmp_path):
    assert RunWandbLogger(str(tmp_path), settings={"init_timeout": 60})._wandb_init["settings"] == {"init_timeout": 60}
    assert RunWandbLogger(str(tmp_path), init_timeout=5)._wandb_init["settings"] == {"init_timeout": 5.0}
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "7")
    assert "settings" not in RunWandbLogger(str(tmp_path))._wandb_init


def test_lightnings_own_class_gets_no_key_of_ours(composed, tmp_path):
    target = "logger.wandb._target_=lightning.pytorch.loggers.WandbLogger"
    (logger,) = made(composed, tmp_path, "logger=wandb", target)
    assert type(logger).__mro__[1] is WandbLogger and "init_timeout" not in logger._wandb_init


def test_a_page_or_a_farewell_that_cannot_be_sent_is_a_warning(tmp_path, monkeypatch):
    import wandb

    def refuse(*args, **kwargs):
        raise wandb.errors.CommError("no way")

    monkeypatch.setattr(wandb_sections, "publish", refuse)
    monkeypatch.setattr(wandb, "finish", refuse)
    monkeypatch.setattr("lowrank_pretrain.export.card.write", lambda *args: None)
    first, second = (guard(WandbLogger.__new__(WandbLogger), "wandb") for _ in range(2))
    first._experiment = second._experiment = object()
    with pytest.warns(UserWarning, match="publishing the report and the weights failed .CommError: no way"):
        loggers.publish({}, {}, tmp_path, [first])
    with pytest.warns(UserWarning, match="the end of its run failed"):
        loggers.finish([second])


# -- by class -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # MLflow makes its tables
def test_mlflow_by_its_class(run, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (the extra `dev`)")
    pytest.importorskip("sqlalchemy", reason="MLflow's own store needs sqlalchemy")
    from mlflow.tracking import MlflowClient

    store = f"sqlite:///{tmp_path}/mlflow.db"
    target = "logger._target_=lightning.pytorch.loggers.MLFlowLogger"
    run("my run", target, f"+logger.tracking_uri={store}", "+logger.experiment_name=e", base=ONE)
    client = MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert found.info.run_name == "my run" and found.info.status == "FINISHED"
    assert {"train/loss", "val/loss", "test/acc1"} <= set(found.data.metrics)


def test_a_store_that_mlflow_refuses_is_one_warning(composed, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (the extra `dev`)")
    import mlflow.tracking
    from mlflow.exceptions import MlflowException

    def client(uri):
        raise MlflowException("The filesystem tracking backend is in maintenance mode")

    monkeypatch.setattr(mlflow.tracking, "MlflowClient", client)
    target = "logger._target_=lightning.pytorch.loggers.MLFlowLogger"
    with pytest.warns(UserWarning, match="logger MLFlowLogger: left out .MlflowException: The filesystem .*training goes on"):
        assert made(composed, tmp_path, target, f"+logger.save_dir={tmp_path}/mlruns") == []


def test_a_server_of_mlflows_that_does_not_answer_is_one_warning(run):
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (the extra `dev`)")
    target = "logger._target_=lightning.pytorch.loggers.MLFlowLogger"
    with pytest.warns(UserWarning, match="logger MLFlowLogger: experiment failed .*; it is not used from here on"):
        _, summary = run("run", target, "+logger.tracking_uri=http://127.0.0.1:9", base=ONE)
    assert summary["final"] and os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


def test_mlflows_own_place_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(get_tracking_uri=lambda: "sqlite:///mlflow.db"))
    assert loggers._mlflow({}, tmp_path / "a") == {"run_name": "a", "tracking_uri": "sqlite:///mlflow.db"}
    assert loggers._mlflow({"save_dir": "x", "run_name": "b"}, tmp_path / "a") == {"save_dir": "x", "run_name": "b"}


class Experiment:
    """As much of a Comet experiment as the logger asks for."""

    project_name = "p"

    def __init__(self) -> None:
        self.rows, self.ended = [], False

    def get_key(self) -> str:
        return "key"

    def log_other(self, *args) -> None:
        pass

    def __internal_api__log_metrics__(self, metrics, **kwargs) -> None:
        self.rows.append(metrics)

    def __internal_api__log_parameters__(self, **kwargs) -> None:
        pass

    def flush(self) -> None:
        pass

    def end(self) -> None:
        self.ended = True


def test_comet_by_its_class(run, monkeypatch):
    experiment = Experiment()
    fake = types.ModuleType("comet_ml")
    fake.ExperimentConfig = lambda **kwargs: types.SimpleNamespace(offline_directory=None)
    fake.start = lambda **kwargs: experiment
    monkeypatch.setitem(sys.modules, "comet_ml", fake)
    monkeypatch.setattr("lightning.pytorch.loggers.comet._COMET_AVAILABLE", True)
    run("run", "logger._target_=lightning.pytorch.loggers.CometLogger", "+logger.project=p", base=ONE)
    assert any("train/loss" in row for row in experiment.rows) and experiment.ended, "the next job of a sweep gets its own"


def test_a_class_that_wants_a_place_gets_the_run_directory(composed, tmp_path):
    (logger,) = made(composed, tmp_path, "logger._target_=lightning.pytorch.loggers.CSVLogger")
    assert isinstance(logger, CSVLogger) and str(logger.save_dir).startswith(str(tmp_path / "run"))
