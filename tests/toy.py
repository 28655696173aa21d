"""A LightningModule that the package knows nothing of, its data, and a Trainer that says nothing: shared by the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lowrank_pretrain.data.loaders.batch import Fetched
from lowrank_pretrain.data.loaders.epoch import EpochBatches, EpochLoader


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + torch.softmax(q * k, -1) * v
        return x + self.drop(self.fc2(torch.relu(self.fc1(x))))


class Toy(pl.LightningModule):
    """x (B, 12) -> class of 3. `lr_groups` > 1 gives layer-wise learning rates; `scheduler` names one of torch's."""

    def __init__(self, dim: int = 16, depth: int = 2, lr_groups: int = 1, scheduler: str | None = None, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(12, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 3)
        self.losses: list[float] = []

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        # Lightning saves no random state: seeding by position makes dropout the same in a resumed run
        torch.manual_seed(1000 * self.current_epoch + batch_idx)
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        params = [p for p in self.parameters() if p.requires_grad]
        n, lr = self.hparams.lr_groups, self.hparams.lr
        groups = [{"params": params[i::n], "lr": lr / (i + 1)} for i in range(n)]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        s = torch.optim.lr_scheduler
        schedulers = {
            None: lambda: None,
            "lambda": lambda: s.LambdaLR(optimizer, lambda t: 0.95**t),
            "cosine": lambda: s.CosineAnnealingLR(optimizer, 30),
            "onecycle": lambda: s.OneCycleLR(optimizer, lr, total_steps=60),
            "sequential": lambda: s.SequentialLR(
                optimizer, [s.LinearLR(optimizer, 0.1, total_iters=5), s.CosineAnnealingLR(optimizer, 30)], [5]
            ),
            "step": lambda: s.StepLR(optimizer, 3, 0.7),
        }
        scheduler = schedulers[self.hparams.scheduler]()
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Pairs:
    """x (n, 12) and the class that its first two coordinates decide."""

    def __init__(self, n: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 12, generator=g)
        self.y = (self.x[:, 0] > 0).long() + (self.x[:, 1] > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, epoch: int, indices: list[int]) -> Fetched:
        return Fetched((self.x[indices], self.y[indices]), [])


def loader(n: int = 48, batch_size: int = 8) -> EpochLoader:
    """Resumes in the middle of an epoch, and at its end."""
    data = Pairs(n)
    return EpochLoader(data, EpochBatches(len(data), batch_size, shuffle=True, seed=0))


def trainer(tmp: Path, *callbacks: Any, every: int | None = None, **kwargs: Any) -> pl.Trainer:
    """A quiet CPU trainer; with `every`, a checkpoint file step=N.ckpt every so many steps."""
    callbacks = list(callbacks)
    if every:
        callbacks.append(
            ModelCheckpoint(tmp, filename="{step}", save_top_k=-1, every_n_train_steps=every, save_on_train_epoch_end=False)
        )
    defaults = {"max_epochs": 6, "accelerator": "cpu", "limit_val_batches": 0}
    return pl.Trainer(
        default_root_dir=tmp,
        callbacks=callbacks,
        logger=kwargs.pop("logger", False),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**defaults, **kwargs},
    )


class AtEnd(pl.Callback):
    """Calls a function with trainer and module when training has ended: behind the fit the module is a plain one again."""

    def __init__(self, look: Callable[[pl.Trainer, pl.LightningModule], Any]) -> None:
        self.look = look

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = self.look(trainer, pl_module)


def trained(trainer: pl.Trainer, module: pl.LightningModule) -> set[str]:
    """Names of the parameters that train; for ``AtEnd``."""
    return {name for name, p in module.named_parameters() if p.requires_grad}


def adapted(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that had adapters when the fit ended: their factors are still readable."""
    return [(name, layer) for name, layer in module.named_modules() if "lora_A" in layer.__dict__]


def adapters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Their factors by name."""
    found = {}
    for name, layer in adapted(module):
        found |= {f"{name}.lora_A": layer.lora_A} | {f"{name}.lora_B.{part}": B for part, B in layer.lora_B.items()}
    return found


def toy(**kwargs: Any) -> Toy:
    torch.manual_seed(7)
    return Toy(**kwargs)
