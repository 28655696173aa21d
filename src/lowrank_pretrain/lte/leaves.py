"""Find the contents of a batch in any container: tensors, arrays, texts and numbers, one after the other."""

import hashlib
import inspect
import itertools
import pickle
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ATOMS = (str, bytes, bytearray, bool, int, float, complex, type(None))
_END = object()


def leaves(batch: Any) -> Iterator[Any]:
    """Yield everything in a batch that is not a container, in the containers' order.

    Mappings, sequences and sets, data classes, and objects that hold things in attributes (graphs, batch classes of the
    user's own). An object that is met twice counts once. Nothing that can be used up (an iterator) is touched.
    """
    pending, met = [iter((batch,))], {}
    while pending:
        item = next(pending[-1], _END)
        if item is _END:
            pending.pop()
        elif isinstance(item, (Tensor, np.ndarray, np.generic, *ATOMS)):
            yield item
        elif id(item) not in met:
            met[id(item)] = item  # held, so that no other takes its number
            inside = _inside(item)
            if inside is None:
                yield item
            else:
                pending.append(iter(inside))


def _inside(item: Any) -> Iterable[Any] | None:
    """Return a container's contents; ``None`` if the item is not a container."""
    if isinstance(item, Mapping):
        return (item[key] for key in sorted(item, key=str))
    if isinstance(item, (list, tuple, deque)):
        return item
    if isinstance(item, (set, frozenset)):
        return sorted(item, key=repr)
    if isinstance(item, (type, Iterator, nn.Module)) or inspect.isroutine(item):
        return None
    slots = [name for kind in type(item).__mro__ for name in _slots(kind)]
    held = [getattr(item, name) for name in slots if hasattr(item, name)]
    held += list(vars(item).values()) if hasattr(item, "__dict__") else []
    return held or None


def _slots(kind: type) -> list[str]:
    names = kind.__dict__.get("__slots__", ())
    names = [names] if isinstance(names, str) else list(names)
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def digest(batch: Any) -> str:
    """Return a hash that is the same for equal batches.

    Tensors, arrays and texts decide where there are any. Numbers that stand alone (a temperature, a rank, the time of day)
    say nothing about the samples, so they count only if there is nothing else.
    """
    found, alone = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
    samples = 0
    for leaf in leaves(batch):
        number = isinstance(leaf, (bool, int, float, complex, np.generic)) or getattr(leaf, "ndim", None) == 0
        content = _bytes(leaf)
        samples += not number and bool(content)
        (alone if number else found).update(len(content).to_bytes(8, "big") + content)
    return (found if samples else alone).hexdigest()


def _bytes(leaf: Any) -> bytes:
    """Return a leaf's content as bytes, or its class's name if the content cannot be read."""
    if isinstance(leaf, (bytes, bytearray)):
        return bytes(leaf)
    if isinstance(leaf, str):
        return leaf.encode(errors="surrogatepass")
    if leaf is None:
        return b""
    try:
        if isinstance(leaf, Tensor):
            return _tensor_bytes(leaf)
        if isinstance(leaf, np.ndarray) and leaf.dtype != object:
            return f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes()
        return pickle.dumps(leaf)
    except Exception:  # any class may raise: not a reason to stop a training run
        return type(leaf).__qualname__.encode()


def _tensor_bytes(t: Tensor) -> bytes:
    """Return the bits of a tensor of any layout and type, with its shape."""
    t = t.detach()
    if t.is_nested:
        return b"".join(_tensor_bytes(part) for part in t.unbind())
    if t.layout == torch.sparse_coo:
        t = t.coalesce()
        return _tensor_bytes(t.indices()) + _tensor_bytes(t.values())
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return b"".join(map(_tensor_bytes, (t.crow_indices(), t.col_indices(), t.values())))
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return b"".join(map(_tensor_bytes, (t.ccol_indices(), t.row_indices(), t.values())))
    if t.layout != torch.strided:
        t = t.to_dense()
    if t.is_quantized:
        t = t.dequantize()
    flat = t.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return f"{t.dtype}{tuple(t.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()


def batch_size(batch: Any, looked_at: int = 64) -> int:
    """Return how many samples a batch holds: the first dimension shared by more than half of its tensors; 0 if none.

    Args:
        batch: a batch of any kind.
        looked_at: leaves after which to stop: it is called at every step.
    """
    some = list(itertools.islice(leaves(batch), looked_at))
    sizes = Counter(leaf.shape[0] for leaf in some if isinstance(leaf, Tensor) and not leaf.is_nested and leaf.ndim)
    size, times = sizes.most_common(1)[0] if sizes else (0, 0)
    return size if 2 * times > sizes.total() else 0
