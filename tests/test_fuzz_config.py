"""Every key of every group set to what nobody can mean: one line that names it, exit code 2, and nothing was started.

A value that happens to be legal is no failure, but it must be declared in ``LEGAL``: whoever adds a key decides.
"""

import copy
import math
import resource
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from lowrank_pretrain.data.images import fashion_mnist
from lowrank_pretrain.run import failures
from lowrank_pretrain.run.train import train
from tests.conftest import VIT, Started
from tests.data_helpers import write_idx

HOSTILE = ["words", "", -1, 0, 0.5, 10**12, [], {}, None, math.nan, math.inf, True, ["a", None]]
HUGE = 10**12
COMMON = ["data.batch_size=8", "trainer.accelerator=cpu", "trainer.max_epochs=3", "trainer.limit_val_batches=1"]
TEXT = ["experiment=none", "data=kjv_sample", "model=gpt2_pocket", "data.seq_len=16", "model.config.n_embd=24", *COMMON]
IMAGES = [*VIT, *COMMON]

# what is tried: a name, the run, the keys that are spoiled, by how they begin ("": the top level)
CASES = {
    "top": (IMAGES, "method=full", ""),
    "images": (IMAGES, "method=full", "data"),
    "vision model": (IMAGES, "method=full", "model"),
    "optimizer": (IMAGES, "method=full", "optim"),
    "trainer": (IMAGES, "method=full", "trainer"),
    "logger": (IMAGES, "method=full", "logger"),
    "tokens": (TEXT, "method=full", "data"),
    "language model": (TEXT, "method=full", "model"),
    "prelora": (IMAGES, "method=prelora", "method"),
    "lora": (IMAGES, "method=lora", "method"),
    "galore": (IMAGES, "method=galore", "method"),
    "lte": (IMAGES, "method=lte", "method"),
    "relora": (IMAGES, "method=relora", "method.restart_"),
}
SMALL_RANKS = {
    "prelora": ["method.ranks=[2,4]"],
    "lora": ["method.rank=4"],
    "lte": ["method.rank=4"],
    "relora": ["method.rank=4"],
}

OFF_OR_SHARE, FLAG, COUNT_FROM_0 = (0, 0.5), (True,), (0, HUGE)
# values among the hostile ones that are right; where two groups have a key of the same name, one may have one more
LEGAL = {
    "seed": (0,), "ckpt_path": (None,), "save_every": COUNT_FROM_0, "max_rewinds": COUNT_FROM_0,
    "loss_spike": (HUGE, None), "stall_timeout": (0.5, HUGE, None), "agree_every": COUNT_FROM_0,
    "trainer": ({},), "logger": ({}, None),
    # images are mixed, tokens are not; the embedded samples ask for no file names
    "data.root": (None,), "data.num_workers": (0,), "data.flip": FLAG, "data.seed": (-1, 0, HUGE, None),
    "data.num_classes": (None,), "model.num_classes": (None,),  # as many as the set has
    "data.mixup": (0, 0.5, HUGE), "data.cutmix": (0, 0.5, HUGE), "data.mix_prob": OFF_OR_SHARE,
    "data.switch_prob": OFF_OR_SHARE, "data.smoothing": OFF_OR_SHARE,
    "data.train_file": ("words", ""), "data.val_file": ("words", ""), "data.test_file": ("words", "", None),
    # timm's own arguments: null is its default, a class token is anything that is true or not
    "model.pretrained_file": (None,), "model.model_kwargs.embed_dim": (None,),
    "model.model_kwargs.depth": (None,), "model.model_kwargs.num_heads": FLAG,
    "model.model_kwargs.mlp_ratio": (0, 0.5, None, True),
    "model.model_kwargs.class_token": tuple(v for v in HOSTILE if v not in (math.nan, math.inf)),
    "model.model_kwargs.global_pool": ("",),
    "model.model_kwargs.proj_drop_rate": (0, 0.5, True, None),
    "model.config": ({}, None), "model.config.attn_pdrop": OFF_OR_SHARE, "model.config.embd_pdrop": OFF_OR_SHARE,
    "model.config.resid_pdrop": OFF_OR_SHARE,
    "optim.lr": (0.5, HUGE), "optim.weight_decay": (0, 0.5, HUGE), "optim.eps": (0.5, HUGE), "optim.warmup": OFF_OR_SHARE,
    "optim.final_lr": OFF_OR_SHARE, "optim.rest_lr": (0.5, HUGE, None),
    "trainer.max_epochs": (0, HUGE, None), "trainer.max_steps": (-1, HUGE), "trainer.precision": (None,),
    "trainer.gradient_clip_val": (0, 0.5, HUGE, None), "trainer.accumulate_grad_batches": (HUGE,),
    "trainer.limit_train_batches": (0.5, HUGE, None), "trainer.limit_val_batches": (0, 0.5, HUGE, None),
    "trainer.limit_test_batches": (0, 0.5, HUGE, None), "trainer.check_val_every_n_epoch": (HUGE, None),
    "trainer.val_check_interval": (0.5, None), "trainer.log_every_n_steps": (0, HUGE, None),
    "trainer.num_sanity_val_steps": (-1, 0, HUGE, None), "trainer.enable_model_summary": (True, None),
    "trainer.enable_progress_bar": (True, None), "trainer.deterministic": (True, None), "trainer.benchmark": (True, None),
    "logger._target_": (None,),
    "method.alpha": (0.5, HUGE, None), "method.freeze_rest": FLAG, "method.train_A": FLAG, "method.adapter_lr": (0.5, HUGE),
    "method.adapter_weight_decay": (0, 0.5, HUGE, None), "method.seed": (-1, 0, HUGE, None),
    "method.weight_tol": (0.5,), "method.loss_tol": (0.5,), "method.warmup": COUNT_FROM_0, "method.earliest": (0,),
    "method.energy": (None,), "method.flops": (None,), "method.latest": (HUGE, None), "method.rewarm": COUNT_FROM_0,
    "method.update_proj_gap": (HUGE,), "method.scale": (0, 0.5, HUGE), "method.rotate_moments": FLAG, "method.stagger": FLAG,
    "method.layerwise": FLAG, "method.residual": (None,), "method.nesterov": FLAG, "method.outer_lr": (0.5, HUGE),
    "method.outer_momentum": OFF_OR_SHARE,
    "method.merge_every": (HUGE,), "method.reset": FLAG, "method.route": (None,), "method.overlap": (0,),
    "method.fragments": (1,),
    "method.prune": (None,), "method.merge_timeout": (None, 0.5, HUGE),
    "method.restart_warmup": (0,), "method.restart_start": COUNT_FROM_0,
}  # fmt: skip
LEGAL_IN = {
    "tokens": {"data.root": ()},
    "galore": {"method.rank": (HUGE,)},  # clamped to what a matrix allows
    "lora": {"method.rank": (HUGE,)},  # likewise, under a preset
    "lte": {"method.rank": (HUGE,)},
    "relora": {"method.prune": (0, 0.5, None)},
}
# values that only do not go with another key, which the line names instead
ELSEWHERE = [
    ("trainer.max_epochs", -1, "optim.schedule"), ("method.window", HUGE, "trainer.max_epochs=3"),
    ("method.earliest", HUGE, "trainer.max_epochs=3"),
    ("model.model_kwargs", None, "img_size=28"), ("model.model_kwargs", {}, "img_size=28"),
    ("model.model_kwargs.patch_size", None, "img_size=28"), ("method.uses", [], "is no key of this method"),
]  # fmt: skip


def leaves(node: dict, prefix: str = ""):
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def keys(config, group: str) -> list[str]:
    node = OmegaConf.to_container(config, resolve=False)
    name = group.partition(".")[0]
    return (
        [key for key in leaves(node[name], f"{name}.") if key.startswith(group) and key != "method.name"] if group else [*node]
    )


def same(value, other) -> bool:
    return type(value) is type(other) and value == other


def is_legal(key: str, value, legal: dict) -> bool:
    return any(same(allowed, value) for allowed in legal.get(key, ()))


def names(line: str, key: str, value) -> bool:
    """Whether the line says which key is wrong, and its value (of a list, the item); or what else it does not go with."""
    shown = [value, *value] if isinstance(value, list) else [value]
    if key.rpartition(".")[2] in line and any(repr(part) in line or str(part) in line for part in shown):
        return True
    return any(key == other and same(value, its) and words in line for other, its, words in ELSEWHERE)


def attempt(config, directory: Path) -> tuple[str, int]:
    """What the command line would print, and its exit code; 0 if training would have begun."""
    try:
        train(config, directory)
        raise AssertionError("a whole run")
    except Started:
        return "", 0
    except BaseException as error:
        described = failures.describe(error, config, directory)
        if described is None:
            raise
        return described


@pytest.fixture
def bounded(shut):
    """Memory is bounded, so that a huge value cannot hurt the machine."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (48 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def installed(monkeypatch, tmp_path_factory):
    """Debian's folder of Fashion-MNIST, which ``data.root=null`` means; made here, whether the package is there or not."""
    folder = tmp_path_factory.mktemp("fashion-mnist")
    for stem, count in (("train", 40), ("t10k", 20)):
        write_idx(folder / f"{stem}-images-idx3-ubyte.gz", np.zeros((count, 28, 28), np.uint8))
        write_idx(folder / f"{stem}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_wrong_value_is_one_line_and_nothing_starts(name, composed, bounded, installed, tmp_path, capsys):
    overrides, method, group = CASES[name]
    base = composed(*overrides, method, *SMALL_RANKS.get(name, ()))
    OmegaConf.set_struct(base, False)
    wrong, tried = [], 0
    for key in keys(base, group):
        for value in HOSTILE:
            config, directory = copy.deepcopy(base), tmp_path / f"run{tried}"
            OmegaConf.update(config, key, value, merge=False)
            tried += 1
            try:
                line, code = attempt(config, directory)
            except Exception as error:
                wrong.append(f"{key}={value!r}: a traceback, {type(error).__name__}: {error}")
                continue
            if is_legal(key, value, LEGAL | LEGAL_IN.get(name, {})):
                wrong += [f"{key}={value!r} is declared legal: {line}"] * bool(code)
            elif code == 0:
                wrong.append(f"{key}={value!r} was accepted")
            else:
                wrong += [f"{key}={value!r}: exit code {code}: {line}"] * (
                    code != 2 or "\n" in line or not names(line, key, value)
                )
                wrong += [f"{key}={value!r} left {left}" for left in [[*directory.rglob("*")]] if left]
    assert not wrong, "\n".join(wrong)
    COUNT.append(tried)


COUNT: list[int] = []


def test_enough_was_tried():
    if len(COUNT) == len(CASES):  # all of them ran, in this process
        assert sum(COUNT) >= 300
