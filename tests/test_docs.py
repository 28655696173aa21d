"""What README and the site say is so: their Python runs, their commands compose, and (``make docs-test``) run, shortened.

A page is one session. Its blocks:

- ``python``: executed here in their order, in one namespace, with a Trainer that is quiet and brief.
- ``python title="X.py"``: written to X.py; a later command runs it.
- ``sh``: commands, one a line; with ``nodes``, all lines at the same time. "You see" and a quotation after the block say what
  they print; "…" stands for anything.
- ``{ .python }``: included from a file that another test runs.
"""

import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module

from lowrank_pretrain.run import train  # noqa: F401  it makes sweep=tuned known to Hydra
from tests.docs_commands import Command

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
BRIEF = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "limit_train_batches": 1,
}  # fmt: skip
# Appended to a command that trains.
SHORT = ["trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1",
         "trainer.accelerator=cpu", "data.num_workers=0"]  # fmt: skip
# What a reader would type, and what the test does in its place.
SHORTER = {
    "trainer.max_epochs=30": "trainer.max_epochs=3",
    "method.latest=10": "method.latest=1",
    "hydra.sweeper.n_trials=20": "hydra.sweeper.n_trials=2",
    "experiment=prelora_vitl": "experiment=prelora_vitl +model.model_kwargs.depth=1",
}
# Needs a cluster, data that is not here, or an account: composed only.
ELSEWHERE = ("submitit_slurm", "/data", "ENTITY", "srun")


class Block(NamedTuple):
    """One fenced block: its language, what follows that in the same line, its lines, and the prose after it."""

    language: str | None
    options: str
    text: str
    after: str

    @property
    def title(self) -> str | None:
        named = re.search(r'title="([^"]+)"', self.options)
        return named and named[1]


def blocks(page: str) -> list[Block]:
    parts = re.split(r"^```(\w+)?([^\n]*)\n(.*?)^```$", PAGES[page].read_text(), flags=re.M | re.S)
    return [Block(*parts[i : i + 4]) for i in range(1, len(parts), 4)]


def commands(page: str) -> list[str]:
    return [
        line
        for block in blocks(page)
        if block.language == "sh"
        for line in block.text.splitlines()
        if line[:1] not in ("#", "")
    ]


def own(page: str) -> list[str]:
    """Python that is run here."""
    return [b.text for b in blocks(page) if b.language == "python" and not b.title]


def test_every_block_is_of_a_known_kind():
    known = {"python", "sh", "text", None}
    assert {(page, b.language) for page in PAGES for b in blocks(page) if b.language not in known} == set()
    assert len(PAGES["README.md"].read_text().splitlines()) <= 150


def test_every_link_leads_somewhere():
    """``make docs`` is stricter, but needs the generator; pages that it makes itself are linked to here by name."""
    made = {"docs/reference/configuration.md"}
    for page, path in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.S)):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            if "://" in link or os.path.relpath(target, ROOT) in made:
                continue
            assert target.exists(), (page, link)
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w]+", "-", title.lower()).strip("-") for title in titles}, (page, link)


@pytest.mark.parametrize("page", [page for page in PAGES if own(page)])
def test_python_runs(page, monkeypatch, tmp_path):
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(L, "Trainer", functools.partial(L.Trainer, **BRIEF))
    names, strategies = {"__name__": "page"}, []
    for snippet in own(page):
        exec(compile(snippet, page, "exec"), names)
        strategies.append(type(getattr(names.get("trainer"), "strategy", None)).__name__)
    if page == "README.md":
        assert strategies[-1] == "LTEStrategy"
    if page == "docs/tutorials/galore.md":
        assert strategies[-1] == "ModelParallelStrategy"
        model, optimizer = names["model"], names["optimizer"]
        torch.nn.functional.cross_entropy(model(torch.randn(2, 32)), torch.arange(2)).backward()
        optimizer.step()
        assert {"proj", "exp_avg"} <= set(optimizer.state[model[0].weight])


def words(command: str) -> list[str]:
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    return shlex.split(command)


def overrides(command: str) -> list[str] | None:
    """What a command that trains gives to Hydra, the first value of a sweep; None for any other command."""
    found = re.search(r"-m lowrank_pretrain( |$)(.*)", command)
    if not found or "--version" in command:
        return None
    given = [word for word in shlex.split(found[2]) if not word.startswith("-") and word != "job"]
    return [word if re.search(r"[\[{(]", word) else word.partition(",")[0] for word in given]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_ones_that_there_are(page):
    makefile, pyproject = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    with initialize_config_module("lowrank_pretrain.conf", version_base="1.3"):
        for command in commands(page):
            first = command.split()[0]
            if (given := overrides(command)) is not None:
                compose("train", overrides=given)
            elif first == "make":
                assert re.search(rf"^{command.split()[1]}: ", makefile, re.M), command
            elif first == "pip":
                for extra in re.findall(r"[\w]+", "".join(re.findall(r"\[(.*?)\]", command))):
                    assert re.search(rf"^{extra} = \[", pyproject, re.M), command
            else:
                assert first in ("python", "git", "cd", "#!/bin/bash"), command


# ---- make docs-test -----------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """What the pages call ``pictures`` and ``texts``."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / "pictures" / name / f"{i}.png")
    (folder / "texts").mkdir()
    for i in range(4):
        lines = (" ".join(draw.choice("in the beginning was a word and some more".split(), 12)) for _ in range(400))
        (folder / "texts" / f"{i}.txt").write_text("\n".join(lines))
    (folder / "examples").symlink_to(ROOT / "examples")


def argv(command: str) -> list[str] | None:
    """The words of the command as this test runs it; None if it only looks at it."""
    if any(word in command for word in ELSEWHERE) or command.split()[0] in ("make", "pip", "git", "cd", "#!/bin/bash"):
        return None
    given = [word.replace("=HOST", "=127.0.0.1") for word in words(command)]
    return [*given, *(SHORT if overrides(command) is not None and "--cfg" not in command else [])]


def run_block(block: Block, folder: Path, env: dict[str, str]) -> str:
    """Run a block's commands; returns what they print."""
    printed, running = "", []
    for command in block.text.splitlines():
        if args := argv(command):
            log = folder / f"log-{len(list(folder.glob('log-*')))}"
            log.touch()
            running.append(Command(args, folder, env, log, again="trainer.devices=2" in command or "lte.py" in command))
            if "nodes" not in block.options:
                printed += running.pop().finish(900)
    return printed + "".join(one.finish(900) for one in running)


@pytest.mark.docs
@pytest.mark.parametrize("page", [page for page in PAGES if any(argv(command) for command in commands(page))])
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    make_data(tmp_path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline", "COLUMNS": "200"}
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).write_text(block.text)
            if block.language == "sh":
                subprocess.run(["bash", "-n", block.title], cwd=tmp_path, check=True)
        elif block.language == "sh":
            printed = " ".join(run_block(block, tmp_path, env).split())
            if said := re.match(r"\s*You see `([^`]+)`", block.after):
                for part in said[1].split("…"):
                    assert " ".join(part.split()) in printed, (said[1], printed[-2000:])
    if page == "docs/use/timm.md":
        assert_all_metrics_are_named(tmp_path)


def assert_all_metrics_are_named(folder: Path) -> None:
    """Every column of a run's metrics.csv is in the page of metrics, and its summary has what the run directory's page says."""
    page = PAGES["docs/reference/metrics.md"].read_text()
    patterns = [re.escape(name).replace(r"\*", ".*") for name in re.findall(r"`([\w/*]+)`", page)]
    columns = (folder / "runs/vit/metrics.csv").read_text().splitlines()[0].split(",")
    unnamed = [column for column in columns if not any(re.fullmatch(pattern, column) for pattern in patterns)]
    assert set(unnamed) <= {"step", "epoch"}
    assert {"phases", "plan", "final", "switch_step", "freeze_step"} <= json.loads(
        (folder / "runs/vit/summary.json").read_text()
    ).keys()


def test_the_site_can_describe_every_key_and_find_every_record(monkeypatch):
    """``docs/hooks.py`` without the generator, which only ``make docs`` installs."""
    taken = []
    for name, has in {"mkdocs.config.defaults": "MkDocsConfig", "mkdocs.structure.files": "File Files",
                      "mkdocs.structure.pages": "Page"}.items():  # fmt: skip
        for parent in ("mkdocs", name.rpartition(".")[0], name):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        for word in has.split():
            setattr(sys.modules[name], word, lambda *args: taken.append(args[0]))
    sys.modules["mkdocs.structure.files"].File.generated = lambda *args, **kwargs: None
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.configuration()
    for file in (ROOT / "conf" / "method").glob("*.yaml"):
        assert f"### `method={file.stem}`" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| `ns_steps` |")]
    assert "`int`" in row and "Newton-Schulz" in row
    hooks.on_files([], {"site_dir": "site", "use_directory_urls": False})
    assert taken and all((ROOT / file).is_file() for file in taken)
    assert "benchmarks/results/gpu_h100.md" in taken
