"""What Lightning's resume leaves out: schedulers that go by a metric."""

import pytest
import torch

from lowrank_pretrain.checkpoints.loop_state import LoopState
from tests.data_helpers import SaveAt
from tests.test_resume import assert_equal
from tests.toy import Toy, loader, trainer


class Falling(Toy):
    """The learning rate halves whenever ``val/loss`` is not a tenth of its best so far: always."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss", "frequency": self.every}}

    every = 1


def run(path, *callbacks, every=1, ckpt=None, **kwargs):
    torch.manual_seed(0)
    module = Falling()
    module.every = every
    rates = []

    class Rate(LoopState):
        def on_train_batch_start(self, trainer, pl_module, *args):
            super().on_train_batch_start(trainer, pl_module, *args)
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit = trainer(path, Rate(), *callbacks, max_epochs=6, limit_val_batches=2, **kwargs)
    fit.fit(module, loader(), loader(), ckpt_path=ckpt)
    return {
        "model": dict(module.state_dict()),
        "optimizer": fit.optimizers[0].state_dict(),
        "scheduler": fit.lr_scheduler_configs[0].scheduler.state_dict(),
    }, rates


WHEN = [("batch", 2), ("batch", 11), ("validation", 6), ("epoch", 6)]


@pytest.mark.parametrize(
    ("hook", "step", "every", "limits"),
    [(*at, 1, {}) for at in WHEN] + [(*at, 1, {"max_steps": 33}) for at in WHEN] + [("epoch", 6, 2, {}), ("epoch", 12, 2, {})],
)
def test_a_scheduler_by_metric_resumes(tmp_path, hook, step, limits, every):
    file = tmp_path / "x.ckpt"
    whole, rates = run(tmp_path, SaveAt(file, hook, step), every=every, **limits)
    assert len(set(rates)) == (5 if every == 1 else 2), "else nothing was shown"
    again, rest = run(tmp_path, every=every, ckpt=file, **limits)
    assert rest == rates[step:]
    assert_equal(again, whole)
    # and once more, from a file that the resumed run wrote in the epoch in which it was resumed
    run(tmp_path, SaveAt(tmp_path / "y.ckpt", "epoch", 12 if step <= 12 else 24), every=every, ckpt=file, **limits)
    if (tmp_path / "y.ckpt").exists():
        assert_equal(run(tmp_path, every=every, ckpt=tmp_path / "y.ckpt", **limits)[0], whole)
