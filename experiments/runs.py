"""Runs of a study, one after the other, each in processes of its own; one that is done is not done again.

    done(job, where) -> what it found;   run(jobs, where, world=2);   run(jobs, where, together=2) on two cores

The processes are forked from a server that has the libraries loaded already, so that a run of twenty seconds does not wait
twenty more for imports, and still has a memory of its own to be measured. LOWRANK_STUDY_START=spawn where an installed package
touches the GPU as it is imported: no fork can use the GPU then.
"""

import fcntl
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import socket
import stat
import statistics
import struct
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lowrank_pretrain.core.protocols import phase_of

PRELOAD = ["lightning.pytorch", "timm", "transformers", "torchmetrics", "lowrank_pretrain.run.train", "experiments.held_out"]
PRELOAD += ["experiments.mixers", "transformers.models.gpt2.modeling_gpt2",
            "transformers.models.llama.modeling_llama"]  # fmt: skip


@dataclass
class Job:
    """One run.

    Attributes:
        name: of its directory.
        overrides: what would stand on the command line.
        facts: what it is, for the table.
        work: ``package.module.function`` to call with (facts, run directory) instead of training; its answer is what is found.
    """

    name: str
    overrides: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    work: str = ""


class Wire(pl.Callback):
    """Bytes that this process has sent over its sockets, by the kernel's count, and its CPU time, every ten steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, int]] = []  # step, phase, bytes
        self.clock: list[float] = []  # CPU seconds so far, at each of `seen`
        self.began = self.ended = (0, 0.0)  # bytes, CPU seconds

    def on_train_start(self, *_: Any) -> None:
        """Begin to count."""
        self.began = self.ended = (sum(by_socket().values()), time.process_time())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Look once per merge and not more often: it costs a system call per socket."""
        if trainer.global_step % 10 == 0 and (not self.seen or self.seen[-1][0] != trainer.global_step):
            self.seen.append((trainer.global_step, phase_of(trainer), sum(by_socket().values())))
            self.clock.append(time.process_time())
            self.ended = (self.seen[-1][2], self.clock[-1])

    def whole_run(self) -> dict[str, float]:
        """Bytes and CPU seconds of this process from the start of training to its last step (of a multiple of ten)."""
        return {"sent": self.ended[0] - self.began[0], "train_cpu": self.ended[1] - self.began[1]}

    def per_step(self) -> dict[str, float]:
        """Mean bytes per step by phase."""
        found: dict[str, list[int]] = {}
        for (step, phase, so_far), (later, then, total) in zip(self.seen, self.seen[1:], strict=False):
            if phase == then:
                sums = found.setdefault(phase, [0, 0])
                sums[0], sums[1] = sums[0] + total - so_far, sums[1] + later - step
        return {phase: total / steps for phase, (total, steps) in found.items()}

    def cpu_per_step(self) -> dict[str, float]:
        """CPU seconds of a step by phase: the median, so that validation and a switch do not count."""
        found: dict[str, list[float]] = {}
        looks = [(step, phase, clock) for (step, phase, _), clock in zip(self.seen, self.clock, strict=True)]
        for (step, phase, clock), (later, then, end) in zip(looks, looks[1:], strict=False):
            if phase == then:
                found.setdefault(phase, []).append((end - clock) / (later - step))
        return {phase: statistics.median(some) for phase, some in found.items()}


def by_socket() -> dict[int, int]:
    """Bytes that this process has sent over each of its open TCP sockets, by the kernel's count (Linux: tcpi_bytes_sent).

    What a busy machine had to send again (tcpi_bytes_retrans, the number after it) counts once.
    """
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, again = struct.unpack_from("<QQ", info, 200)
                    found[os.fstat(fd).st_ino] = sent - again
        except OSError:  # closed meanwhile, or listening
            continue
    return found


def run(jobs: list[Job], where: Path, world: int = 1, together: int = 1) -> None:
    """Do what is not done yet, `together` runs at a time; a run that fails is named and leaves the others alone."""
    hold(where)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU any other way spoils it for forks
    context = multiprocessing.get_context(os.environ.get("LOWRANK_STUDY_START", "forkserver"))  # or spawn
    context.set_forkserver_preload(PRELOAD)
    waiting = [(number, job) for number, job in enumerate(jobs, 1) if done(job, where) is None]
    going: list[tuple[int, Job, list[Any], float]] = []
    started, ended = time.monotonic(), 0
    while waiting or going:
        while waiting and len(going) < together:
            number, job = waiting.pop(0)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            arguments = (world, port, job, where / job.name, together, os.getpid())
            ranks = [context.Process(target=_rank, args=(r, *arguments)) for r in range(world)]
            for rank in ranks:
                rank.start()
            going.append((number, job, ranks, time.monotonic()))
        wait([rank.sentinel for *_, ranks, _ in going for rank in ranks if rank.is_alive()])
        for entry in [e for e in going if not any(rank.is_alive() for rank in e[2])]:
            going.remove(entry)
            number, job, ranks, began = entry
            for rank in ranks:
                rank.join()
            found, now = done(job, where), time.monotonic()
            word = "FAILED, see its rank0.log," if found is None else found.get("diverged") or "done"
            ended, left = ended + 1, len(waiting) + len(going)
            rest = f"; {left} left of this list, about {(now - started) / ended * left / 60:.0f} min" if left else ""
            print(f"{number}/{len(jobs)} {job.name}: {word} in {now - began:.0f} s{rest}", flush=True)


_HELD: dict[Path, int] = {}  # folders that this process holds, with the open lock of each


def hold(where: Path) -> None:
    """Hold a study's folder until this process ends: two studies in one would delete each other's unfinished runs.

    Raises:
        SystemExit: another process holds it.
    """
    where = where.resolve()
    if where in _HELD:
        return
    where.mkdir(parents=True, exist_ok=True)
    lock = os.open(where / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        process = os.pread(lock, 20, 0).decode() or "another process"
        os.close(lock)
        raise SystemExit(
            f"--runs={where}: must be a folder in which no other study runs, and process {process} is at work there: wait for "
            "it, or give another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    _HELD[where] = lock


def machine() -> str:
    """What the run was on, in words."""
    import torch

    with open("/proc/cpuinfo") as file:
        name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    libraries = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.cuda.is_initialized():  # by the run itself
        name = f"{torch.cuda.get_device_name()} next to {name}"
    return f"{platform.system()}, {name}, {os.cpu_count()} cores, one thread per run, {libraries}"


def done(job: Job, where: Path) -> dict[str, Any] | None:
    """What a finished run found: its summary and the figures of ``_train``. None too where it was another run of that name."""
    path = where / job.name / "found.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    same = found.get("overrides", []) == _portable(job, where) if not job.work else found.get("facts") == job.facts
    return found if same else None


def _portable(job: Job, where: Path) -> list[str]:
    """The overrides, wherever the runs lie."""
    return [override.replace(str(where), "RUNS") for override in job.overrides]


def _end_with(study: int) -> None:
    """End this process soon after the study's: the next one would begin the same run, in the same folder."""

    def watch() -> None:
        while True:
            time.sleep(2)
            try:
                os.kill(study, 0)
            except ProcessLookupError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rank(rank: int, world: int, port: int, job: Job, run_dir: Path, together: int, study: int) -> None:
    _end_with(study)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "study",
        }  # fmt: skip
    run_dir.mkdir(parents=True, exist_ok=True)
    if rank == 0 and "ckpt_path=last" not in job.overrides:  # what a run that was cut off left
        for old in (*run_dir.glob("checkpoints/*"), *run_dir.glob("metrics.csv*"), *run_dir.glob("summary.json")):
            old.unlink(missing_ok=True)
    log = (run_dir / f"rank{rank}.log").open("w")
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    try:
        found = _train(rank, job.overrides, run_dir) if not job.work else _work(job, run_dir)
        if rank == 0:
            load = os.getloadavg()[0]
            kept = run_dir / ".found.part"
            what = {"overrides": _portable(job, run_dir.parent), "facts": job.facts, "together": together}
            kept.write_text(json.dumps({**found, **what, "machine": machine(), "load": load}, indent=1))
            kept.replace(run_dir / "found.json")  # whole or not at all: it says that the run is done
            shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)  # a hundred runs' would fill a disk
    except BaseException:
        traceback.print_exc()
        log.flush()
        os._exit(1)
    log.flush()


def _work(job: Job, run_dir: Path) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    module, _, function = job.work.rpartition(".")
    began, cpu = time.perf_counter(), time.process_time()
    found = getattr(importlib.import_module(module), function)(job.facts, run_dir)
    return {**found, "wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def _train(rank: int, overrides: list[str], run_dir: Path) -> dict[str, Any]:
    import hydra
    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    import lowrank_pretrain.run.attempt as attempt
    import lowrank_pretrain.run.train as command
    from lowrank_pretrain.core.memory import GIB, optimizer_bytes
    from lowrank_pretrain.guards.finite import Diverged

    rank_zero_only.rank = rank
    torch.set_num_threads(1)
    with hydra.initialize_config_module("lowrank_pretrain.conf", version_base="1.3"):
        cfg = hydra.compose("train", overrides)
    wire, kept = Wire(), {}
    real = attempt.build_trainer

    def build_trainer(values: Any, directory: Path, callbacks: list, *args: Any) -> pl.Trainer:
        kept["trainer"] = real(values, directory, [wire, *callbacks], *args)
        return kept["trainer"]

    attempt.build_trainer = build_trainer
    before = high_water()
    began, cpu = time.perf_counter(), time.process_time()
    try:
        summary = command.train(cfg, run_dir)
    except (Diverged, FloatingPointError) as error:  # an answer too: this learning rate is too high
        return {"diverged": f"diverged ({str(error).splitlines()[0]})"}
    trainer = kept["trainer"]
    return {
        "summary": summary, "wall": time.perf_counter() - began, "cpu": time.process_time() - cpu,
        "peak_gib": (high_water() - before) / GIB, "optimizer_mib": optimizer_bytes(trainer.optimizers) / 2**20,
        "wire": wire.per_step(), "step_cpu": wire.cpu_per_step(), **wire.whole_run(), "steps": trainer.global_step,
    }  # fmt: skip


def high_water() -> int:
    """The most memory that this process ever held, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
