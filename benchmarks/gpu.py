"""Everything that is to be known of a GPU, by one command, in 27 minutes: what is worth most comes first.

    make gpu                                                      # on a machine with one
    python benchmarks/gpu.py --device cpu --tiny                  # to try it anywhere

Each piece is a command of its own with a time limit. When it ends, its output and a record (GPU, date, seconds, what became of
it) are in ``benchmarks/results/gpu_<GPU>_<date>/``, so that a machine that is taken away leaves what was done. A piece that
cannot run says why in its line.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
MINUTES = 27
LEAST = 20  # seconds, with fewer a piece is not begun


def always() -> str | None:
    """Need nothing."""


def several_gpus() -> str | None:
    """Need two GPUs; the reason if there are not."""
    found = torch.cuda.device_count()
    return None if found > 1 else f"needs 2 GPUs, here: {found}"


def transformers() -> str | None:
    """Need transformers."""
    return None if importlib.util.find_spec("transformers") else "needs transformers: pip install transformers"


@dataclass(frozen=True)
class Piece:
    """One command.

    Attributes:
        name: of its record.
        limit: seconds.
        real: its words on a GPU; ``{out}`` is where its rows go, without an ending.
        tiny: its words to try it anywhere.
        reason: why it cannot run on this GPU, or None.
    """

    name: str
    limit: int
    real: str
    tiny: str
    reason: Callable[[], str | None] = always


LORA, GALORE, LTE, LLAMA, FACTORS = (f"{HERE.name}/{name}.py" for name in ("lora", "galore", "lte", "llama", "factorize"))
TINY_VIT = f"{LORA} --model test_vit --batch 2 --rounds 1 --threads 1"
ROWS = "--out {out}.jsonl"
VIT_L = f"{LORA} --device cuda --model vit_large_patch16_224 --batch 64"
PIECES = [
    Piece("vit_l_bf16", 180, f"{VIT_L} --precision bf16-mixed {ROWS}", f"{TINY_VIT} --precision bf16-mixed {ROWS}"),
    Piece("llama_1b", 240, f"{LLAMA} --device cuda {ROWS}", f"{LLAMA} --rounds 1 {ROWS}", transformers),
    Piece(
        "factors_vit_l", 120, f"{FACTORS} --device cuda --model vit_large_patch16_224 --batch 64 --precision bf16 {ROWS}",
        f"{FACTORS} --model test_vit --batch 2 --rounds 1 --threads 1 {ROWS}",
    ),
    Piece(
        "galore_step", 360, f"{GALORE} --device cuda --out {{out}}.csv",
        f"{GALORE} --shapes tiny --rounds 1 --no-refresh --out {{out}}.csv", transformers,
    ),
    Piece("tests", 240, "-m pytest -q -m gpu tests", "-m pytest -q tests/test_pretend_gpu.py -k notices"),
    Piece(
        "merges", 120, f"{LTE} --device cuda --parts merge --workers 2 --out {{out}}.jsonl",
        f"{LTE} --parts merge --sets vit_s --workers 2 --rounds 1 --out {{out}}.jsonl", several_gpus,
    ),
    Piece(
        "lte_steps", 120, f"{LTE} --device cuda --precision bf16 --parts step --out {{out}}.jsonl",
        f"{LTE} --parts traffic --out {{out}}.jsonl",
    ),
    Piece("vit_l_fp32", 150, f"{VIT_L} --rounds 5 --out {{out}}.jsonl", f"{TINY_VIT} --out {{out}}.jsonl"),
    Piece(
        "galore_step_vit_l", 90, f"{GALORE} --device cuda --shapes vit_l --no-memory --no-refresh --out {{out}}.csv",
        f"{GALORE} --shapes tiny --rounds 1 --no-refresh --sides ours --out {{out}}.csv",
    ),
]  # fmt: skip


def run(piece: Piece, words: list[str], seconds: float, log: Path) -> str:
    """Run a command of our Python in the repository's folder; return what became of it. Its processes end with it."""
    path = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, cwd=HERE.parent, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s: its rows so far are kept"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code == 0:
        return "done"
    said = log.read_text(errors="replace").strip().splitlines()
    return f"failed ({code}): {said[-1][:120] if said else 'it said nothing'}"


def main() -> int:
    """Run the pieces in order; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="the same pieces at sizes that say nothing")
    parser.add_argument("--pieces", nargs="+", choices=[piece.name for piece in PIECES])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all")
    parser.add_argument("--out", type=Path, help="folder of the records")
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu goes with --tiny: the real sizes take hours there")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there: --device cpu --tiny tries the command without one")
    if args.device == "cuda" and args.tiny:
        parser.error("--tiny goes with --device cpu")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    label = re.sub(r"[^a-z0-9]+", "_", machine.lower()).strip("_")
    folder = (args.out or HERE / "results" / f"gpu_{label}_{date.today()}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine, "date": str(date.today()), "torch": torch.__version__, "gpus": torch.cuda.device_count()}
    print(
        f"{about['date']} {machine}, torch {torch.__version__}; at most {args.minutes:g} minutes; records: {folder}", flush=True
    )
    end, failed = time.monotonic() + 60 * args.minutes, 0
    for piece in PIECES:
        if args.pieces and piece.name not in args.pieces:
            continue
        began, words = time.monotonic(), (piece.tiny if args.tiny else piece.real).format(out=folder / piece.name).split()
        left = end - began
        reason = None if args.tiny else piece.reason()
        if reason is not None:
            result = f"not run: {reason}"
        elif left < min(LEAST, piece.limit):
            result = f"not run: the {args.minutes:g} minutes are over"
        else:
            result = run(piece, words, min(left, piece.limit), folder / f"{piece.name}.log")
        failed += result.startswith("failed")
        record = about | {
            "piece": piece.name,
            "command": words,
            "result": result,
            "seconds": round(time.monotonic() - began, 1),
        }
        (folder / f"{piece.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{piece.name:20}{record['seconds']:7.1f} s  {result}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
