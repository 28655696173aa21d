"""An `adopt` of one's own: from the switch on only the most active rows of each matrix train. python examples/own_adopt.py"""

import torch

from lowrank_pretrain import Adopter
from lowrank_pretrain.core.targets import all_targets


class RowSparseAdamW(Adopter, torch.optim.AdamW):
    """AdamW; from the switch on a target of rank r trains the r rows whose gradients were largest (by second moment)."""

    def adopt(self, plan, module):
        targets = all_targets(module)
        for name, rank in plan.items():
            target = targets[name]
            weight, rows = target.layer.weight, slice(target.start, target.start + target.rows)
            state = self.state[weight]
            activity = state.get("exp_avg_sq", torch.zeros_like(weight))[rows].sum(1)
            # among the state, so that it is saved and restored with the moments
            mask = state.setdefault("row_mask", torch.ones(len(weight), 1, dtype=weight.dtype, device=weight.device))
            mask[rows] = torch.zeros_like(mask[rows]).index_fill_(0, activity.topk(rank).indices, 1.0)

    @torch.no_grad()
    def step(self, closure=None):
        chosen = [(p, s["row_mask"]) for p, s in self.state.items() if "row_mask" in s]
        before = [p.clone() for p, _ in chosen]
        loss = super().step(closure)
        for (p, mask), old in zip(chosen, before, strict=True):
            p.copy_(torch.where(mask > 0, p, old))
        return loss


if __name__ == "__main__":
    import lightning.pytorch as pl
    import timm

    from lowrank_pretrain import PreLoRA
    from lowrank_pretrain.data.images.fashion_mnist import FashionMNIST

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            shape = {"img_size": 28, "in_chans": 1, "patch_size": 7, "embed_dim": 96, "depth": 2, "num_heads": 4}
            self.net = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return RowSparseAdamW(self.parameters(), lr=2e-3)

    pl.seed_everything(0)
    when = PreLoRA(window=20, window_unit="step", windows=2, latest=3, warmup=1)
    trainer = pl.Trainer(max_steps=120, callbacks=[when], accelerator="auto", devices=1)
    trainer.fit(Net(), FashionMNIST("sample", batch_size=64))
