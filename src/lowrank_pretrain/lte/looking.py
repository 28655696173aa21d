"""Show the merged model wherever Lightning looks at the model, from the first hook to the last.

Lightning calls callbacks before the strategy, at the start of an evaluation as at its end. A callback that saves weights at
the start, puts others (an average's) in their place and puts the saved ones back at the end would save what trains, and put
it back into the merged model: two different W. So the merged model is swapped in before any callback's start hook, and out
after all end hooks. A pair of hooks then sees the same W, and what it puts back is no write.
"""

from typing import cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.lte.conversion import ConvertedModule


class SwapIn(Callback):
    """Swap the merged model in before any other callback's start hook; the first of the trainer's callbacks during a fit."""

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the merged model in."""
        cast(ShowsMerged, trainer.strategy).converted.swap_in()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the merged model in."""
        cast(ShowsMerged, trainer.strategy).converted.swap_in()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap the merged model in."""
        cast(ShowsMerged, trainer.strategy).converted.swap_in()


class ShowsMerged(DDPStrategy):
    """Hold a converted module that evaluation sees merged: the part of ``LTEStrategy`` that answers evaluation's hooks.

    Attributes:
        converted: the module's parts.
    """

    converted: ConvertedModule

    def _swap_in_first(self, trainer: pl.Trainer) -> None:
        """Swap in before all callbacks, until ``_swap_in_no_more``."""
        callbacks_of(trainer).insert(0, SwapIn())

    def _swap_in_no_more(self, trainer: pl.Trainer) -> None:
        callbacks = callbacks_of(trainer)
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, SwapIn)]

    def on_validation_start(self) -> None:
        """Swap the merged model in, if no callback has (``lr_find`` replaces the trainer's)."""
        self.converted.swap_in()

    def on_validation_end(self) -> None:
        """Swap the heads' state back in."""
        self.converted.swap_out_keeping_writes()

    def on_test_start(self) -> None:
        """Swap the merged model in, if no callback has."""
        self.converted.swap_in()

    def on_test_end(self) -> None:
        """Swap the heads' state back in."""
        self.converted.swap_out_keeping_writes()

    def on_predict_start(self) -> None:
        """Swap the merged model in, if no callback has."""
        self.converted.swap_in()

    def on_predict_end(self) -> None:
        """Swap the heads' state back in."""
        self.converted.swap_out_keeping_writes()
