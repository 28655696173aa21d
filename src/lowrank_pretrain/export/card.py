"""Write the card of exported weights: what they are, their data, results, how to load them and how to reproduce them."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lowrank_pretrain.core.files import write_whole
from lowrank_pretrain.core.metrics import METRICS
from lowrank_pretrain.core.text import format_number
from lowrank_pretrain.export.facts import Facts

GRAY = "from torchvision.transforms import Compose, Grayscale\n"
# Each of these programs runs in the export's folder, without this package.
TIMM = """import timm
import torch
{gray_import}
model = timm.create_model('local-dir:.', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{gray}names = model.pretrained_cfg['label_names']


def classify(image):
    \"\"\"The class of a PIL image.\"\"\"
    with torch.no_grad():
        return names[model(transform(image.convert('RGB'))[None]).argmax()]"""
PIPELINE = """from transformers import pipeline
{gray_import}
classify = pipeline('image-classification', model='.')
{gray}"""
MIXER = """from safetensors.torch import load_file
from timm.models.mlp_mixer import MlpMixer

model = MlpMixer({args}, num_blocks=8, embed_dim=192).eval()  # timm has no name for this size
model.load_state_dict(load_file('model.safetensors'))"""
GENERATE = """from transformers import pipeline

generate = pipeline('text-generation', model='.')
print(generate('In the beginning')[0]['generated_text'])"""
CAUSAL = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained('.').eval()"""
PEFT_TIMM = """import timm
from peft import PeftModel

base = timm.create_model('local-dir:base', pretrained=True)
model = PeftModel.from_pretrained(base, '.').eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(base)){gray}"""
PEFT_CAUSAL = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained('base')
model = PeftModel.from_pretrained(base, '.').eval()"""
STATE = """from safetensors.torch import load_file

state_dict = load_file('model.safetensors')"""


def write(
    out: Path, config: dict[str, Any] | None, summary: dict[str, Any] | None, facts: Facts | None = None,
    merged: str | None = None,
) -> Path:  # fmt: skip
    """Write ``README.md`` into the folder of an export.

    Args:
        out: the folder, with weights and config.json in it.
        config: the run's whole configuration; None: not known.
        summary: the contents of its summary.json; None: not known.
        facts: of the data.
        merged: a sentence on the weights that the merge is made of, if they were not the run's own.

    Returns:
        The file.
    """
    card = out / "README.md"
    write_whole(card, text(out, config, summary, facts or Facts(), merged))
    return card


def of_run(ckpt: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return configuration and summary of the run whose folder holds the checkpoint `ckpt`, each None if missing."""
    run_dir = ckpt.resolve().parent.parent
    config, summary = run_dir / ".hydra" / "config.yaml", run_dir / "summary.json"
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(config), resolve=True) if config.is_file() else None
        whole = isinstance(found, dict) and all(isinstance(found.get(group), dict) for group in ("model", "data", "method"))
        return (found if whole else None), (json.loads(summary.read_text()) if summary.is_file() else None)
    except Exception:  # damaged or foreign files: a card without results is better than no export
        return None, None


def library(out: Path) -> str | None:
    """Return ``timm`` or ``transformers``, by the export's config.json; None for a module that neither library knows."""
    file = out / "config.json"
    if not file.is_file():
        return None
    return "timm" if "architecture" in json.loads(file.read_text(encoding="utf-8")) else "transformers"


def usage(out: Path) -> list[tuple[str, str]]:
    """Return the ways to load the export in the folder `out`: (library, lines of Python)."""
    adapters = (out / "adapter_config.json").is_file()
    home = out / "base" if adapters else out
    kind = library(home)
    if kind == "timm":
        config = json.loads((home / "config.json").read_text(encoding="utf-8"))
        size = config.get("pretrained_cfg", {}).get("input_size", [3, 224, 224])
        gray = size[0] == 1
        if config["architecture"] == "mixer_ti16_224":  # of this package
            args = f"num_classes={config['num_classes']}, img_size={size[1]}, in_chans={size[0]}, patch_size=16"
            return [("timm", MIXER.format(args=args))]
        compose = "transform = Compose([Grayscale(), transform])\n"
        if adapters:
            return [("peft", PEFT_TIMM.format(gray="\n" + GRAY + compose.rstrip() if gray else ""))]
        insert = "classify.image_processor.val_transforms.transforms.insert(0, Grayscale())  # one channel\n"
        ways = (("timm", TIMM, compose), ("transformers", PIPELINE, insert))
        imports = {"timm": GRAY, "transformers": "from torchvision.transforms import Grayscale\n"}
        return [
            (name, lines.format(gray=extra if gray else "", gray_import=imports[name] if gray else "").rstrip())
            for name, lines, extra in ways
        ]
    if kind == "transformers":
        if adapters:
            return [("peft", PEFT_CAUSAL)]
        return [("transformers", GENERATE if (home / "tokenizer.json").is_file() else CAUSAL)]
    return [("safetensors", STATE)]


def text(
    out: Path, config: dict[str, Any] | None, summary: dict[str, Any] | None, facts: Facts, merged: str | None = None
) -> str:
    """Return the card as Markdown, with the metadata block that model hubs read."""
    adapters = (out / "adapter_config.json").is_file()
    kind = library(out / "base" if adapters else out)
    config, summary = _without_paths(config or {}), summary or {"phases": [], "final": {}}
    model, method = (dict(config.get(group) or {}) for group in ("model", "method"))
    name, how = model.get("name") or _last(model.get("_target_") or "model"), method.get("name", "full")
    task = {"timm": "image-classification", "transformers": "text-generation"}.get(kind or "")
    meta: dict[str, Any] = {"library_name": "peft" if adapters else kind, "pipeline_tag": task}
    meta |= {"tags": ["lowrank_pretrain", *([how] if config else [])]}
    head = OmegaConf.to_yaml(OmegaConf.create({key: value for key, value in meta.items() if value}))
    total = summary["phases"][0]["total"] if summary["phases"] else None
    size = f", {total:,} parameters" if total else ""
    trained = f", trained from {_start(model)} on {facts.dataset_name or _last((config.get('data') or {}).get('_target_'))}"
    parts = [
        f"---\n{head}---\n\n# {name}{f', trained with {how}' if config else ''}\n",
        f"A {name}{size}{trained if config else ''}{f' with the method `{how}` of lowrank_pretrain' if config else ''}. "
        f"{'These are its adapters; `base` holds the weights that they belong to.' if adapters else PLAIN}"
        f"{f' {merged}' if merged else ''}\n",
        "## Use\n\nIn this folder, or with its path in the place of the dot:\n",
        *(f"With {way}:\n\n```python\n{lines}\n```\n" for way, lines in usage(out)),
        _data(facts, kind),
    ]
    if summary["final"]:
        parts.append(f"## Results\n\n{_results(summary['final'])}\n")
    if summary["phases"]:
        parts.append(f"## Training\n\n{_phases(summary)}\n")
    if config:
        known = ", ".join(f"{package} {number}" for package, number in summary.get("versions", {}).items())
        whole = OmegaConf.to_yaml(OmegaConf.create(config))
        words = f"Seed {config.get('seed')}{f', {known}' if known else ''}. The whole configuration"
        parts.append(f"{words}, local paths by their last name:\n\n```yaml\n{whole}```\n")
    parts.append(
        "## Limits\n\nTrained for research on training methods. This card knows neither the licence of the data nor what is "
        "missing in them: check both before you use the weights for anything else.\n"
    )
    return "\n".join(parts)


PLAIN = "Low-rank parts are merged: this is a plain model."


def _data(facts: Facts, kind: str | None) -> str:
    """Describe the model's inputs and the names of its outputs."""
    lines = []
    if kind == "timm":
        recipe = facts.preprocessing
        if recipe is None:
            lines.append("How the images were prepared is not known: the transform in the lines above is ImageNet's.")
        else:
            shown = ", ".join(f"{key} {_words(value)}" for key, value in recipe.items())
            lines.append(f"Images as in the run's evaluation: {shown}.")
        if facts.class_names:
            lines.append("Classes, in the order of the outputs: " + ", ".join(f"`{name}`" for name in facts.class_names) + ".")
    if kind == "transformers":
        has = (
            "has no tokenizer, because the run's data came as tokens"
            if facts.tokenizer is None
            else "brings the run's tokenizer"
        )
        end = "" if facts.end_id is None else f"; token {facts.end_id} ends a document"
        lines.append(f"This folder {has}{end}.")
    return "## Data\n\n" + "\n\n".join(lines) + "\n" if lines else ""


def _words(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _without_paths(value: Any) -> Any:
    """Replace each absolute path by its last name: a card must not reveal paths of this machine."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _start(model: dict[str, Any]) -> str:
    file = model.get("pretrained_file")
    return f"the weights in `{Path(file).name}`" if file else "random weights"


def _last(target: str | None) -> str:
    return str(target).rsplit(".", 1)[-1]


def _results(final: dict[str, float]) -> str:
    """Build a table with a column for each split."""
    splits = [split for split in ("train", "val", "test") if any(key.startswith(f"{split}/") for key in final)]
    rows = [f"| | {' | '.join(splits)} |", "|---|" + "---:|" * len(splits)]
    for key in ("loss", "acc1", "acc5", "ppl"):
        values = [final.get(f"{split}/{key}") for split in splits]
        if any(value is not None for value in values):
            cells = [METRICS[f"val/{key}"].word, *("–" if value is None else format_number(value) for value in values)]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) if splits else "None were logged."


def _phases(summary: dict[str, Any]) -> str:
    rows = [
        "| phase | optimizer steps | seconds | samples/s | peak memory, GiB | trainable |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for p in summary["phases"]:
        rate = "–" if p["samples_per_sec"] is None else format_number(p["samples_per_sec"])
        rows.append(
            f"| {p['phase']} | {p['steps']:,} | {p['seconds']:.1f} | {rate} | {p['peak_gib']:.2f} | {p['trainable']:,} |"
        )
    return "\n".join(rows)
