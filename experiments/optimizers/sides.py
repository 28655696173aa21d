"""Who is compared, on what, at which size and length; each as overrides of the command line."""

from dataclasses import dataclass
from pathlib import Path

from experiments import tasks

# side -> (overrides, its matrices' first rate as a multiple of AdamW's). GaLore's scale is 1: optim.lr is the matrices' rate
SIDES: dict[str, tuple[list[str], float]] = {
    "adamw": (["method=full"], 1.0),
    "adamw8bit": (["method=adamw8bit"], 1.0),
    "muon": (["method=muon"], 2.0),
    "sinkgd": (["method=sinkgd"], 1.0),
    "galore_torch": (["method=galore_torch", "method.scale=1"], 2.0),  # the package itself, where it is installed
    "galore_published": (["method=galore_published", "method.scale=1"], 2.0),
    "galore": (["method=galore", "method.scale=1"], 2.0),
    "track": (["method=galore_track", "method.scale=1"], 2.0),
    "track_fira": (["method=galore_track", "method.scale=1", "method.residual=fira"], 1.5),
    "factored": (["method=galore_factored", "method.scale=1"], 2.0),
    "factored_fira": (["method=galore_factored", "method.scale=1", "method.residual=fira"], 1.5),
    "factored_muon": (["method=galore_factored", "method.scale=1", "method.residual=muon"], 2.0),
    "galore_muon": (["method=galore_muon", "method.scale=1"], 2.0),
    "galore_muon_whole": (["method=galore_muon", "method.scale=1", "method.residual=muon"], 2.0),
}
GAP = 50  # steps of a basis, where it does not follow every step


@dataclass(frozen=True)
class Cell:
    """One part at one size and length.

    Attributes:
        part: ``text`` or ``images``.
        size: millions of parameters in matrices.
        width: of the model.
        depth: layers.
        length: text: tokens per parameter in matrices; images: passes over the training set.
        coordinates: which settings a side may choose here; the others are those of the cell before.
        rates: AdamW's first rates, matrices and rest.
    """

    part: str
    size: float
    width: int
    depth: int
    length: float
    coordinates: tuple[str, ...]
    rates: tuple[float, float]
    batch: int = 16
    tokens: int = 128

    @property
    def name(self) -> str:
        """What its runs are called by."""
        unit = "tpp" if self.part == "text" else "ep"
        large = f"-{self.batch * self.tokens // 1024}k" if self.part == "text" and self.batch > 16 else ""
        return f"{self.part}{self.size:g}m-{self.length:g}{unit}{large}"

    def steps(self, images: int = 60_000) -> int:
        """Return the optimizer steps of a run."""
        seen = self.length * (self.size * 1e6 if self.part == "text" else images)
        return max(1, round(seen / (self.batch * (self.tokens if self.part == "text" else 1))))


ALL = ("lr", "rest_lr", "beta1", "beta2", "weight_decay", "warmup")
TEXT, PICTURES = (2e-3, 1e-2), (1e-3, 4e-3)
# the smallest of each part is searched in full; a later one begins at the best of the one before
CELLS = (
    Cell("text", 1, 128, 5, 1, ALL, TEXT),
    Cell("text", 1, 128, 5, 4, ("lr", "rest_lr", "beta2"), TEXT),
    Cell("text", 1, 128, 5, 20, ("lr",), TEXT),
    Cell("text", 4, 256, 5, 1, ("lr", "rest_lr"), TEXT),
    Cell("text", 4, 256, 5, 4, ("lr",), TEXT),
    Cell("text", 12, 384, 7, 1, ("lr",), TEXT),
    Cell("text", 12, 384, 7, 4, ("lr",), TEXT),
    Cell("text", 1, 128, 5, 4, ("lr",), TEXT, batch=64),  # 8,192 tokens a step: what an optimizer's own products cost there
    Cell("images", 0.3, 96, 3, 2, ALL, PICTURES, batch=64),
    Cell("images", 1.2, 192, 3, 2, ("lr", "rest_lr"), PICTURES, batch=64),
    Cell("images", 5, 384, 3, 2, ("lr",), PICTURES, batch=64),
)
QUICK = (
    Cell("text", 0.05, 32, 4, 1, ("lr", "rest_lr"), TEXT, batch=4, tokens=64),
    Cell("images", 0.02, 32, 2, 0.02, ("lr",), PICTURES, batch=16),
)
QUICK_SIDES = ("adamw", "muon", "track")


def task(cell: Cell, steps: int, corpus: Path | None, device: str, precision: str) -> list[str]:
    """Return the overrides of a cell's model, data and length.

    Args:
        cell: which.
        steps: of a run.
        corpus: folder that ``python -m lowrank_pretrain.data.corpus`` has made; None: the embedded King James text.
        device: ``cpu`` or ``cuda``.
        precision: Lightning's.
    """
    common = [
        f"++trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}", f"trainer.precision={precision}",
        "++trainer.enable_progress_bar=false", f"++trainer.limit_train_batches={steps}", "trainer.max_epochs=1",
        "save_every=0", "optim.final_lr=0.1",
    ]  # fmt: skip
    if cell.part == "images":
        return [
            "experiment=prelora_pocket", "data._target_=experiments.held_out.Images", f"data.root={pictures()}",
            f"data.batch_size={cell.batch}", "model.model_kwargs.patch_size=7", f"model.model_kwargs.embed_dim={cell.width}",
            f"model.model_kwargs.depth={cell.depth}", "model.model_kwargs.mlp_ratio=4", *tasks.WHOLE, *common,
        ]  # fmt: skip
    data = ["data._target_=experiments.held_out.Text", *tasks.WHOLE]
    if corpus is not None:  # 131,000 tokens for each look are enough to tell .001 from chance: the same ones for all
        looks = [f"++trainer.limit_{part}_batches={max(1, 131_072 // (cell.batch * cell.tokens))}" for part in ("val", "test")]
        data = ["data=docs_corpus", f"data.root={corpus}", *looks]
    return [
        "experiment=galore_pocket", *data, f"data.batch_size={cell.batch}", f"data.seq_len={cell.tokens}",
        f"model.config.hidden_size={cell.width}", f"model.config.intermediate_size={cell.width * 11 // 4}",
        f"model.config.num_hidden_layers={cell.depth}", f"model.config.num_attention_heads={max(2, cell.width // 64)}",
        f"model.config.num_key_value_heads={max(2, cell.width // 64)}", *common,
    ]  # fmt: skip


def pictures() -> str:
    """Return ``null``, Debian's package with all 60,000 images, where it is installed; else ``sample``."""
    from lowrank_pretrain.data.images.fashion_mnist import DEBIAN

    return "null" if DEBIAN.is_dir() else "sample"


def settings(side: str, cell: Cell, values: dict[str, float]) -> list[str]:
    """Return the overrides of a side with its chosen values; beta1 is the matrices' momentum too where that is separate."""
    overrides, _ = SIDES[side]
    found = [*overrides, f"optim.lr={values['lr']:g}", f"optim.rest_lr={values['rest_lr']:g}"]
    found += [f"optim.betas=[{values['beta1']:g},{values['beta2']:g}]"]
    found += [f"optim.weight_decay={values['weight_decay']:g}", f"optim.warmup={values['warmup']:g}"]
    if side == "muon":
        found.append(f"method.momentum={values['beta1']:g}")
    if any("method=galore" in word for word in overrides):
        found.append(f"method.rank={cell.width // 4}")
        found.append(f"method.update_proj_gap={GAP}")
    return found
