"""Validation, test, prediction and the end of a fit see the merged model; heads never notice (hooks of the strategy).

Merged weights are put in W's place and taken away again; real merges happen by the clock only.
"""

from contextlib import suppress

from lightning.pytorch.strategies import DDPStrategy

from lowrank_pretrain.checkpoints import random_state
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lte.first_step import FirstStep
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.rest import Rest
from lowrank_pretrain.lte.workers import Workers


class ViewHooks(DDPStrategy):
    """What ``LTEStrategy`` does around everything that only looks."""

    heads: HeadSet | None
    rest: Rest | None
    rehearsal: FirstStep | None
    _ignored: set[str]
    _workers: Workers | None

    def _look(self) -> None:
        if self.heads is not None and self.heads.worn:
            self.rest.look()  # first: the merged weights take rows of the rest along
            self.heads.view.look()

    def _look_away(self) -> None:
        if self.heads is not None and self.heads.worn:
            self.heads.view.look_away()
            self.rest.look_away()

    def _look_to_write(self) -> None:
        """Like ``_look``, on worker 0 alone, which writes; no other holds more than a few matrices' factors meanwhile."""
        writes = self._workers.rank == 0
        self.rest.look_to_write(writes)
        self.heads.view.look(piecemeal=True, writes=writes)

    def _look_away_with_care(self) -> None:
        """Like ``_look_away``; what a callback wrote into the weights that it saw joins those that train."""
        if self.heads is not None and self.heads.worn:
            self.heads.view.look_away_with_care()
            self.rest.look_away_with_care()

    def on_train_start(self) -> None:
        """Random states of a resumed run, behind everything that draws; and the view off (``lr_find`` leaves it on)."""
        self._look_away()
        states, self._random = getattr(self, "_random", None), None
        if states is not None and self._workers is not None and len(states) == self._workers.size:
            random_state.restore(states[self._workers.rank])

    def on_validation_start(self) -> None:
        """Score the merged model."""
        self._look()

    def on_validation_end(self) -> None:
        """Go on with the heads as they were."""
        self._look_away_with_care()

    def on_test_start(self) -> None:
        """Score the merged model."""
        self._look()

    def on_test_end(self) -> None:
        """Go on with the heads as they were."""
        self._look_away_with_care()

    def on_predict_start(self) -> None:
        """Score the merged model."""
        self._look()

    def on_predict_end(self) -> None:
        """Go on with the heads as they were."""
        self._look_away_with_care()

    def on_train_end(self) -> None:
        """From here on the module is the merged model."""
        self._look()

    def teardown(self) -> None:
        """Take the heads off; after an exception W stays that of the last merge (the others may be gone).

        A fit that resumes a finished run takes no step, and ``on_train_end`` does not come.
        """
        with suppress(AttributeError):
            del self.precision_plugin.clip_grad_by_norm
        if self.rehearsal is not None:
            self.rehearsal.stop()
        if self.heads is not None and self.heads.worn:
            together = self.heads.workers.size == 1 or not self.lightning_module.trainer.interrupted
            if self.rest is not None and not self.heads.shared.viewing and together:
                self._look()
            self.heads.take_off()
            if self.rest is not None:
                self.rest.settle()
            lora.switch_fast_path(self.lightning_module, off=False)
            self.lightning_module._ddp_params_and_buffers_to_ignore = sorted(self._ignored)
        super().teardown()
