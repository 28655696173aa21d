"""Exports load in stock timm, transformers and peft, and compute what our checkpoint computes."""

import json
import logging
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.export.facts import Facts
from lowrank_pretrain.export.weights import export, export_module, main
from lowrank_pretrain.models.language import CausalLM
from lowrank_pretrain.models.optim import Optim
from lowrank_pretrain.models.vision import VisionClassifier
from lowrank_pretrain.phases.lora import LoRA

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
STOCK_VIT = {"num_classes": 7, "img_size": 8, "in_chans": 1, **VIT}
GPT = {"n_layer": 2, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def make(kind):
    torch.manual_seed(0)
    if kind == "vit":
        return VisionClassifier("vit_tiny_patch16_224", 7, img_size=8, in_chans=1, model_kwargs=VIT).eval()
    return CausalLM(kind, 50, 8, GPT if kind == "gpt2" else LLAMA).eval()


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return torch.randn(3, 1, 8, 8, generator=generator)
    return torch.randint(50, (3, 8), generator=generator)


def stock(kind, folder):
    """The plain network as a user of the stock library loads it."""
    if kind == "vit":
        path = folder / "model.safetensors"
        return timm.create_model("vit_tiny_patch16_224", checkpoint_path=path, **STOCK_VIT).eval()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(network, x):
    with torch.no_grad():
        out = network(x)
    return getattr(out, "logits", out)


def wrong(call, *words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"


# Ranks by layer and part: different within a fused layer, parts missing, layers missing (rank 0 leaves no trace).
RANKS = {
    "vit": {
        "blocks.0.attn.qkv": {"q": 4, "k": 2, "v": 1},
        "blocks.1.attn.qkv": {"k": 3},
        "blocks.1.mlp.fc1": {"W": 5},
        "head": {"W": 2},
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn": {"q": 4, "v": 2},
        "transformer.h.1.attn.c_proj": {"W": 3},
        "transformer.h.1.mlp.c_fc": {"W": 2},
    },
    "llama": {"model.layers.0.self_attn.q_proj": {"W": 4}, "model.layers.0.mlp.down_proj": {"W": 2}, "lm_head": {"W": 1}},
}


def lowrank_checkpoint(kind, path, alpha):
    """A checkpoint as low-rank training writes it, made by hand; returns the module with the merged weights."""
    module = make(kind)
    generator = torch.Generator().manual_seed(2)
    merged, exact, plan = module.state_dict(), {}, {}
    for layer, ranks in RANKS[kind].items():
        name = f"model.{layer}"
        weight = merged[f"{name}.weight"].clone()
        conv1d = kind == "gpt2"
        rows, cols = weight.T.shape if conv1d else weight.shape
        A = torch.randn(sum(ranks.values()), cols, generator=generator)
        exact |= {f"{name}.weight": weight, f"{name}.lora_A": A}
        blocks, used = [], 0
        for i, part in enumerate("qkv" if "W" not in ranks else "W"):
            part_rows = rows if part == "W" else rows // 3
            rank = ranks.get(part, 0)
            if i == 0 or rank:
                plan[name if part == "W" else f"{name}.{part}"] = rank
            if rank == 0:
                blocks.append(torch.zeros(part_rows, cols))
                continue
            B = torch.randn(part_rows, rank, generator=generator)
            exact[f"{name}.lora_B.{part}"] = B
            blocks.append((1.0 if alpha is None else alpha / rank) * B @ A[used : used + rank])
            used += rank
        delta = torch.cat(blocks)
        merged[f"{name}.weight"] = weight + (delta.T if conv1d else delta)
    if kind == "gpt2":
        merged["model.lm_head.weight"] = merged["model.transformer.wte.weight"]
    side = {"format": 1, "phase": "joint", "plan": plan, "alpha": alpha, "exact": exact}
    torch.save({"state_dict": merged, "hyper_parameters": dict(module.hparams), "lowrank_pretrain": side}, path)
    module.load_state_dict(merged)
    return module


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("kind", ["vit", "gpt2", "llama"])
def test_merged_and_peft_exports_compute_the_same(tmp_path, kind, alpha):
    module = lowrank_checkpoint(kind, tmp_path / "last.ckpt", alpha)
    x = inputs(kind)
    expected = logits(module.model, x)

    plain = export(tmp_path / "last.ckpt", "timm" if kind == "vit" else "hf", tmp_path / "plain")
    assert len(list(plain.rglob("*.safetensors"))) == 1 and (plain / "config.json").is_file()
    torch.testing.assert_close(logits(stock(kind, plain), x), expected, rtol=0, atol=1e-5)

    adapters = export(tmp_path / "last.ckpt", "peft", tmp_path / "peft")
    base = stock(kind, adapters / "base")
    assert not torch.allclose(logits(base, x), expected, atol=1e-2)
    peft = PeftModel.from_pretrained(base, adapters).eval()
    torch.testing.assert_close(logits(peft, x), expected, rtol=1e-5, atol=1e-5)
    ranks = {name: layer.r["default"] for name, layer in peft.named_modules() if hasattr(layer, "lora_A")}
    assert ranks == {f"base_model.model.{name}": sum(parts.values()) for name, parts in RANKS[kind].items()}


def test_config_alone_rebuilds_a_timm_model(tmp_path):
    module = lowrank_checkpoint("vit", tmp_path / "last.ckpt", None)
    plain = export(tmp_path / "last.ckpt", None, tmp_path / "plain")
    model = timm.create_model(f"local-dir:{plain}", pretrained=True).eval()
    torch.testing.assert_close(logits(model, inputs("vit")), logits(module.model, inputs("vit")), rtol=0, atol=0)


def test_nothing_is_claimed_of_data_that_nobody_described(tmp_path):
    """timm's registry knows a mean, a crop and a licence for this name; they are somebody else's."""
    lowrank_checkpoint("vit", tmp_path / "last.ckpt", None)
    config = json.loads((export(tmp_path / "last.ckpt", None, tmp_path / "plain") / "config.json").read_text())
    allowed = {"num_classes", "input_size", "fixed_input_size", "pool_size", "first_conv", "classifier"}
    assert set(config["pretrained_cfg"]) <= allowed
    assert config["label_names"] == [f"LABEL_{i}" for i in range(7)]
    assert "is not known" in (tmp_path / "plain" / "README.md").read_text()


class Described:
    """A data module of a user's own."""

    def __init__(self, **said):
        vars(self).update(said)


@pytest.mark.parametrize("names", [["a", "b"], [str(i) for i in range(9)], None])
def test_a_data_module_of_ones_own_describes_itself(tmp_path, names):
    recipe = {"input_size": (1, 8, 8), "mean": (0.1,), "std": (0.2,), "crop_pct": 0.7, "interpolation": "nearest"}
    data = Described(class_names=names, preprocessing=recipe, dataset_name="mine")
    export_module(make("vit"), tmp_path, Facts.of(data))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    resolved = timm.data.resolve_model_data_config(model)
    assert {key: tuple(v) if isinstance(v := resolved[key], list) else v for key in recipe} == recipe
    known = (names or [])[:7]
    assert model.pretrained_cfg["label_names"] == known + [f"LABEL_{i}" for i in range(len(known), 7)]


def test_facts_are_made_plain_whatever_holds_them(tmp_path):
    recipe = {
        "mean": np.array([0.5]),
        "std": torch.tensor([0.25]),
        "crop_pct": np.float32(0.5),
        "input_size": OmegaConf.create([1, 8, 8]),
    }
    facts = Facts.of(Described(preprocessing=recipe, class_names={0: "zero", 1: 1}, dataset_name=None))
    assert facts.preprocessing == {"mean": [0.5], "std": [0.25], "crop_pct": 0.5, "input_size": [1, 8, 8]}
    assert facts.class_names == ["zero", "1"]
    assert Facts.from_state(asdict(facts)) == facts


@pytest.mark.parametrize(
    "state", [None, 3, [], {"class_names": 5, "end_id": "x"}, {"preprocessing": {"mean": torch.zeros(2)}}, {"newer": 1}]
)
def test_facts_that_are_damaged_are_left_out(tmp_path, state):
    assert Facts.from_state(state) == Facts()


def spoken(**special):
    """A tokenizer of a few words, with more special tokens than it uses as the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<pad>", "in", "the", "beginning"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Described(tokenizer=tokenizer, seq_len=8, **special)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({"end_id": 2}, (2, 2, 2)),
        ({"end_id": 2, "bos_id": 1}, (1, 2, 2)),
        ({"end_id": 2, "bos_id": 1, "pad_id": 3}, (1, 2, 3)),
        ({"end_id": 0, "bos_id": None, "pad_id": 0}, (0, 0, 0)),
    ],
)
def test_special_ids_are_the_runs_everywhere(tmp_path, kind, special, expected):
    export_module(make(kind), tmp_path, Facts.of(spoken(**special)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert tuple(getattr(tokenizer, name) for name in names) == expected
    assert tokenizer.encode("in the beginning") == [4, 5, 6] and tokenizer.model_max_length == 8
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tuple(getattr(model.config, name) for name in names) == expected
    assert tuple(getattr(model.generation_config, name) for name in names) == expected
    grown = model.generate(torch.tensor([[4, 5]]), do_sample=False)
    assert grown.shape[1] <= 8, "no further than there are positions"


def test_without_a_tokenizer_no_tokenizer_is_written(tmp_path):
    export_module(make("gpt2"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}


def test_adapters_name_their_base_by_a_relative_path(tmp_path):
    lowrank_checkpoint("gpt2", tmp_path / "last.ckpt", None)
    out = export(tmp_path / "last.ckpt", "peft", tmp_path / "peft")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_gpt2_export_keeps_the_tie_and_the_cache(tmp_path):
    lowrank_checkpoint("gpt2", tmp_path / "last.ckpt", None)
    plain = export(tmp_path / "last.ckpt", "hf", tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in load_file(plain / "model.safetensors")
    assert model.config.use_cache is True
    assert model.config.architectures == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_live_module_is_exported_merged_and_left_alone(tmp_path, kind):
    from lowrank_pretrain.lora import model as lora

    module = make(kind)
    plan = {"model.blocks.0.attn.qkv.q": 2} if kind == "vit" else {"model.transformer.h.0.attn.c_attn.v": 2}
    lora.inject(module, plan, seed=0)
    for _, layer in lora.lora_layers(module):
        for factor in layer.lora_B.values():
            nn.init.normal_(factor)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    draws = torch.random.get_rng_state()
    for _ in range(2):  # a resumed run writes over its earlier export
        export_module(module, tmp_path / "export")
    assert torch.equal(torch.random.get_rng_state(), draws)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert len(list((tmp_path / "export").glob("*.safetensors"))) == 1
    x = inputs(kind)
    torch.testing.assert_close(logits(stock(kind, tmp_path / "export"), x), logits(module.model, x), rtol=0, atol=1e-5)


def test_a_sparse_buffer_is_named(tmp_path):
    class Graph(LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("edges", torch.eye(3).to_sparse())

    with pytest.raises(ConfigError, match="^ckpt='Graph': holds edges as torch.sparse_coo, .*make it dense") as error:
        export_module(Graph(), tmp_path / "live")
    assert "\n" not in str(error.value) and not (tmp_path / "live").exists()
    torch.save({"state_dict": Graph().state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="holds edges as torch.sparse_coo"):
        export(tmp_path / "a.ckpt", None, tmp_path / "out")


def test_bfloat16_stays_bfloat16(tmp_path):
    module = make("gpt2").bfloat16()
    export_module(module, tmp_path / "export")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["transformer.wte.weight"], module.model.transformer.wte.weight)


# --- through a real fit -----------------------------------------------------------------------------------------


def fit(kind, path, targets, epochs=4, resume=None):
    """A checkpoint by a real Trainer with adapters from step 0; returns the trained module."""
    module = make(kind)
    module.optim = Optim(lr=0.03, schedule="constant")
    x = inputs(kind)
    rows = [(row, i) for i, row in enumerate(x)] if kind == "vit" else [{"input_ids": row} for row in x]
    callback = LoRA(rank=4, targets=targets, alpha=6.0)
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[callback], **QUIET)
    trainer.fit(module, DataLoader(rows, batch_size=3), ckpt_path=resume)
    trainer.save_checkpoint(path)
    return module.eval()


@pytest.mark.parametrize(
    ("kind", "targets"), [("vit", "all"), ("gpt2", "all"), ("gpt2", ["head", "c_attn.q"]), ("llama", "attention")]
)
def test_checkpoint_of_a_fit(tmp_path, kind, targets):
    module = fit(kind, tmp_path / "last.ckpt", targets)
    x = inputs(kind)
    expected = logits(module, x)
    plain = export(tmp_path / "last.ckpt", None, tmp_path / "plain")
    torch.testing.assert_close(logits(stock(kind, plain), x), expected, rtol=0, atol=1e-5)
    adapters = export(tmp_path / "last.ckpt", "peft", tmp_path / "peft")
    base = stock(kind, adapters / "base")
    assert not torch.allclose(logits(base, x), expected, atol=1e-4)
    peft = PeftModel.from_pretrained(base, adapters).eval()
    torch.testing.assert_close(logits(peft, x), expected, rtol=0, atol=1e-5)
    again = type(module).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    torch.testing.assert_close(logits(again, x), expected, rtol=0, atol=1e-5)


def test_head_that_was_a_target_is_exported_untied_and_said(tmp_path, caplog):
    module = fit("gpt2", tmp_path / "last.ckpt", "head")
    with caplog.at_level(logging.INFO, logger="lowrank_pretrain"):
        plain = export(tmp_path / "last.ckpt", "hf", tmp_path / "plain")
    assert [record.message for record in caplog.records if "untied" in record.message]
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert torch.equal(model.transformer.wte.weight, module.model.transformer.wte.weight)


def test_resume_with_an_untied_head_is_exact(tmp_path):
    whole = fit("gpt2", tmp_path / "whole.ckpt", ["head", "mlp"])
    fit("gpt2", tmp_path / "half.ckpt", ["head", "mlp"], epochs=2)
    resumed = fit("gpt2", tmp_path / "again.ckpt", ["head", "mlp"], resume=tmp_path / "half.ckpt")
    ours = resumed.state_dict()
    for key, value in whole.state_dict().items():
        assert torch.equal(ours[key], value), key


# --- a module that this package knows nothing of ----------------------------------------------------------------


class Foreign(LightningModule):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x))))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch), batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_foreign_module_is_written_as_its_merged_state_dict(tmp_path, caplog):
    torch.manual_seed(0)
    module, x = Foreign(), torch.arange(5)
    trainer = Trainer(accelerator="cpu", max_epochs=3, callbacks=[LoRA(rank=2, targets=["mix"])], **QUIET)
    trainer.fit(module, DataLoader(x, batch_size=5))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with caplog.at_level(logging.INFO, logger="lowrank_pretrain"):
        plain = export(tmp_path / "last.ckpt", None, tmp_path / "plain")
        export_module(module, tmp_path / "live")
    notes = [record.message for record in caplog.records if record.name == "lowrank_pretrain.export"]
    assert ["merged state dict" in note for note in notes] == [True, True]
    for folder in (plain, tmp_path / "live"):
        fresh = Foreign()
        fresh.load_state_dict(load_file(folder / "model.safetensors"))
        torch.testing.assert_close(logits(fresh, x), logits(module, x), rtol=0, atol=1e-6)

    adapters = export(tmp_path / "last.ckpt", "peft", tmp_path / "peft")
    base = Foreign()
    base.load_state_dict(load_file(adapters / "base" / "model.safetensors"))
    peft = PeftModel.from_pretrained(base, adapters)
    torch.testing.assert_close(logits(peft, x), logits(module, x), rtol=0, atol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------


def test_wrong_requests_are_one_line(tmp_path):
    path = tmp_path / "last.ckpt"
    lowrank_checkpoint("vit", path, None)
    wrong(lambda: export(path, "onnx", tmp_path / "out"), "format='onnx'", "timm, hf, peft")
    wrong(lambda: export(path, "hf", tmp_path / "out"), "format='hf'", "use format=timm")
    wrong(lambda: export(path, "timm", path), "out=", "empty folder")
    wrong(lambda: export(path, "timm", tmp_path), "out=", "empty folder")
    wrong(lambda: export(tmp_path / "none.ckpt", "timm", tmp_path / "out"), "ckpt=", "no such file")
    full = make("vit")
    torch.save({"state_dict": full.state_dict(), "hyper_parameters": dict(full.hparams)}, tmp_path / "full.ckpt")
    wrong(lambda: export(tmp_path / "full.ckpt", "peft", tmp_path / "out"), "format='peft'", "holds no adapters")
    assert not (tmp_path / "out").exists()


def test_truncated_and_foreign_checkpoints_are_one_line(tmp_path):
    path = tmp_path / "last.ckpt"
    lowrank_checkpoint("vit", path, None)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1000):
        path.write_bytes(whole[:size])
        wrong(lambda: export(path, None, tmp_path / "out"), "ckpt=", "last.ckpt", "cannot be read")
    path.write_text("not a checkpoint")
    wrong(lambda: export(path, None, tmp_path / "out"), "cannot be read")
    torch.save({"model": Foreign()}, path)  # a class of the file's choosing is not read, and nothing else is there
    wrong(lambda: export(path, None, tmp_path / "out"), "no Lightning checkpoint")
    torch.save({"weight": torch.zeros(2)}, path)
    wrong(lambda: export(path, None, tmp_path / "out"), "no Lightning checkpoint")
    torch.save({"state_dict": {"model.x": torch.zeros(2)}, "hyper_parameters": dict(make("gpt2").hparams)}, path)
    wrong(lambda: export(path, None, tmp_path / "out"), "do not fit")
    torch.save({"state_dict": {"x": torch.zeros(2)}, "lowrank_pretrain": {"format": 9}}, path)
    wrong(lambda: export(path, None, tmp_path / "out"), "format 9")


def test_command_line(tmp_path, capsys):
    lowrank_checkpoint("vit", tmp_path / "last.ckpt", None)
    assert main([f"ckpt={tmp_path}/last.ckpt", f"out={tmp_path}/out", "format=timm"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    files = ", ".join(f"{tmp_path}/out/{name}" for name in ("README.md", "config.json", "model.safetensors"))
    assert capsys.readouterr().out == f"written: {files}\n"
    assert main(["--ckpt", f"{tmp_path}/last.ckpt", "--out", f"{tmp_path}/flags"]) == 0
    assert (tmp_path / "flags" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    capsys.readouterr()
    for argv, word in [
        (["ckpt=a.ckpt"], "out"),
        (["ckpt=a.ckpt", "out=b", "fromat=timm"], "format"),
        (["ckpt=none.ckpt", f"out={tmp_path}/new"], "no such file"),
        (["--ckpt", "a.ckpt"], "out"),
        (["--ckpt"], "--ckpt"),
    ]:
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and word in err
    assert main(["--help"]) == 0
    assert "format=timm|hf|peft" in capsys.readouterr().out


def test_command_exits_with_two_and_one_line():
    command = [sys.executable, "-m", "lowrank_pretrain.export", "ckpt=none.ckpt", "out=new"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "ckpt='none.ckpt': no such file" in done.stderr
