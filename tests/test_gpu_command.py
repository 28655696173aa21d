"""``make gpu`` in its tiny form: a piece ends with its record, and one whose time is over says so."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_piece_writes_its_record_and_one_without_time_says_so(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--pieces", "llama_1b"]
    subprocess.run([*command, "--minutes", "0"], cwd=ROOT, check=True, capture_output=True)
    record = json.loads((tmp_path / "llama_1b.json").read_text())
    assert "minutes are over" in record["result"] and record["machine"] and record["date"]
