"""Load MedMNIST: medical images as one ``.npz`` per set, e.g. PathMNIST, 107,180 colon tissue patches of 9 classes.

https://medmnist.com. The package ``medmnist`` is used for the download only.
"""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from lowrank_pretrain.core.checks import choice
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.data.images.arrays import ArrayImages
from lowrank_pretrain.data.images.module import ImageModule
from lowrank_pretrain.data.loaders.base import evaluation_recipe

# of the sets with one label an image: classes
CLASSES = {
    "pathmnist": 9, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5, "breastmnist": 2, "bloodmnist": 8,
    "tissuemnist": 8, "organamnist": 11, "organcmnist": 11, "organsmnist": 11,
}  # fmt: skip
SIZES = (28, 64, 128, 224)
HALF = (0.5,)  # MedMNIST's own normalisation: to [-1, 1]
SPLITS = ("train", "val", "test")
# what zipfile, zlib and numpy raise for a damaged file; numpy's header is Python text
UNREADABLE: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)
UNREADABLE += (SyntaxError, struct.error, TypeError)


class MedMNIST(ImageModule):
    """Load one MedMNIST set into memory (PathMNIST at 224 pixels: 16 GB; ``size=64`` is 1.3 GB).

    Args:
        root: folder with the ``.npz``.
        flag: which set; the file is ``{flag}_{size}.npz``, or ``{flag}.npz`` for 28 pixels.
        size: stored side, pixels: 28, 64, 128 or 224.
        download: fetch a missing file with the package ``medmnist`` (extra ``[medmnist]``).
        flip: mirror half of the training images at random.

    All other arguments are described at :class:`~lowrank_pretrain.data.images.module.ImageModule`.

    Raises:
        ConfigError: a wrong value, or (from ``setup``) a file that is missing or not of this format.
    """

    def __init__(
        self,
        root: str | None = None,
        flag: str = "pathmnist",
        size: int = 224,
        download: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        num_classes: int | None = None,
        img_size: int = 224,
        in_chans: int = 3,
        flip: bool = True,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
        seed: int | None = None,
    ) -> None:
        mixing = mixup, cutmix, mix_prob, switch_prob, smoothing
        super().__init__(batch_size, num_workers, num_classes, img_size, in_chans, mixing, seed)
        choice("size", size, SIZES)
        if flag.lower().startswith("chestmnist"):
            raise ConfigError("flag", flag, f"has several labels an image, which is not supported; take {', '.join(CLASSES)}")
        if flag.lower().endswith("3d"):
            raise ConfigError("flag", flag, f"holds volumes, which are not supported; take {', '.join(CLASSES)}")
        self.root, self.flag, self.size, self.download, self.flip = root, flag, size, download, flip
        self.dataset_name = flag.replace("mnist", "MNIST")
        self.preprocessing = evaluation_recipe(img_size, in_chans, HALF, HALF)
        self._arrays: dict[str, tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def path(self) -> Path | None:
        """Return the file's path, whether it exists or not; None without ``root``."""
        name = f"{self.flag}.npz" if self.size == 28 else f"{self.flag}_{self.size}.npz"
        return None if self.root is None else Path(self.root) / name

    def prepare_data(self) -> None:
        """Download the file on one process, if it is missing and ``download`` is on."""
        if not self.download or self.path is None or self.path.is_file():
            return
        with optional_import("download", True):
            import medmnist
        if self.flag not in medmnist.INFO:
            raise ConfigError("flag", self.flag, f"must be one of {', '.join(medmnist.INFO)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        dataset = getattr(medmnist, medmnist.INFO[self.flag]["python_class"])
        dataset(split="train", root=str(self.root), size=self.size, download=True)

    def count_classes(self) -> int:
        """Return the number of classes: as given, else the known set's, else counted in the user's labels.

        Raises:
            ConfigError: the file must be read to count, and cannot be read.
        """
        if self.num_classes is None:
            self.num_classes = CLASSES.get(self.flag)
        if self.num_classes is None:
            self.prepare_data()
            self._arrays = read_npz(self.path, self.root)
            self.num_classes = 1 + max(int(labels.max(initial=0)) for _, labels in self._arrays.values())
        return self.num_classes

    def setup(self, stage: str | None = None) -> None:
        """Read the file, once."""
        if self.train_set is not None:
            return
        classes = self.count_classes()
        shape = classes, self.img_size, self.in_chans
        sets = []
        for split, (images, labels) in (self._arrays or read_npz(self.path, self.root)).items():
            train = split == "train"
            flip, mixing = self.flip and train, self.mixing(classes) if train else None
            half = HALF * (images.shape[3] if images.ndim == 4 else 1)
            sets.append(ArrayImages(images, labels, *shape, half, half, flip, mixing, self.seed))
        self.train_set, self.val_set, self.test_set = sets
        self.class_names, self._arrays = _class_names(self.flag, classes), None


def _class_names(flag: str, num_classes: int) -> list[str] | None:
    """Return the names of the labels, where the package ``medmnist`` is installed and has them."""
    try:
        from medmnist import INFO
    except ImportError:
        return None
    names = list(INFO.get(flag, {}).get("label", {}).values())
    return names if len(names) == num_classes else None


def read_npz(path: Path | None, root: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read images and labels by split from a MedMNIST file: uint8 (N, H, W[, 3]) and integers (N, 1).

    Raises:
        ConfigError: the file is missing, damaged, or of another kind.
    """
    if path is None or not path.is_file():
        name = path.name if path else "the set's .npz"
        allowed = f"must hold {name}: data.download=true fetches it, or take it from https://zenodo.org/records/10519652"
        raise ConfigError("root", root, allowed)
    try:
        with np.load(path) as file:
            found = {split: (file[f"{split}_images"], file[f"{split}_labels"]) for split in SPLITS}
    except KeyError as error:
        raise ConfigError("root", str(path), f"must hold {{train,val,test}}_{{images,labels}}: {error.args[0]}") from error
    except UNREADABLE as error:
        raise ConfigError("root", str(path), f"must be a .npz file, cannot be read: {error}") from error
    for images, labels in found.values():
        if labels.ndim == 2 and labels.shape[1] > 1:
            allowed = f"has {labels.shape[1]} labels an image, which is not supported; take a set of one, e.g. pathmnist"
            raise ConfigError("root", str(path), allowed)
        if images.ndim == 5 or (images.ndim == 4 and images.shape[3] > 4):
            raise ConfigError("root", str(path), f"holds volumes of {images.shape[1:4]}, which are not supported")
    return found
