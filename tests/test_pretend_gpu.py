"""No operation on mixed devices and no wait for the device, on a GPU that torch pretends (``tests/pretend_gpu.py``)."""

import itertools

import pytest
import torch
from torch import nn

from lowrank_pretrain.galore import GaLoreAdamW
from tests.pretend_gpu import Waits, no_waiting, pretend_gpu

# ---- the optimizer: every mode. A new mode joins by a line here ---------------------------------------------------------

SIDES = ["std", "reverse_std", "left", "right", "full"]
MODES = [
    *({"refresh": refresh, "proj_type": side} for refresh, side in itertools.product(("subspace", "track", "svd"), SIDES)),
    *({"residual": "fira", "refresh": refresh} for refresh in ("subspace", "track", "svd")),
    {"residual": "fira", "moments": "grad"},
    {"variant": "apollo"}, {"variant": "apollo", "rank": 1}, {"variant": "apollo", "moments": "grad"},
    {"refresh": "svd", "rotate_moments": False, "stagger": False},
    {"moments": "grad"}, {"rotate_moments": False}, {"correct_bias": False}, {"weight_decay": 0.0},
    {"layerwise": True}, {"layerwise": True, "residual": "fira"}, {"layerwise": True, "variant": "apollo"},
    {"layerwise": True, "refresh": "track"},
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
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.zeros(3)
