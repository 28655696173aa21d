"""Heads, merges and LTE on one device: against the twin, and what must stay true of the maths."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_pretrain import ConfigError, PreLoRA
from lowrank_pretrain.core.targets import all_targets
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.heads.layer import draw_A
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.workers import Workers
from tests.lte_workers import WIDTH, Net, Samples, fit, layout, weights
from tests.reference import lte as reference

TARGETS = {"net.0.weight": "net.0", "net.4.weight": "net.4"}


def twin(steps=12, heads=2, rank=2, every=4, alpha=None, optimizer="adamw", **how):
    """The reference's final weights for the run that ``layout(1, …)`` makes."""
    module, data = Net(optimizer), Samples()
    scale = 1.0 if alpha is None else alpha / rank
    plain = {name: target for name, target in all_targets(module).items()}

    def draw(weight, head, redraw):
        return draw_A(TARGETS[weight], head, redraw, rank, plain[TARGETS[weight]].cols).double()

    factors = {
        w: (torch.stack([draw(w, n, 0) for n in range(heads)]), torch.zeros(heads, plain[t].rows, rank, dtype=torch.float64))
        for w, t in TARGETS.items()
    }
    share = 8 // heads
    batches = [[range(8 * (s % 8) + n * share, 8 * (s % 8) + (n + 1) * share) for n in range(heads)] for s in range(steps)]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.out = module.net, module.out

        def forward(self, x):
            return self.out(self.net(x))

    def loss_of(f, rows):
        return F.cross_entropy(f(data.x[list(rows)]), data.y[list(rows)])

    def optimizer_of(params):
        if optimizer == "sgd":
            return torch.optim.SGD(params, lr=1e-2, momentum=0.9)
        return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)

    return reference.lte(Whole(), list(TARGETS), batches, loss_of, optimizer_of, factors, every, scale, redraw=draw, **how)


def assert_close(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "how", [{}, {"reset": True}, {"overlap": 2}, {"alpha": 5.0}, {"heads": 4}, {"every": 1}, {"optimizer": "sgd"}], ids=str
)
def test_equals_the_papers_algorithm(how):
    ours = dict(how)
    net = {"optimizer": ours.pop("optimizer", "adamw")}
    ours["merge_every"] = ours.pop("every", 4)
    assert_close(layout(1, steps=14, net=net, **ours)["weights"], twin(steps=14, **how))


def test_the_twin_would_notice_double_counting(monkeypatch):
    """A head that forgets what W holds of it counts its update twice: visibly another run."""
    monkeypatch.setattr("lowrank_pretrain.lte.heads.layer.MultiheadLoRALinear.has_prev", False)
    wrong = layout(1, steps=14)["weights"]
    monkeypatch.undo()
    assert (wrong["net.0.weight"] - twin(steps=14)["net.0.weight"]).abs().max() > 1e-4


def head_set(module, rank=2, seed=0, **how):
    settings = Settings(**{"heads": 2, "merge_every": 1, "seed": seed, **how})
    heads = HeadSet(settings, Workers())
    targets = all_targets(module)
    heads.convert(targets, dict.fromkeys(targets, rank))
    return heads


def stir(heads, seed=1):
    """As if the heads had trained: factors from a generator."""
    g = torch.Generator().manual_seed(seed)
    for p in heads.parameters().values():
        p.data.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.1)


def test_conversion_changes_no_output_and_every_head_is_its_own():
    layer = nn.Sequential(nn.Linear(6, 10).double())
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    before = layer(x)
    heads = head_set(layer)
    assert torch.equal(layer(x), before)  # outside a step
    heads.shared.batch = 4
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-15)
    A = layer[0].lora_A
    assert A.shape == (2, 2, 6) and not torch.equal(A[0], A[1])
    # semi-orthogonal with every singular value √(D/R), as the authors draw it
    torch.testing.assert_close(A[0] @ A[0].T, torch.eye(2, dtype=torch.float64) * 3, atol=1e-5, rtol=0)
    assert not layer[0].weight.requires_grad and layer[0].bias.requires_grad


@pytest.mark.parametrize("rows", [7, 64])  # two thin products each, or one merged weight per head
@pytest.mark.parametrize("merged_before", [False, True])
def test_gradients_are_autograds(rows, merged_before):
    torch.manual_seed(0)
    plain = nn.Linear(6, 10).double()
    layer = nn.Sequential(copy.deepcopy(plain))
    heads = head_set(layer)
    stir(heads)
    if merged_before:
        heads.after_step()
        stir(heads, 2)
    module = layer[0]
    heads.shared.batch = rows
    x = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randn(rows, 10, dtype=torch.float64)
    (layer(x) - target).square().mean().backward()
    ours = [x.grad.clone(), module.lora_A.grad.clone(), module.lora_B["W"].grad.clone(), module.bias.grad.clone()]
    A, B = (p.detach().clone().requires_grad_() for p in (module.lora_A, module.lora_B["W"]))
    bias, x2 = module.bias.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    cut = [(0, rows - rows // 2), (rows - rows // 2, rows)]
    y = []
    for k, (i, j) in enumerate(cut):
        W = module.weight + B[k] @ A[k] - (module.prev_B[0][k] @ module.prev_A[k] if merged_before else 0)
        y.append(F.linear(x2[i:j], W, bias))
    (torch.cat(y) - target).square().mean().backward()
    share = torch.tensor([rows / (j - i) for i, j in cut], dtype=torch.float64).view(2, 1, 1)  # its own chunk's mean
    for mine, theirs in zip(ours, [x2.grad, A.grad * share, B.grad * share, bias.grad], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_forward_goes_on_at_a_merge_and_merging_again_changes_nothing():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 10).double())
    heads = head_set(layer)
    stir(heads)
    view = heads.view.merged_weights()["0"]
    heads.after_step()
    assert torch.equal(view, layer[0].weight)  # what was looked at is what the merge makes
    x = torch.randn(4, 6, dtype=torch.float64)
    heads.shared.batch = None
    evaluated = layer(x)
    heads.shared.batch = 4
    torch.testing.assert_close(layer(x), evaluated, rtol=0, atol=1e-14)
    before = layer[0].weight.clone()
    heads.after_step()
    assert torch.equal(before, layer[0].weight)


@pytest.mark.parametrize(("reset", "expected"), [(False, 4), (True, 12)])
def test_rank_of_the_update(reset, expected):
    """Without reset updates telescope: rank(W − W₀) ≤ N·R for ever; with it every merge adds N·R."""
    layer = nn.Sequential(nn.Linear(16, 20).double())
    start = layer[0].weight.detach().clone()
    heads = head_set(layer, reset=reset)
    for merge in range(3):
        stir(heads, merge)
        heads.after_step()
    assert torch.linalg.matrix_rank(layer[0].weight.detach() - start) == expected


def test_bfloat16_weights_are_formed_from_float32(tmp_path):
    """300 merges round W once each, not on top of one another."""
    torch.manual_seed(0)
    exact, half = (nn.Sequential(nn.Linear(32, 32).to(d)) for d in (torch.float64, torch.bfloat16))
    half[0].weight.data.copy_(exact[0].weight.data)
    exact[0].weight.data.copy_(half[0].weight.data)
    sets = [head_set(exact), head_set(half)]
    for step in range(300):
        for heads in sets:
            g = torch.Generator().manual_seed(step)
            for p in heads.parameters().values():
                p.data += (torch.randn(p.shape, generator=g, dtype=torch.float64) * 1e-3).to(p.dtype)
        for p, q in zip(sets[0].parameters().values(), sets[1].parameters().values(), strict=True):
            p.data.copy_(q.data)  # the factors are the same numbers
        for heads in sets:
            heads.after_step()
    error = (half[0].weight.double() - exact[0].weight).abs().max()
    assert error <= exact[0].weight.abs().max() * 2**-8  # one rounding


def test_looking_under_inference_mode_leaves_training_possible():
    """Lightning validates so on NCCL (and not on gloo): no tensor of it may reach training."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, 10).double())
    heads = head_set(layer)
    stir(heads)
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.inference_mode():
        heads.view.swap_in()
        looked = layer(x).clone()
        heads.view.swap_out()
    heads.after_step()
    heads.shared.batch = 4
    y = layer(x)
    torch.testing.assert_close(y.detach(), torch.Tensor(looked.tolist()).double(), rtol=0, atol=1e-6)
    y.sum().backward()
    assert layer[0].lora_B["W"].grad is not None


def test_batch_that_does_not_divide_is_spread_exactly():
    layer = nn.Sequential(nn.Linear(6, 10).double())
    heads = head_set(layer, heads=3)
    heads.shared.batch = 5
    assert layer[0]._spans(torch.zeros(5, 6)) == ((0, 2), (2, 4), (4, 5))
    assert layer[0]._spans(torch.zeros(10, 7, 6)) == ((0, 28), (28, 56), (56, 70))  # two windows per sample, 7 tokens each
    with pytest.raises(ConfigError, match="does not have the batch of 5 first"):
        layer[0]._spans(torch.zeros(7, 5, 6))


def test_module_copies_pickles_and_prints():
    layer = nn.Sequential(nn.Linear(6, 10))
    heads = head_set(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other[0].lora_A, layer[0].lora_A) and type(other[0]) is type(layer[0])
    assert "heads=2" in repr(layer)
    assert heads.total == 2


def test_joint_is_one_adapter_of_all_heads():
    """MHLoRA: y = Wx + (s/N) Σ BₙAₙ x on the same x."""
    layer = nn.Sequential(nn.Linear(6, 10).double())
    heads = head_set(layer, mode="joint", alpha=6.0)
    stir(heads)
    heads.shared.batch = 4
    x = torch.randn(4, 6, dtype=torch.float64)
    m = layer[0]
    W = m.weight + 3.0 / 2 * sum(m.lora_B["W"][k] @ m.lora_A[k] for k in range(2))
    torch.testing.assert_close(layer(x), F.linear(x, W, m.bias), rtol=1e-12, atol=1e-12)


def test_sequential_trains_one_head_at_a_time():
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append((trainer.strategy.local.turn, trainer.strategy.local.parameters()["net.0.lora_A"].shape[0]))

    fit(steps=9, mode="sequential", heads=3, merge_every=2, trainer={"callbacks": [Look()]})
    assert seen == [(0, 1), (1, 1), (1, 1), (2, 1), (2, 1), (0, 1), (0, 1), (1, 1), (1, 1)]


def test_fused_layers_have_heads_per_part_and_train_the_rest(tmp_path):
    from tests.toy import loader, toy, trainer

    module = toy()
    start = weights(module)
    run = trainer(tmp_path, strategy=LTEStrategy(rank=2, heads=2, targets=["*.q", "*.v"], merge_every=2), max_epochs=1)
    run.fit(module, loader())
    assert set(run.strategy.local.parameters()) >= {"blocks.0.qkv.lora_A", "blocks.0.qkv.lora_B.q", "blocks.0.qkv.lora_B.v"}
    change = (module.blocks[0].qkv.weight - start["blocks.0.qkv.weight"]).detach()
    ranks = [int(torch.linalg.matrix_rank(block)) for block in change.chunk(3)]
    assert ranks[0] <= 4 and ranks[2] <= 4 and ranks[1] > 4  # k trains in full
    assert type(module.blocks[0].qkv) is nn.Linear and module.blocks[0].qkv.weight.requires_grad


def test_conv1d_and_a_tied_head(tmp_path):
    from lowrank_pretrain.models.language import CausalLM
    from tests.toy import trainer

    torch.manual_seed(0)
    module = CausalLM("gpt2", 31, 8, {"n_layer": 1, "n_head": 2, "n_embd": 16})
    data = [{"input_ids": torch.randint(31, (8,))} for _ in range(16)]
    run = trainer(
        tmp_path, strategy=LTEStrategy(rank=2, heads=2, targets=["all", "head"], merge_every=2), max_epochs=1, every=3
    )
    with pytest.warns(UserWarning, match="no longer shares its weight"):
        run.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert not [key for key in saved["state_dict"] if "lora" in key]
    assert saved["lte_state"]["targets"]["model.lm_head"] == 2


def test_looking_never_changes_training():
    often = layout(1, steps=10, net={"dropout": 0.2}, val=2, trainer={"val_check_interval": 1, "check_val_every_n_epoch": None})
    never = layout(1, steps=10, net={"dropout": 0.2})
    assert len(often["scores"]) > 10
    assert all(torch.equal(often["weights"][k], never["weights"][k]) for k in never["weights"])


def test_the_score_is_the_merged_models(tmp_path):
    module, run, _ = fit(
        steps=6, val=2, save_at=[6], folder=tmp_path, trainer={"val_check_interval": 6, "check_val_every_n_epoch": None}
    )
    scored = module.scores[-2:]
    plain = Net()
    plain.load_state_dict(torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"])
    data = Samples(16)
    with torch.no_grad():
        mine = [F.cross_entropy(plain.out(plain.net(data.x[i : i + 8])), data.y[i : i + 8]).item() for i in (0, 8)]
    assert mine == scored
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in module.state_dict().items())  # after fit: merged
    run.test(module, torch.utils.data.DataLoader(data, batch_size=8), verbose=False)
    assert module.scores[-2:] == scored


def test_accumulation_is_one_larger_batch():
    """Four micro-batches give what one batch of the four gives, head for head, if the heads' shares are the same samples."""
    whole = layout(1, steps=6, batch=16, heads=2)
    order = [16 * b + 8 * k + 2 * m + i for b in range(4) for m in range(4) for k in range(2) for i in range(2)]
    micro = layout(1, steps=6, batch=4, heads=2, data=Samples(order=order), trainer={"accumulate_grad_batches": 4})
    assert_close(whole["weights"], micro["weights"])


def test_clipping_by_norm_takes_each_head_by_its_own():
    from lowrank_pretrain.lte.workers import clip_norms

    rest, factor = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 4))
    rest.grad, factor.grad = torch.tensor([3.0, 0.0, 4.0]), torch.tensor([[0.1] * 4, [5.0] * 4])
    clip_norms([rest], [factor], 1.0)
    assert rest.grad.norm() == pytest.approx(1.0, rel=1e-4)
    assert factor.grad[0].tolist() == pytest.approx([0.1] * 4) and factor.grad[1].norm() == pytest.approx(1.0, rel=1e-4)


def test_registered_by_name_and_import_twice():
    import importlib

    import lowrank_pretrain.lte as package

    importlib.reload(package)
    assert type(pl.Trainer(strategy="lte", accelerator="cpu", devices=1, logger=False).strategy).__name__ == "LTEStrategy"


def test_warns_when_heads_cannot_span_the_matrices():
    with pytest.warns(UserWarning, match="reach updates of rank 4 only"):
        fit(steps=1)


def test_lr_finder_leaves_no_trace():
    from lightning.pytorch.callbacks import LearningRateFinder

    class Find(LearningRateFinder):
        def on_fit_start(self, trainer, module):
            super().on_fit_start(trainer, module)
            self.clock = (
                trainer.strategy.local.clock,
                max(p.abs().max().item() for n, p in trainer.strategy.local.parameters().items() if ".lora_B" in n),
            )

    find = Find(num_training_steps=6, update_attr=False)
    module, _, strategy = fit(steps=4, trainer={"callbacks": [find]})
    assert find.clock == (0, 0.0) and strategy.local.clock == 4


BAD = [
    ({"rank": 0}, "rank"), ({"rank": 2.5}, "rank"), ({"heads": 0}, "heads"), ({"merge_every": 0}, "merge_every"),
    ({"mode": "fast"}, "mode"), ({"sync_rest": "never"}, "sync_rest"), ({"route": "air"}, "route"), ({"alpha": -1}, "alpha"),
    ({"overlap": 10}, "overlap"), ({"overlap": 2, "reset": True}, "overlap"), ({"prune": 0.9}, "prune"),
    ({"merge_timeout": 0}, "merge_timeout"), ({"mode": "joint", "reset": True}, "reset"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "key"), BAD, ids=str)
def test_a_wrong_argument_is_one_line(wrong, key):
    with pytest.raises(ConfigError) as error:
        LTEStrategy(**wrong)
    assert error.value.key == key and "\n" not in str(error.value)


def test_a_wrong_use_is_one_line():
    with pytest.raises(ConfigError, match="at most 8"):
        fit(rank=9, targets="net.0")
    with pytest.raises(ConfigError, match="at least one per head"):
        fit(heads=9)
    with pytest.raises(ConfigError, match="matches no target"):
        fit(targets="conv")

    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    module = Net()
    module.net[0] = Own(WIDTH, WIDTH).double()
    with pytest.raises(ConfigError, match="forward of its own"):
        fit(module=module, targets="net.0")


def test_a_phase_callback_decides_targets_and_ranks():
    with pytest.raises(ConfigError, match="phase callback"):
        fit(rank=3, trainer={"callbacks": [PreLoRA(ranks=(2, 4))]})
