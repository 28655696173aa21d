"""Define the base of all data modules: loaders over sets, and the position in the data in every checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L

from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import CountsClasses
from lowrank_pretrain.data.images.arrays import GRAY
from lowrank_pretrain.data.loaders.epoch import BatchSet, EpochBatches, EpochLoader
from lowrank_pretrain.data.loaders.stream import PassLoader, StreamLoader
from lowrank_pretrain.data.text.tokenizer import special_tokens

MOST_WORKERS = 1024  # a typing error must not start a million processes
Loader = EpochLoader | StreamLoader | PassLoader
SomeLoader = TypeVar("SomeLoader", bound=Loader)


def evaluation_recipe(
    img_size: int,
    in_chans: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
    crop_pct: float = 1.0,
    crop_mode: str = "squash",
) -> dict[str, Any]:
    """Describe how evaluation prepares an image, in the arguments of ``timm.data.create_transform``.

    Args:
        img_size: side of the images handed to the model, pixels.
        in_chans: 1 or 3.
        mean: of the pixel values in [0, 1], for one channel or three.
        std: their standard deviation.
        interpolation: how images are resized.
        crop_pct: the share of the resized image's side that is kept.
        crop_mode: ``squash`` resizes to a square, ``center`` keeps the aspect ratio and cuts the middle out.
    """
    recipe = {"input_size": (in_chans, img_size, img_size), "interpolation": interpolation, "crop_pct": float(crop_pct)}
    return recipe | {"crop_mode": crop_mode, "mean": for_channels(mean, in_chans), "std": for_channels(std, in_chans)}


def for_channels(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Return one value per channel; three become one with the weights of gray, one is repeated."""
    values = tuple(float(value) for value in values)
    if len(values) == in_chans:
        return values
    return values * in_chans if len(values) == 1 else (sum(w * v for w, v in zip(GRAY, values, strict=True)),)


def public_name(path_or_name: str) -> str:
    """Return the name of a set for people: a folder's own name, without its path on this machine."""
    path = Path(path_or_name)
    return path.resolve().name if path.is_absolute() or path.exists() else path_or_name


class PretrainData(CountsClasses, L.LightningDataModule):
    """Hold loaders and their position in the data. A subclass's ``setup`` sets ``train_set``, ``val_set`` and ``test_set``.

    The position in the data is saved by this module, not only by Lightning's fit loop. The loop restores its loader only if
    nothing has asked for it before, but ``trainer.estimated_stepping_batches``, which every schedule needs, does ask.

    Args:
        batch_size: samples per batch and process.
        num_workers: processes that load; 0 loads in the training process.
        seed: of order and augmentation. None: the one given to ``seed_everything``.

    Raises:
        ConfigError: ``batch_size`` below 1, or ``num_workers`` below 0 or absurd.
    """

    # each a BatchSet, or the stream of a subclass that creates its own loaders
    train_set: Any = None
    val_set: Any = None
    test_set: Any = None

    # What an export says about the data; known after ``setup``, None if the data has no such thing.
    dataset_name: str = "data"  # for people: never a path of this machine
    class_names: list[str] | None = None  # in the order of the labels
    preprocessing: dict[str, Any] | None = None  # of evaluation, with timm's keys, see :func:`evaluation_recipe`
    tokenizer: Any | None = None  # of the library `tokenizers`, without truncation and padding
    tokenizer_file: Path | None = None  # a tokenizer.json
    tokenizer_folder: Path | None = None  # where the tokenizer's other files lie, tokenizer_config.json and the like
    end_id: int | None = None  # after each document
    bos_id: int | None = None
    pad_id: int | None = None

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int | None = None) -> None:
        super().__init__()
        self.batch_size = whole("batch_size", batch_size, 1)
        self.num_workers = whole("num_workers", num_workers, 0, "processes", most=MOST_WORKERS)
        self.seed = seed
        self._train_loader: EpochLoader | StreamLoader | None = None
        self._loaders: list[Loader] = []  # open ones; none left: the training loader's fit is over
        self._resume: dict[str, Any] | None = None

    @property
    def ranks(self) -> tuple[int, int]:
        """Return the rank of this process, and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def remember_tokenizer(self, name: str, tokenizer: Any, end: int) -> None:
        """Keep what an export says about the tokenizer ``name``."""
        found = special_tokens(name, tokenizer)
        self.tokenizer, self.end_id, self.bos_id, self.pad_id = tokenizer, end, found.bos, found.pad
        self.tokenizer_file, self.tokenizer_folder = found.file, found.folder

    def count_classes(self) -> int | None:
        """Return the number of classes of an image set, for the model's output size; None if there are none."""
        return getattr(self, "num_classes", None)

    def train_dataloader(self) -> EpochLoader | StreamLoader:
        """Return the training loader. It continues where the checkpoint, or an earlier loader of the same fit, stopped."""
        loader = self._make_train_loader()
        earlier = self._train_loader if self._train_loader in self._loaders else None
        state = self._resume or (earlier.state_dict() if earlier is not None else None)
        if state:
            loader.load_state_dict(state)
        self._train_loader, self._resume = loader, None
        return self._remember(loader)

    def val_dataloader(self) -> Loader:
        """Return the validation loader, in its natural order."""
        return self._remember(self._make_loader(self.val_set, shuffle=False))

    def test_dataloader(self) -> Loader:
        """Return the test loader, in its natural order."""
        return self._remember(self._make_loader(self.test_set, shuffle=False))

    def teardown(self, stage: str | None = None) -> None:
        """End the loaders' worker processes. The training loader is kept for a checkpoint after the fit."""
        for loader in self._loaders:
            loader.close()
        self._loaders = []

    def on_exception(self, exception: BaseException) -> None:
        """End the worker processes after an error or interrupt too, when Lightning does not call ``teardown``."""
        self.teardown()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data, {} before there is one."""
        return {"train": self._train_loader.state_dict()} if self._train_loader else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``: at once if a loader is waiting to start, else when it is made."""
        if self._train_loader is not None and self._train_loader in self._loaders:
            self._train_loader.load_state_dict(state["train"])
        else:
            self._resume = state["train"]

    def _remember(self, loader: SomeLoader) -> SomeLoader:
        self._loaders.append(loader)
        return loader

    def _make_train_loader(self) -> EpochLoader | StreamLoader:
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        return self._make_loader(self.train_set, shuffle=not overfit)

    def _make_loader(self, dataset: BatchSet | None, shuffle: bool) -> EpochLoader:
        if dataset is None:
            raise RuntimeError(f"call {type(self).__name__}.setup() before asking for its loaders")
        rank, world = self.ranks
        if shuffle and self.batch_size * world > len(dataset):
            allowed = f"times {world} process{'es' * (world > 1)} must be at most {len(dataset)}, the size of the training set"
            raise ConfigError("batch_size", self.batch_size, allowed)
        batches = EpochBatches(len(dataset), self.batch_size, shuffle, rank, world, self.seed)
        return EpochLoader(dataset, batches, self.num_workers)
