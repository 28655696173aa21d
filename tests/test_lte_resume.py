"""LTE's checkpoints: bit-exact resume at and between merges, on other numbers of workers, and without LTE."""

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from lowrank_pretrain import ConfigError, PreLoRA
from lowrank_pretrain.lte import LTEStrategy
from tests import lte_workers as workers
from tests.lte_workers import Net, Samples, saved

SAVE = [3, 4, 6, 8, 9]  # T = 4; eight batches make an epoch


def identical(whole, again, since):
    for key in ("weights", "heads"):
        assert all(torch.equal(whole[key][name], again[key][name]) for name in whole[key]), key
    assert whole["losses"][since:] == again["losses"] and whole["clock"] == again["clock"]
    assert all(torch.equal(a, b) for a, b in zip(whole["moments"], again["moments"], strict=True))


HOW = [
    {}, {"reset": True}, {"mode": "sequential"}, {"mode": "sequential", "reset": True}, {"mode": "joint"}, {"overlap": 2},
    {"net": {"dropout": 0.2}}, {"net": {"dtype": torch.bfloat16}}, {"net": {"optimizer": "sgd"}},
    {"net": {"optimizer": "numbers"}},
    {"reset": True, "prune": 0.9, "net": {"dtype": torch.float32}}, {"trainer": {"accumulate_grad_batches": 2}},
    {"trainer": {"precision": "bf16-mixed", "gradient_clip_val": 0.1}, "net": {"dtype": torch.float32}},
]  # fmt: skip


@pytest.mark.parametrize("how", HOW, ids=str)
def test_resume_is_exact_on_one_device(tmp_path, how):
    whole = saved(1, tmp_path, SAVE, steps=14, **how)
    micro = how.get("trainer", {}).get("accumulate_grad_batches", 1)
    for step in SAVE:
        again = saved(1, tmp_path / "again", [], steps=14, ckpt=str(tmp_path / f"step={step}.ckpt"), **how)
        identical(whole, again, step * micro)


@pytest.mark.parametrize(
    "how",
    [
        {}, {"sync_rest": "merge"}, {"reset": True, "sync_rest": "merge"}, {"overlap": 2, "net": {"dropout": 0.2}},
        {"route": "dense", "heads": 1}, {"mode": "sequential"}, {"net": {"optimizer": "numbers"}},
    ],
    ids=str,
)  # fmt: skip
def test_resume_is_exact_on_two_workers(ranks, tmp_path, how):
    whole = ranks(2, saved, 2, tmp_path, SAVE, steps=14, **how)
    for step in SAVE:
        again = ranks(2, saved, 2, tmp_path / "again", [], steps=14, ckpt=str(tmp_path / f"step={step}.ckpt"), **how)
        for a, b in zip(whole, again, strict=True):
            identical(a, b, step)


SMALL = {"bucket_cap_mb": 1e-4, "batch": 12, "steps": 9}  # several buckets; three workers or four
MORE = [
    {"net": {"dtype": torch.float32}},
    {"net": {"dtype": torch.float32}, "sync_rest": "merge"},
    {"net": {"dtype": torch.float32}, "mode": "joint", "static_graph": True},
    {"crossed": False, "gradient_as_bucket_view": True, "overlap": 1},
    {"crossed": True, "find_unused_parameters": True},
]


@pytest.mark.parametrize("how", MORE, ids=lambda how: "-".join(how))
@pytest.mark.parametrize("world", [3, 4])
def test_resume_is_exact_on_more_than_two_workers(ranks, tmp_path, world, how):
    """A sum of three numbers depends on who adds first: a wrapper's first step must add as all later ones do."""
    for unlike in ranks(world, workers.resumed, world, tmp_path, [3, 4, 6], **SMALL, **how):
        assert unlike == {3: [], 4: [], 6: []}


def merged_loss(path):
    """What the file's model scores, loaded without LTE."""
    plain, data = Net(), Samples(16)
    plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        return F.cross_entropy(plain.out(plain.net(data.x)), data.y).item()


ELASTIC = [
    {}, {"reset": True}, {"sync_rest": "merge"}, {"mode": "sequential"}, {"overlap": 1},
    {"sync_rest": "merge", "net": {"optimizer": "numbers"}},
]  # fmt: skip


@pytest.mark.parametrize("how", ELASTIC, ids=str)
@pytest.mark.parametrize("at", [4, 6])  # at a merge, and between two
def test_two_to_three_to_one_worker(ranks, tmp_path, how, at):
    """Every change of workers keeps the function; between merges it merges first and says so."""
    heads = {"heads": 1, "batch": 12, "data": None, **how}
    start = str(tmp_path / f"step={at}.ckpt")
    ranks(2, saved, 2, tmp_path, [at], steps=at, **heads)
    now = ranks(3, saved, 3, tmp_path / "three", [at, at + 3], steps=at + 3, ckpt=start, **heads)
    assert all(torch.equal(now[0]["weights"][k], r["weights"][k]) for r in now for k in r["weights"])
    assert now[0]["clock"][0] == at + 3
    # resumed without a step the model is what it was
    same = ranks(3, saved, 3, tmp_path / "same", [at], steps=at, ckpt=start, **heads)
    before = torch.load(start, weights_only=True)["state_dict"]
    for name in before:
        torch.testing.assert_close(same[0]["weights"][name], before[name], rtol=0, atol=1e-12)
    last = saved(1, tmp_path / "one", [], steps=at + 6, ckpt=str(tmp_path / "three" / f"step={at + 3}.ckpt"), **heads)
    assert last["clock"][0] == at + 6 and all(torch.isfinite(w).all() for w in last["weights"].values())


def test_fewer_heads_go_on_from_what_all_had_merged(ranks, tmp_path):
    """2 × 1 -> 1 × 2 is the same run; the heads are the same ones."""
    whole = ranks(2, saved, 2, tmp_path, [8], steps=14, heads=1)
    one = saved(1, tmp_path / "one", [], steps=14, heads=2, ckpt=str(tmp_path / "step=8.ckpt"))
    assert one["clock"] == whole[0]["clock"]
    order = {name: w for name, w in one["weights"].items()}
    assert order.keys() == whole[0]["weights"].keys()
    for name, p in one["heads"].items():
        assert p.shape[0] == 2 and whole[0]["heads"][name].shape[0] == 1


def test_a_file_of_lte_loads_without_lte(tmp_path):
    whole = saved(1, tmp_path, [6], steps=6)
    file = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert file["state_dict"].keys() == Net().state_dict().keys()
    assert all(torch.equal(file["state_dict"][k], v) for k, v in whole["weights"].items())
    bare = torch.optim.AdamW(Net().parameters())
    bare.load_state_dict(file["optimizer_states"][0])
    names = [name for name, _ in Net().named_parameters()]
    held = {names[i] for i in file["optimizer_states"][0]["state"]}
    assert held == set(names) - {"net.0.weight", "net.4.weight"}
    module = Net()
    run = pl.Trainer(max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False, max_epochs=-1)  # fmt: skip
    run.fit(module, workers.loader(Samples(), 8), ckpt_path=tmp_path / "step=6.ckpt")
    assert run.global_step == 10 and (module.net[0].weight - whole["weights"]["net.0.weight"]).abs().max() > 0


def test_a_file_without_lte_goes_on_under_lte(tmp_path):
    run = pl.Trainer(max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False)  # fmt: skip
    module = Net()
    run.fit(module, torch.utils.data.DataLoader(Samples(), batch_size=8))
    run.save_checkpoint(tmp_path / "plain.ckpt")
    again, went, strategy = workers.fit(steps=10, ckpt=str(tmp_path / "plain.ckpt"))
    assert went.global_step == 10 and strategy.local.clock == 4


def test_saved_after_the_fit_it_goes_on(tmp_path):
    """The heads are kept aside when the module is given back merged."""
    whole = saved(1, tmp_path, [], steps=14, merge_every=3)
    module, run, _ = workers.fit(steps=8, exact=True, merge_every=3)  # after a fit Lightning knows no place within an epoch
    run.save_checkpoint(tmp_path / "after.ckpt")
    assert type(module.net[0]) is torch.nn.Linear and module.net[0].weight.requires_grad
    again = saved(1, tmp_path / "again", [], steps=14, merge_every=3, ckpt=str(tmp_path / "after.ckpt"))
    identical(whole, again, 8)


def test_a_tied_head_as_target_resumes(tmp_path):
    from lowrank_pretrain.models.language import CausalLM
    from tests.toy import trainer

    tokens = torch.randint(31, (24, 8), generator=torch.Generator().manual_seed(0))

    class Text:
        def __len__(self):
            return 24

        def fetch(self, epoch, indices):
            return workers.Fetched({"input_ids": tokens[indices]}, [])

    def go(folder, **how):
        torch.manual_seed(0)
        no_dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        module = CausalLM("gpt2", 31, 8, {"n_layer": 1, "n_head": 2, "n_embd": 16, **no_dropout})
        data = workers.EpochLoader(Text(), workers.EpochBatches(24, 4, shuffle=True, seed=0))
        strategy = LTEStrategy(rank=2, heads=2, targets=["all", "head"], merge_every=4)
        run = trainer(folder, strategy=strategy, max_epochs=2, every=6)
        run.fit(module, data, **how)
        return {name: w.clone() for name, w in module.state_dict().items()}

    whole = go(tmp_path)
    again = go(tmp_path / "again", ckpt_path=tmp_path / "step=6.ckpt")  # within a window, between epochs
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    assert not torch.equal(whole["model.lm_head.weight"], whole["model.transformer.wte.weight"])


@pytest.mark.parametrize("reset", [False, True])
def test_prelora_hands_over_to_lte_and_resumes(tmp_path, reset):
    """Train plainly while full and joint; at the freeze every head starts from the joint adapter."""

    def go(folder, ckpt=None, at=()):
        callback = PreLoRA(
            ranks=(2, 4), windows=2, window=3, window_unit="step", latest=1, warmup=1, loss_tol=0.5, weight_tol=0.5
        )
        strategy = LTEStrategy(heads=2, merge_every=3, reset=reset)
        module, _, _ = workers.fit(
            steps=16, folder=folder, save_at=at, ckpt=ckpt, exact=True, strategy=strategy, trainer={"callbacks": [callback]}
        )
        assert callback.phase == "lowrank" and strategy.local.begun
        return {"weights": workers.weights(module), "losses": module.losses}

    whole = go(tmp_path, at=[2, 5, 8, 11, 13])
    for step in (2, 5, 8, 11, 13):
        again = go(tmp_path / "again", ckpt=str(tmp_path / f"step={step}.ckpt"))
        assert whole["losses"][step:] == again["losses"], step
        assert all(torch.equal(whole["weights"][k], again["weights"][k]) for k in whole["weights"]), step


OTHER = [
    ({"rank": 3}, "rank"), ({"targets": ["net.0"]}, "targets"), ({"reset": True}, "reset"), ({"alpha": 3.0}, "alpha"),
    ({"mode": "sequential"}, "mode"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "key"), OTHER, ids=str)
def test_a_checkpoint_of_other_heads_is_refused(tmp_path, how, key):
    saved(1, tmp_path, [3], steps=3)
    with pytest.raises(ConfigError) as error:
        saved(1, tmp_path, [], steps=6, ckpt=str(tmp_path / "step=3.ckpt"), **how)
    assert error.value.key == key


def test_averaging_callbacks_are_refused():
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    with pytest.raises(ConfigError, match="pairs weights by position"):
        workers.fit(trainer={"callbacks": [StochasticWeightAveraging(1e-2)]})
