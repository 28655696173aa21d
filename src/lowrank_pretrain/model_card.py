"""The card beside exported weights: what they are, what they learned from, how well, how to load and how to remake them."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from .digits import digits

LOAD = {
    "timm": "import timm\n\nmodel = timm.create_model('local-dir:{out}', pretrained=True)",
    "transformers": "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained('{out}')",
    None: "from safetensors.torch import load_file\n\nstate_dict = load_file('{out}/model.safetensors')",
}
METRICS = {"loss": "loss, nats", "acc1": "top-1 accuracy", "acc5": "top-5 accuracy", "ppl": "perplexity"}


def write(out: Path, config: dict[str, Any], summary: dict[str, Any]) -> Path:
    """Write ``README.md`` into the folder of an export.

    Args:
        out: the folder, with weights and config.json in it.
        config: the run's whole configuration.
        summary: the contents of its summary.json.

    Returns:
        The file.
    """
    card = out / "README.md"
    card.write_text(text(config, summary, library(out)))
    return card


def library(out: Path) -> str | None:
    """``timm`` or ``transformers``, by the export's config.json; None for a module that neither knows."""
    file = out / "config.json"
    if not file.is_file():
        return None
    return "timm" if "architecture" in json.loads(file.read_text()) else "transformers"


def text(config: dict[str, Any], summary: dict[str, Any], library: str | None) -> str:
    """The card as Markdown with the metadata block that model hubs read."""
    model, data, method = (dict(config[group]) for group in ("model", "data", "method"))
    name, how = model.get("name") or _last(model.get("_target_")), method.get("name", "full")
    source = _last(data.get("_target_"))
    task = {"timm": "image-classification", "transformers": "text-generation"}.get(library)
    meta = {"library_name": library, "pipeline_tag": task, "tags": ["lowrank_pretrain", how]}
    head = OmegaConf.to_yaml(OmegaConf.create({key: value for key, value in meta.items() if value}))
    total = summary["phases"][0]["total"] if summary["phases"] else None
    size = f", {total:,} parameters" if total else ""
    parts = [
        f"---\n{head}---\n\n# {name}, trained with {how}\n",
        f"A {name}{size}, trained from {_start(model)} on `{source}` (`{data.get('root')}`) with the method `{how}` of "
        "lowrank_pretrain. Low-rank parts are merged: this is a plain model.\n",
        f"## Use\n\n```python\n{LOAD[library].format(out='DIR')}\n```\n\n`DIR` is this folder.\n",
        f"## Results\n\n{_results(summary['final'])}\n",
        f"## Training\n\n{_phases(summary)}\n",
        f"Seed {config['seed']}. The whole configuration:\n\n```yaml\n{OmegaConf.to_yaml(OmegaConf.create(config))}```\n",
        "## Limits\n\nTrained for research on training methods. This card knows neither the licence of the data nor what they "
        "leave out: see to both before using the weights for anything else.\n",
    ]
    return "\n".join(parts)


def _start(model: dict[str, Any]) -> str:
    file = model.get("pretrained_file")
    return f"the weights in `{Path(file).name}`" if file else "random weights"


def _last(target: str | None) -> str:
    return str(target).rsplit(".", 1)[-1]


def _results(final: dict[str, float]) -> str:
    """Splits as columns."""
    splits = [split for split in ("train", "val", "test") if any(key.startswith(f"{split}/") for key in final)]
    rows = [f"| | {' | '.join(splits)} |", "|---|" + "---:|" * len(splits)]
    for key, words in METRICS.items():
        values = [final.get(f"{split}/{key}") for split in splits]
        if any(value is not None for value in values):
            rows.append(f"| {words} | {' | '.join('–' if value is None else digits(value) for value in values)} |")
    return "\n".join(rows) if splits else "None were logged."


def _phases(summary: dict[str, Any]) -> str:
    rows = [
        "| phase | optimizer steps | seconds | samples/s | peak memory, GiB | trainable |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for p in summary["phases"]:
        rate = "–" if p["samples_per_sec"] is None else digits(p["samples_per_sec"])
        rows.append(
            f"| {p['phase']} | {p['steps']:,} | {p['seconds']:.1f} | {rate} | {p['peak_gib']:.2f} | {p['trainable']:,} |"
        )
    return "\n".join(rows)
