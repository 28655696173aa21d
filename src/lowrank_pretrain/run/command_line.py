"""Prepare the command line before Hydra reads it: paths that its grammar refuses, and ``logger=null``."""

import os
import re
import sys

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from lowrank_pretrain.core.errors import ConfigError

NOTHING = ("null", "None", "none", "false", "False", "''", '""')
KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@:-]*$")
MULTIRUN = ("-m", "--multirun")


def prepare(arguments: list[str]) -> list[str]:
    """Return `arguments` as Hydra can read them.

    ``logger=null`` is ``logger=none``. A value with ``=`` or ``~`` in it, which Hydra wants in quotes, gets them; a
    leading ``~/`` is the home directory, which a shell leaves alone after ``data.root=``. ``-m`` may stand anywhere.

    Raises:
        ConfigError: a value that Hydra's grammar refuses, and that cannot be meant as one word.
    """
    sweep = [argument for argument in arguments if argument in MULTIRUN]
    rest = [argument for argument in arguments if argument not in MULTIRUN]
    return sweep + [_prepared(argument, bool(sweep)) for argument in rest]


def _prepared(argument: str, sweep: bool) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or not KEY.match(key):
        return argument
    if key == "logger" and value in NOTHING:
        return "logger=none"
    if re.match(r"~[\w.-]*(/|$)", value):
        value = os.path.expanduser(value)
        argument = f"{key}={value}"
    try:
        OverridesParser.create().parse_override(argument)
        return argument
    except HydraException as error:
        if not re.search("[=~]", value):
            return argument  # Hydra's own words
        # a comma could part the values of a sweep, and brackets begin something that was not ended
        if re.search(r"""["'\[\]{}$]""", value) or (sweep and "," in value):
            quoted = f"""'{key}="{value}"'"""
            raise ConfigError(key, value, f"has a character that Hydra wants in quotes, in the shell {quoted}") from error
        return f"{key}='{value}'"


def prepare_process() -> None:
    """Prepare this process's own arguments, which Hydra reads, and with which Lightning starts further processes.

    Raises:
        SystemExit: 2, after one line, where they cannot be read.
    """
    try:
        sys.argv[1:] = prepare(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
