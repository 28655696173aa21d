"""Opening image sets by name: timm's ``create_dataset`` plus the torchvision sets it leaves out; errors in one line.

Here is also where a split is checked: ``create_dataset`` silently falls back to the whole folder, or to the test split.
"""

import inspect
from pathlib import Path
from typing import Any

from lowrank_pretrain.errors import ConfigError

TIMM_TORCH = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "image_folder", "places365")
STREAMS = ("hfids", "wds", "tfds")
TRAIN = ("train", "training")
EVAL = ("val", "valid", "validation", "eval", "evaluation", "test", "testing")
HOLD_OUT = 10  # every 10th image of a set without splits is for validation


def open_images(name: str, root: str | None, split: str, split_key: str, download: bool = False, **kwargs: Any) -> Any:
    """A set of ``(PIL image, class)``, map-style or (``hfids/``, ``wds/``, ``tfds/``) iterable.

    Args:
        name: empty or ``folder`` for folders of images by class (or a ``.tar``), ``torch/<torchvision set>``, ``hfds/<name>``,
            or a stream: ``hfids/<name>``, ``wds/``, ``tfds/<name>``.
        root: folder of the data; for ``hfds/`` the cache.
        split: which part.
        split_key: the configuration key that named it.
        download: let torchvision fetch a missing set.
        kwargs: passed to ``timm.data.create_dataset``.

    Raises:
        ConfigError: unknown name, no data at ``root``, or no such split.
    """
    prefix, _, rest = name.partition("/")
    if prefix in ("", "folder"):
        return _folder(root, split, split_key, **kwargs)
    if prefix not in ("torch", "hfds", *STREAMS) or (not rest and prefix != "wds"):
        allowed = "must be folder, torch/<torchvision set>, hfds/<hub set>, hfids/<hub set>, wds/ or tfds/<set>"
        raise ConfigError("name", name, allowed)
    if prefix != "hfds" and prefix != "hfids" and (root is None or not (download or Path(root).is_dir())):
        raise ConfigError("root", root, "must be an existing folder with the data")
    if prefix == "torch":
        return _torchvision(rest.lower(), root, split, split_key, download)
    from timm.data import create_dataset

    try:
        return create_dataset(name, root=root, split=split, **kwargs)
    except ImportError as error:
        raise ConfigError("name", name, f"needs a package that is not installed: {error}") from error
    except ValueError as error:  # datasets: 'Unknown split "x". Should be one of [...]'
        raise ConfigError(split_key, split, first_line(error)) from error
    except Exception as error:  # each library has its own for no network, no such set, no such file
        key, value = ("root", root) if prefix == "wds" else ("name", name)
        raise ConfigError(key, value, f"cannot be opened: {first_line(error)}") from error


def _folder(root: str | None, split: str, split_key: str, **kwargs: Any) -> Any:
    from timm.data import create_dataset

    path = Path(root) if root is not None else None
    if path is None or not path.exists():
        raise ConfigError("root", root, "must be an existing folder of images, <root>/<split>/<class>/<image>")
    names = next((group for group in (TRAIN, EVAL[:5]) if split in group), (split,))
    if path.is_dir() and not any((path / name).exists() for name in (split, *names)):
        folders = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())[:10]) or "no folders at all"
        raise ConfigError(split_key, split, f"must be a folder under {root}, there are: {folders}")
    try:
        return create_dataset("", root=root, split=split, **kwargs)
    except RuntimeError as error:
        raise ConfigError("root", root, first_line(error)) from error


def _torchvision(name: str, root: str | None, split: str, split_key: str, download: bool) -> Any:
    from timm.data import create_dataset
    from torchvision import datasets

    known = {c.lower(): getattr(datasets, c) for c in datasets.__all__ if inspect.isclass(getattr(datasets, c))}
    cls = known.get(name.replace("_", ""))
    if cls is None and name not in TIMM_TORCH:
        raise ConfigError("name", f"torch/{name}", f"must be one of torch/{', torch/'.join(sorted(known))}")
    if split not in TRAIN + EVAL and (name in TIMM_TORCH or "split" not in inspect.signature(cls).parameters):
        raise ConfigError(split_key, split, f"must be one of {', '.join(TRAIN + EVAL)}")
    try:
        if name in TIMM_TORCH:
            return create_dataset(f"torch/{name}", root=root, split=split, download=download)
        return _other_torchvision(cls, root, split, split_key, download)
    except (RuntimeError, OSError) as error:  # "Dataset not found or corrupted. You can use download=True to download it"
        raise ConfigError("root", root, first_line(error)) from error


def _other_torchvision(cls: type, root: str | None, split: str, split_key: str, download: bool) -> Any:
    from torch.utils.data import Subset

    parameters = inspect.signature(cls).parameters
    kwargs = {"root": root} | ({"download": download} if "download" in parameters else {})
    if "split" in parameters:
        names = EVAL if split in EVAL else TRAIN if split in TRAIN else ()
        refusal: ValueError | None = None
        for alias in dict.fromkeys((split, *names)):  # the set's own word for it
            try:
                return cls(split=alias, **kwargs)
            except ValueError as error:
                refusal = refusal or error
        raise ConfigError(split_key, split, first_line(refusal)) from refusal
    if "train" in parameters:
        return cls(train=split in TRAIN, **kwargs)
    whole = cls(**kwargs)  # Caltech256, SUN397: no splits of their own
    held = range(HOLD_OUT - 1, len(whole), HOLD_OUT)
    return Subset(whole, [i for i in range(len(whole)) if i not in held] if split in TRAIN else list(held))


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
