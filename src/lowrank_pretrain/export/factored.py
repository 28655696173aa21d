"""Write factored layers as two plain linear layers each, next to the dense export, as ``factored.safetensors``.

A layer ``fc1`` with W = U V has ``fc1.V.weight`` (k, D), ``fc1.U.weight`` (O, k) and ``fc1.U.bias``. Any network of the
architecture can load them without this package (torch 2.5 or later)::

    state = load_file("factored.safetensors")
    for name in [key.removesuffix(".V.weight") for key in state if key.endswith(".V.weight")]:
        (rank, cols), (rows, _) = state[name + ".V.weight"].shape, state[name + ".U.weight"].shape
        pair = {"V": nn.Linear(cols, rank, bias=False), "U": nn.Linear(rank, rows, bias=name + ".U.bias" in state)}
        network.set_submodule(name, nn.Sequential(OrderedDict(pair)))
    network.load_state_dict(state)
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FILE = "factored.safetensors"
_PARTS = ("W", "q", "k", "v")  # in the order of their rows


def factored_names(exact: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the factored layers among a checkpoint's exact values."""
    return [key.removesuffix(".factor_V") for key in exact if key.endswith(".factor_V")]


def write_factors(state: Mapping[str, Tensor], exact: Mapping[str, Tensor], out: Path, prefix: str) -> Path:
    """Write ``factored.safetensors``.

    Args:
        state: merged weights by name.
        exact: a checkpoint's exact values.
        out: the folder.
        prefix: of the names in both, left out in the file.
    """
    written = dict(state)
    for name in factored_names(exact):
        del written[f"{name}.weight"]
        blocks = [exact[key] for part in _PARTS if (key := f"{name}.factor_U.{part}") in exact]
        written[f"{name}.V.weight"] = exact[f"{name}.factor_V"]
        written[f"{name}.U.weight"] = torch.block_diag(*blocks)  # separately factored parts, with zeros between them
        if f"{name}.bias" in written:
            written[f"{name}.U.bias"] = written.pop(f"{name}.bias")
    # copies: safetensors refuses tensors that share memory, as tied weights do
    save_file({key.removeprefix(prefix): value.clone().contiguous() for key, value in written.items()}, path := out / FILE)
    return path
