"""Export trained weights from a checkpoint or a module into the formats that stock libraries read.

    python -m lowrank_pretrain.export ckpt=PATH out=DIR [format=timm|hf|peft|factored]

    timm   DIR/{model.safetensors, config.json}: the merged network; timm.create_model("local-dir:DIR", pretrained=True),
           or timm.create_model(NAME, checkpoint_path="DIR/model.safetensors", ...)
    hf     the same for AutoModelForCausalLM.from_pretrained("DIR")
    peft   DIR/{adapter_model.safetensors, adapter_config.json}: the adapters, not merged, and DIR/base: the weights
           that they belong to, as above; PeftModel.from_pretrained(BASE, "DIR")
    factored   DIR as above, and DIR/factored.safetensors: each W = U V as two linear layers (export/factored.py loads it)

The folder also holds what a reader of the weights needs: preprocessing and class names (timm; transformers'
pipeline("image-classification") reads the same folder), tokenizer and special ids (hf), and a README.md with the lines that
load it. Without format= it is timm or hf, as the checkpoint holds it. A LightningModule of the user's own is written as its
merged state dict, DIR/model.safetensors. --ckpt PATH --out DIR does the same as ckpt=PATH out=DIR.
"""

import inspect
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor

from lowrank_pretrain.checkpoints.format import check_format
from lowrank_pretrain.checkpoints.io import local_path
from lowrank_pretrain.checkpoints.safe_load import safe_load, unread
from lowrank_pretrain.core.arguments import key_values
from lowrank_pretrain.core.checks import choice
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.core.files import write_whole
from lowrank_pretrain.core.text import one_line
from lowrank_pretrain.export import card as model_card
from lowrank_pretrain.export.factored import factored_names, write_factors
from lowrank_pretrain.export.facts import KEY as FACTS
from lowrank_pretrain.export.facts import Facts
from lowrank_pretrain.export.peft import adapted_layers, write_adapters
from lowrank_pretrain.lora.model import plain_state
from lowrank_pretrain.lora.storing import unmerged_weights

log = logging.getLogger("lowrank_pretrain.export")  # run as a command, __name__ differs

FORMATS = ("timm", "hf", "peft", "factored")
_VISION = {"name", "num_classes", "img_size", "in_chans", "model_kwargs"}
_LANGUAGE = {"name", "vocab_size", "seq_len", "config"}


class Source(NamedTuple):
    """Hold the input of an export.

    Attributes:
        state: merged weights by their names in the LightningModule (``model.…``).
        hparams: the LightningModule's constructor arguments.
        lowrank: the checkpoint's side entry (unmerged factors), or nothing.
        label: for messages.
        facts: of the data.
    """

    state: Mapping[str, Tensor]
    hparams: Mapping[str, Any]
    lowrank: Mapping[str, Any]
    label: str
    facts: Facts = Facts()

    @property
    def kind(self) -> str | None:
        """Return ``"timm"``, ``"hf"``, or ``None`` for a module that this package does not know."""
        if not all(key.startswith("model.") for key in self.state):
            return None
        return "timm" if _VISION <= set(self.hparams) else "hf" if _LANGUAGE <= set(self.hparams) else None


def export(ckpt: str | Path, format: str | None, out: str | Path) -> Path:
    """Write the weights of a checkpoint into the folder `out`, which must be new or empty.

    Args:
        ckpt: a Lightning checkpoint of this package's modules, or of a user's own.
        format: ``"timm"``, ``"hf"``, ``"peft"``, ``"factored"``, or ``None``: what the checkpoint holds.
        out: the folder to make.

    Returns:
        `out`.

    Raises:
        ConfigError: an unreadable or foreign checkpoint, or a format that it cannot be written in.
    """
    if format is not None:
        choice("format", format, FORMATS)
    out, ckpt = Path(local_path(out, "out")), local_path(ckpt, "ckpt")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("out", str(out), "must be a new or an empty folder")
    source = read(Path(ckpt))
    if format == "peft":
        _write_peft(source, out)
    elif format == "factored":
        _write_factored(source, out)
    elif format is not None and source.kind not in (format, None):
        raise ConfigError("format", format, f"{source.label} holds a {source.kind} model; use format={source.kind}")
    else:
        _write(source, out)
    model_card.write(out, *model_card.of_run(Path(ckpt)), source.facts, _stored_in(source))
    return out


def export_module(module: torch.nn.Module, out: str | Path, facts: Facts | None = None) -> Path:
    """Write a live LightningModule's merged weights into the folder `out`, replacing an earlier export of it.

    The module itself is not changed, with or without adapters, on any device.

    Args:
        module: the LightningModule.
        out: the folder.
        facts: of the data; None: nothing is known.

    Returns:
        `out`.

    Raises:
        ValueError: the adapters hold NaN or infinite numbers.
    """
    state = {key: value.detach().cpu() for key, value in _tensors(plain_state(module)).items()}
    hparams = dict(getattr(module, "hparams", {}))
    return _write(Source(state, hparams, {}, type(module).__name__, facts or Facts()), Path(out))


def read(path: Path) -> Source:
    """Read a checkpoint file without executing anything that it may hold.

    Raises:
        ConfigError: no such file, a truncated or a foreign one.
    """
    if not path.is_file():
        raise ConfigError("ckpt", str(path), "no such file; give a Lightning checkpoint such as checkpoints/last.ckpt")
    try:
        found = safe_load(path)
    except Exception as error:  # torch raises a dozen kinds for files that are cut off or of another format
        raise ConfigError("ckpt", str(path), f"cannot be read (truncated, or foreign): {one_line(error, 160)}") from error
    state = found.get("state_dict") if isinstance(found, dict) else None
    if not isinstance(state, dict) or not state:
        raise ConfigError("ckpt", str(path), "is no Lightning checkpoint: it holds no state_dict")
    lowrank = found.get("lowrank_pretrain", {})
    check_format(lowrank, path, "ckpt")
    hparams, facts = found.get("hyper_parameters", {}), Facts.from_state(lowrank.get(FACTS))
    return Source(_tensors(state), dict(hparams) if isinstance(hparams, Mapping) else {}, lowrank, str(path), facts)


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state dict, without torch.compile's prefix; a module's extra state may be of any type."""
    return {key.replace("_orig_mod.", ""): value for key, value in state.items() if isinstance(value, Tensor)}


def _write(source: Source, out: Path) -> Path:
    """Write one ``.safetensors`` into `out`, with its ``config.json`` where the network is known."""
    if source.kind is None:
        with optional_import():
            from safetensors.torch import save_file

        for key, value in source.state.items():
            if value.layout != torch.strided:
                cure = "make it dense, or register the buffer with persistent=False"
                raise ConfigError("ckpt", source.label, f"holds {key} as {value.layout}, which no export can: {cure}")
        out.mkdir(parents=True, exist_ok=True)
        # copies: safetensors refuses tensors that share memory, as tied weights do
        save_file({key: value.clone().contiguous() for key, value in source.state.items()}, out / "model.safetensors")
        log.info("%s: not a module of this package, written as its merged state dict under its own names", source.label)
        return out
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn only to be overwritten
        network = _network(source)
    if source.kind == "timm":
        _write_timm(network, source.facts, out)
    else:
        _write_hf(network, source.facts, out)
    return out


# the keys of timm's pretrained_cfg that describe the network; the others describe weights that somebody else published
_OF_THE_NETWORK = ("num_classes", "input_size", "fixed_input_size", "pool_size", "first_conv", "classifier")


def _write_timm(network: Any, facts: Facts, out: Path) -> None:
    """Write weights and a ``config.json`` that timm reads, and transformers' TimmWrapper as well."""
    from timm.models import save_for_hf

    args = {key: value for key, value in network.created_with.items() if not key.endswith(("drop_rate", "path_rate"))}
    save_for_hf(network, str(out), model_args=args, safe_serialization=True)
    config = json.loads((out / "config.json").read_text())
    # timm 1.0.3x writes it here as well, and transformers would then pass it twice
    config.get("model_args", {}).pop("num_classes", None)
    theirs, recipe = config["pretrained_cfg"], facts.preprocessing or {}
    config["pretrained_cfg"] = {key: theirs[key] for key in _OF_THE_NETWORK if theirs.get(key) is not None} | recipe
    # stand-ins if no names are known: transformers would take ImageNet's for a thousand classes
    names = list(facts.class_names or ())
    config["label_names"] = [*names, *(f"LABEL_{i}" for i in range(len(names), network.num_classes))][: network.num_classes]
    write_whole(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _write_hf(network: Any, facts: Facts, out: Path) -> None:
    """Write weights, ``config.json``, ``generation_config.json`` and the tokenizer's files."""
    from transformers import GenerationConfig
    from transformers.utils import logging as hf_logging

    config = network.config
    config.use_cache = True
    ids: dict[str, int | None]
    if facts.end_id is not None:
        # packed text has the end token between documents, so a new document begins after it where there is no other token
        ids = {"bos_token_id": facts.end_id if facts.bos_id is None else facts.bos_id, "eos_token_id": facts.end_id}
        ids["pad_token_id"] = facts.end_id if facts.pad_id is None else facts.pad_id
    else:
        ids = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for key, value in ids.items():
        setattr(config, key, value)
    longest = getattr(config, "max_position_embeddings", None) or facts.seq_len
    limit = {} if longest is None else {"max_length": longest}  # a reader's default may exceed the positions
    network.generation_config = GenerationConfig(**ids, use_cache=True, **limit)
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # one file needs no progress bar
    try:
        network.save_pretrained(out, max_shard_size="1000GB")
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    if facts.tokenizer is not None:
        _write_tokenizer(facts.tokenizer, ids, longest, out)


def _write_tokenizer(text: str, ids: Mapping[str, int | None], longest: int | None, out: Path) -> None:
    """Write the run's tokenizer for ``AutoTokenizer``, with the same special tokens as the weights."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library knows no other class
        raise ConfigError("ckpt", str(out), f"its tokenizer cannot be read: {one_line(error)}") from error
    words = {key.removesuffix("_id"): tokenizer.id_to_token(value) for key, value in ids.items() if value is not None}
    limit = {} if longest is None else {"model_max_length": longest}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **words, **limit).save_pretrained(
        out
    )


def _network(source: Source) -> torch.nn.Module:
    """Return the plain timm or transformers network with the source's weights.

    Raises:
        ConfigError: weights and constructor arguments do not belong together.
    """
    cls: type[pl.LightningModule]
    if source.kind == "timm":
        from lowrank_pretrain.models.vision import VisionClassifier

        cls = VisionClassifier
    else:
        from lowrank_pretrain.models.language import CausalLM

        cls = CausalLM
    known = inspect.signature(cls).parameters
    for key in known.keys() & source.hparams.keys():
        if unread(source.hparams[key]) is not None:
            raise ConfigError(
                "ckpt", source.label, f"its hyper-parameter {key} is a {unread(source.hparams[key])}, which is not read from a "
                "file: give the module plain values (numbers, text, lists, dicts); the weights are in its state_dict"
            )  # fmt: skip
    module: Any = cls(**{key: value for key, value in source.hparams.items() if key in known})
    module.on_load_checkpoint({"state_dict": source.state})
    dtypes = {value.dtype for value in source.state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        module.to(dtypes.pop())  # a model trained in bfloat16 stays one
    try:
        module.load_state_dict(source.state)
    except RuntimeError as error:
        raise ConfigError("ckpt", source.label, f"its weights do not fit its model: {one_line(error)}") from error
    return module.model.eval()


def _stored_in(source: Source) -> str | None:
    """Say of which W the merge is made, where a run stored it in a cheaper type; ``None`` elsewhere."""
    kind = source.lowrank.get("frozen_dtype")
    if kind is None:
        return None
    if source.lowrank.get("keep_original"):
        return f"From the freeze on the targets' W was multiplied in {kind}. The W merged here is the original, which was kept."
    return f"From the freeze on the targets' W was stored and multiplied in {kind}. The W merged here is the one as stored."


def _write_peft(source: Source, out: Path) -> Path:
    """Write adapters into `out`, and the weights that they belong to into ``out/base``."""
    exact: Mapping[str, Tensor] = _tensors(source.lowrank.get("exact", {}))
    if not adapted_layers(exact):
        raise ConfigError("format", "peft", f"{source.label} holds no adapters; leave format= out for its merged weights")
    _write(source._replace(state={**source.state, **unmerged_weights(exact, source.state)}), out / "base")
    # names start from the network, or from the root of a user's own module
    prefix = "model." if source.kind else ""
    write_adapters(exact, source.lowrank.get("alpha"), out, prefix, "CAUSAL_LM" if source.kind == "hf" else None)
    return out


def _write_factored(source: Source, out: Path) -> Path:
    """Write the dense weights in `out`, and next to them the factors."""
    exact = _tensors(source.lowrank.get("exact", {}))
    if not factored_names(exact):
        raise ConfigError("format", "factored", f"{source.label} holds no factors; leave format= out for its merged weights")
    _write(source, out)
    return write_factors(source.state, exact, out, "model." if source.kind else "")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code (2: wrong arguments or an unusable checkpoint)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(str(__doc__))
        return 0 if argv else 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lowrank_pretrain").setLevel(logging.INFO)
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns if the mean's channels differ from the model's
    try:
        given = key_values(argv, ("ckpt", "format", "out"))
        for key in ("ckpt", "out"):
            if not given.get(key):
                raise ConfigError(key, None, "is missing; usage: ckpt=PATH out=DIR [format=timm|hf|peft|factored]")
        out = export(given["ckpt"], given.get("format"), given["out"])
    except (ConfigError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"error: {one_line(error, 600)}\n")
        return 2
    print(f"written: {', '.join(str(path) for path in sorted(out.rglob('*')) if path.is_file())}")
    return 0
