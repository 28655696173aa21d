"""The runs that are killed: every method at a size where a whole run takes a second or two."""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.conftest import PHASES, SHORT, VIT

LLAMA = [
    "experiment=galore_pocket",
    "data.seq_len=16",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
]
GALORE = ["method.rank=4", "method.update_proj_gap=3"]
LTE = ["method=lte", "method.rank=2", "method.heads=2", "method.merge_every=3", "method.merge_timeout=30"]
DRAWS = "+trainer.callbacks=[{_target_: tests.chaos.draws.Draws}]"
EMA = "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, update_every_n_steps: 2}]"


@dataclass(frozen=True)
class Scenario:
    """One kind of run.

    Args:
        name: for messages.
        args: of the command line, without directory and ``ckpt_path``.
        places: where it can be killed by its own hand, besides those of every run: place -> times a life passes it.
        workers: processes.
        prepare: writes what the run reads into the directory where it is started.
    """

    name: str
    args: list[str]
    places: dict[str, int] = field(default_factory=dict)
    workers: int = 1
    prepare: Callable[[Path], None] | None = None


def documents(directory: Path) -> None:
    """Three shards of text, and one to validate on."""
    rng = np.random.default_rng(0)
    words = "the king of all tribes went up unto that hill and spake words".split()
    texts = directory / "texts"  # a name of its own: the checkpoint says which data the run had
    texts.mkdir()
    for name in ("train-0", "train-1", "train-2", "val"):
        with gzip.open(texts / f"{name}.jsonl.gz", "wt") as file:
            for i in range(40):
                file.write(json.dumps({"text": " ".join(rng.choice(words, rng.integers(5, 60))) + f" {i}."}) + "\n")


EVERYWHERE = {
    "step": 12, "validation": 3, "log": 12, "save last.ckpt": 6, "save best.ckpt": 2, "bytes": 8, "replace": 8, "fsync": 8,
    "test": 1, "export": 1, "summary": 1, "finish": 1, "forget": 1,
}  # fmt: skip
CHANGES = {"switch": 1, "freeze": 1, "groups": 2, "replay": 2}
STREAM = ["data=text", "data.root=texts", "data.tokenizer=kjv", "data.vocab_size=2048", "data.seq_len=16"]

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("full", [*SHORT, *VIT, "method=full", "save_every=2", "data.num_workers=2", EMA]),
        Scenario("prelora", [*SHORT, *VIT, *PHASES, "save_every=1", DRAWS], CHANGES),
        Scenario(
            "prelora twice",
            [*SHORT, *VIT, *PHASES, "save_every=3", "trainer.val_check_interval=2", "trainer.accumulate_grad_batches=2",
             "method.window=1", "method.rank_signal=grad_norm", "method.rewarm=3", "method.adapter_lr=2.0"],
            CHANGES,
        ),
        Scenario("galore", [*LLAMA, *SHORT, "method=galore", *GALORE, "save_every=2", EMA], {"galore step": 12, "refresh": 20}),
        Scenario(
            "galore track",
            [*LLAMA, *STREAM, *SHORT, "method=galore_track", *GALORE, "save_every=3", "data.num_workers=2",
             "data.batches_per_epoch=4", "data.shuffle_block=7", "data.val_sequences=16"],
            {"galore step": 12},
            prepare=documents,
        ),
        Scenario("lte", [*SHORT, *VIT, *LTE, "trainer.devices=2", "save_every=2"], {"exchange": 4, "merge": 4}, workers=2),
        Scenario(
            "lte overlap",
            [*SHORT, *VIT, *LTE, "trainer.devices=2", "method.overlap=1", "method.sync_rest=merge", "save_every=1"],
            {"exchange": 4, "merge": 4},
            workers=2,
        ),
        Scenario(
            "prelora ddp",
            [*SHORT, *VIT, *PHASES, "trainer.devices=2", "trainer.strategy=ddp", "trainer.gradient_clip_val=1.0",
             "save_every=2"],
            CHANGES,
            workers=2,
        ),
        Scenario(
            "lte galore",
            [*LLAMA, *SHORT, "method=lte_galore", "method.rank=4", "method.merge_every=3", "method.merge_timeout=30",
             "trainer.devices=2", "save_every=2"],
            {"galore step": 12, "refresh": 20},
            workers=2,
        ),
        Scenario(
            "prelora lte",
            [*SHORT, *VIT, "method=prelora_lte", *PHASES[1:], "method.heads=2", "method.merge_every=2",
             "method.merge_timeout=30", "trainer.devices=2", "save_every=1"],
            {**CHANGES, "exchange": 3, "merge": 3},
            workers=2,
        ),
        Scenario(
            "lte three",
            [*SHORT, *VIT, *LTE, "trainer.devices=3", "data.batch_size=12", "method.heads=1", "save_every=1"],
            {"exchange": 4, "merge": 4},
            workers=3,
        ),
        Scenario(
            "prelora ddp three",
            [*SHORT, *VIT, *PHASES, "trainer.devices=3", "data.batch_size=12", "trainer.strategy=ddp", "save_every=2"],
            CHANGES,
            workers=3,
        ),
        Scenario("lte sequential", [*SHORT, *VIT, *LTE, "method.mode=sequential", "save_every=1"], {"exchange": 4, "merge": 4}),
    )
}  # fmt: skip
