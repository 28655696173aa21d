"""A callback that draws from every global generator and logs what it drew: a resumed run must draw the same."""

import random

import numpy as np
import torch
from lightning.pytorch import Callback


class Draws(Callback):
    """Logs ``draws/python``, ``draws/numpy`` and ``draws/torch`` at every batch."""

    def on_train_batch_end(self, *args: object) -> None:
        drawn = {"python": random.gauss(0, 1), "numpy": np.random.randn(), "torch": torch.randn(()).item()}
        self.log_dict({f"draws/{name}": value for name, value in drawn.items()}, on_step=True, on_epoch=False)
