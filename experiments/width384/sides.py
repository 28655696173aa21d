"""Who is compared at width 384, on what; each as overrides of the command line."""

from dataclasses import dataclass
from pathlib import Path

WIDTH, STEPS, EPOCHS = 384, 50, 12  # STEPS of an epoch
LOOK = 50  # steps between two looks at ranks and angles
FULL = ("method=full",)


@dataclass(frozen=True)
class Side:
    """One way to train.

    Attributes:
        overrides: of the command line.
        first: its first learning rate over full training's.
        adapters: it also searches the rate of adapters over the matrices'.
        headline: reported with all seeds; else with one.
        looks: what is watched while it is reported; looking changes nothing.
    """

    overrides: tuple[str, ...]
    first: float = 1.0
    adapters: bool = False
    headline: bool = False
    looks: tuple[str, ...] = ()

    @property
    def ddp(self) -> bool:
        """Return whether several workers agree at every step."""
        return not any(word.startswith("method=") and ("lte" in word or "diloco" in word) for word in self.overrides)


def lora(rank: int) -> Side:
    """Return one adapter for a matrix, never merged."""
    return Side(("method=lora", f"method.rank={rank}"), 2.0)


def heads(count: int, rank: int, every: int = 10, mode: str = "parallel", targets: str = "", headline: bool = False) -> Side:
    """Return LTE of so many heads; ``joint`` is multi-head LoRA."""
    words = ["method=lte", f"method.heads={count}", f"method.rank={rank}", f"method.merge_every={every}", f"method.mode={mode}"]
    words += [f"method.targets=[{targets}]"] if targets else []
    looks = ("method.uses=[lte,effective_rank,orthogonality]", f"+method.orthogonality_every={LOOK}")
    return Side(
        tuple(words), 2.0, headline=headline, looks=looks if (count, rank, every, mode) == (4, 96, 10, "parallel") else ()
    )


# LTE's observations 1 to 5: heads of which rank, how many, merged how often; 4 x 96 and 16 x 24 span the width
OBSERVATIONS = {
    "full": Side(FULL, headline=True, looks=("method.uses=[effective_rank]", f"+method.gradient_every={LOOK}")),
    **{f"lora-r{rank}": lora(rank) for rank in (1, 4, 16, 64)},
    "mhlora-h4-r16": heads(4, 16, mode="joint"),
    "mhlora-h4-r96": heads(4, 96, mode="joint", headline=True),
    "sequential-h4-r96": heads(4, 96, mode="sequential", headline=True),
    "lte-h4-r96-t1": heads(4, 96, 1, headline=True),
    "lte-h4-r96-t10": heads(4, 96, headline=True),
    "lte-h4-r96-t100": heads(4, 96, 100),
    "lte-h4-r24-t10": heads(4, 24),
    "lte-h16-r24-t10": heads(16, 24),
}
# heads x rank, interval, layers replaced: as in the course's report on GPT-2
REPLACED = {
    "full": Side(FULL, headline=True),
    **{
        f"attention-h{count}-r{rank}-t10": heads(count, rank, targets="attention")
        for count in (2, 4, 8)
        for rank in (1, 16, 64)
    },
    "attention-h4-r16-t40": heads(4, 16, 40, targets="attention"),
    "mlp-h4-r16-t10": heads(4, 16, targets="mlp", headline=True),
    "head-h4-r16-t10": heads(4, 16, targets="head", headline=True),
    "attention+mlp-h4-r16-t10": heads(4, 16, targets="attention,mlp", headline=True),
}
PRELORA = ("method.windows=3", "method.weight_tol=0.02", "method.loss_tol=0.1", "method.warmup=1", "method.latest=6",
           "method.ranks=[16,32,64]")  # fmt: skip
MERGE = ("method.merge_every=10", "method.sync_rest=merge")
GALORE = (f"method.rank={WIDTH // 4}",)
CELLS = {
    "full": Side(FULL, headline=True),
    "muon": Side(("method=muon",), 2.0, headline=True),
    "lora": Side(("method=lora", f"method.rank={WIDTH // 4}"), 2.0, headline=True),
    "prelora": Side(("method=prelora", *PRELORA), adapters=True, headline=True),
    "prelora, factored": Side(("method=prelora_factorize", *PRELORA[:-1], "method.ranks=[0.25]"), adapters=True, headline=True),
    "galore": Side(("method=galore_track", "method.scale=1", *GALORE), 2.0, headline=True),
    "prelora, galore": Side(("method=prelora_galore", *PRELORA), headline=True),
    "lte": Side(("method=lte", f"method.rank={WIDTH // 4}", "method.heads=2", *MERGE), 2.0, headline=True),
    "diloco": Side(("method=diloco", "method.merge_every=10"), headline=True),
    "prelora, lte": Side(("method=prelora_lte", "method.heads=2", *PRELORA, *MERGE), adapters=True, headline=True),
    "lte, galore": Side(("method=lte_galore", *GALORE, *MERGE), 16.0, headline=True),
    "prelora, lte, galore": Side(("method=prelora_lte_galore", *PRELORA, *MERGE), headline=True),
}


@dataclass(frozen=True)
class Part:
    """One comparison.

    Attributes:
        task: ``glyphs`` or ``corpus``.
        network: ``vit``, ``gpt2``.
        sides: by name; the first is what the others are compared with.
        world: workers.
        lr: full training's first learning rate.
    """

    task: str
    network: str
    sides: dict[str, Side]
    world: int
    lr: float


PARTS = {
    "lte": Part("glyphs", "vit", OBSERVATIONS, 1, 1e-3),
    "gpt2": Part("corpus", "gpt2", REPLACED, 1, 1e-3),
    "composition-images": Part("glyphs", "vit", CELLS, 2, 1e-3),
    "composition-text": Part("corpus", "gpt2", CELLS, 2, 1e-3),
}
POCKET = {  # the quick form: the same questions at pocket size, minutes
    "lte": "lte_vit", "gpt2": "cs744_gpt2", "composition-images": "composition", "composition-text": "composition",
}  # fmt: skip


def task(part: Part, where: Path, width: int, steps: int, epochs: int) -> list[str]:
    """Return the overrides of a part's model, data and length: bf16-mixed on the CPU, validation after each epoch."""
    each = 1 if part.world == 1 else part.world  # every worker has its share: equal samples a step
    common = [
        "++trainer.accelerator=cpu", "trainer.precision=bf16-mixed", "++trainer.enable_progress_bar=false", "save_every=0",
        f"trainer.max_epochs={epochs}", f"++trainer.limit_train_batches={steps}", "++trainer.limit_val_batches=32",
        "++trainer.limit_test_batches=128", f"data.root={where / part.task}",
    ]  # fmt: skip
    common += [f"trainer.devices={part.world}"] if part.world > 1 else []
    if part.network == "vit":
        return [
            "experiment=prelora_pocket", "data=glyphs", f"data.batch_size={64 // each}", "model.model_kwargs.patch_size=8",
            f"model.model_kwargs.embed_dim={width}", "model.model_kwargs.depth=3",
            f"model.model_kwargs.num_heads={max(1, width // 64)}", "model.model_kwargs.mlp_ratio=4", *common,
        ]  # fmt: skip
    return [
        "experiment=lte_gpt2_pocket", "data=docs_corpus", f"data.batch_size={16 // each}", "data.seq_len=128",
        f"model.config.n_embd={width}", f"model.config.n_head={max(1, width // 64)}", "model.config.n_layer=3", *common,
    ]  # fmt: skip
