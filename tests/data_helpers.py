"""Toy module and trainer that show which batches a run saw, and small data in the real formats."""

import gzip
import hashlib
import json
import logging
import pickle

import lightning as L
import numpy as np
import torch
from PIL import Image

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fingerprint(batch):
    tensors = batch if isinstance(batch, (tuple, list)) else batch.values()
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tensor.shape).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


class Recorder(L.LightningModule):
    """Trains one number and writes down every training batch.

    Asks for the number of steps in `configure_optimizers` as every schedule does: Lightning then makes the training
    loader before the checkpoint's loops are restored, and forgets the loader's state.
    """

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def _loss(self, batch):
        tensors = batch if isinstance(batch, (tuple, list)) else list(batch.values())
        return (self.weight - tensors[0].float().mean()) ** 2

    def training_step(self, batch, batch_idx):
        self.seen.append(fingerprint(batch))
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._loss(batch))

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    """Saves at one hook and step."""

    def __init__(self, path, hook, step):
        self.path, self.hook, self.step = path, hook, step

    def _maybe(self, trainer, hook):
        if hook == self.hook and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer, *args):
        self._maybe(trainer, "batch")

    def on_validation_end(self, trainer, *args):
        self._maybe(trainer, "validation")

    def on_train_epoch_end(self, trainer, *args):
        self._maybe(trainer, "epoch")


def fit(datamodule, ckpt=None, callbacks=(), seed=7, **kwargs):
    """One run; returns the batches seen and the trained number."""
    L.seed_everything(seed, verbose=False)
    module = Recorder()
    kwargs = {"max_epochs": 3, "num_sanity_val_steps": 0, "devices": 1} | kwargs
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **kwargs,
    )
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module.seen, module.weight.item()


def picture(rng, size=20):
    """Smooth noise, so that JPEG keeps it."""
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size + 3))


def image_folder(root, per_class=12, classes=("cat", "dog")):
    """<root>/{train,val}/<class>/<image>, PNG and JPEG."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                picture(rng).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def cifar10(root, per_batch=8):
    """torchvision's layout of CIFAR-10, with few images."""
    rng = np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        entry = {"data": rng.integers(0, 256, (per_batch, 3072), np.uint8), "labels": [i % 10 for i in range(per_batch)]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return root


def medmnist_npz(path, count=12, size=64):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, size, size, 3), np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 9, (count, 1), np.uint8)
    np.savez_compressed(path, **arrays)


def sentences(count, seed=0):
    """Documents of different lengths, none like another."""
    rng = np.random.default_rng(seed)
    words = "the king of all tribes went up unto that hill and spake words".split()
    return [" ".join(rng.choice(words, rng.integers(5, 60))) + f" {i}." for i in range(count)]


def jsonl_gz(path, documents):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents)
