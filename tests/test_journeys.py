"""Short paths: a reader of a step, a switch or a set-up opens few files, in few rooms.

Files are counted, not seconds: which files of the package are entered while something runs on a tiny model.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_pretrain
from lowrank_pretrain import GaLoreAdamW, LTEStrategy, PreLoRA
from lowrank_pretrain.galore import galore_param_groups
from tests.toy import loader, toy, trainer

PACKAGE = Path(lowrank_pretrain.__file__).parent


@contextmanager
def journey() -> Iterator[set[str]]:
    """Collect the files of the package that are entered, by their path in it.

    A class or module body is no journey: only calls of functions count.
    """
    files: set[str] = set()
    root = f"{PACKAGE}/"

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root) and frame.f_code.co_name != "<module>":
            files.add(frame.f_code.co_filename.removeprefix(root))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(before)


def rooms(files: set[str]) -> set[str]:
    return {file.partition("/")[0] for file in files}


def on_journey(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], Any, Any]]:
    """Have each call of a method noted: the files entered, and the phase before and after it."""
    taken: list[tuple[set[str], Any, Any]] = []
    plain: Callable[..., Any] = getattr(owner, name)

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = self.phase
        with journey() as files:
            result = plain(self, *args, **kwargs)
        taken.append((files, before, self.phase))
        return result

    monkeypatch.setattr(owner, name, watched)
    return taken


def test_the_batch_end_that_decides_and_switches_is_ten_files_in_five_rooms(tmp_path, monkeypatch):
    taken = on_journey(PreLoRA, "on_train_batch_end", monkeypatch)
    when = PreLoRA(ranks=(2, 4), window=2, window_unit="step", windows=2, latest=3, warmup=1, loss_tol=1e-6)
    trainer(tmp_path, when, max_epochs=3).fit(toy(), loader())
    (switch,) = [files for files, before, after in taken if (before, after) == ("full", "joint")]
    (freeze,) = [files for files, before, after in taken if (before, after) == ("joint", "lowrank")]
    assert len(switch) <= 10 and len(rooms(switch)) <= 5, " ".join(sorted(switch))
    assert len(freeze) <= 9, " ".join(sorted(freeze))


def test_a_steady_galore_step_is_five_files():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    optimizer = GaLoreAdamW(galore_param_groups(model, rank=2), update_proj_gap=100)
    for _ in range(3):
        model(torch.ones(4, 8)).sum().backward()
        with journey() as files:
            optimizer.step()
        optimizer.zero_grad()
    assert len(files) <= 5, sorted(files)


@pytest.mark.xfail(strict=True, reason="each part of the converted module is a file of its own: twice as many")
def test_the_set_up_of_lte_is_twelve_files(tmp_path, monkeypatch):
    taken = on_journey(LTEStrategy, "setup", monkeypatch)
    trainer(tmp_path, strategy=LTEStrategy(rank=2, heads=2, merge_every=2), max_steps=1).fit(toy(), loader())
    ((files, *_),) = taken
    assert len(files) <= 12, sorted(files)


def test_the_command_line_imports_twelve_siblings():
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / "run" / "train.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowrank_pretrain"):
            whole = (PACKAGE / node.module.replace(".", "/").removeprefix("lowrank_pretrain/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if whole else {node.module}
    assert len(found) <= 12, sorted(found)
