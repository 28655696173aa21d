"""Average the parameters that belong to no target (norms, embeddings, biases, the output head), and buffers.

``sync_rest="step"``: DDP averages its gradients at every step. ``"merge"``: nothing is sent between merges. Every worker
trains its own rest, and all are averaged at a merge, parameters through the wire. Its optimizer state then differs between
workers as well: it is never averaged in training, and a checkpoint keeps each worker's.

Only buffers that training changes are averaged, and only without a DDP wrapper that broadcasts them: floating ones that
the model saves (``persistent``) and that differ between workers, as BatchNorm's statistics do. Masks, tables, constants and
equal counters stay bit for bit; so do caches, which may be longer on one worker than on another.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.bits import stamp
from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.lightning_private import tensor_norms, unsaved_buffers
from lowrank_pretrain.core.wrapped import forget, state_of
from lowrank_pretrain.lte.bare_groups import BareGroups
from lowrank_pretrain.lte.increments import Increments, add_pending
from lowrank_pretrain.lte.outer import OuterStep
from lowrank_pretrain.lte.view import read_stamps
from lowrank_pretrain.lte.workers import Workers


def not_wrapped() -> bool:
    """Return False: DDP does not broadcast buffers."""
    return False


class SharedParameters:
    """Hold the rest of a converted module: parameters and buffers that all workers share, at every step or merge.

    Args:
        module: the converted module.
        local: ids of the targets' parameters.
        left_out: names of the targets' buffers, and of tensors that the module excludes from DDP.
        workers: who merges with whom.
        sync: ``sync_rest``.
        wrapped: tells whether DDP broadcasts buffers at every step.
        wire: what the parameters travel in at a merge (``wire.WIRES``).
        keep_on: where the wire's copies lie between merges (``storage.Storage``).

    Attributes:
        parameters: the rest's, by name.
        apart: whether workers may differ between merges.
        increments: with a lossy wire, each worker's changes between merges, which it sends with error feedback.
    """

    def __init__(
        self, module: nn.Module, local: set[int], left_out: Collection[str], workers: Workers, sync: str,
        wrapped: Callable[[], bool] = not_wrapped, wire: str = "float32", keep_on: str = "device",
    ) -> None:  # fmt: skip
        self._left_out, self._local = set(left_out), local
        self.parameters = {
            n: p
            for n, p in nn.Module.named_parameters(module)
            if p.requires_grad and id(p) not in local and n not in self._left_out
        }
        self.workers, self.apart = workers, sync == "merge" and workers.size > 1
        self._module, self._wrapped = module, wrapped
        self._kept: dict[str, Tensor] | None = None  # this worker's own, while the averages are in place
        self._own: dict[str, Tensor] | None = None  # the same, after a fit
        self._seen: dict[str, int] = {}  # stamps of the averages while they are in place
        self._buffer_bytes = 0  # that the last merge averaged; before the first, what it may
        self.increments: Increments | None = None
        self._average = OuterStep()  # the plain mean
        if self.apart:
            self._buffer_bytes = sum(b.numel() * at_least_32(b.dtype).itemsize for b in self._buffers().values())
            if wire != "float32" and self.parameters:
                self.increments = Increments({n: p.detach() for n, p in self.parameters.items()}, workers, wire, keep_on)

    def follow(self, frozen: Collection[int]) -> bool:
        """Add parameters that a callback has unfrozen since, except ids in ``frozen``; return whether there were any."""
        named = nn.Module.named_parameters(self._module)
        new = {n: p for n, p in named if p.requires_grad and n not in self.parameters and n not in self._left_out}
        new = {n: p for n, p in new.items() if id(p) not in self._local and id(p) not in frozen}
        self.parameters |= new
        return bool(new)

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters to average, looked up by name: moving a module replaces storages."""
        live = dict(nn.Module.named_parameters(self._module)) if self.apart else {}
        return {name: live[name].data for name in self.parameters if name in live}

    def _buffers(self) -> dict[str, Tensor]:
        """Return floating buffers that the model saves, as of now."""
        if self.workers.size == 1 or (self._wrapped() and not self.apart):
            return {}
        return {n: b for n, b in saved_buffers(self._module) if b.is_floating_point() and n not in self._left_out}

    def _moving(self) -> dict[str, Tensor]:
        """Return the buffers that training changes: same shape on all workers, other numbers. All workers call it together."""
        if self.workers.size == 1 or (self._wrapped() and not self.apart):
            return {}
        mine = dict(sorted(self._buffers().items()))
        kinds = {n: (tuple(b.shape), str(b.dtype)) for n, b in mine.items()}
        digest = hashlib.sha256(repr(kinds).encode()).digest()
        if len({tuple(theirs) for theirs in self.workers.gather_numbers([int.from_bytes(digest[:7], "big")])}) > 1:
            everyone: list[Any] = [None] * self.workers.size
            dist.all_gather_object(everyone, kinds, group=self.workers.group)
            mine = {n: b for n, b in mine.items() if all(theirs.get(n) == kinds[n] for theirs in everyone)}
        gathered = self.workers.gather_numbers(read_stamps(list(mine.values())))
        return {n: b for i, (n, b) in enumerate(mine.items()) if any(theirs[i] != gathered[0][i] for theirs in gathered)}

    def _live(self) -> dict[str, Tensor]:
        """Return the tensors to average: those that may differ between workers. All workers call it together."""
        return self._parameters() | self._moving()

    def bytes(self) -> int:
        """Return the size of the trainable rest."""
        return sum(p.numel() * p.itemsize for p in self.parameters.values())

    def sent_per_window(self, steps: int) -> float:
        """Return the bytes that a worker sends for the rest in a window of `steps` steps (rings)."""
        share = 2 * (self.workers.size - 1) / self.workers.size
        if self.apart:
            coded = {} if self.increments is None else self.increments.base
            exact = {n: p for n, p in self.parameters.items() if n not in coded}
            own = sum(p.numel() * at_least_32(p.dtype).itemsize for p in exact.values())
            written = 0.0 if self.increments is None else self.increments.wire.sent_per_mean()
            return share * (own + self._buffer_bytes) + written
        return share * (self.bytes() * steps + self._buffer_bytes)

    @torch.no_grad()
    def merge(self) -> None:
        """Average the tensors that differ between workers."""
        moving = self._moving()
        self._buffer_bytes = sum(b.numel() * at_least_32(b.dtype).itemsize for b in moving.values())
        live = self._parameters()
        if self.increments is not None:
            # through the wire; parameters unfrozen since the start are sent uncoded
            base = self.increments.base
            mean = self.increments.mean({name: live.get(name, W) for name, W in base.items()}, overwrite=True)
            for name, increment in mean.items():
                W = self.increments.moved(name, increment, self._average)
                if name in live:
                    live.pop(name).copy_(W)
        self.workers.average([*live.values(), *moving.values()])

    @torch.no_grad()
    def agrees(self) -> bool:
        """Return whether all workers hold the same rest, as they must with ``sync_rest="step"``. All call it together."""
        live = [] if self.apart or self.workers.size == 1 else [p.detach() for p in self.parameters.values() if p.numel()]
        if not live:
            return True
        sizes = torch.stack([size.double().to(live[0].device) for size in tensor_norms(live)])
        return len({theirs[0] for theirs in self.workers.gather_numbers([int(stamp(sizes))])}) == 1

    # -- averages in place -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def swap_in(self) -> None:
        """Swap the averages in. All workers call it together."""
        if self._kept is None:
            live = self._live()
            self._kept = {name: t.clone() for name, t in live.items()}
            self.workers.average(list(live.values()), counted=False)
            self._seen = dict(zip(live, read_stamps(list(live.values())), strict=True))

    @torch.no_grad()
    def swap_in_to_write(self, writes: bool) -> None:
        """Swap the averages in on the worker that writes; the others help, a tensor at a time. All call it together."""
        if self._kept is not None:
            return
        self._kept = {}
        for name, t in self._live().items():
            mean = t.clone()
            self.workers.average([mean], counted=False)
            if writes:
                self._kept[name] = t.clone()
                t.copy_(mean)

    @property
    def averaged(self) -> bool:
        """Return whether averages are in place."""
        return bool(self._kept)

    @torch.no_grad()
    def swap_out(self) -> None:
        """Swap this worker's own tensors back in; one whose shape has changed meanwhile is left."""
        if self._kept is not None:
            for name, t in self._live_of(self._kept).items():
                if t.shape == self._kept[name].shape:
                    t.copy_(self._kept[name])
            self._kept, self._seen = None, {}

    @torch.no_grad()
    def swap_out_keeping_writes(self) -> None:
        """Swap out, and keep what anyone wrote into the averages meanwhile. All workers call it together."""
        if self._kept is None:
            return
        kept = self._kept
        same = {name: t for name, t in self._live_of(kept).items() if t.shape == kept[name].shape}
        now = [read_stamps([same[name]])[0] if name in same else 0 for name in self._seen]
        everyone = self.workers.gather_numbers(now)
        touched = [n for i, (n, was) in enumerate(self._seen.items()) if all(e[i] for e in everyone)
                   and any(e[i] != was for e in everyone)]  # fmt: skip
        seen = {name: same[name].clone() for name in touched}
        means = {name: kept[name].clone() for name in touched}
        self.workers.average(list(means.values()), counted=False)
        self.swap_out()
        for name, t in self._live_of(touched).items():
            t.add_(seen[name] - means[name])

    def _live_of(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the live tensors of these names; a buffer may be gone."""
        every = {n: p.data for n, p in nn.Module.named_parameters(self._module)} | dict(nn.Module.named_buffers(self._module))
        return {n: every[n] for n in names if n in every}

    def keep(self) -> None:
        """Keep the tensors now in place; a later checkpoint still saves each worker's own."""
        self._own, self._kept, self._seen = self._kept, None, {}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def saved_state(self, bare: Sequence[BareGroups]) -> dict[str, Any] | None:
        """Return every worker's rest, {name: [w tensors]}, and its moments, on the worker that writes; ``None``: all equal.

        All workers call it together.
        """
        mine = self._parameters() | self._buffers()
        mine |= {n: t for n, t in (self._own or self._kept or {}).items() if n in mine}
        if not self.apart and not any(theirs[0] for theirs in self.workers.gather_numbers([len(mine)])):
            return None
        flat: dict[tuple[str, ...], Tensor] = {("tensor", name): t for name, t in mine.items()}
        flat |= {("moment", name, key): v for name, key, v in self._moments(bare)} if self.apart else {}
        everyone = self.workers.to_first(flat)
        entry: dict[str, Any] = {"tensors": {}, "moments": {}, "workers": self.workers.size}
        if self.increments is not None:
            entry["errors"] = self.increments.errors()
            entry["base"] = self.increments.saved_base()
        for key, values in (everyone or {}).items():
            copies = [None if value is None else value.clone() for value in values]
            if key[0] == "tensor":
                entry["tensors"][key[1]] = copies
            else:
                entry["moments"].setdefault(key[1], {})[key[2]] = copies
        return entry

    def _moments(self, bare: Sequence[BareGroups]) -> list[tuple[str, str, Tensor]]:
        return [
            (name, key, value)
            for name, p in self.parameters.items()
            for groups in bare
            for key, value in state_of(groups.optimizer, p).items()
            if isinstance(value, Tensor)
        ]

    @torch.no_grad()
    def averaged_moments(self, saved: dict[str, Any], own: set[int]) -> dict[str, Any]:
        """Return an optimizer's state dict with the mean of every tensor over the workers that have it, for runs without LTE.

        All workers call it together; the worker that writes gets it, a tensor at a time.

        Args:
            saved: the state dict.
            own: numbers of the parameters outside the rest, whose state stays this worker's.
        """
        if not self.apart:
            return saved
        mine = {
            (n, k): v for n, s in saved["state"].items() if n not in own and isinstance(s, dict) for k, v in s.items()
            if isinstance(v, Tensor) and v.is_floating_point()
        }  # fmt: skip
        kinds: list[Any] = [None] * self.workers.size
        dist.all_gather_object(kinds, {key: (tuple(v.shape), v.dtype) for key, v in mine.items()}, group=self.workers.group)
        state = {n: dict(s) if isinstance(s, dict) else s for n, s in saved["state"].items()}
        device = next((v.device for v in mine.values() if v.ndim), torch.device("cpu"))
        for key in sorted(set().union(*kinds), key=str):
            holders = [kind[key] for kind in kinds if key in kind]
            if any(held != holders[0] for held in holders):
                continue  # of two shapes there is no mean: the writer's own stays
            shape, dtype = holders[0]
            mean = mine[key].clone() if key in mine else torch.zeros(shape, dtype=dtype, device=device)
            self.workers.average([mean], counted=False)
            if self.workers.rank == 0:
                state.setdefault(key[0], {})[key[1]] = mean if len(holders) == len(kinds) else mean * len(kinds) / len(holders)
        return {**saved, "state": state}

    @torch.no_grad()
    def agree_on_moments(self, optimizers: Iterable[Optimizer]) -> None:
        """Average the optimizer state of a rest that is to stay equal at every step; until now workers had their own.

        What not all workers have begins anew on all of them. All workers call it together.
        """
        if self.apart or self.workers.size == 1:
            return
        found = [(n, state_of(o, p)) for n, p in self.parameters.items() for o in optimizers]
        mine = {(n, k): v for n, state in found for k, v in state.items() if isinstance(v, Tensor) and v.is_floating_point()}
        kinds: list[Any] = [None] * self.workers.size
        dist.all_gather_object(kinds, {key: (tuple(v.shape), v.dtype) for key, v in mine.items()}, group=self.workers.group)
        unlike = {key[0] for key in set().union(*kinds) if any(kind.get(key) != kinds[0].get(key) for kind in kinds)}
        for optimizer in optimizers:
            for name in unlike:
                forget(optimizer, self.parameters[name])
        self.workers.average([v for key, v in sorted(mine.items()) if key[0] not in unlike])

    @torch.no_grad()
    def load_state(self, entry: Mapping[str, Any] | None) -> None:
        """Restore this worker's own rest, if the number of workers is the same; else keep the loaded average."""
        if entry is not None and self._fits(entry):
            live = {n: p.data for n, p in nn.Module.named_parameters(self._module)} | dict(
                nn.Module.named_buffers(self._module)
            )
            for name, values in entry["tensors"].items():
                value = values[self.workers.rank]
                if value is not None and name in live and live[name].shape == value.shape:
                    live[name].copy_(value)
        if entry is None or not entry.get("base"):
            return
        if self.increments is not None:
            self.increments.load(entry["base"], entry["errors"])
        elif self.workers.size == 1:  # no other worker to send the wire's pending part to
            add_pending(self.parameters, entry["base"], entry["errors"])

    @torch.no_grad()
    def load_moments(self, entry: Mapping[str, Any] | None, bare: Sequence[BareGroups]) -> None:
        """Restore its moments likewise, once the optimizers hold some."""
        if entry is None or not (self._fits(entry) and self.apart):
            return
        for name, p in self.parameters.items():
            kept = entry["moments"].get(name, {})
            for groups in bare:
                state = state_of(groups.optimizer, p)
                for key in [key for key, values in kept.items() if key in state]:
                    value = kept[key][self.workers.rank]
                    if value is None:  # this worker never trained it
                        forget(groups.optimizer, p)
                        break
                    state[key].copy_(value)

    def _fits(self, entry: Mapping[str, Any]) -> bool:
        there = entry.get("workers", len(next(iter(entry["tensors"].values()), ())))
        return self.workers.size > 1 and there == self.workers.size


def saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, buffer) of every buffer that ``state_dict`` holds."""
    lost = {
        f"{prefix}.{name}" if prefix else name for prefix, child in module.named_modules() for name in unsaved_buffers(child)
    }
    return ((name, b) for name, b in nn.Module.named_buffers(module) if name not in lost)
