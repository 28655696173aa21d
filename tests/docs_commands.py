"""Run a documented command as its own process that need not import everything again: forked from a server that has."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

PRELOADED = [
    "lightning.pytorch",
    "timm",
    "transformers",
    "torchmetrics",
    "torchvision",
    "lowrank_pretrain",
    "tests.docs_commands",
]


def run_here(argv: list[str], folder: Path, env: dict[str, str], log: Path) -> None:
    """Become the command: its folder, variables, output and words."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = argv
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(folder))
        runpy.run_path(argv[0], run_name="__main__")


class Command:
    """A started command; it may be one that starts itself again by its own command line (several processes)."""

    def __init__(self, words: list[str], folder: Path, env: dict[str, str], log: Path, again: bool) -> None:
        self.words, self.log = words, log
        if again or words[0] != "python":
            start = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
            with log.open("w") as out:
                args = [sys.executable, *start, *words[1:]]
                self.process = subprocess.Popen(
                    args, cwd=folder, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
                )
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(PRELOADED)
            self.process = context.Process(target=run_here, args=(words[1:], folder, env, log))
            self.process.start()

    def finish(self, seconds: float) -> str:
        """Wait for its end and return what it printed; an exit code other than 0 fails."""
        if isinstance(self.process, subprocess.Popen):
            code = self.process.wait(seconds)
        else:
            self.process.join(seconds)
            code = self.process.exitcode
        printed = self.log.read_text()
        assert code == 0, f"{code}: {' '.join(self.words)}\n{printed[-4000:]}"
        return printed
