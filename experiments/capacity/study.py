"""Are the two tasks hard enough? Full training of a small, a middle and a large model: the loss must still fall with size.

    python -m lowrank_pretrain.data.images.draw_glyphs --out runs/studies/capacity/glyphs
    python -m lowrank_pretrain.data.corpus --out runs/studies/capacity/corpus
    python -m experiments.capacity.study                       or  make study NAME=capacity
    python -m experiments.capacity.study --table               only the table, from the runs there are

Images: a ViT of three blocks, 64 tokens, on glyphs of fonts (94 classes, test fonts never seen). Text: a LLaMA of four layers
on documentation and Python sources. Widths 64, 128, 256; 600 steps, bf16-mixed. Each size tries three learning rates (more
where the best is at an edge) by the validation split; reported is the test split of the best, one seed.
"""

from collections.abc import Iterator
from pathlib import Path

from experiments.command import main
from experiments.rates import chosen, rounds
from experiments.runs import Job
from experiments.tables import Missing

WIDTHS, STEPS = (64, 128, 256), 600
MIDDLE = {("glyphs", 64): 4e-3, ("glyphs", 128): 2e-3, ("glyphs", 256): 1e-3,
          ("corpus", 64): 8e-3, ("corpus", 128): 4e-3, ("corpus", 256): 2e-3}  # fmt: skip
Side = tuple[str, int]  # task, width


def job(where: Path, side: Side, lr: float) -> Job:
    """Return one run."""
    task, width = side
    common = [
        "++trainer.accelerator=cpu", "trainer.precision=bf16-mixed", "++trainer.enable_progress_bar=false",
        "trainer.max_epochs=1", f"++trainer.limit_train_batches={STEPS}", "++trainer.limit_val_batches=32",
        "++trainer.limit_test_batches=64", "save_every=0", "method=full", f"data.root={where / task}",
        f"optim.lr={lr:g}", "seed=0",
    ]  # fmt: skip
    if task == "glyphs":
        own = ["experiment=prelora_pocket", "data=glyphs", "data.batch_size=64", "model.model_kwargs.patch_size=8",
               f"model.model_kwargs.embed_dim={width}", "model.model_kwargs.depth=3",
               f"model.model_kwargs.num_heads={width // 32}", "model.model_kwargs.mlp_ratio=4"]  # fmt: skip
    else:
        own = ["experiment=galore_pocket", "data=docs_corpus", "data.batch_size=16", "data.seq_len=128",
               f"model.config.hidden_size={width}", f"model.config.intermediate_size={width * 11 // 4}",
               "model.config.num_hidden_layers=4", f"model.config.num_attention_heads={width // 32}",
               f"model.config.num_key_value_heads={width // 32}"]  # fmt: skip
    return Job(f"{task}-{width}-lr{lr:g}", [*own, *common], {"task": task, "width": width, "lr": lr, "seed": 0})


def final(where: Path) -> dict[Side, Job]:
    """Return the reported run of every size that is finished.

    Raises:
        Missing: none is.
    """
    found, lacking = {}, ""
    for side, middle in MIDDLE.items():
        try:
            found[side] = job(where, side, chosen(side, middle, lambda one, lr: job(where, one, lr), where))
        except Missing as error:
            lacking = lacking or str(error)
    if not found:
        raise Missing(lacking)
    return found


def stages(where: Path) -> Iterator[tuple[list[Job], int]]:
    """Yield what to run, one stage after another: small models first."""
    for side, middle in sorted(MIDDLE.items(), key=lambda pair: pair[0][1]):
        for jobs in rounds([(side, middle)], lambda one, lr: job(where, one, lr), where):
            yield jobs, 2


if __name__ == "__main__":
    from experiments.capacity.table import write

    main(__doc__, __file__, stages, write)
