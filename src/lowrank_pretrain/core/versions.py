"""Report the versions of this package and of those that its results depend on most."""

from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

OTHERS = ("torch", "lightning", "timm", "transformers")


@cache
def _found() -> tuple[tuple[str, str], ...]:
    from lowrank_pretrain import __version__

    found = [("lowrank_pretrain", __version__)]
    for name in OTHERS:
        with suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return tuple(found)


def versions() -> dict[str, str]:
    """Return versions by package, ours first; a package that is not installed is left out. Nothing is imported."""
    return dict(_found())


def version_line() -> str:
    """Return what ``--version`` prints, e.g. ``lowrank_pretrain 0.1.0 (torch 2.6.0, …)``."""
    (name, own), *others = versions().items()
    return f"{name} {own} ({', '.join(f'{other} {number}' for other, number in others)})"
