"""Lay out a convolutional network as NHWC on a GPU, which suits its tensor cores."""

import lightning.pytorch as pl
import torch
from torch import nn
from typing_extensions import override


class ChannelsLast(pl.Callback):
    """Store convolutions' weights in ``torch.channels_last`` on a GPU, where the network has more than one of them.

    Their outputs follow, so images need no change. A lone convolution is the patch embedding of a Transformer or a Mixer, for
    which it costs a copy and brings nothing. Values, names and Parameter objects stay the same.
    """

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change the layout, on the device."""
        if pl_module.device.type == "cuda" and convolutions(pl_module) > 1:
            pl_module.to(memory_format=torch.channels_last)


def convolutions(module: nn.Module) -> int:
    """Return the number of convolutions that look at more than one pixel."""
    return sum(isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1 for part in module.modules())
