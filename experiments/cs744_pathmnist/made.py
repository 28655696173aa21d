"""Made images in PathMNIST's exact format, for where the real file cannot be had: they show that code runs, not medicine.

The real ``pathmnist.npz``: ``{train,val,test}_images`` uint8 (N, 28, 28, 3) and ``…_labels`` uint8 (N, 1), 9 classes, 89,996,
10,004 and 7,180 images. Made: the same keys, types and shapes, fewer images. A class is a kind of texture (how coarse, in
which direction, in which stain); position, contrast, brightness, noise and a second texture beside it vary from image to image.
"""

from pathlib import Path
from typing import Any

import numpy as np

CLASSES, SIDE = 9, 28
COUNTS = {"train": 3000, "val": 1000, "test": 1000}
STAINS = np.array([[0.75, 0.45, 0.70], [0.85, 0.60, 0.75], [0.60, 0.40, 0.65]])  # pinks and purples


def texture(draws: np.random.Generator, label: int, scale: float) -> np.ndarray:
    """(28, 28) waves of the class's coarseness and direction, in [-1, 1]."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    turn = np.pi * (label % 3) / 3 + draws.normal(0, 0.15)
    waves = (3 + 2.5 * (label // 3)) * (1 + draws.normal(0, 0.06))
    phase = draws.uniform(0, 2 * np.pi)
    bend = scale * np.sin(2 * np.pi * (x * draws.uniform(-1, 1) + y * draws.uniform(-1, 1)))
    return np.sin(2 * np.pi * waves * (x * np.cos(turn) + y * np.sin(turn)) + phase + bend)


def image(draws: np.random.Generator, label: int) -> np.ndarray:
    """One (28, 28, 3) uint8 image."""
    other = int(draws.integers(CLASSES))
    mixed = texture(draws, label, 1.0) + draws.uniform(0, 0.8) * texture(draws, other, 1.0)
    stain = STAINS[draws.integers(len(STAINS))] + draws.normal(0, 0.05, 3)
    pixels = stain + draws.uniform(0.08, 0.2) * mixed[..., None] * np.array([0.6, 1.0, 0.5])
    pixels += draws.normal(0, 0.10, pixels.shape)
    return (255 * pixels.clip(0, 1)).astype(np.uint8)


def write(facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write ``pathmnist.npz`` into `folder`; the same for the same ``facts["seed"]``."""
    draws = np.random.default_rng(facts["seed"])
    arrays = {}
    for split, count in COUNTS.items():
        labels = draws.integers(CLASSES, size=count)
        arrays[f"{split}_images"] = np.stack([image(draws, int(label)) for label in labels])
        arrays[f"{split}_labels"] = labels.astype(np.uint8)[:, None]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "pathmnist.npz", **arrays)
    return {name: [str(array.dtype), *array.shape] for name, array in arrays.items()}
