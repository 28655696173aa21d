"""What the ranks of test_lte_galore do: small fits of a toy model by GaLoreAdamW under LTE, by real Trainers."""

from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups
from lowrank_pretrain.lte import LTEStrategy
from tests import lte_workers
from tests.lte_workers import Net, weights

RANK, SETTINGS = 3, {"lr": 1e-2, "scale": 0.5, "weight_decay": 0.3, "seed": 0}


class GaLoreNet(Net):
    """The toy; its two wide matrices are projected."""

    def __init__(self, groups=None, settings=None, **net):
        super().__init__(**net)
        self.groups, self.settings = groups or {}, {**SETTINGS, **(settings or {})}

    def configure_optimizers(self):
        groups = galore_param_groups(self, **{"rank": RANK, **self.groups})
        return GaLoreAdamW(groups, **self.settings)


def fit(world=1, update=None, net=None, groups=None, settings=None, module=None, **kwargs):
    module = module or GaLoreNet(groups, settings, **(net or {}))
    lte = {k: kwargs.pop(k) for k in ("basis", "sync_rest", "route", "merge_every") if k in kwargs}
    strategy = LTEStrategy(**{"update": "galore", "merge_every": 4, **lte})
    return lte_workers.fit(world, module=module, strategy=strategy, **kwargs)


def run(world, **kwargs):
    module, trainer, strategy = fit(world, **kwargs)
    return {"weights": weights(module), "losses": module.losses, "scores": module.scores, "metrics": strategy.metrics(),
            "sent": strategy.heads.workers.sent, "merges": strategy.heads.merges, "step": trainer.global_step}  # fmt: skip
