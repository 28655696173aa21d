"""No operation on mixed devices and no wait for the device, on a GPU that torch pretends (``tests/pretend_gpu.py``)."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.galore import GaLoreAdamW
from lowrank_pretrain.guards.finite import FiniteGuard
from lowrank_pretrain.lora import function as lora_function
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lte.heads import function as heads_function
from lowrank_pretrain.lte.heads.checkpoint import _all_turns
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.heads.record import factor_name, factor_parameters, put_moments, to_file
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.workers import Workers, clip_norms
from lowrank_pretrain.observe.step_clock import StepClock
from tests.pretend_gpu import Waits, autocast, by_hand, no_waiting, pretend_gpu

# ---- the optimizer: every mode. A new mode joins by a line here ---------------------------------------------------------

SIDES = ["std", "reverse_std", "left", "right", "full"]
MODES = [
    *({"refresh": refresh, "proj_type": side} for refresh, side in itertools.product(("subspace", "track", "svd"), SIDES)),
    *({"residual": "fira", "refresh": refresh} for refresh in ("subspace", "track", "svd")),
    {"residual": "fira", "moments": "grad"}, {"residual": "muon", "rule": "muon", "refresh": "track"}, {"residual": "muon"},
    {"variant": "apollo"}, {"variant": "apollo", "rank": 1}, {"variant": "apollo", "moments": "grad"},
    {"refresh": "svd", "rotate_moments": False, "stagger": False},
    {"moments": "grad"}, {"rotate_moments": False}, {"correct_bias": False}, {"weight_decay": 0.0},
    {"layerwise": True}, {"layerwise": True, "residual": "fira"}, {"layerwise": True, "variant": "apollo"},
    {"layerwise": True, "refresh": "track"},
    *({**rule, "refresh": refresh, **more} for rule, refresh, more in itertools.product(
        ({"second_moment": "factored"}, {"nesterov": True}, {"rule": "muon"}), ("subspace", "track"),
        ({}, {"residual": "fira"}, {"proj_type": "full"}, {"layerwise": True}),
    )),
    {"second_moment": "factored", "nesterov": True, "refresh": "track"}, {"rule": "muon", "nesterov": True, "moments": "grad"},
    {"rank": None},
]  # fmt: skip
COLD, WARM = 2, 4  # steps; a gap of 2 makes every other one renew its bases


def parameters(dtype):
    shapes = [(16, 12), (12, 16), (8, 3, 2, 2), (16,)]
    return [nn.Parameter(torch.zeros(shape, device="cuda", dtype=dtype)) for shape in shapes]


def take_steps(optimizer, params, number):
    def closure():  # autograd's engine asks for the device, so gradients and their hooks come by hand
        for p in params:
            p.grad = torch.ones_like(p)
            for hook in (p._post_accumulate_grad_hooks or {}).values():
                hook(p)

    for _ in range(number):
        optimizer.step(closure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_warm_step_of_every_mode_stays_on_the_device_and_never_waits(mode, dtype):
    with pretend_gpu():
        *matrices, bias = params = parameters(dtype)
        gap = 1000 if mode.get("refresh") == "svd" else 2  # LAPACK's answer must be waited for
        group = {"params": matrices, "rank": 3, "update_proj_gap": gap, **mode}
        layerwise = {"layerwise": True} if "layerwise" in mode else {}
        optimizer = GaLoreAdamW([group, {"params": [bias], **layerwise}], lr=1e-2, weight_decay=mode.get("weight_decay", 0.1))
        take_steps(optimizer, params, COLD)
        with no_waiting() as watch:
            take_steps(optimizer, params, WARM)
        assert watch.operations > 20 * WARM
        assert all(t.device.type == "cuda" for p in params for key, t in optimizer.state[p].items() if key != "step")
        assert len(optimizer._guard.pending) >= WARM, "the guard went another way than on a device"


@pytest.mark.parametrize("mode", [{}, {"variant": "apollo"}, {"variant": "apollo", "second_moment": "factored"}], ids=str)
def test_a_state_follows_a_model_that_is_moved_to_the_device(mode):
    with pretend_gpu():
        params = [nn.Parameter(torch.zeros(shape)) for shape in ((16, 12), (16,))]
        optimizer = GaLoreAdamW([{"params": params[:1], "rank": 3, **mode}, {"params": params[1:]}], lr=1e-2)
        take_steps(optimizer, params, COLD)
        moved = [nn.Parameter(p.detach().to("cuda")) for p in params]  # ``.data`` of a fake tensor cannot change its device
        for group, old, new in zip(optimizer.param_groups, params, moved, strict=True):
            group["params"], optimizer.state[new] = [new], optimizer.state.pop(old)
        take_steps(optimizer, moved, 1)
        assert all(t.device.type == "cuda" for p in moved for key, t in optimizer.state[p].items() if key != "step")


def test_the_pretended_device_notices_what_waits():
    with pretend_gpu(), no_waiting():
        x = torch.zeros(3, device="cuda")
        for wait in (
            lambda: x.sum().item(), lambda: bool(x.all()), lambda: x.cpu(), lambda: torch.tensor(1.0, device="cuda"),
            lambda: torch.zeros(3).copy_(x, non_blocking=True), lambda: torch.zeros(3).to("cuda"), lambda: x.tolist(),
            lambda: torch.linalg.svd(torch.zeros(3, 3, device="cuda")), lambda: x.nonzero(),
        ):  # fmt: skip
            with pytest.raises(Waits):
                wait()
        with pytest.raises(RuntimeError, match="same device|different devices"):
            x + torch.zeros(3)


# ---- layers with adapters and with heads ----------------------------------------------------------------------------------


class Layers(nn.Module):
    """A fused layer, of which q and v may be targets alone, and a plain one."""

    def __init__(self, dtype):
        super().__init__()
        self.qkv, self.fc = nn.Linear(16, 48, dtype=dtype), nn.Linear(48, 16, dtype=dtype)

    def forward(self, x):
        return self.fc(self.qkv(x))


@pytest.mark.parametrize("freeze", [{}, {"freeze_rest": True}, None], ids=str)
@pytest.mark.parametrize("rows", [2, 200])  # the two-step form, and the formed weight
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_adapters_stay_on_the_device_and_never_wait(freeze, rows, cast):
    with pretend_gpu(), torch.device("cuda"):
        net = Layers(torch.float32)
        plan = {name: 4 for name in find_targets(net) if not name.endswith(".k")}
        lora.inject(net, plan)
        if freeze is not None:
            lora.freeze(net, plan, **freeze)
        with no_waiting() as watch, autocast(cast), by_hand(lora_function._LoRALinear) as calls:
            net(torch.zeros(2, rows // 2, 16, requires_grad=True))
            gradients = [gradient for call in calls for gradient in call.backward()]
        assert len(calls) == 2 and watch.operations > 20 and all(g is None or g.is_cuda for g in gradients)


def heads_of(net, **settings):
    owner = HeadSet(Settings(heads=2, merge_every=2, seed=0, **settings), Workers())
    targets = find_targets(net)
    owner.convert(targets, dict.fromkeys(targets, 4))
    owner.shared.batch = 2
    return owner


def test_moments_of_a_head_whose_turn_comes_after_a_resume_lie_on_the_device():
    """A checkpoint is read on the CPU, and what it parked came back from there. The device here is torch's meta."""
    read = heads_of(Layers(torch.float32), mode="sequential").record()
    with torch.device("meta"):
        owner = heads_of(Layers(torch.float32), mode="sequential")
    factors = factor_parameters(owner.layers)
    for name, heads in read.items():
        for factor in ("A", *(f"B.{part}" for part in heads.B)):
            shape = factors[factor_name(name, factor)].shape
            heads.moments[factor] = {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape), "step": torch.ones(1)}
    for settings, counts_on in (({}, "cpu"), ({"fused": True}, "meta")):
        optimizer = torch.optim.AdamW([{"params": [*factors.values()], **settings}])
        put_moments(read, owner.layers, [optimizer])
        for p in factors.values():
            state = optimizer.state[p]
            assert state["exp_avg"].device == state["exp_avg_sq"].device == p.device
            assert state["step"].device.type == counts_on and state["step"].ndim == 0


def test_a_resumed_run_writes_the_heads_of_all_turns_though_some_lie_in_main_memory(monkeypatch):
    monkeypatch.setattr("lowrank_pretrain.lte.view.read_stamps", lambda tensors: [0] * len(tensors))  # fake ones have no bits
    with pretend_gpu():
        read = heads_of(Layers(torch.float32), mode="sequential").record()
        with torch.device("cuda"):
            owner = heads_of(Layers(torch.float32), mode="sequential")
        owner.optimizers = [torch.optim.AdamW(owner.parameters().values())]
        for p in owner.parameters().values():
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            owner.optimizers[0].state[p] = {**moments, "step": torch.ones(())}
        for parked in ({}, {1: read}):
            owner.parked = parked
            assert all(len(t) == 2 and t.device.type == "cpu" for t in to_file(_all_turns(owner)).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("reset", [False, True])
def test_heads_and_the_sums_of_their_merge_stay_on_the_device_and_never_wait(reset, rows, dtype, monkeypatch):
    monkeypatch.setattr("lowrank_pretrain.lte.view.read_stamps", lambda tensors: [0] * len(tensors))  # once a merge it may wait
    with pretend_gpu(), torch.device("cuda"):
        net = Layers(dtype)
        owner = heads_of(net, reset=reset)
        for merged in (False, True):  # from the first merge on W holds something of the heads
            with no_waiting(), autocast(None), by_hand(heads_function._HeadsLinear) as calls:
                net(torch.zeros(2, rows // 2, 16, dtype=dtype, requires_grad=True))
                gradients = [gradient for call in calls for gradient in call.backward()]
                assert len(calls) == 2 and all(g is None or g.is_cuda for g in gradients)
                heads, rest = list(owner.parameters().values()), [net.qkv.bias, net.fc.bias]
                for p in (*heads, *rest):
                    p.grad = torch.zeros_like(p)
                clip_norms(rest, heads, 1.0)
            if not merged:
                with no_waiting(), torch.no_grad():
                    exchange = owner.exchange()
                    for index, piece in enumerate(owner.pieces):
                        piece.live().copy_(exchange.updated(index))
                    for layer in owner.live_layers().values() if not reset else ():
                        layer.set_prev(*owner._given(exchange, layer))


# ---- what looks on ----------------------------------------------------------------------------------------------------------


def test_guard_clipping_and_clock_of_a_steady_step_never_wait():
    with pretend_gpu(), torch.device("cuda"):
        net = Layers(torch.float32)
        steps = SimpleNamespace(
            global_step=0, world_size=1, is_last_batch=False, accumulate_grad_batches=1, log_every_n_steps=1000,
            precision_plugin=SimpleNamespace(), strategy=None,
        )  # fmt: skip
        module = SimpleNamespace(device=torch.device("cuda"), named_parameters=net.named_parameters)
        guard, clock = FiniteGuard(loss_spike=3.0), StepClock(torch.device("cuda"))
        guard.on_train_start(steps, module)
        guard._batches = 100  # the running mean is settled
        with no_waiting() as watch:
            for _ in range(3):
                clock.start()
                for p in net.parameters():
                    p.grad = torch.zeros_like(p)
                guard.on_before_optimizer_step(steps, module, None)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                steps.global_step += 1
                guard.on_train_batch_end(steps, module, {"loss": torch.zeros(())}, None, 0)
                clock.end_batch()
                clock.end_step("full", 8, 0)
                clock.drain()
        assert watch.operations > 30
