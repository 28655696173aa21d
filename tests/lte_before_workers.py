"""What the ranks of test_lte_before do: small fits of a toy model under a method file, merging from the first step."""

import lightning.pytorch as pl

from lowrank_pretrain.run import method
from tests import lte_galore_workers, lte_workers
from tests.lte_galore_workers import Configured, config, outcome


class Seen(pl.Callback):
    """After every batch: the phase, and all parameters that are not heads."""

    def __init__(self):
        self.W, self.phases = [], []

    def on_train_batch_end(self, trainer, module, *_):
        hidden = trainer.strategy.local.hidden(module)
        self.W.append({n: p.detach().clone() for n, p in module.named_parameters() if n not in hidden})
        self.phases.append(next(c.phase for c in trainer.callbacks if hasattr(c, "plan")))


def cell(world, name, change=None, steps=18, trainer=None, module=None, net=None, **fit):
    """A fit under a method file. Two windows of 3 steps, one joint: switch at 6, freeze at 9."""
    change = {"before": "merge", "sync_rest": "merge", "latest": 2, **(change or {})}
    built, seen = method.build(config(name, **change)), Seen()
    trainer = {**(trainer or {}), "callbacks": [*built.callbacks, *(trainer or {}).get("callbacks", []), seen]}
    module, run, strategy = lte_workers.fit(
        world, steps=steps, exact=True, strategy=built.strategy, trainer=trainer,
        module=module or Configured(built, **(net or {})), **fit,
    )  # fmt: skip
    (callback,) = (c for c in built.callbacks if hasattr(c, "plan"))
    return {**outcome(module, run, strategy), "phases": [callback.phase], "at": (callback.switch_step, callback.freeze_step),
            "plan": dict(callback.plan or {}), "history": [(w.loss, w.norms) for w in callback.history], "W": seen.W,
            "seen": seen.phases, "sent": strategy.sent.mebibytes(), "metrics": strategy.metrics()}  # fmt: skip
