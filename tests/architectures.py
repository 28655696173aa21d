"""Build small models of many architectures from their own configurations, and train each by a method to its end.

    python -m tests.architectures [--out docs/architectures.md] [--only NAME …]     # the table of what each one does

Every model is built by its library (timm, transformers) with few layers and narrow ones; nothing is downloaded. An
architecture passes if it trains through all three phases of PreLoRA, if the plain state of its checkpoint, loaded into a fresh
model of the library's, has the loss that ``trainer.test`` measured, and if a resumed run ends with the same bits. It may also
be refused, in one line, before the first optimizer step.
"""

import argparse
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lowrank_pretrain import ConfigError, LTEStrategy, PreLoRA
from lowrank_pretrain.data.loaders.batch import Fetched
from lowrank_pretrain.data.loaders.epoch import EpochBatches, EpochLoader

SIDE, CLASSES, VOCABULARY, TOKENS = 64, 4, 128, 16
PLAIN = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": SIDE}  # of a Vision Transformer's kin
STAGES = {"depths": (1, 1, 1, 1)}
NARROW = {**STAGES, "embed_dim": 24, "img_size": SIDE}
SIDED = {"img_size": SIDE}

# name -> arguments of timm.create_model
VISION: dict[str, dict[str, Any]] = {
    "aimv2_large_patch14_224": PLAIN, "beit_base_patch16_224": PLAIN, "botnet26t_256": SIDED, "cait_xxs24_224": PLAIN,
    "coat_lite_tiny": SIDED, "coatnet_0_rw_224": {**STAGES, **SIDED}, "convit_tiny": PLAIN, "convnext_atto": STAGES,
    "convnextv2_atto": STAGES, "crossvit_tiny_240": {}, "csatv2": {}, "davit_tiny": STAGES, "deit3_small_patch16_224": PLAIN,
    "deit_tiny_distilled_patch16_224": PLAIN, "edgenext_xx_small": STAGES, "efficientnet_b0": {}, "efficientvim_m1": {},
    "efficientvit_b0": STAGES, "efficientvit_m0": SIDED, "eva02_tiny_patch14_224": PLAIN, "eva_giant_patch14_224": PLAIN,
    "fastvit_sa12": {}, "flexivit_small": PLAIN, "gcvit_xxtiny": SIDED, "gmlp_ti16_224": SIDED, "hiera_tiny_224": SIDED,
    "inception_next_atto": STAGES, "levit_128s": SIDED, "mambaout_femto": STAGES,
    "maxvit_rmlp_pico_rw_256": {**STAGES, **SIDED},
    "maxvit_tiny_tf_224": {**STAGES, **SIDED}, "mixer_s16_224": SIDED,
    "mobilevit_xxs": SIDED, "naflexvit_base_patch16_gap": PLAIN, "pit_ti_224": SIDED, "poolformer_s12": {},
    "pvt_v2_b0": STAGES, "qwen3_vit_88m": PLAIN, "regnety_002": {}, "repvit_m0_9": SIDED,
    "resmlp_12_224": SIDED, "resnet18": {}, "samvit_base_patch16_224": PLAIN,
    "shvit_s1": {}, "starnet_s1": STAGES, "swiftformer_xs": SIDED, "swin_s3_tiny_224": NARROW,
    "swin_tiny_patch4_window7_224": NARROW, "swinv2_cr_tiny_224": NARROW, "swinv2_tiny_window8_256": NARROW,
    "tiny_vit_5m_224": STAGES, "tnt_s_patch16_224": {"depth": 2, "embed_dim": 48, **SIDED},
    "twins_svt_small": {**STAGES, **SIDED}, "visformer_tiny": PLAIN, "vit_base_patch16_clip_224": PLAIN,
    "vit_base_patch16_rope_224": PLAIN, "vit_base_patch16_siglip_224": PLAIN, "vit_dwee_patch16_reg1_gap_256": PLAIN,
    "vit_relpos_small_patch16_224": PLAIN, "vit_srelpos_small_patch16_224": PLAIN, "vit_tiny_patch16_224": PLAIN,
    "vitamin_small_224": {"depth": 2, **SIDED}, "xcit_nano_12_p16_224": PLAIN,
}  # fmt: skip

LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "head_dim": 16,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
ROTARY = {**GPT, "rotary_dim": 8}
EXPERTS = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
LOCAL_EXPERTS = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
# name -> (head of the model, arguments of its configuration; those that it does not know are left out)
LANGUAGE: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(
        ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox", "olmo", "olmo2",
         "stablelm", "starcoder2", "cohere", "granite", "persimmon", "nemotron", "biogpt", "helium", "glm", "smollm3",
         "bitnet"],
        ("causal", LLAMA),
    ),
    **dict.fromkeys(["gpt2", "gpt_bigcode", "openai-gpt"], ("causal", GPT)),
    **dict.fromkeys(["mixtral", "granitemoe", "gpt_oss", "olmoe"], ("causal", {**LOCAL_EXPERTS, "num_experts": 4})),
    "qwen2_moe": ("causal", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("causal", EXPERTS),
    "gptj": ("causal", ROTARY),
    "codegen": ("causal", {**ROTARY, "n_head": 4}),
    "ctrl": ("causal", {**GPT, "dff": 64}),
    "bloom": ("causal", {**LLAMA, "n_head": 2, "n_layer": 2}),
    "opt": ("causal", {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neo": ("causal", {**LLAMA, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
    "mpt": ("causal", {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": VOCABULARY}),
    "xglm": ("causal", {**LLAMA, "d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64}),
    "mamba": ("causal", {**LLAMA, "state_size": 8}),
    "mamba2": ("causal", {**LLAMA, "num_heads": 4, "n_groups": 1, "state_size": 8}),
    "falcon_mamba": ("causal", {**LLAMA, "state_size": 8}),
    "rwkv": ("causal", {**LLAMA, "attention_hidden_size": 32}),
    "lfm2": ("causal", {**LLAMA, "layer_types": ["conv", "full_attention"]}),
    "jamba": ("causal", {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                         "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}),
    **dict.fromkeys(["bert", "roberta", "deberta-v2", "fnet", "nystromformer"], ("masked", LLAMA)),
    "albert": ("masked", {**LLAMA, "embedding_size": 16}),
    "electra": ("masked", {**LLAMA, "embedding_size": 16}),
    "convbert": ("masked", {**LLAMA, "embedding_size": 16}),
    "squeezebert": ("masked", {**LLAMA, "embedding_size": 32}),
    "roformer": ("masked", {**LLAMA, "embedding_size": 32}),
    "distilbert": ("masked", {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": VOCABULARY}),
    "big_bird": ("masked", {**LLAMA, "attention_type": "original_full"}),
    "longformer": ("masked", {**LLAMA, "attention_window": 8}),
    "modernbert": ("masked", {**LLAMA, "global_attn_every_n_layers": 2}),
}  # fmt: skip


class Vision(pl.LightningModule):
    """Classify images of four kinds by a timm model."""

    def __init__(self, name: str) -> None:
        import timm

        super().__init__()
        torch.manual_seed(0)
        self.model = timm.create_model(name, num_classes=CLASSES, **VISION[name])

    def loss(self, batch: list[Tensor]) -> Tensor:
        out = self.model(batch[0])
        out = out if isinstance(out, Tensor) else sum(out) / len(out)  # two classifiers, in training
        return nn.functional.cross_entropy(out, batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        torch.manual_seed(1000 + self.trainer.global_step)  # dropout of a resumed run is that of the first one
        return self.loss(batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Language(Vision):
    """Predict tokens by a transformers model."""

    def __init__(self, name: str) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

        pl.LightningModule.__init__(self)
        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        head, arguments = LANGUAGE[name]
        default = AutoConfig.for_model(name)
        config = AutoConfig.for_model(name, **{key: value for key, value in arguments.items() if hasattr(default, key)})
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if isinstance(getattr(config, key, None), int) and getattr(config, key) >= VOCABULARY:
                setattr(config, key, 1)
        self.model = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM}[head].from_config(config)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss


class Samples(Dataset):
    """Eight fixed pictures with labels, or eight rows of tokens."""

    def __init__(self, images: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        pictures, tokens = (8, 3, SIDE, SIDE), (8, TOKENS)
        self.x = torch.randn(pictures, generator=draw) if images else torch.randint(3, VOCABULARY, tokens, generator=draw)
        self.y = torch.arange(8) % CLASSES

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> list[Tensor]:
        return [self.x[index], self.y[index]]

    def fetch(self, epoch: int, indices: list[int]) -> Fetched:
        return Fetched([self.x[indices], self.y[indices]], [])


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        name: of the architecture.
        targets: how many matrices became low-rank.
        refused: the line that refused it, or None.
        left_out: the warnings that named what is no target.
        export: relative difference between ``trainer.test`` and the plain state loaded into a fresh model.
        resumed: whether a resumed run ended with the same bits.
    """

    name: str
    targets: int = 0
    refused: str | None = None
    left_out: str = ""
    export: float = float("nan")
    resumed: bool = False

    @property
    def passed(self) -> bool:
        return self.refused is not None or (self.export < 1e-5 and self.resumed and self.targets > 0)


class Save(pl.Callback):
    """Write a checkpoint after one step."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def build(name: str) -> Vision:
    return (Vision if name in VISION else Language)(name)


def quiet(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_epochs=5, callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=folder, **{"devices": 1, **options},
    )  # fmt: skip


def loader(name: str, batch: int = 4) -> DataLoader:
    return DataLoader(Samples(name in VISION), batch_size=batch)


def resuming(name: str) -> EpochLoader:
    """Two batches an epoch, from a loader that goes on in the middle of one."""
    return EpochLoader(Samples(name in VISION), EpochBatches(8, 4, True, seed=0))


def prelora(name: str) -> Outcome:
    """Train through all three phases (switch after step 4, freeze after step 6, end after 10), test, load, resume."""
    outcome = Outcome(name)

    def callback() -> PreLoRA:
        return PreLoRA(targets="all", ranks=(2, 4), window_unit="step", window=2, windows=2, latest=2, warmup=1)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path, phases = Path(folder) / "joint.ckpt", callback()
        module, data = build(name), resuming(name)
        trainer = quiet(Path(folder), phases, Save(path, 5))
        try:
            trainer.fit(module, data)
        except ConfigError as error:
            assert trainer.global_step == 0, f"refused after {trainer.global_step} steps: {error}"
            assert len(str(error).splitlines()) == 1, f"more than one line: {error}"
            outcome.refused = str(error)
            return outcome
        outcome.left_out = "; ".join(dict.fromkeys(str(w.message) for w in caught if _ours(w.message)))
        assert phases.phase == "lowrank", phases.phase
        outcome.targets = len(phases.plan)
        trainer.save_checkpoint(Path(folder) / "end.ckpt")
        measured = trainer.test(module, loader(name), verbose=False)[0]["test/loss"]
        state = torch.load(Path(folder) / "end.ckpt", weights_only=True)["state_dict"]
        outcome.export = abs(plain_loss(name, state) - measured) / abs(measured)
        again = build(name)
        quiet(Path(folder), callback()).fit(again, resuming(name), ckpt_path=path)
        outcome.resumed = all(torch.equal(a, b) for a, b in zip(_state(module), _state(again), strict=True))
    return outcome


def plain_loss(name: str, state: dict[str, Tensor]) -> float:
    """The test loss of a model of the library's that has loaded the state, without this package."""
    plain = build(name).eval()
    plain.load_state_dict(state)
    with torch.no_grad():
        return sum(plain.loss(batch).item() for batch in loader(name)) / 2


def lte(name: str, world: int = 1) -> Outcome:
    """Train four windows with two heads (on one worker, or one head on each of two); every target must have moved.

    A target whose output the loss does not use cannot move in any training: it must be named.
    """
    outcome, rank = Outcome(name), int(os.environ.get("RANK", 0)) if world > 1 else 0
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = build(name)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        strategy, seen = LTEStrategy(rank=2, heads=2 // world, merge_every=2), Targets()
        trainer = quiet(Path(folder), seen, strategy=strategy, devices=world)
        try:
            trainer.fit(module, loader(name, batch=4 // world))
        except ConfigError as error:
            assert trainer.global_step == 0, f"refused after {trainer.global_step} steps: {error}"
            outcome.refused = str(error)
            return outcome
        outcome.left_out = "; ".join(dict.fromkeys(str(w.message) for w in caught if _ours(w.message)))
        outcome.targets = len(seen.names)
        after = module.state_dict()
        still = [key for key in seen.names if torch.equal(before[f"{key}.weight"], after[f"{key}.weight"])]
        named = [key for key in still if "no gradient" in outcome.left_out and key.rpartition(".")[2] in outcome.left_out]
        assert still == named, f"never moved on worker {rank}, and nobody says so: {still}"
        outcome.export, outcome.resumed = 0.0, True
    return outcome


class Targets(pl.Callback):
    """Note the layers that hold heads after the second step."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.names = self.names or [name for name, layer in module.named_modules() if hasattr(layer, "lora_A")]


def _ours(message: Warning | str) -> bool:
    return "target" in str(message) or "no gradient" in str(message)


def _state(module: nn.Module) -> list[Tensor]:
    return list(module.state_dict().values())


def table(rows: list[Outcome]) -> str:
    """A Markdown table of outcomes."""
    lines = ["| architecture | targets | outcome | export | resumed |", "|---|---|---|---|---|"]
    for row in rows:
        if row.refused:
            lines.append(f"| `{row.name}` | | refused: {_cell(row.refused)} | | |")
        else:
            words = "all three phases" + (f"; {_cell(row.left_out)}" if row.left_out else "")
            resumed = "bit for bit" if row.resumed else "**no**"
            lines.append(f"| `{row.name}` | {row.targets} | {words} | {row.export:.0e} | {resumed} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) < 240 else text[:237] + "…"


def page(run: Callable[[str], Outcome] = prelora, only: list[str] | None = None) -> tuple[str, list[Outcome]]:
    """The page of the documentation, and its rows."""
    names = [name for name in [*VISION, *LANGUAGE] if not only or name in only]
    rows, seen = [], {}
    for name in names:
        try:
            rows.append(run(name))
        except Exception as error:  # one failed architecture is a row of the table
            rows.append(Outcome(name, left_out=f"**failed**: {type(error).__name__}: {error}"))
        seen[name] = rows[-1]
        print(name, "refused" if rows[-1].refused else "passed" if rows[-1].passed else f"FAILED {rows[-1]}", flush=True)
    images, text = [seen[n] for n in names if n in VISION], [seen[n] for n in names if n in LANGUAGE]
    text_page = f"""# Architectures

Each model below is built small from its library's own configuration and trained by PreLoRA with `targets="all"`.
*Outcome*: it trained through all three phases, or was refused before the first optimizer step.
*Export*: relative difference between the loss that `trainer.test` measured and that of the checkpoint's plain weights in a
fresh model of the library. *Resumed*: a run resumed from the joint phase ended with the same bits.

Written by `python -m tests.architectures`; the test is `make test-slow`'s `test_architectures`.

## timm

{table(images)}

## transformers

{table(text)}
"""
    return text_page, rows


def main() -> int:
    """Write the page; return 1 if an architecture fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/architectures.md"))
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    text, rows = page(only=options.only)
    if not options.only:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    print(f"{sum(row.passed for row in rows)} of {len(rows)} passed, {sum(bool(row.refused) for row in rows)} of these refused")
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
