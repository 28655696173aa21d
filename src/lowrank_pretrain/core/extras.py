"""Import optional packages, and say in one line which one is missing and how to install it.

The core needs torch, lightning, numpy and omegaconf. All else comes with an extra of ``pyproject.toml``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lowrank_pretrain.core.errors import ConfigError

# top-level module -> (the package's name on the index, the extra that brings it)
EXTRAS: dict[str, tuple[str, str]] = {
    "hydra": ("hydra-core", "cli"),
    "rich": ("rich", "cli"),
    "safetensors": ("safetensors", "cli"),
    "timm": ("timm", "images"),
    "torchvision": ("torchvision", "images"),
    "PIL": ("pillow", "images"),
    "transformers": ("transformers", "text"),
    "tokenizers": ("tokenizers", "text"),
    "huggingface_hub": ("huggingface-hub", "text"),
    "torchdata": ("torchdata", "cli"),
    "datasets": ("datasets", "hub"),
    "pyarrow": ("pyarrow", "hub"),
    "zstandard": ("zstandard", "hub"),
    "webdataset": ("webdataset", "wds"),
    "medmnist": ("medmnist", "medmnist"),
    "fontTools": ("fonttools", "glyphs"),
    "matplotlib": ("matplotlib", "report"),
    "wandb": ("wandb", "wandb"),
    "wandb_workspaces": ("wandb-workspaces", "dashboard"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "bitsandbytes": ("bitsandbytes", "8bit"),
    "hydra_plugins": ("hydra-joblib-launcher", "sweep"),
}


def missing_words(module: str) -> str:
    """Return the end of a sentence that says which package a module needs, and how to install it.

    The package is named first because its line is true everywhere. lowrank_pretrain itself is on no index: it was installed
    from a checkout, a wheel or a git address, and takes the extra there.
    """
    package, extra = EXTRAS.get(module.split(".")[0], (module, ""))
    if not extra:
        return f"needs {package}: pip install {package}"
    again = f"or lowrank_pretrain again with the extra [{extra}], in a checkout pip install '.[{extra}]'"
    return f"needs {package}: pip install {package}, {again}"


def missing_module(error: BaseException | None) -> str | None:
    """Return the optional module that an import failed for; None for any other error or cause."""
    while error is not None:
        name = (getattr(error, "name", None) or "").split(".")[0]
        if isinstance(error, ModuleNotFoundError) and name in EXTRAS:
            return name
        error = error.__cause__
    return None


@contextmanager
def optional_import(key: str | None = None, value: Any = None) -> Iterator[None]:
    """Turn the failed import of an optional package in this block into one line.

    Args:
        key: the configuration key, or the argument, that asks for the package. None: an import of our own does.
        value: what it was given.

    Raises:
        ConfigError: a package is missing, and there is a key.
        ModuleNotFoundError: a package is missing, and there is no key; the message names the extra.
    """
    try:
        yield
    except ImportError as error:
        name = missing_module(error)
        if name is None:
            raise
        if key is not None:
            raise ConfigError(key, value, missing_words(name)) from error
        raise ModuleNotFoundError(f"No module named {name!r}: {missing_words(name)}", name=name) from error
