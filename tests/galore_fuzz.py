"""Random shapes, layouts, dtypes, devices and modes for GaLoreAdamW, in a process of its own: none may end in a signal.

``python -m tests.galore_fuzz SEED DRAWS``. Each draw makes an optimizer, steps, changes something, steps, saves, loads, steps.
Errors are fine where they are one of Python's; weights that are finite must stay so.
"""

import copy
import random
import sys
import warnings

import torch
from torch import nn

from lowrank_pretrain.galore import GaLoreAdamW

SHAPES = [(), (1,), (0,), (7,), (300,), (0, 4), (4, 0), (1, 1), (1, 9), (9, 1), (8, 12), (12, 8), (80, 64), (16, 3, 3, 3),
          (4, 6, 5), (2, 1, 3, 1), (2, 3, 2, 3, 2)]  # fmt: skip
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
SETTINGS = {
    "refresh": ["subspace", "subspace", "track", "svd"], "rotate_moments": [True, True, False], "stagger": [True, False],
    "proj_type": ["std", "reverse_std", "left", "right", "full"], "moments": ["auto", "float32", "grad", "8bit"],
    "residual": [None, None, "fira", "muon"], "variant": ["galore", "galore", "galore", "apollo"], "update_proj_gap": [1, 2, 5],
    "layerwise": [False, False, True], "correct_bias": [True, True, False], "eps": [1e-6, 1e-8], "weight_decay": [0.0, 0.1],
    "rank": [1, 2, 4, None],
}  # fmt: skip


def lay(t, how, rng):
    """The same numbers in another layout."""
    if how == "permuted" and t.ndim > 1:
        order = rng.sample(range(t.ndim), t.ndim)
        return t.permute(order).contiguous().permute([order.index(i) for i in range(t.ndim)])
    if how == "strided":
        wide = torch.zeros((*t.shape, 3), dtype=t.dtype, device=t.device)
        wide[..., 1] = t
        return wide[..., 1]
    if how == "expanded" and t.ndim:
        return t[:1].expand(t.shape) if t.shape[0] else t
    if how == "offset":
        return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)
    if how == "channels_last" and t.ndim == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t


LAYOUTS = ["plain", "permuted", "strided", "offset", "channels_last"]


def gradient(p, rng):
    """One of a random size and layout; now and then none, of another shape's memory, or sparse."""
    size = rng.choice([*[1.0] * 40, *[1e-25, 1e20, 1e36, 0.0] * 3, float("nan")])
    grad = torch.randn(p.shape, dtype=torch.float64).mul(size).to(p.device, p.dtype)
    if rng.random() < 0.01 and p.ndim == 2 and p.numel():
        return grad.to_sparse()
    return None if rng.random() < 0.1 else lay(grad, rng.choice([*LAYOUTS, "expanded"]), rng)


def change(optimizer, params, rng):
    """Something that a user may do to an optimizer between two steps."""
    group, p = rng.choice(optimizer.param_groups), rng.choice(params)
    what = rng.choice(["nothing", "setting", "lr", "dtype", "resize", "replace", "layout", "drop", "late", "copy", "lists"])
    if what == "setting":
        key = rng.choice(list(SETTINGS))
        group[key] = rng.choice(SETTINGS[key])
    elif what == "lr":
        group["lr"] = rng.choice([torch.tensor(1e-3), 1e-3, float("nan"), 0.0])
    elif what == "dtype":
        p.grad, p.data = None, p.data.to(rng.choice(DTYPES))
    elif what == "resize":
        p.grad, p.data = None, torch.randn([n + rng.choice([-1, 1, 5]) if n > 1 else n for n in p.shape], dtype=p.dtype)
    elif what == "replace" and group["params"]:
        optimizer.state.pop(group["params"][0], None)  # torch's state_dict takes no state of a parameter that is in no group
        group["params"][0] = params[0] = nn.Parameter(torch.randn(rng.choice(SHAPES)))
    elif what == "layout":
        p.grad, p.data = None, lay(p.data, rng.choice(LAYOUTS), rng)
    elif what == "drop":
        optimizer.state.pop(p, None)
    elif what == "late":
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(rng.choice(SHAPES)))], "rank": rng.choice([None, 2])})
    elif what == "copy":
        optimizer.__setstate__(copy.deepcopy(optimizer).__getstate__())
    elif what == "lists" and group["params"]:
        optimizer.state.pop(group["params"][-1], None)
        group["params"] = group["params"][:-1]


def damage(state, rng):
    """Now and then a file that is not what it should be."""
    if rng.random() < 0.2 and state["state"]:
        one = rng.choice(list(state["state"].values()))
        if one:
            key = rng.choice(list(one))
            one[key] = rng.choice(
                [torch.zeros(2, 2), torch.zeros(3, dtype=torch.uint8), one[key].double(), torch.zeros(()), None]
            )
    if rng.random() < 0.2:
        group = rng.choice(state["param_groups"])
        group.pop(rng.choice(list(group)), None)
    return state


def draw(rng):
    """One life of an optimizer. Returns whether it came to its end without an error."""
    dtype = rng.choice(DTYPES)
    device = rng.choice(["cpu"] * 40 + ["meta"])
    settings = {key: rng.choice(values) for key, values in SETTINGS.items() if rng.random() < 0.4}
    params = [
        nn.Parameter(lay(torch.randn(rng.choice(SHAPES)).to(device, dtype), rng.choice(LAYOUTS), rng))
        for _ in range(rng.randint(1, 4))
    ]
    groups = []
    for p in params:
        ranked = rng.random() < 0.7 and (p.ndim > 1 and p.numel() > 0 or rng.random() < 0.02)
        groups.append({"params": [p], **({"rank": rng.choice([1, 2, 4])} if ranked else {})})
    settings.pop("rank", None)
    optimizer = GaLoreAdamW(groups, lr=1e-2, **settings)
    around = rng.choice([torch.no_grad, torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu")])
    for step in range(rng.randint(2, 6)):
        before = [p.isfinite().all() if not p.is_meta else None for p in params]
        for p in params:
            p.grad = gradient(p, rng)
        with around():
            optimizer.step()
        for p, was in zip(params, before, strict=True):
            if was is not None and was and p.dtype != torch.float16:
                assert p.isfinite().all(), f"a weight is not finite after {settings}"
        if step == 1:
            change(optimizer, params, rng)
        if step == 2:
            optimizer.load_state_dict(damage(copy.deepcopy(optimizer.state_dict()), rng))
    return True


def main(seed, draws):
    """Print each draw's number before it begins, so that one that ends in a signal is known."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    whole = 0
    for number in range(draws):
        print(number, flush=True)
        rng = random.Random(f"{seed}/{number}")
        torch.manual_seed(number)
        try:
            whole += draw(rng)
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001 - any error is fine that is no signal
            kind = type(error).__name__
            print(number, kind, str(error)[:200].replace("\n", " "), flush=True)
    print("whole", whole)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
