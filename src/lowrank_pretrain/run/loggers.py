"""Build the loggers besides metrics.csv: W&B, TensorBoard, any other of Lightning, one or several; none of them ends a run."""

import hashlib
import inspect
import netrc
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import missing_words
from lowrank_pretrain.core.lightning_private import has_begun
from lowrank_pretrain.core.protocols import LogsPhases
from lowrank_pretrain.core.text import one_line
from lowrank_pretrain.loggers.guarded import give_up, guard
from lowrank_pretrain.run.build import build, check_finite, find_class

MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")  # of W&B
OFFLINE = ("offline", "dryrun")
# keys of the group -> what W&B's own settings call them, which know what a name may hold
NAMES = {"project": "project", "entity": "entity", "name": "run_name", "group": "run_group", "tags": "run_tags"}


# MLflow's own seven tries of two minutes each hold up the start of training where its server does not answer
MLFLOW_WAITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def more_loggers(values: dict[str, Any], run_dir: Path, config: dict[str, Any], multirun: bool = False) -> list[Logger]:
    """Return the loggers of the ``logger`` group, besides metrics.csv.

    Args:
        values: the group's plain node, see `split`.
        run_dir: the run directory, where an offline run is written.
        config: the run's whole configuration, for a logger that shows it.
        multirun: whether this is one job of a sweep: its runs make one group, named after the sweep's directory.

    Raises:
        ConfigError: an unknown key, a wrong value, or a package that is not installed.
    """
    made = []
    for name, group, node in split(values):
        try:
            logger = _one(group, node, run_dir, config, multirun)
        except ConfigError:
            raise
        except ModuleNotFoundError as error:
            raise ConfigError(f"{group}._target_", node["_target_"], _missing(error)) from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{group}._target_", node["_target_"], f"cannot be made: {one_line(error, 300)}") from error
        except Exception as error:  # a server that does not answer, a store that refuses
            words = f"{type(error).__name__}: {one_line(error, 300)}"
            warnings.warn(f"logger {name}: left out ({words}); training goes on, with metrics.csv", stacklevel=1)
            continue
        if logger is not None:
            made.append(guard(logger, name))
    return made


def split(values: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (name, key of the configuration, node) of every logger that the group asks for.

    A node inside `values` whose ``_target_`` is a logger is one of several (``logger=[wandb,tensorboard]``, or
    ``+logger.NAME._target_=…``). Other keys in `values` belong to the one logger there is, or to the class at its ``_target_``.

    Raises:
        ConfigError: no class of that name, one that is not a logger, or a key that could belong to several.
    """
    check_finite("logger", values)
    target = values.get("_target_")
    alone = target is None  # else a node inside may be an argument of that class
    nodes = {key: node for key, node in values.items() if isinstance(node, dict) and _is_logger(f"logger.{key}", node, alone)}
    flat = {key: value for key, value in values.items() if key not in nodes and key != "_target_"}
    own = {key: value for key, value in flat.items() if not any(key in node for node in nodes.values())}
    found = [(key, f"logger.{key}", node) for key, node in nodes.items()]
    if target is not None:
        find_class("logger", target, Logger)
        return [*found, (target.rpartition(".")[2], "logger", {"_target_": target, **own})]
    if len(found) == 1:
        ((name, _, node),) = found
        return [(name, "logger", {**node, **own})]
    for key in own:
        several = f"with several loggers must be logger.NAME.{key}, NAME one of {', '.join(nodes)}"
        raise ConfigError(f"logger.{key}", own[key], several if nodes else "unknown key; needs logger=wandb or logger._target_")
    return found


def _is_logger(group: str, node: dict[str, Any], must: bool) -> bool:
    return "_target_" in node and issubclass(find_class(group, node["_target_"], Logger if must else object), Logger)


def _one(group: str, values: dict[str, Any], run_dir: Path, config: dict[str, Any], multirun: bool) -> Logger | None:
    target = find_class(group, values["_target_"], Logger)
    if values["_target_"].endswith("TensorBoardLogger"):
        return build(group, values, save_dir=str(run_dir), name="", version="tensorboard")
    if issubclass(target, WandbLogger):
        return _wandb(group, values, run_dir, config, multirun)
    if issubclass(target, MLFlowLogger):
        values = _mlflow(values, run_dir)
    directory = inspect.signature(target).parameters.get("save_dir")
    if directory is not None and directory.default is directory.empty and "save_dir" not in values:
        values = {**values, "save_dir": str(run_dir / target.__name__)}
    return build(group, values)


def _mlflow(values: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Use MLflow's own default store: MLflow 3 no longer writes to Lightning's."""
    for key, value in MLFLOW_WAITS.items():
        os.environ.setdefault(key, value)
    values = {"run_name": run_dir.name, **values}
    if not any(values.get(key) for key in ("tracking_uri", "save_dir")):
        try:
            from mlflow import get_tracking_uri
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow") from error
        values["tracking_uri"] = get_tracking_uri()
    return values


def _wandb(group: str, values: dict[str, Any], run_dir: Path, config: dict[str, Any], multirun: bool) -> Logger | None:
    check_wandb(group, values)
    values = dict(values)
    mode = _wandb_setting("mode")
    if mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        rank_zero_only(print)("wandb: disabled by the environment or its settings; nothing is written")
        return None
    if values.get("offline"):
        values["mode"] = "offline"
    elif values.get("offline") is None or mode in OFFLINE:
        why = f"WANDB_MODE is {mode}" if mode in OFFLINE else "no API key found"
        values = {**values, "offline": mode in OFFLINE or not has_wandb_key()}
        if values["offline"]:
            values["mode"] = "offline"  # in the environment, where Lightning puts it, wandb would no longer look
            rank_zero_only(print)(f"wandb: {why}, writing an offline run; {upload_later(run_dir)}")
    if not issubclass(find_class(group, values["_target_"], Logger), LogsPhases):  # W&B's own class, without ours
        values.pop("init_timeout", None)
    # the same directory is the same run, so that a resumed one continues it
    run_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    names = {
        "name": values.get("name") or run_dir.name,
        "group": values.get("group") or (run_dir.parent.name if multirun else None),
    }
    return build(group, {**values, **names}, save_dir=str(run_dir), id=run_id, config=config)


def upload_later(run_dir: Path) -> str:
    """Return how to upload the offline run in `run_dir`, for a message."""
    return f"upload it later with: wandb sync {os.path.relpath(run_dir / 'wandb' / 'latest-run')}"


def check_wandb(group: str, values: dict[str, Any]) -> None:
    """Check names by W&B's own rules before training, not by its server afterwards.

    Raises:
        ConfigError: a name that W&B refuses, or an unknown ``WANDB_MODE``.
    """
    from wandb import Settings

    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in MODES:
        raise ConfigError("WANDB_MODE", mode, f"must be one of {', '.join(MODES)}")
    for key, setting in NAMES.items():
        if values.get(key) is None:
            continue
        try:
            Settings(**{setting: values[key]})
        except Exception as error:  # W&B's UsageError, pydantic's ValidationError
            details: list[Any] = getattr(error, "errors", list)()
            words = details[0]["msg"] if details else one_line(error, 300)
            raise ConfigError(f"{group}.{key}", values[key], f"is refused by W&B: {words}") from error


def has_wandb_key() -> bool:
    """Return whether wandb would find a key, in its own way and for its own host, without asking its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _wandb_setting("api_key"):
        return True
    host = _wandb_setting("base_url") or "https://api.wandb.ai"
    try:
        from wandb.sdk.lib.wbauth import read_netrc_auth  # since 0.22
    except ImportError:
        return _netrc_key(urlparse(host).netloc)
    try:
        return read_netrc_auth(host=host) is not None
    except Exception:  # a key that is none: wandb itself says so when the run begins
        return True


def _wandb_setting(name: str) -> Any:
    """Return one of W&B's settings: the environment's, else the one in its settings files, else its default."""
    if given := os.environ.get(f"WANDB_{name.upper()}"):
        return given
    try:
        from wandb.sdk import wandb_setup

        return getattr(wandb_setup.singleton().settings, name, None)
    except (ImportError, AttributeError, ValueError):  # before 0.19.10; or a setting of another name is wrong
        return None


def _netrc_key(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _missing(error: ModuleNotFoundError) -> str:
    """Return the message for a package that is not installed; Lightning's errors do not always say its name."""
    words = one_line(error, 300)
    for package in ("tensorboard", "mlflow", "comet-ml", "neptune", "wandb", "sqlalchemy"):
        if package in words.lower().replace("_", "-"):
            return missing_words(package)
    return f"needs a package that is not installed: {words}"


@rank_zero_only
def publish(summary: dict[str, Any], config: dict[str, Any], run_dir: Path, loggers: list[Logger]) -> None:
    """Publish to W&B the exported weights and their card as an artifact, and the report's page.

    Args:
        summary: the contents of summary.json, which is written by now.
        config: the run's whole configuration.
        run_dir: the run directory.
        loggers: of the run.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger) and not getattr(logger, "_guard_over", False):
            from lowrank_pretrain.loggers.wandb import publish as to_wandb

            try:
                to_wandb(logger.experiment, summary, run_dir)
            except Exception as error:
                give_up(logger, "publishing the report and the weights", error)


def finish(loggers: list[Logger]) -> None:
    """Close W&B's and Comet's runs, which a sweep's next job would otherwise continue; W&B marks a failed run."""
    failed = sys.exc_info()[0] is not None
    for logger in loggers:
        try:
            if isinstance(logger, WandbLogger):
                import wandb

                wandb.finish(exit_code=1 if failed else 0)
            elif isinstance(logger, CometLogger) and has_begun(logger):
                logger.experiment.end()
        except Exception as error:
            give_up(logger, "the end of its run", error)
