"""A schedule of one's own: train in full until a step, then at low rank. python examples/fixed_step_schedule.py"""

import lightning.pytorch as pl

from lowrank_pretrain import PhaseCallback, Plan
from lowrank_pretrain.core.targets import find_targets


class SwitchAt(PhaseCallback):
    """Switches after `step` optimizer steps and freezes `joint` steps later; every target gets the same rank."""

    def __init__(self, step: int, joint: int = 0, rank: int = 8, targets: str = "all", **settings) -> None:
        super().__init__(**settings)
        self.step, self.joint, self.rank, self.targets = step, joint, rank, targets

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_) -> None:
        if self.phase == "full" and trainer.global_step >= self.step:
            self.switch(trainer, pl_module, Plan(dict.fromkeys(find_targets(pl_module, self.targets), self.rank)))
        if self.phase == "joint" and trainer.global_step >= self.step + self.joint:
            self.freeze(trainer, pl_module)


if __name__ == "__main__":
    import timm
    import torch

    from lowrank_pretrain.data.images.fashion_mnist import FashionMNIST

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            shape = {"img_size": 28, "in_chans": 1, "patch_size": 7, "embed_dim": 96, "depth": 2, "num_heads": 4}
            self.net = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=2e-3)

    pl.seed_everything(0)
    trainer = pl.Trainer(max_steps=120, callbacks=[SwitchAt(60, joint=20)], accelerator="auto", devices=1)
    trainer.fit(Net(), FashionMNIST("sample", batch_size=64))
