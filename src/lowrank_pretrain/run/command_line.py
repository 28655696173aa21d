"""Prepare the command line before Hydra reads it: paths that its grammar refuses, ``logger=null``, unknown names and keys."""

import os
import re
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from yaml import MarkedYAMLError, YAMLError

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.text import one_line
from lowrank_pretrain.core.versions import version_line

NOTHING = ("null", "None", "none", "false", "False", "''", '""')
KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@:-]*$")
MULTIRUN = ("-m", "--multirun")
CONFIG_DIR = ("--config-dir", "-cd")
# a value with `=` or `~`; or one with a slash or a letter beyond ASCII that is no list, mapping or function such as choice(...)
MEANT_AS_ONE_WORD = re.compile(r".*[=~]|(?!\s*([\[{\"']|[A-Za-z_]+\()).*[/\u0080-\U0010ffff]", re.DOTALL)
INTERPOLATION = re.compile(r"\$\{[\w.:@/-]+\}")  # quotes do not change what it means


def prepare(arguments: list[str]) -> list[str]:
    """Return `arguments` as Hydra can read them.

    ``logger=null`` is ``logger=none``. A path, or a value with ``=``, ``~`` or a letter beyond ASCII in it, gets the
    quotes that Hydra wants around such characters; a leading ``~/`` is the home directory, which a shell leaves alone
    after ``data.root=``. ``-m`` and ``--config-dir DIR`` may stand anywhere.

    Raises:
        ConfigError: a value that Hydra's grammar refuses, and that cannot be meant as one word.
    """
    sweep = [argument for argument in arguments if argument in MULTIRUN]
    directory, rest = _config_dir([argument for argument in arguments if argument not in MULTIRUN])
    found = [] if directory is None else [f"--config-dir={directory}"]
    return sweep + found + [_prepared(argument, bool(sweep)) for argument in rest]


def _prepared(argument: str, sweep: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or not KEY.match(key):
        return argument
    if key == "logger" and value in NOTHING:
        return "logger=none"
    if re.match(r"~[\w.-]*(/|$)", value):
        value = os.path.expanduser(value)
        argument = f"{key}={value}"
    if _parses(argument) or not MEANT_AS_ONE_WORD.match(value):
        return argument  # as it is, or to be refused in Hydra's own words
    # a comma could part the values of a sweep, and brackets or a quote begin something that was not ended
    several = sweep and "," in value
    if several or re.search(r"""["\[\]{}$]|^'""", INTERPOLATION.sub("", value)):
        words = value.split(",") if several else [value]
        quoted = [f"{key}={_quoted(value)}", *([f"{key}={','.join(map(_quoted, words))}"] if several else [])]
        written = ", or as several values ".join(map(_for_shell, quoted))
        raise ConfigError(key, value, f"has a character that Hydra wants in quotes, in the shell {written}")
    quoted_once = f"{key}={_quoted(value)}"
    return quoted_once if _parses(quoted_once) else argument


def _parses(argument: str) -> bool:
    """Return whether Hydra's grammar takes an override."""
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _quoted(value: str) -> str:
    """Return a value in the quotes of Hydra's grammar: single ones, or double ones around an apostrophe."""
    mark = '"' if "'" in value else "'"
    return mark + re.sub(rf"(\\*)({mark}|\Z)", lambda found: found[1] * 2 + (found[2] and "\\" + found[2]), value) + mark


def _for_shell(argument: str) -> str:
    """Return a quoted argument as one writes it in a shell, in the readable form if the value has no quotes of its own."""
    return shlex.quote(argument if '"' in argument else argument.replace("'", '"'))


def refuse_unknown(arguments: list[str]) -> None:
    """Refuse an unknown option of a group, or an unknown key, in one line; Hydra's message takes many.

    In a sweep that is each key, and the options that are not swept (``sweeps.check_options`` has the others). Files of a
    ``--config-dir`` are looked at too. Hydra's other flags are left to Hydra, and so is any other mistake.

    Raises:
        ConfigError: with the nearest name or key, and all valid ones; or with the place in a file that is not YAML.
    """
    directory, given_words = _config_dir([argument for argument in arguments if argument not in MULTIRUN])
    if any(argument.startswith(("-", "hydra.searchpath=")) for argument in given_words):
        return
    sweep = any(argument in MULTIRUN for argument in arguments)
    words = [one for argument in given_words for one in _one_of_sweep(argument)] if sweep else given_words
    if directory is not None:
        words = [f"hydra.searchpath=[{_quoted(f'file://{os.path.abspath(directory)}')}]", *words]
    try:
        _configuration(words)
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").partition("/")
        if {f"{group}={name}", f"{group}={_quoted(name)}"} & {*given_words}:
            allowed = f"Could not find '{group}/{name}'; {_near(name, list(error.options or []))}"
            raise ConfigError(group, name, allowed) from error
    except HydraException as error:
        if (found := re.match(r"Could not override '([\w.]+)'", str(error))) is None:
            return
        key = found[1]
        given = [argument for argument in given_words if argument.partition("=")[0] == key]
        hint = _hint(key, [word for word in words if word.partition("=")[0] != key])
        if given and hint:
            allowed = f"Could not override '{key}', which is no key; {hint}"
            raise ConfigError(key, given[0].partition("=")[2], allowed) from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError("--config-dir", directory, f"has a file that cannot be read: {_place(error, directory)}") from error


def _config_dir(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the directory after ``--config-dir``, if it is among `arguments`, and the other arguments."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in CONFIG_DIR and equals:
            return value, arguments[:i] + arguments[i + 1 :]
        if flag in CONFIG_DIR and i + 1 < len(arguments):
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def _place(error: YAMLError | UnicodeDecodeError | OSError, directory: str | None) -> str:
    """Return which file of a directory is damaged, and where, from the error of reading it."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}, line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, UnicodeDecodeError):
        for path in sorted(Path(directory or ".").rglob("*.yaml")):
            if error.object in (content := path.read_bytes()):
                return f"{path}, line {content[: content.find(error.object) + error.start].count(10) + 1}: is not UTF-8"
    return one_line(error)


def _one_of_sweep(argument: str) -> list[str]:
    """Return an override of a sweep with its first value, which is enough to look for its key; a glob is left out."""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return [argument]
    if not override.is_sweep_override():
        return [argument]
    if isinstance(override.value(), Glob):
        return []
    first = next(override.sweep_string_iterator()) if override.is_discrete_sweep() else "null"
    return [f"{argument.partition('=')[0]}={first}"]


def _configuration(arguments: list[str]) -> DictConfig:
    with initialize_config_module("lowrank_pretrain.conf", version_base="1.3"):
        return compose("train", overrides=arguments)


def _hint(key: str, arguments: list[str]) -> str:
    """Return the keys of an unknown key's group, or the group that has it; nothing if more is wrong."""
    parent, dot, word = key.rpartition(".")
    try:
        config = _configuration(arguments)
        group = OmegaConf.select(config, parent) if parent else config
    except Exception:  # another mistake, which Hydra reports
        return ""
    if not isinstance(group, DictConfig) or word in group:
        return ""
    names = [str(name) for name in group]
    if parent:
        return f"{_near(word, names, parent + dot)}; +{key}=VALUE adds one"
    within = [f"{name}.{word}" for name in names if isinstance(group[name], DictConfig) and word in group[name]]
    return f"did you mean {' or '.join(within)}?" if within else _near(word, names)


def _near(word: str, words: list[str], prefix: str = "") -> str:
    close = get_close_matches(word, words, 1, 0.6)
    return f"{f'did you mean {prefix}{close[0]}? ' if close else ''}There are {', '.join(words)}"


def prepare_process() -> None:
    """Prepare this process's arguments, which Hydra reads and Lightning reuses to start further processes.

    Raises:
        SystemExit: 2, after one line, if they cannot be read; 0 after the answer to ``--version``.
    """
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(version_line())
        sys.exit()
    try:
        sys.argv[1:] = prepare(sys.argv[1:])
        refuse_unknown(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
