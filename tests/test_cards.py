"""The model card's own lines, run as they stand where this package is not, in a folder that was moved: the run's figures."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lowrank_pretrain.data import SAMPLES
from tests.conftest import SHORT, VIT

CLASSES = ["cat", "dog", "Vögel mit Ä", "日本"]
ONE_EPOCH = ["trainer.max_epochs=1"]
TINY_GPT2 = ["model.config.n_embd=24", "model.config.n_layer=1", "model.config.n_head=2"]
TINY_LLAMA = [
    "data=kjv_sample", "model=llama_pocket", "model.config.hidden_size=24", "model.config.intermediate_size=32",
    "model.config.num_hidden_layers=1", "model.config.num_attention_heads=2", "model.config.num_key_value_heads=2",
]  # fmt: skip

# Reads {name: folder} and the data to be seen by each; prints what the card's lines compute, as JSON.
READER = r"""
import io, json, os, re, sys
sys.modules["lowrank_pretrain"] = None  # whoever imports it fails
import numpy as np, torch
from PIL import Image
from torch.nn.functional import cross_entropy

def blocks(folder):
    os.chdir(folder)
    for lines in re.findall(r"```python\n(.*?)```", open("README.md", encoding="utf-8").read(), re.S):
        found = {}
        exec(lines, found)
        yield found

def pictures(folder):
    for path in json.load(open(os.path.join(folder, "pictures.json"))):
        yield Image.open(path)

told = {}
for name, folder, seen in json.load(sys.stdin):
    torch.manual_seed(0)
    if seen == "pictures":
        images, labels = zip(*[(Image.open(path), label) for path, label in json.load(open(os.path.join(folder, "seen.json")))])
        told[name] = {}
        for found in blocks(folder):
            if "model" in found:  # timm's way
                mode = "RGB"
                with torch.no_grad():
                    logits = torch.stack([found["model"](found["transform"](i.convert(mode))[None])[0] for i in images])
                right = [found["names"].index(label) if isinstance(label, str) else label for label in labels]
                told[name]["loss"] = cross_entropy(logits, torch.tensor(right)).item()
                told[name]["named"] = [found["classify"](image) for image in images[:3]]
                told[name]["names"] = found["names"]
                told[name]["first"] = logits.argmax(-1).tolist()[:3]
                told[name]["cfg"] = found["model"].pretrained_cfg
                probabilities = logits.softmax(-1)
            elif "classify" in found:
                answers = found["classify"](list(images), top_k=1)
                told[name]["pipeline"] = [a[0]["label"] for a in answers][:3]
                told[name]["pipeline off by"] = max(abs(a[0]["score"] - p.max().item()) for a, p in zip(answers, probabilities))
    elif seen == "peft":
        for found in blocks(folder):
            adapters = [n for n, _ in found["model"].named_parameters() if "lora_A" in n]
            told[name] = [type(found["model"]).__name__, bool(adapters)]
    elif seen == "mixer":
        for found in blocks(folder):
            told[name] = list(found["model"](torch.zeros(1, 1, 32, 32)).shape)
    else:
        rows = torch.tensor(seen)
        for found in blocks(folder):
            if "model" in found:
                model, tokenizer, said = found["model"], None, None
            else:
                model, tokenizer = found["generate"].model, found["generate"].tokenizer
                said = found["generate"]("In the beginning")[0]["generated_text"]
            from transformers import AutoTokenizer, GenerationConfig
            with torch.no_grad():
                loss = model(input_ids=rows, labels=rows).loss.item()
            written = GenerationConfig.from_pretrained(folder)
            told[name] = {"loss": loss, "said": said, "ids": [written.bos_token_id, written.eos_token_id, written.pad_token_id],
                          "config": [model.config.vocab_size, model.config.bos_token_id, model.config.eos_token_id]}
            if tokenizer is not None:
                auto = AutoTokenizer.from_pretrained(folder)
                told[name]["tokens"] = [t.encode("In the beginning God") for t in (auto, tokenizer)]
                told[name]["special"] = [auto.bos_token, auto.eos_token, auto.pad_token, auto.model_max_length]
print("TOLD" + json.dumps(told))
"""


def draw(folder, n=3):
    """Pictures of three sizes in folders by class and split."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for k, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (24 + 3 * i, 30 - 2 * i, 3)) + 40 * k
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i}.png")


@pytest.fixture(scope="module")
def told(tmp_path_factory, composed):
    """What the cards' lines say: ({name: told}, {name: summary}, {name: folder})."""
    from lowrank_pretrain.data.text.bins import open_bin
    from lowrank_pretrain.export.weights import export
    from lowrank_pretrain.run.train import train

    home = tmp_path_factory.mktemp("cards")
    draw(home / "pets")
    gray = [*SHORT, *ONE_EPOCH, *VIT]
    coloured = [
        *gray, "data=images", f"data.root={home / 'pets'}", "data.num_workers=0", "data.img_size=28", "data.crop_pct=0.8",
        "data.mean=[0.4,0.3,0.2]", "data.std=[0.3,0.2,0.4]", "data.num_classes=4", "data.batch_size=4",
        "data.interpolation=bilinear", "method=full", "trainer.limit_test_batches=1.0",
    ]  # fmt: skip
    text = [*SHORT, *ONE_EPOCH, "method=full", "data.seq_len=16"]
    runs = {
        "gray": [*gray, "method=lora", "method.rank=4"],
        "coloured": coloured,
        "gpt2": ["experiment=prelora_gpt2_pocket", *text, *TINY_GPT2],
        "llama": ["experiment=none", *TINY_LLAMA, *text],
        "mixer": [
            *SHORT, *ONE_EPOCH, "experiment=none", "model=mixer_ti", "data=fashion_mnist_sample", "data.img_size=32",
            "method=full", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1",
        ],
    }  # fmt: skip
    summaries, folders = {}, {}
    for name, overrides in runs.items():
        directory = home / name
        summaries[name] = train(composed(*overrides), directory)
        folders[name] = home / "moved" / name
        shutil.copytree(directory / "export", folders[name])
    folders["peft"] = home / "moved" / "peft"
    export(home / "gray" / "checkpoints" / "last.ckpt", "peft", folders["peft"])
    folders["from the checkpoint"] = home / "moved" / "again"
    export(home / "coloured" / "checkpoints" / "last.ckpt", None, folders["from the checkpoint"])

    with np.load(SAMPLES / "fashion_mnist.npz") as file:
        images, labels = file["test_images"][:8], file["test_labels"][:8]
    seen = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(home / f"{i}.png")
        seen.append((str(home / f"{i}.png"), int(label)))
    (folders["gray"] / "seen.json").write_text(json.dumps(seen))
    pets = [(str(p), p.parent.name) for p in sorted((home / "pets" / "validation").rglob("*.png"))]
    for name in ("coloured", "from the checkpoint"):
        (folders[name] / "seen.json").write_text(json.dumps(pets))
    rows = np.array(open_bin(SAMPLES / "kjv_val.bin")[0][: 8 * 16]).reshape(8, 16).tolist()
    kinds = {"mixer": "mixer", "peft": "peft", "gpt2": rows, "llama": rows}
    asked = [(name, str(folder), kinds.get(name, "pictures")) for name, folder in folders.items()]
    done = subprocess.run([sys.executable, "-c", READER], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("TOLD")[2]), summaries, folders


@pytest.mark.parametrize("name", ["gray", "coloured"])
def test_stock_timm_and_the_pipeline_see_what_the_run_saw(told, name):
    said, summaries, _ = told
    assert said[name]["loss"] == pytest.approx(summaries[name]["final"]["test/loss"], abs=2e-5)
    assert said[name]["pipeline off by"] < 1e-5
    assert said[name]["named"] == said[name]["pipeline"] == [said[name]["names"][i] for i in said[name]["first"]]


def test_an_export_of_the_checkpoint_alone_says_the_same(told):
    said, _, _ = told
    here, there = said["from the checkpoint"], said["coloured"]
    assert here["loss"] == there["loss"] and here["names"] == there["names"] and set(here["names"]) == set(CLASSES)


def test_nothing_of_somebody_elses_weights_is_in_the_config(told):
    for name in ("gray", "coloured"):
        config = json.loads((told[2][name] / "config.json").read_text(encoding="utf-8"))
        assert not {"tag", "license", "url", "hf_hub_id", "origin_url", "paper_ids"} & set(config["pretrained_cfg"])
    assert config["pretrained_cfg"]["mean"] == [0.4, 0.3, 0.2] and config["pretrained_cfg"]["crop_pct"] == 0.8
    gray = json.loads((told[2]["gray"] / "config.json").read_text())["pretrained_cfg"]
    assert gray["mean"] == [0.286] and gray["input_size"] == [1, 28, 28]


def test_the_card_names_the_set_and_no_path_of_this_machine(told):
    _, _, folders = told
    card = (folders["coloured"] / "README.md").read_text(encoding="utf-8")
    assert "trained from random weights on pets" in card and "`日本`" in card
    assert "Fashion-MNIST" in (folders["gray"] / "README.md").read_text(encoding="utf-8")
    for name, folder in folders.items():
        assert str(folder.parents[1]) not in (folder / "README.md").read_text(encoding="utf-8"), name
        for config in folder.rglob("*.json"):
            assert config.name == "seen.json" or str(folder.parents[1]) not in config.read_text(encoding="utf-8"), config


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model_generates_with_the_runs_tokenizer(told, name):
    from lowrank_pretrain.data.text.tokenizer import load_tokenizer

    said, summaries, _ = told
    tokenizer, end = load_tokenizer("kjv")
    assert said[name]["loss"] == pytest.approx(summaries[name]["final"]["test/loss"], rel=1e-5)
    assert said[name]["tokens"] == [tokenizer.encode("In the beginning God").ids] * 2
    assert said[name]["ids"] == [end] * 3
    assert said[name]["config"] == [tokenizer.get_vocab_size(), end, end]
    assert said[name]["special"] == ["<|endoftext|>"] * 3 + [16]
    assert said[name]["said"].startswith("In the beginning")


def test_adapters_and_a_network_that_timm_has_no_name_for(told):
    assert told[0]["peft"] == ["PeftModel", True]
    assert told[0]["mixer"] == [1, 10]


def test_every_card_has_lines_to_run(told):
    for folder in told[2].values():
        assert re.search(r"```python\n.+```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
