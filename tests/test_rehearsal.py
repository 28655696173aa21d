"""What the first training step finds out about targets, so that nothing is found only when the model changes."""

import copy
import io
import pickle
import warnings

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelPruning, WeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lowrank_pretrain import LoRA, PreLoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.phases.rehearsal import Rehearsal
from lowrank_pretrain.phases.teachers import teachers
from lowrank_pretrain.prelora import callback as prelora_callback
from tests.toy import adapters
from tests.toy import trainer as make_trainer

X, Y = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
STEPS = 8  # two epochs of four


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)
        self.losses = []

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(x + self.fc2(F.relu(self.fc1(x))))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-2)


def data():
    return DataLoader(TensorDataset(X, Y), batch_size=8)


def pre(**kwargs):
    """Switches after step 4 and freezes after step 6."""
    return PreLoRA(**{"ranks": (2, 4), "window_unit": "step", "window": 2, "windows": 2, "latest": 2, "warmup": 1, **kwargs})


def fit(tmp, module, *callbacks, loader=None, ckpt=None, **kwargs):
    run = make_trainer(tmp, *callbacks, **{"max_epochs": 2, **kwargs})
    run.fit(module, data() if loader is None else loader, ckpt_path=ckpt)
    return run


def said(caught):
    return [str(w.message) for w in caught if "LoRA" in str(w.message)]


def hooks(module):
    kinds = ("_forward_pre_hooks", "_forward_hooks")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds) + ("training_step" in vars(module))


# -- pure: what is seen of one forward and backward ---------------------------------------------------------------------


class Two(nn.Module):
    """Layers ``a`` and ``b``; x (B, T, 8)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.b(self.drop(self.a(x)).relu())


@torch.no_grad()
def constant(x, weight):
    return (x @ weight).mean()


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return dy @ w, dy.flatten(0, 1).t() @ x.flatten(0, 1)


def net(forward, **layers):
    """A ``Two`` with further layers and a forward of its own, which gets the plain one as its last argument."""

    class Changed(Two):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, copy.deepcopy(layer))

        def forward(self, x):
            return forward(self, x, super().forward)

    return Changed


def penalties(m, x, plain):
    square = (m.a.weight @ m.a.weight.t() - torch.eye(8)).norm() + (m.a.weight - m.b.weight.detach()).pow(2).sum()
    every = torch.cat([p.flatten() for p in m.parameters()]).norm() + sum(p.abs().sum() for p in m.parameters())
    return plain(x) + 0.01 * (square + every) + 0.01 * F.mse_loss(m.a.weight, torch.zeros(8, 8))


ELSEWHERE = "also used outside of its layer"
NEVER = "is never called: its weight is used outside of it"
SEEN = {
    "plain": (net(lambda m, x, plain: plain(x)), {}, []),
    "called by name": (net(lambda m, x, plain: m.b(m.a.forward(x))), {}, []),
    "checkpointed": (net(lambda m, x, plain: checkpoint(plain, x, use_reentrant=False)), {}, []),
    "only looked at": (net(lambda m, x, plain: plain(x.to(m.a.weight.dtype)) * m.a.weight.shape[0]), {}, []),
    "looked at without autograd": (net(lambda m, x, plain: plain(x) + constant(x, m.a.weight)), {}, []),
    "penalties": (net(penalties), {}, []),
    "penalties on a layer of other steps": (net(penalties, spare=nn.Linear(8, 8)), {}, ["spare"]),
    "of other steps": (net(lambda m, x, plain: plain(x), spare=nn.Linear(8, 8)), {}, ["spare"]),
    "tied by hand": (net(lambda m, x, plain: plain(x) @ m.a.weight), {"a"}, []),
    "tied transposed": (net(lambda m, x, plain: F.linear(plain(x), m.b.weight.t())), {"b"}, []),
    "tied by einsum": (net(lambda m, x, plain: torch.einsum("btd,do->bto", plain(x), m.a.weight)), {"a"}, []),
    "tied as an embedding": (net(lambda m, x, plain: plain(x + F.embedding(torch.arange(6), m.b.weight[:6]))), {"b"}, []),
    "tied by index": (net(lambda m, x, plain: plain(x + m.b.weight[torch.arange(6)])), {"b"}, []),
    "scaled by a row": (net(lambda m, x, plain: plain(x * m.b.weight[0])), {"b"}, []),
    "a product of weights": (net(lambda m, x, plain: plain(F.linear(x, m.a.weight @ m.b.weight))), {"a", "b"}, []),
    "normed elsewhere": (net(lambda m, x, plain: plain(x) + F.linear(x, F.normalize(m.a.weight))), {"a"}, []),
    "qkv by its weight": (
        net(lambda m, x, plain: plain(F.linear(x, m.q.weight, m.q.bias)[..., :8]), q=nn.Linear(8, 24)), {"q"}, ["q"],
    ),
    "weights side by side": (
        net(lambda m, x, plain: m.b(F.linear(x, torch.cat([m.a.weight, m.a.weight]))[..., :8])), {"a"}, ["a"],
    ),
    "in a function of one's own": (net(lambda m, x, plain: m.b(Product.apply(x, m.a.weight))), {"a"}, ["a"]),
    "in a function, and called": (net(lambda m, x, plain: plain(Product.apply(x, m.a.weight))), {"a"}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", SEEN)
def test_one_step_sees_who_is_called_and_whose_weight_is_used_elsewhere(case):
    make, unfit, unseen = SEEN[case]
    module, x = make(), torch.randn(2, 6, 8)
    torch.manual_seed(1)
    loss = module(x).pow(2).mean()
    loss.backward()
    wanted, state = {name: p.grad for name, p in module.named_parameters()}, torch.get_rng_state()
    module.zero_grad()
    watching = Rehearsal(module, find_targets(module))
    watching.start()
    torch.manual_seed(1)
    with watching.forward():
        again = module(x).pow(2).mean()
    again.backward()
    watching.after_backward()
    reasons = watching.finish()
    assert torch.equal(again, loss) and torch.equal(torch.get_rng_state(), state)
    for name, p in module.named_parameters():
        assert (p.grad is None) == (wanted[name] is None) and (p.grad is None or torch.equal(p.grad, wanted[name])), name
    assert {name.partition(".")[0] for name in reasons} == set(unfit), reasons
    assert all((NEVER if name.partition(".")[0] in unseen else ELSEWHERE) in reason for name, reason in reasons.items())
    assert list(dict.fromkeys(name.partition(".")[0] for name in watching.unseen())) == unseen
    assert hooks(module) == len(set(unseen) - set(unfit))  # one on each layer that may still be called
    module.apply(lambda layer: layer(torch.randn(1, 8)) if isinstance(layer, nn.Linear) else None)
    assert hooks(module) == 0


class Gain(nn.Linear):
    def forward(self, x, gain=3.0):
        return super().forward(x) * gain


class Masked(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", (torch.arange(64).view(8, 8) % 3 > 0).float())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Counting(nn.Linear):
    """The same as its parent, with a buffer that every call changes."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Rounded(nn.Linear):
    def forward(self, x):
        w = torch.round(self.weight * 4) / 4
        return F.linear(x, self.weight + (w - self.weight).detach(), self.bias)


@pytest.mark.parametrize("cls", [Gain, Masked, Counting, Rounded])
def test_a_forward_of_its_own_is_compared_with_the_merged_layer(cls):
    """Whatever the adapted layer makes of such a class: it is told from the numbers, on copies."""
    module = net(lambda m, x, plain: plain(x), a=cls(8, 8))()
    watching = Rehearsal(module, find_targets(module))
    watching.start()
    x, before = torch.randn(2, 3, 8), {name: t.clone() for name, t in module.state_dict().items()}
    with watching.forward():
        module(x).sum().backward()
    watching.after_backward()
    refused = "a" in watching.finish()
    assert not hooks(module)
    assert {name for name, t in module.state_dict().items() if not torch.equal(t, before[name])} <= {"a.calls"}
    assert not hasattr(module.a, "calls") or module.a.calls == 1
    lora.inject(module, {"a": 2})
    with torch.no_grad():
        module.a.lora_B["W"].normal_(generator=torch.Generator().manual_seed(0))
    adapted = module.a(x)
    lora.merge(module)
    off = (module.a(x) - adapted).abs().max()
    assert refused == bool(off > 1e-4), off


def test_a_forward_that_was_replaced_on_the_layer_is_named():
    module = Two()
    module.a.forward = lambda x: F.linear(x, module.a.weight)
    watching = Rehearsal(module, find_targets(module))
    watching.start()
    with watching.forward():
        module(torch.randn(2, 8)).sum().backward()
    watching.after_backward()
    assert "was replaced on the layer itself" in watching.finish()["a"]


def test_copies_and_pickles_of_a_watched_module_are_free_of_it():
    module = Two()
    watching = Rehearsal(module, find_targets(module))
    watching.start()
    twin = copy.deepcopy(module)
    twin(torch.randn(2, 8))
    torch.save(module, io.BytesIO())
    pickle.loads(pickle.dumps(module))(torch.randn(2, 8))
    assert not watching.called
    watching.stop()
    assert not hooks(module)


def test_compiled_layers_are_not_watched():
    inner = torch.compile(Two(), backend="eager")
    module = nn.ModuleDict({"net": inner, "out": nn.Linear(8, 8)})
    watching = Rehearsal(module, find_targets(module))
    watching.start()
    assert watching.called == {"net.a", "net.b"} and hooks(inner) == 0
    watching.stop()


# -- in a fit -----------------------------------------------------------------------------------------------------------


class Unused(Net):
    """``proj`` is used by its weight alone (Swin V2, BEiT, EVA, Mamba)."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        return super().forward(F.linear(x, self.proj.weight, self.proj.bias))


@pytest.mark.parametrize("callback", [pre, lambda **kw: LoRA(rank=2, **kw)], ids=["prelora", "lora"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_layer_that_is_never_called_is_left_out_of_a_preset_or_refused_before_the_first_step(tmp_path, callback, accumulate):
    kwargs = {"max_epochs": 2 * accumulate, "accumulate_grad_batches": accumulate}
    module, phases = Unused(), callback()
    before = module.proj.weight.detach().clone()
    with pytest.warns(UserWarning) as caught:
        fit(tmp_path, module, phases, **kwargs)
    assert [line for line in said(caught) if "proj is never called" in line] and len(said(caught)) == 1
    assert phases.phase == "lowrank" and set(phases.plan) == {"fc1", "fc2"} and hooks(module) == 0
    assert module.proj.weight.requires_grad and not torch.equal(module.proj.weight, before)
    module, steps = Unused(), []
    module.on_train_batch_end = lambda *_: steps.append(0)
    with pytest.raises(ConfigError, match="targets='proj': is never called"):
        fit(tmp_path, module, callback(targets=["fc1", "proj"]), **kwargs)
    assert len(steps) == accumulate - 1 and hooks(module) == 0


@pytest.mark.parametrize("adapter_lr", [1.0, 2.0])
def test_a_run_whose_first_step_took_adapters_away_resumes_exactly(tmp_path, adapter_lr):
    def run(module, ckpt=None):
        callback = LoRA(rank=2, adapter_lr=adapter_lr)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return callback, fit(tmp_path, module, callback, every=None if ckpt else 4, ckpt=ckpt)

    module, again = Unused(), Unused()
    run(module)
    callback, _ = run(again, tmp_path / "step=4.ckpt")
    assert set(callback.plan) == {"fc1", "fc2"}
    for (name, a), (_, b) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("callback", [pre, lambda **kw: LoRA(rank=2, **kw)], ids=["prelora", "lora"])
def test_a_weight_that_is_tied_by_hand_is_no_target_and_the_file_is_the_model(tmp_path, callback):
    class Tied(Net):
        def forward(self, x):
            return self.head(F.relu(self.fc1(x)) @ self.fc1.weight + self.fc2(F.relu(self.fc1(x))))

    module, phases = Tied(), callback()
    with pytest.warns(UserWarning, match="fc1 its weight is also used outside of its layer"):
        run = fit(tmp_path, module, phases)
    assert set(phases.plan) == {"fc2"}
    run.save_checkpoint(tmp_path / "a.ckpt")
    plain = Tied()
    plain.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    torch.testing.assert_close(plain(X), module(X), rtol=1e-5, atol=1e-5)


def test_nothing_of_the_rehearsal_is_left_and_it_changes_no_number(tmp_path):
    """In the full phase the run is the one without the callback, bit for bit."""
    plain, module, counts = Net(), Net(), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            counts.append(hooks(pl_module))

    fit(tmp_path, plain)
    fit(tmp_path, module, pre(latest=None, windows=3, loss_tol=1e-9), Look())
    assert module.losses == plain.losses and counts == [0] * STEPS


class Experts(Net):
    """One of four experts a batch."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def training_step(self, batch, batch_idx):
        expert = self.experts[self.pick(batch_idx)]
        return F.cross_entropy(self(batch[0] + expert(batch[0])), batch[1])

    def pick(self, batch_idx):
        return batch_idx % 4


class LayerDrop(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = x if self.training and (self.global_step + i) % 3 == 0 else x + block(x)
        return super().forward(x)


class LateLoss(Net):
    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(16, 4)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if self.global_step < 3 else loss + F.cross_entropy(self.aux(batch[0]), batch[1])


@pytest.mark.parametrize("callback", [pre, lambda: LoRA(rank=2)], ids=["prelora", "lora"])
@pytest.mark.parametrize("cls", [Experts, LayerDrop, LateLoss])
def test_layers_that_one_step_does_not_use_are_targets_all_the_same(tmp_path, cls, callback):
    module, phases = cls(), callback()
    fit(tmp_path, module, phases, max_epochs=4)
    assert phases.phase == "lowrank" and set(phases.plan) == set(find_targets(cls())) and hooks(module) == 0
    assert all(module.get_submodule(name).weight.ne(cls().get_submodule(name).weight).any() for name in phases.plan)


def test_an_expert_that_no_step_of_the_full_phase_used_is_left_out_at_the_switch(tmp_path):
    class Idle(Experts):
        def pick(self, batch_idx):
            return batch_idx % 2

    module, phases = Idle(), pre()
    with pytest.warns(UserWarning) as caught:
        fit(tmp_path, module, phases)
    first, second = said(caught)
    assert "no forward pass called experts.* in the 2 optimizer steps so far" in first
    assert "experts.* (2) was not called in any of the 4 optimizer steps watched" in second
    assert {name for name in phases.plan if "experts" in name} == {"experts.0", "experts.1"}
    assert module.experts[3].weight.requires_grad


def test_adapters_that_no_gradient_reaches_are_named_after_a_window_with_its_length(tmp_path):
    class Goes(Experts):
        def pick(self, batch_idx):
            return batch_idx % 4 if self.global_step < 4 else 0

    with pytest.warns(UserWarning, match=r"no gradient in the 4 optimizer steps .* adapters of experts\.\*") as caught:
        fit(tmp_path, Goes(), pre(window=4, latest=1, windows=2, targets="experts.*"), max_epochs=4)
    assert sum("no gradient" in line for line in said(caught)) == 1

    class Gone(Net):
        def forward(self, x):
            return super().forward(x) if self.global_step < 4 else self.head(x)

    phases = pre()
    with pytest.warns(UserWarning, match="no gradient in the 2 optimizer steps .* adapters of fc1, fc2") as caught:
        fit(tmp_path, Gone(), phases, max_epochs=4)
    assert sum("no gradient" in line for line in said(caught)) == 1 and phases.phase == "lowrank"


def test_a_weight_that_is_trained_without_its_adapter_ends_the_run(tmp_path):
    class Bare(Net):
        def forward(self, x):
            if self.global_step < 4:
                return super().forward(x)
            hidden = F.relu(F.linear(x, self.fc1.weight, self.fc1.bias))
            return self.head(x + F.linear(hidden, self.fc2.weight, self.fc2.bias))

    reason = "no adapter had a gradient in the 2 optimizer steps since the model changed, and their weights had"
    with pytest.raises(ConfigError, match=f"targets='fc1, fc2': {reason}"):
        fit(tmp_path, Bare(), pre(warmup=3), max_epochs=4)


def test_a_run_that_trains_the_head_alone_in_every_second_epoch_goes_on(tmp_path):
    class Alternates(Net):
        def training_step(self, batch, batch_idx):
            if self.current_epoch % 2:
                return F.cross_entropy(self.head(batch[0]), batch[1])
            return super().training_step(batch, batch_idx)

    for warmup in (1, 2):
        module, phases = Alternates(), pre(window_unit="epoch", window=1, windows=3, latest=3, warmup=warmup)
        with pytest.warns(UserWarning, match="no gradient in the 4 optimizer steps") as caught:
            fit(tmp_path, module, phases, max_epochs=8)
        assert sum("no gradient" in line for line in said(caught)) == 1 and phases.phase == "lowrank"
        assert all(factor.any() for factor in adapters(module).values())


def test_steps_that_are_skipped_are_no_evidence(tmp_path):
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if self.trainer.current_epoch in (0, 2) else super().training_step(batch, batch_idx)

    phases = pre(latest=3, window=2)
    fit(tmp_path, Skips(), phases, max_epochs=5)
    assert phases.phase == "lowrank" and set(phases.plan) == {"fc1", "fc2"}


# -- at the start of a fit ----------------------------------------------------------------------------------------------


class Perceptual(Net):
    """A frozen network in the loss; its parameters are in the optimizer all the same."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        features = self.frozen(batch[0] + self.fc2(F.relu(self.fc1(batch[0]))))
        return super().training_step(batch, batch_idx) + features.pow(2).mean()


class TrainableOnly(Perceptual):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-2)


@pytest.mark.parametrize("cls", [Perceptual, TrainableOnly])
def test_what_is_frozen_stays_as_it_is(tmp_path, cls):
    module, phases = cls(), pre()
    before = module.frozen(X)
    with pytest.warns(UserWarning, match="frozen is frozen"):
        fit(tmp_path, module, phases)
    assert torch.equal(module.frozen(X), before) and set(phases.plan) == {"fc1", "fc2"}
    module = cls()
    with pytest.raises(ConfigError, match="targets='frozen': is frozen"):
        fit(tmp_path, module, pre(targets=["fc1", "frozen"]))
    assert not module.losses


def test_lora_on_a_frozen_layer_wants_its_weight_in_the_optimizer(tmp_path):
    phases = LoRA(rank=2)
    with pytest.warns(UserWarning, match="frozen are frozen, but in the optimizer: they get adapters"):
        fit(tmp_path, Perceptual(), phases)
    assert "frozen" in phases.plan
    with pytest.warns(UserWarning, match="frozen is in no optimizer"):
        fit(tmp_path, TrainableOnly(), phases := LoRA(rank=2))
    assert "frozen" not in phases.plan

    class Base(Net):  # fine-tuning: everything but the head is frozen, and handed over
        def __init__(self):
            super().__init__()
            self.fc1.requires_grad_(False)
            self.fc2.requires_grad_(False)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Base(), phases := LoRA(rank=2))
    assert set(phases.plan) == {"fc1", "fc2"} and not said(caught)


def test_a_target_in_no_optimizer_is_named_before_the_first_step(tmp_path):
    class Apart(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW([*self.fc1.parameters(), *self.head.parameters()], lr=3e-2)

    for phases in (pre(), LoRA(rank=2)):
        with pytest.warns(UserWarning, match="fc2 is in no optimizer"):
            fit(tmp_path, Apart(), phases)
        assert set(phases.plan) == {"fc1"}
        module = Apart()
        phases.targets = ["fc2"]
        with pytest.raises(ConfigError, match="targets='fc2': is in no optimizer: configure_optimizers must hand over"):
            fit(tmp_path, module, phases)
        assert not module.losses


class LateSetup(Net):
    def __init__(self):
        pl.LightningModule.__init__(self)
        self.losses = []

    def setup(self, stage):
        torch.manual_seed(0)
        self.fc1, self.fc2, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)


class LateModel(Net):
    def __init__(self):
        pl.LightningModule.__init__(self)
        self.losses = []

    def configure_model(self):
        if not hasattr(self, "fc1"):
            LateSetup.setup(self, "fit")


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.LazyLinear(32)

    def setup(self, stage):
        torch.manual_seed(0)
        self(X)


@pytest.mark.parametrize("cls", [LateSetup, LateModel, Lazy])
@pytest.mark.parametrize("callback", [pre, lambda: LoRA(rank=2)], ids=["prelora", "lora"])
def test_layers_that_setup_or_configure_model_build_are_targets_also_after_a_resume(tmp_path, cls, callback):
    module, again = cls(), cls()
    fit(tmp_path, module, callback(), every=4)
    fit(tmp_path, again, phases := callback(), ckpt=tmp_path / "step=4.ckpt")
    assert set(phases.plan) == {"fc1", "fc2"}
    for (name, a), (_, b) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("callback", [pre, lambda **kw: LoRA(rank=2, **kw)], ids=["prelora", "lora"])
def test_a_layer_that_is_still_lazy_is_one_line(tmp_path, callback):
    class StillLazy(Net):
        def __init__(self):
            super().__init__()
            self.fc2 = nn.LazyLinear(16)

        def configure_optimizers(self):
            every = self.parameters() if self.whole else [*self.fc1.parameters(), *self.head.parameters()]
            return torch.optim.SGD(every, lr=1e-2)

    for StillLazy.whole in (True, False):
        fit(tmp_path, StillLazy(), phases := callback())
        assert set(phases.plan) == {"fc1"}
    with pytest.raises(ConfigError, match="targets='fc2': is lazy"):
        fit(tmp_path, StillLazy(), callback(targets="fc2"))


def complex_layer(module):
    module.fc1 = nn.Linear(16, 32, dtype=torch.cfloat)
    module.forward = lambda x: module.head(x + module.fc2(module.fc1(x.to(torch.cfloat)).abs()))


WRAPS = {
    "complex": complex_layer,
    "weight_norm": lambda m: parametrizations.weight_norm(m.fc1),
    "orthogonal": lambda m: parametrizations.orthogonal(m.fc1),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m.fc1),
    "pruned": lambda m: prune.l1_unstructured(m.fc1, "weight", 0.3),
}


@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("callback", [pre, lambda **kw: LoRA(rank=2, **kw)], ids=["prelora", "lora"])
def test_computed_and_complex_weights_are_left_out_or_refused_at_the_start(tmp_path, kind, callback):
    module = Net()
    WRAPS[kind](module)
    fit(tmp_path, module, phases := callback())
    assert set(phases.plan) == {"fc2"} and phases.phase == "lowrank"
    module = Net()
    WRAPS[kind](module)
    with pytest.raises(ConfigError, match="^targets='fc1': "):
        fit(tmp_path, module, callback(targets=["fc1", "fc2"]))
    assert not module.losses


def test_what_another_callback_prunes_or_freezes_is_no_target(tmp_path):
    module = Net()
    pruning = ModelPruning("l1_unstructured", parameters_to_prune=[(module.fc1, "weight")], amount=0.3)
    with pytest.warns(UserWarning, match="fc1 is pruned by ModelPruning"):
        fit(tmp_path, module, phases := pre(window=5, latest=1), pruning, max_epochs=4)
    assert set(phases.plan) == {"fc2"} and phases.phase == "lowrank"

    class Backbone(Net):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

        def forward(self, x):
            return super().forward(self.backbone(x))

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=3e-2)

    with pytest.warns(UserWarning, match=r"backbone\.\* \(2\) is frozen"):
        fit(tmp_path, Backbone(), BackboneFinetuning(3), phases := pre(), max_epochs=4)
    assert set(phases.plan) == {"fc1", "fc2"}


def test_what_was_frozen_or_parametrized_since_is_left_out_at_the_switch(tmp_path):
    class Changes(Net):
        def on_train_batch_end(self, *_):
            if self.global_step == 3:
                self.fc1.requires_grad_(False)

    with pytest.warns(UserWarning, match="fc1 since the fit began is frozen"):
        fit(tmp_path, Changes(), phases := pre())
    assert set(phases.plan) == {"fc2"}


class Gate(Net):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 2)

    def forward(self, x):
        return super().forward(x) * self.gate(x).softmax(-1)[:, :1]


@pytest.mark.parametrize("callback", [lambda **kw: pre(ranks=(4, 8), **kw), lambda **kw: LoRA(rank=4, **kw)])
def test_one_small_layer_gets_the_rank_it_can_have(tmp_path, callback):
    with pytest.warns(UserWarning, match=r"gate \(2 x 16\) gets at most 2, which is min\(D, O\)"):
        fit(tmp_path, Gate(), phases := callback(), every=4)
    assert phases.plan["gate"] == 2 and phases.plan["fc1"] in (4, 8)
    fit(tmp_path, Gate(), again := callback(), ckpt=tmp_path / "step=4.ckpt")
    assert again.plan == phases.plan
    fit(tmp_path, Gate(), phases := callback(targets=["all", "!gate"]))
    assert set(phases.plan) == {"fc1", "fc2"}
    with pytest.raises(ConfigError, match=r"=[48]: gate is 2 x 16: at most 2"):
        fit(tmp_path, Gate(), callback(targets=["fc1", "gate"]))


# -- teachers -----------------------------------------------------------------------------------------------------------


class Distilled(Net):
    """A mean teacher of ``body``, updated by ``how``."""

    def __init__(self, how):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.teacher = copy.deepcopy(self.body).requires_grad_(False)
        self.how = how

    def forward(self, x):
        return self.head(self.body(x))

    def on_train_batch_end(self, *_):
        self.how(self.body, self.teacher)


@torch.no_grad()
def by_position(student, teacher):
    for p, q in zip(student.parameters(), teacher.parameters(), strict=False):
        q.lerp_(p, 0.5)


@torch.no_grad()
def by_name(student, teacher):
    plain = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        tensor.copy_(plain[name])


@pytest.mark.parametrize("callback", [pre, lambda **kw: LoRA(rank=2, **kw)], ids=["prelora", "lora"])
def test_a_teacher_is_named_and_one_that_follows_by_position_is_refused_in_the_first_step(tmp_path, callback):
    parameters = nn.Module.parameters
    with pytest.warns(UserWarning, match="teacher looks like a frozen copy of body") as caught:
        module = Distilled(by_name)
        fit(tmp_path, module, callback(targets="body.*"))
    assert sum("frozen copy" in str(w.message) for w in caught) == 1
    torch.testing.assert_close(module.teacher(X), module.body(X), rtol=1e-4, atol=1e-5)
    module = Distilled(by_position)
    with pytest.raises(
        ConfigError, match="targets='body': teacher pairs its parameters with these by position: update it by name"
    ):
        fit(tmp_path, module, callback(targets="body.*"))
    assert len(module.losses) <= 1 and nn.Module.parameters is parameters


class Hidden(Net):
    """A mean teacher that the module does not hold, or another model that it is filled from once."""

    def __init__(self, how, when):
        super().__init__()
        self.teacher = [Net()]
        self.how, self.when = how, when

    def on_train_batch_start(self, *_):
        if self.when == "before" and self.global_step == 0:
            self.how(self.teacher[0], self)

    def on_train_batch_end(self, *_):
        if self.when == "after":
            self.how(self, self.teacher[0])


@torch.no_grad()
def by_named_position(student, teacher):
    for (_, p), (_, q) in zip(student.named_parameters(), teacher.named_parameters(), strict=False):
        q.lerp_(p, 0.5)


@pytest.mark.parametrize("how", [by_position, by_named_position])
def test_a_teacher_that_the_module_does_not_hold_is_found_in_the_first_steps(tmp_path, how):
    module, plain = Hidden(how, "after"), nn.Module.named_parameters
    with pytest.raises(ConfigError, match=r"targets='Hidden': a module outside of it \(Net\) pairs .*update it by name"):
        fit(tmp_path, module, pre())
    assert len(module.losses) == 1 and nn.Module.named_parameters is plain
    module = Hidden(how, "before")
    assert fit(tmp_path, module, pre()).global_step == 8
    callback, average = pre(), WeightAveraging(avg_fn=get_ema_avg_fn(0.9))  # this one follows
    fit(tmp_path, Net(), callback, average)
    assert callback.phase == "lowrank" and nn.Module.named_parameters is plain


def test_frozen_blocks_of_a_list_are_no_teachers():
    module = nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4))})
    module["blocks"][0].requires_grad_(False)
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    assert teachers(module, find_targets(module, warn=False), trained) == []


# -- counters and lengths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [lambda x: x[None], lambda x: x.view(1, 1), lambda x: {"loss": x[None]}, torch.Tensor.double], ids=range(4)
)
def test_a_loss_of_any_shape_with_one_number(tmp_path, shape):
    class Shaped(Net):
        def training_step(self, batch, batch_idx):
            return shape(super().training_step(batch, batch_idx))

    module, phases = Shaped(), pre()
    fit(tmp_path, module, phases)
    assert phases.phase == "lowrank" and phases.history[0].loss == pytest.approx(sum(module.losses[:2]) / 2)


def test_a_device_without_float64_adds_the_loss_up_elsewhere(monkeypatch):
    def refuse(*_):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    monkeypatch.setattr(torch.Tensor, "to", refuse)
    total = torch.zeros(2, dtype=torch.float64)
    assert prelora_callback._on(torch.device("cpu"), total) is total


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    ("settings", "limits", "line"),
    [
        ({}, {"max_epochs": 2}, r"max_epochs=2: must be at least windows \* window = 3, else .* never switch; latest=2 would"),
        ({}, {"max_epochs": -1, "max_steps": 11}, r"max_steps=11: must be at least windows \* window = 3 epochs of 4 steps,"),
        ({}, {"max_epochs": 9, "max_steps": 11}, "max_steps=11: "),
        ({}, {"max_epochs": 9, "max_steps": 5, "accumulate_grad_batches": 2}, "max_steps=5: .* 3 epochs of 2 steps"),
        ({"earliest": 5}, {"max_epochs": 4}, r"max_epochs=4: must be at least earliest \* window = 5,"),
        ({"latest": 2}, {"max_epochs": 1}, r"max_epochs=1: must be at least latest \* window = 2,"),
        ({"window_unit": "step", "window": 4, "earliest": 5}, {"max_epochs": 4}, "max_steps=16: .* = 20,"),
        ({"window_unit": "step", "window": 2}, {"max_epochs": 1, "max_steps": 1000}, "max_steps=4: .* = 6,"),
        ({"window_unit": "step", "window": 2}, {"max_epochs": 4, "limit_train_batches": 1}, "max_steps=4: .* = 6,"),
        ({"window_unit": "step", "window": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}, "max_steps=4: .* = 6,"),
    ],
)
def test_a_run_that_can_never_switch_is_refused(tmp_path, settings, limits, line):
    module = Net()
    with pytest.raises(ConfigError, match=line):
        fit(tmp_path, module, PreLoRA(ranks=(2, 4), **settings), **limits)
    assert not module.losses


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({}, {"max_epochs": 3}), ({}, {"max_epochs": -1, "max_steps": 12}), ({"earliest": 9, "latest": 2}, {"max_epochs": 3}),
        ({"window_unit": "step", "window": 2}, {"max_epochs": -1, "max_steps": 6}), ({}, {"fast_dev_run": True}),
    ],
)  # fmt: skip
def test_a_run_that_may_switch_is_not_refused(tmp_path, settings, limits):
    fit(tmp_path, Net(), PreLoRA(ranks=(2, 4), **settings), **limits)


def test_data_of_unknown_length_are_warned_of_where_epochs_are_counted_and_steps_limited(tmp_path):
    with pytest.warns(UserWarning, match="no known length.*max_steps=3.*window_unit"):
        fit(tmp_path, Net(), PreLoRA(ranks=(2, 4)), loader=DataLoader(Stream(), 8), max_epochs=-1, max_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Net(), PreLoRA(ranks=(2, 4)), loader=DataLoader(Stream(), 8), max_epochs=3)
    assert not any("known length" in str(w.message) for w in caught)


def test_what_is_counted_begins_anew_with_a_new_fit_and_goes_on_with_a_resumed_one(tmp_path):
    def phases():
        return PreLoRA(ranks=(2, 4), window_unit="step", window=3, windows=2, latest=9, loss_tol=1e-9, warmup=1)

    def counters(callback):
        return callback.windows_done, callback._units, callback._loss.tolist(), callback.history, callback.left_out

    used, once = phases(), phases()
    fit(tmp_path, Net(), used)  # ends in the middle of a window
    fit(tmp_path, Net(), once)
    assert counters(once)[:2] == (2, 2)
    fit(tmp_path, Net(), used)  # the same callback, another module and trainer
    assert counters(used) == counters(once)
    fit(tmp_path, Net(), phases(), every=4)
    fit(tmp_path, Net(), again := phases(), ckpt=tmp_path / "step=4.ckpt")
    assert counters(again) == counters(once)


def test_a_second_fit_of_a_changed_module_counts_the_new_trainers_steps(tmp_path):
    """With the old ones the ramp of the learning rate would begin below zero."""
    module, phases, rates = Net(), pre(rewarm=4), []
    fit(tmp_path, module, phases)
    assert (phases.switch_step, phases.freeze_step) == (4, 6)

    class Rates(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))

    fit(tmp_path, module, Rates(), phases)
    assert (phases.phase, phases.switch_step, phases.freeze_step) == ("lowrank", 0, 0)
    assert rates == pytest.approx([3e-2 * r for r in (0.25, 0.5, 0.75, 1, 1, 1, 1, 1)])


@pytest.mark.parametrize("first", [True, False])
def test_a_search_for_a_learning_rate_before_the_run_counts_for_nothing(tmp_path, first, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Searched(Net):
        def __init__(self):
            super().__init__()
            self.lr = 1e-3

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=6, max_lr=1e-2, update_attr=False)
    phases, module = pre(), Searched()
    fit(tmp_path, module, *([finder, phases] if first else [phases, finder]))
    assert (phases.phase, phases.switch_step, phases.freeze_step) == ("lowrank", 4, 6) and hooks(module) == 0


def test_numpys_numbers_are_numbers(tmp_path):
    phases = PreLoRA(ranks=np.array([2, 4]), window_unit="step", window=np.int64(2), windows=2, latest=np.int32(2), warmup=1)
    assert phases.ranks == [2, 4] and all(type(rank) is int for rank in phases.ranks)
    fit(tmp_path, Net(), phases)
    assert phases.phase == "lowrank" and LoRA(rank=np.int64(4)).rank == 4


@pytest.mark.parametrize("ranks", [np.array(4), np.array([4.0, 8.0]), {4: 8}, b"48", 4, None, [np.True_], np.array([3])])
def test_ranks_that_are_none(ranks):
    with pytest.raises(ConfigError, match="^ranks="):
        PreLoRA(ranks=ranks)


@pytest.mark.parametrize("targets", [None, 5, len, {}, {"all": 1}, [None], [], "!"])
def test_targets_that_are_none(targets):
    for make in (PreLoRA, LoRA):
        with pytest.raises(ConfigError, match="^targets="):
            make(targets=targets)


@pytest.mark.parametrize("then", ["lora", "factorize"])
def test_a_weight_that_is_written_into_between_steps_trains_in_full(tmp_path, then):
    class Clamped(Net):
        def on_train_batch_end(self, *_):
            with torch.no_grad():
                self.fc1.weight.clamp_(-0.05, 0.05)

    module = Clamped()
    with pytest.warns(UserWarning, match="fc1 is written into between optimizer steps"):
        fit(tmp_path, module, phases := pre(then=then, ranks=(0.25,) if then == "factorize" else (2,)))
    assert set(phases.plan) == {"fc2"} and module.fc1.weight.abs().max() <= 0.05
    with pytest.raises(ConfigError, match=r"targets='fc1': is written into .*leave it out"):
        fit(tmp_path, Clamped(), LoRA(rank=2, targets="fc1"))


@pytest.mark.parametrize("kind", ["int8", "float8", "bfloat16"])
def test_whoever_casts_to_a_weights_dtype_hears_of_it(tmp_path, kind):
    class Cast(Net):
        def forward(self, x):
            return self.head(x + self.fc2(torch.relu(self.fc1(x.to(self.fc1.weight.dtype))).to(x.dtype)))

    if kind == "bfloat16":
        fit(tmp_path, Cast(), pre(frozen_dtype=kind))
        return
    with pytest.warns(UserWarning, match="asks for the dtype of the weight of fc1"):
        with pytest.raises(TypeError, match=f"frozen_dtype={kind} was given torch.int8"):
            fit(tmp_path, Cast(), pre(frozen_dtype=kind))


def test_a_method_that_is_compiled_whole_is_trained_and_its_layers_count_as_called(tmp_path):
    class Compiled(Net):
        def __init__(self):
            super().__init__()
            self.whole = torch.compile(super().forward, backend="eager", fullgraph=True)

        def forward(self, x):
            return self.whole(x)

    module, phases = Compiled(), pre()
    fit(tmp_path, module, phases)
    assert set(phases.plan) == {"fc1", "fc2"} and phases.phase == "lowrank" and hooks(module) == 0


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_targets_of_several_dtypes(tmp_path, unit):
    class Mixed(Net):
        def __init__(self):
            super().__init__()
            self.fc2 = nn.Linear(32, 16).double()

        def forward(self, x):
            return self.head(x + self.fc2(F.relu(self.fc1(x)).double()).float())

    windows = {"window_unit": "epoch", "window": 1, "rank_signal": "grad_norm"} if unit == "epoch" else {}
    fit(tmp_path, Mixed(), phases := pre(**windows), max_epochs=4)
    assert set(phases.plan) == {"fc1", "fc2"} and phases.phase == "lowrank"
