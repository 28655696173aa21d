"""Check a sweep before its first job, name its jobs' directories and lines, print its closing table; make ``tuned`` known."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.run.tuned import register

register()
_started: list[Path] = []  # the directory of the sweep that this process runs


class Sweep(Callback):
    """Check a sweep before its first job, and name jobs' directories after the swept keys."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the whole sweep; Hydra's hook."""
        try:
            overrides = swept(config)
            check_options(overrides)
            check_storage(config)
            check_same_kind(config, {override.key_or_group for override in overrides})
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        keys = {override.key_or_group for override in overrides}
        if str(config.hydra.sweeper.get("_target_", "")).endswith("TunedSweeper"):
            keys |= {f"optim.{name}" for name in ("lr", "rest_lr", "betas", "weight_decay", "warmup")}
        given = [override.key_or_group for override in _parsed([*config.hydra.overrides.task])]
        excluded = {*config.hydra.job.config.override_dirname.exclude_keys, *(key for key in given if key not in keys)}
        with read_write(config), open_dict(config):  # jobs' configurations are composed anew, from these words
            quoted = ",".join(f"'{key}'" for key in sorted(excluded - keys))
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{quoted}]")
        _started.append(Path(config.hydra.sweep.dir).absolute())


def swept(config: DictConfig) -> list[Override]:
    """Return the overrides that stand for several values: the command line's and the sweeper's own."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    words = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    last = {override.key_or_group: override for override in _parsed(words)}  # which wins, as for Hydra
    return [override for override in last.values() if override.is_sweep_override()]


def _parsed(words: list[str]) -> list[Override]:
    return OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(words)


def check_options(overrides: list[Override]) -> None:
    """Refuse a sweep over a group's options if one of them does not exist, before any job runs.

    Raises:
        ConfigError: there is no such option.
    """
    for override in overrides:
        options = GlobalHydra.instance().config_loader().get_group_options(override.key_or_group)
        if not options or not override.is_discrete_sweep():
            continue
        for value in override.sweep_string_iterator():
            names = [name.strip(" '\"") for name in str(value).strip("[]").split(",")]
            for name in names:
                if name not in options:
                    allowed = f"must be one of {', '.join(options)}; no job was started"
                    raise ConfigError(override.key_or_group, name, allowed)


def check_same_kind(config: DictConfig, keys: set[str]) -> None:
    """Refuse to resume another sweep's jobs: directory names hold only the swept keys, not the shared ones.

    Raises:
        ConfigError: the directory's last sweep was of another method, model, optimizer or data.
    """
    earlier = Path(config.hydra.sweep.dir) / "multirun.yaml"
    if config.get("ckpt_path") is None or not earlier.is_file():
        return
    before: Any = OmegaConf.load(earlier)
    swept_before = {override.key_or_group for override in swept(before)}
    for group in ("data", "model", "optim", "method"):
        old, new = (OmegaConf.select(some, f"hydra.runtime.choices.{group}") for some in (before, config))
        if group not in keys | swept_before and old != new:
            cures = f"holds a sweep with {group}={old}, this one has {group}={new}; start it with hydra.sweep.dir=DIR"
            raise ConfigError("hydra.sweep.dir", str(config.hydra.sweep.dir), cures)


def check_storage(config: DictConfig) -> None:
    """Refuse a storage that the installed Optuna cannot open: version 2 needs an older SQLAlchemy, and does not say so.

    Raises:
        ConfigError: the versions are incompatible; with the cure.
    """
    storage = OmegaConf.select(config, "hydra.sweeper.storage")
    if storage is None or not str(config.hydra.sweeper.get("_target_", "")).endswith("OptunaSweeper"):
        return
    try:
        optuna, sqlalchemy = (metadata.version(name) for name in ("optuna", "sqlalchemy"))
    except metadata.PackageNotFoundError:
        return
    if int(optuna.split(".")[0]) < 3 and int(sqlalchemy.split(".")[0]) >= 2:
        needs = f"Optuna {optuna} stores with SQLAlchemy 1.4, {sqlalchemy} is installed: pip install 'sqlalchemy<2' alembic"
        raise ConfigError("hydra.sweeper.storage", str(storage), needs)


class _Named:
    """Write whole lines, each with a job's name before it, so that jobs' lines do not mix."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.name, self.begun = stream, name, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        if lines:
            self.stream.write("".join(f"[{self.name}] {re.sub('.*' + chr(13), '', line)}\n" for line in lines))
            self.stream.flush()
        return len(text)

    def end(self) -> None:
        if self.begun:
            self.write("\n")

    def isatty(self) -> bool:
        return False

    def __getattr__(self, key: str) -> Any:
        return getattr(self.stream, key)


@contextmanager
def named_lines(launcher: str, name: str) -> Iterator[None]:
    """Put `name` before every line that a job prints, if `launcher` runs several jobs at once on one screen."""
    if not launcher.endswith("JoblibLauncher"):
        yield
        return
    out, err = _Named(sys.stdout, name), _Named(sys.stderr, name)
    held = [handler for handler in _handlers() if handler.stream in (out.stream, err.stream)]
    with redirect_stdout(out), redirect_stderr(err):
        for handler in held:  # Lightning's and Hydra's have kept the streams that there were
            handler.setStream(out if handler.stream is out.stream else err)
        try:
            yield
        finally:
            for handler in held:
                handler.setStream(handler.stream.stream)
            out.end()
            err.end()


def _handlers() -> list[Any]:
    known = [logging.root, *(item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger))]
    found = {id(handler): handler for logger in known for handler in logger.handlers}
    return [handler for handler in found.values() if "stream" in vars(handler)]  # others ask for sys.stderr each time


def show_end() -> None:
    """Print the table of the sweep that has ended in this process, and the command for its page; nothing without a sweep."""
    from lowrank_pretrain.report.collection import find_runs

    while _started:
        directory = _started.pop()
        try:
            runs = find_runs([directory])
        except ConfigError:  # ended before its first job
            continue
        from lowrank_pretrain.report.closing import show

        show(runs, directory)
