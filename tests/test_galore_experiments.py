"""The galore experiments: each composes, has the paper's settings, and trains (made tiny, on embedded data)."""

import csv
import json
import math
from pathlib import Path

import pytest

from lowrank_pretrain.run.build import plain

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "conf" / "experiment").glob("galore_*.yaml"))
LLAMAS = {  # the paper's Table 5: hidden, intermediate, layers, heads; its Table 2: rank, steps
    "galore_llama60m": (512, 1376, 8, 8, 128, 10_000),
    "galore_llama130m": (768, 2048, 12, 12, 256, 20_000),
    "galore_llama350m": (1024, 2736, 24, 16, 256, 60_000),
    "galore_llama1b": (2048, 5461, 24, 32, 512, 100_000),
}
STEPS = 6
TINY = [
    "trainer.accelerator=cpu", "trainer.max_steps=-1", "trainer.max_epochs=1", f"trainer.limit_train_batches={2 * STEPS}",
    "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=null", "trainer.check_val_every_n_epoch=1", "trainer.accumulate_grad_batches=2",
    "data.batch_size=2", "method.rank=8", "method.update_proj_gap=2",
]  # fmt: skip
TINY_LLAMA = [
    "data=kjv_sample", "data.seq_len=32", "model.config.hidden_size=32", "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2", "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2",
]  # fmt: skip
TINY_VIT = [
    "data=fashion_mnist_sample", "data.img_size=28", "+model.model_kwargs.patch_size=14", "+model.model_kwargs.embed_dim=32",
    "+model.model_kwargs.depth=2", "+model.model_kwargs.num_heads=2",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_trains_when_made_tiny(run, name):
    directory, summary = run(name, f"experiment={name}", *TINY, *(TINY_VIT if "vit" in name else TINY_LLAMA), base=[])
    assert json.loads((directory / "summary.json").read_text()) == summary
    (phase,) = summary["phases"]
    assert phase["steps"] == STEPS and phase["optimizer_gib"] == pytest.approx(phase["optimizer_formula_gib"], rel=0.05)
    assert math.isfinite(summary["final"]["val/loss"])
    rows = [row for row in csv.DictReader((directory / "metrics.csv").open()) if row.get("galore/overlap")]
    assert rows and all(0 < float(row["galore/overlap"]) < 1.01 and float(row["galore/refresh_ms"]) > 0 for row in rows)


@pytest.mark.parametrize(
    "method", ["galore_track", "galore_layerwise", "galore_8bit", "galore_published", "fira", "apollo", "full"]
)
def test_every_method_trains_the_pocket_experiment(run, method):
    if method == "galore_8bit":
        pytest.importorskip("bitsandbytes")
    overrides = [key for key in TINY if method != "full" or not key.startswith("method.")]
    directory, summary = run(method, "experiment=galore_pocket", *overrides, *TINY_LLAMA, f"method={method}", base=[])
    (phase,) = summary["phases"]
    assert phase["steps"] == STEPS and ("optimizer_formula_gib" in phase) == (method != "full")
    if method != "full":
        assert phase["optimizer_gib"] == pytest.approx(phase["optimizer_formula_gib"], rel=0.01)
    losses = [float(row["train/loss"]) for row in csv.DictReader((directory / "metrics.csv").open()) if row["train/loss"]]
    assert losses[-1] < losses[0]
    assert (directory / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", LLAMAS)
def test_the_llamas_have_the_papers_settings(composed, name):
    hidden, intermediate, layers, heads, rank, steps = LLAMAS[name]
    config = plain(composed(f"experiment={name}"))
    model, optim, method, trainer = config["model"]["config"], config["optim"], config["method"], config["trainer"]
    assert [model[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")] == [
        hidden, intermediate, layers, heads,
    ]  # fmt: skip
    assert (optim["lr"], optim["warmup"], optim["schedule"], optim["final_lr"]) == (1e-2, 0.1, "cosine", 0.1)
    assert (method["rank"], method["update_proj_gap"], method["scale"], optim["weight_decay"]) == (rank, 200, 0.25, 0)
    assert trainer["max_steps"] == steps and trainer["precision"] == "bf16-true"
    tokens = config["data"]["batch_size"] * trainer["accumulate_grad_batches"] * config["data"]["seq_len"]
    assert tokens == 512 * 256 and config["data"]["tokenizer"] == "t5-base" and config["model"]["vocab_size"] == 32100
