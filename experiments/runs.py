"""Runs of a study, one after the other, each in processes of its own; one that is done is not done again.

    done(job, where) -> what it found;   run(jobs, where, world=2)

The processes are forked from a server that has the libraries loaded already, so that a run of twenty seconds does not wait
twenty more for imports, and still has a memory of its own to be measured.
"""

import json
import multiprocessing
import os
import socket
import stat
import struct
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

PRELOAD = ["lightning.pytorch", "timm", "transformers", "torchmetrics", "lowrank_pretrain.train", "experiments.held_out"]


@dataclass
class Job:
    """One run.

    Attributes:
        name: of its directory.
        overrides: what would stand on the command line.
        facts: what it is, for the table.
    """

    name: str
    overrides: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


class Wire(pl.Callback):
    """Bytes that this process has sent over its sockets, by the kernel's count, at the end of each epoch and phase."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, int]] = []  # step, phase, bytes

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Look once per merge and not more often: it costs a system call per socket."""
        if trainer.global_step % 10 == 0 and (not self.seen or self.seen[-1][0] != trainer.global_step):
            self.seen.append((trainer.global_step, phase_of(trainer), sent()))

    def per_step(self) -> dict[str, float]:
        """Mean bytes per step by phase."""
        found: dict[str, list[int]] = {}
        for (step, phase, so_far), (later, then, total) in zip(self.seen, self.seen[1:], strict=False):
            if phase == then:
                sums = found.setdefault(phase, [0, 0])
                sums[0], sums[1] = sums[0] + total - so_far, sums[1] + later - step
        return {phase: total / steps for phase, (total, steps) in found.items()}


def phase_of(trainer: pl.Trainer) -> str:
    """``full``, ``joint`` or ``lowrank``."""
    phases = [callback.phase for callback in trainer.callbacks if hasattr(callback, "switch_step")]
    return (phases or [getattr(trainer.strategy, "phase", "full")])[0]


def sent() -> int:
    """Bytes sent over this process's TCP sockets (Linux: tcpi_bytes_sent)."""
    total = 0
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    total += struct.unpack_from("<Q", copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200)[0]
        except OSError:  # no socket, or closed meanwhile
            continue
    return total


def run(jobs: list[Job], where: Path, world: int = 1) -> None:
    """Do what is not done yet; a run that fails is named and leaves the others alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    for number, job in enumerate(jobs, 1):
        if (where / job.name / "found.json").is_file():
            continue
        began = time.monotonic()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = [context.Process(target=_rank, args=(r, world, port, job.overrides, where / job.name)) for r in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        good = (where / job.name / "found.json").is_file()
        took = f"{time.monotonic() - began:.0f} s"
        print(f"{number}/{len(jobs)} {job.name}: {'done' if good else 'FAILED, see its rank0.log,'} in {took}", flush=True)


def done(job: Job, where: Path) -> dict[str, Any] | None:
    """What a finished run found: its summary and the figures of ``_rank``."""
    path = where / job.name / "found.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _rank(rank: int, world: int, port: int, overrides: list[str], run_dir: Path) -> None:
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "study",
        }  # fmt: skip
    run_dir.mkdir(parents=True, exist_ok=True)
    if rank == 0:  # what a run that was cut off left
        for old in (*run_dir.glob("checkpoints/*"), *run_dir.glob("metrics.csv*"), *run_dir.glob("summary.json")):
            old.unlink(missing_ok=True)
    log = (run_dir / f"rank{rank}.log").open("w")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    try:
        _train(rank, overrides, run_dir)
    except BaseException:
        traceback.print_exc()
        log.flush()
        os._exit(1)
    log.flush()


def _train(rank: int, overrides: list[str], run_dir: Path) -> None:
    import hydra
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    import lowrank_pretrain.train as command
    from lowrank_pretrain.memory import GIB, optimizer_bytes

    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    with hydra.initialize_config_module("lowrank_pretrain.conf", version_base="1.3"):
        cfg = hydra.compose("train", overrides)
    wire, kept = Wire(), {}
    real = command.build_trainer

    def build_trainer(values: Any, directory: Path, callbacks: list, *args: Any) -> pl.Trainer:
        kept["trainer"] = real(values, directory, [wire, *callbacks], *args)
        return kept["trainer"]

    command.build_trainer = build_trainer
    before = _high_water()
    began, cpu = time.perf_counter(), time.process_time()
    summary = command.train(cfg, run_dir)
    trainer = kept["trainer"]
    found = {
        "summary": summary, "wall": time.perf_counter() - began, "cpu": time.process_time() - cpu,
        "peak_gib": (_high_water() - before) / GIB, "optimizer_mib": optimizer_bytes(trainer.optimizers) / 2**20,
        "wire": wire.per_step(), "steps": trainer.global_step, "overrides": overrides,
    }  # fmt: skip
    if rank == 0:
        (run_dir / "found.json").write_text(json.dumps(found, indent=1))


def _high_water() -> int:
    """The most memory that this process ever held, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
