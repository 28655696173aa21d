"""Two processes: the DDP hook against plain DDP, FSDP2 against one process, distributed checkpoints.

The scenarios are in galore_workers; both processes start once and run them all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import galore_workers


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("two_processes")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.galore_workers", str(rank), str(path)],
            cwd=Path(__file__).parents[1], env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    output = []
    try:
        output = [worker.communicate(timeout=170)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(text[-3000:] for text in output)
    return [torch.load(path / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("scenario", [function.__name__ for function in galore_workers.SCENARIOS])
def test_two_processes(results, scenario):
    for rank, result in enumerate(results):
        assert not result[scenario], f"rank {rank}: {result[scenario]}"
