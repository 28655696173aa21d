"""The README's Python, executed as it stands and in order, with a Trainer that is quiet and brief."""

import functools
import re
from pathlib import Path

import lightning as L
import pytest
import torch

BRIEF = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "limit_train_batches": 1,
}  # fmt: skip


def test_the_snippets_run(monkeypatch):
    pytest.importorskip("timm")
    monkeypatch.setattr(L, "Trainer", functools.partial(L.Trainer, **BRIEF))
    snippets = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    names, strategies, optimized = {"__name__": "readme"}, [], False
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
        strategies.append(type(names["trainer"].strategy).__name__ if "trainer" in names else "")
        if "optimizer" in names and not optimized:
            optimized, model, optimizer = True, names["model"], names["optimizer"]
            torch.nn.functional.cross_entropy(model.net(torch.randn(2, 3, 32, 32)), torch.arange(2)).backward()
            optimizer.step()
            assert {"proj", "exp_avg"} <= set(optimizer.state[model.net.blocks[0].attn.qkv.weight])
    assert optimized and "ModelParallelStrategy" in strategies and strategies[-1] == "LTEStrategy"
