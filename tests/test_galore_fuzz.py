"""Random shapes, layouts, dtypes, devices and modes: no draw ends in a signal, and no finite weight becomes NaN."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(seed, draws):
    done = subprocess.run(
        [sys.executable, "-m", "tests.galore_fuzz", str(seed), str(draws)], cwd=Path(__file__).parents[1],
        capture_output=True, text=True,
    )  # fmt: skip
    tail = "\n".join(done.stdout.splitlines()[-3:]) + done.stderr[-2000:]
    assert done.returncode == 0, f"code {done.returncode} after draw {tail}"
    whole = int(done.stdout.split()[-1])
    assert whole > draws // 3, f"only {whole} of {draws} draws came to their end"  # else it tries nothing


def test_60_draws():
    run(0, 60)


@pytest.mark.slow
def test_2000_draws():
    run(1, 2000)
