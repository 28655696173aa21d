"""Every cell of the composition matrix (docs/concepts.md): resumes to the bit, alone and on two ranks, which end with equal
weights; its checkpoints and its end are a plain model."""

import pytest
import torch

from lowrank_pretrain import GaLoreAdamW, LTEStrategy, Plan, PreLoRA
from lowrank_pretrain.core.errors import ConfigError
from tests import lte_galore_workers as workers
from tests import lte_workers

COMPOSED = ("lte_galore", "prelora_lte", "prelora_galore", "prelora_lte_galore")
CELLS = ("lora", "mhlora", "lte", "prelora", "galore", *COMPOSED)
STEPS = (2, 5, 8, 11, 13)  # full, behind the switch, behind the freeze (window 3, one joint), between merges, …


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", COMPOSED)
def test_resume_is_exact(tmp_path, name):
    whole = workers.cell(1, name, folder=tmp_path, save_at=STEPS, val=1)
    assert whole["phases"] in ([], ["lowrank"])
    for step in STEPS:
        again = workers.cell(1, name, folder=tmp_path / "again", ckpt=str(tmp_path / f"step={step}.ckpt"), val=1)
        assert whole["losses"][step:] == again["losses"], step
        equal(whole["weights"], again["weights"])
        assert all(torch.equal(a, b) for a, b in zip(whole["moments"], again["moments"], strict=True))


TWO = [
    ("lte_galore", {}, ()), ("lte_galore", {"basis": "shared", "sync_rest": "merge"}, (4, 9)),
    ("lte_galore", {"route": "dense", "moments": "grad"}, (4,)), ("lte_galore", {"proj_type": "full"}, (10,)),
    ("prelora_lte", {"sync_rest": "merge"}, (4, 8, 11)), ("prelora_lte", {"adapter_lr": 3.0, "freeze_rest": True}, (8,)),
    ("prelora_galore", {}, (5, 8)), ("prelora_lte_galore", {}, (2, 5, 8, 10)),
    ("prelora_lte_galore", {"basis": "shared", "sync_rest": "merge"}, (4, 11)),
    ("prelora_lte_galore", {"freeze_rest": True}, (8,)), ("mhlora", {}, ()), ("lora", {}, ()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "at"), TWO, ids=str)
def test_two_ranks_end_equal_and_resume(ranks, tmp_path, name, change, at):
    whole = ranks(2, workers.cell, 2, name, folder=str(tmp_path), save_at=at, change=change)
    equal(whole[0]["weights"], whole[1]["weights"])
    assert whole[0]["losses"] != whole[1]["losses"]  # each has its own data
    for step in at:
        path = str(tmp_path / f"step={step}.ckpt")
        again = ranks(2, workers.cell, 2, name, folder=str(tmp_path / "again"), ckpt=path, change=change)
        for before, after in zip(whole, again, strict=True):
            assert before["losses"][step:] == after["losses"], step
            equal(before["weights"], after["weights"])
            assert all(torch.equal(a, b) for a, b in zip(before["moments"], after["moments"], strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_what_comes_out_is_a_plain_model(tmp_path, name):
    done = workers.cell(1, name, folder=tmp_path, save_at=(13,), val=1)
    bare = lte_workers.Net()
    assert done["names"] == list(bare.state_dict()) or name in ("lora", "prelora", "mhlora")  # those keep their adapters
    saved = torch.load(tmp_path / "step=13.ckpt", weights_only=True)
    bare.load_state_dict(saved["state_dict"])  # strict
    assert all(torch.isfinite(value).all() for value in bare.state_dict().values())


def build(name, **change):
    return lambda: workers.cell(1, name, change=change)


def prelora(strategy=None, then="lora", settings=None, groups=None, adapters=None, **fit):
    """A user's own script: PreLoRA beside their GaLoreAdamW."""

    def go():
        callback = PreLoRA(ranks=(2,), window=3, window_unit="step", windows=2, latest=1, warmup=1, then=then, **adapters or {})
        module = workers.GaLoreNet(groups, settings)
        options = {"callbacks": [callback], **fit}
        lte_workers.fit(module=module, strategy=strategy or "auto", trainer=options, steps=8)

    return go


def on_adamw(strategy):
    return lambda: lte_workers.fit(strategy=strategy)


REFUSED = [
    (on_adamw(LTEStrategy(update="galore")), "update", "GaLoreAdamW"),
    (lambda: LTEStrategy(update="galore", rank=8), "rank", "belongs to GaLoreAdamW"),
    (lambda: LTEStrategy(update="galore", heads=2), "heads", "no meaning"),
    (lambda: LTEStrategy(update="galore", overlap=2), "overlap", "no meaning"),
    (lambda: LTEStrategy(update="galore", basis="shared", route="dense"), "route", "D alone"),
    (lambda: LTEStrategy(basis="shared"), "basis", "update=galore"),
    (lambda: LTEStrategy(update="lorra"), "update", "lora, galore"),
    (lambda: workers.fit(settings={"refresh": "track"}), "refresh", "must stay"),
    (lambda: workers.fit(settings={"layerwise": True}), "layerwise", "averaged"),
    (lambda: workers.fit(settings={"residual": "fira"}), "residual", "leaves the subspace"),
    (lambda: workers.fit(settings={"residual": "muon"}), "residual", "leaves the subspace"),
    (lambda: workers.fit(settings={"variant": "apollo"}), "variant", "leaves the subspace"),
    (lambda: lte_workers.fit(module=workers.GaLoreNet(), strategy=LTEStrategy(rank=2)), "update", "projecting optimizer"),
    (build("lte_galore", heads=3), "method.heads", "no key of this method"),
    (build("lte_galore", update="lora"), "method.update", "must be galore"),
    (build("lte_galore", update_proj_gap=7), "method.update_proj_gap", "no key of this method"),
    (build("prelora_lte", rank=4), "method.rank", "no key of this method"),
    (build("prelora_galore", rank=4), "method.rank", "no key of this method"),
    (build("prelora_galore", adapter_lr=3.0), "method.adapter_lr", "own adapters"),
    (build("prelora_lte_galore", alpha=8), "method.alpha", "own adapters"),
    (build("prelora_lte", train_A=False), "method.train_A", "own adapters"),
    (build("prelora_galore", recompute_inputs=True), "method.recompute_inputs", "own adapters"),
    (prelora(then="galore", groups={"targets": ["out"]}, adapters={"recompute_inputs": True}),
     "recompute_inputs", "leave it out"),
    (prelora(LTEStrategy(merge_every=2), groups={"targets": ["out"]}, adapters={"recompute_inputs": True}),
     "recompute_inputs", "LTEStrategy"),
    (lambda: LTEStrategy().adopt(Plan({"net.0": 0}), lte_workers.Net()), "ranks", "nothing to train separately"),
    (prelora(settings={"layerwise": True}, groups={"targets": ["out"]}), "layerwise", "switch"),
    (prelora(then="galore", strategy=LTEStrategy(merge_every=2)), "then", "LTE"),
    (prelora(), "targets", "not projected already"),
    (prelora(groups={"targets": ["out"]}, adapters={"adapter_lr": 2.0}), "adapter_lr", "GaLoreAdamW takes the targets over"),
    (prelora(LTEStrategy(merge_every=2, update="galore"), groups={"targets": ["out"]}, adapters={"adapter_lr": 2.0}),
     "adapter_lr", "LTEStrategy takes the targets over"),
    (prelora(LTEStrategy(merge_every=2), groups={"targets": ["out"]}, adapters={"alpha": 4}), "alpha", "LTEStrategy"),
    (prelora(then="galore", groups={"targets": ["out"]}, adapters={"train_A": False}), "train_A", "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("go", "key", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_combination_that_cannot_work_is_one_line(go, key, words):
    with pytest.raises(ConfigError) as error:
        go()
    assert error.value.key == key and words in str(error.value) and "\n" not in str(error.value)


def test_a_basis_that_would_move_is_refused_before_training():
    class Steps(lte_workers.pl.Callback):
        taken = 0

        def on_train_batch_end(self, *_):
            self.taken += 1

    steps = Steps()
    with pytest.raises(ConfigError, match="must stay"):
        workers.cell(1, "prelora_lte_galore", change={"refresh": "track"}, trainer={"callbacks": [steps]})
    assert steps.taken == 0


def test_moments_are_projected_and_not_thrown_away():
    """PreLoRA -> GaLore: behind the switch the state's step goes on, and m is Pᵀ of what it was."""
    found = {}

    class Look(lte_workers.pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            (optimizer,) = trainer.optimizers
            state = {k: v.clone() for k, v in optimizer.state[module.net[0].weight].items()}
            found[trainer.global_step] = state

    workers.cell(1, "prelora_galore", steps=5, trainer={"callbacks": [Look()]})
    before, after = found[3], found[4]  # the switch comes behind step 3
    assert "proj" not in before and before["exp_avg"].shape == (8, 8)
    assert after["step"] == before["step"] + 1 and after["exp_avg"].shape[0] == after["proj"].shape[1] < 8
    kept = after["proj"].T @ before["exp_avg"].T  # a square matrix counts as tall: projected from the right
    beta1 = GaLoreAdamW([torch.nn.Parameter(torch.zeros(1))]).defaults["betas"][0]
    gradient = (after["exp_avg"] - beta1 * kept) / (1 - beta1)
    assert 0 < gradient.norm() < 10 * before["exp_avg"].norm()
