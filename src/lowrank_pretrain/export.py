"""Trained weights out of a checkpoint or a module, into the formats that stock libraries read.

    python -m lowrank_pretrain.export ckpt=PATH out=DIR [format=timm|hf|peft]

    timm   DIR/{model.safetensors, config.json}: the merged network; timm.create_model("local-dir:DIR", pretrained=True),
           or timm.create_model(NAME, checkpoint_path="DIR/model.safetensors", ...)
    hf     the same for AutoModelForCausalLM.from_pretrained("DIR")
    peft   DIR/{adapter_model.safetensors, adapter_config.json}: the adapters, not merged, and DIR/base: the weights
           that they belong to, as above; PeftModel.from_pretrained(BASE, "DIR")

Without format= it is timm or hf, whichever the checkpoint holds. A LightningModule of the user's own is written as its
merged state dict, DIR/model.safetensors.
"""

import inspect
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowrank_pretrain.checkpoint_io import local_path
from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.export_peft import adapted_layers, write_adapters
from lowrank_pretrain.lora import plain_state
from lowrank_pretrain.models.wording import closest, one_line
from lowrank_pretrain.safe_load import safe_load, unread

log = logging.getLogger("lowrank_pretrain.export")  # as a command, __name__ is another

FORMATS = ("timm", "hf", "peft")
_VISION = {"name", "num_classes", "img_size", "in_chans", "model_kwargs"}
_LANGUAGE = {"name", "vocab_size", "seq_len", "config"}


class Source(NamedTuple):
    """What an export starts from.

    Attributes:
        state: merged weights by their names in the LightningModule (``model.…``).
        hparams: the LightningModule's constructor arguments.
        lowrank: the checkpoint's side entry (unmerged factors), or nothing.
        label: for messages.
    """

    state: Mapping[str, Tensor]
    hparams: Mapping[str, Any]
    lowrank: Mapping[str, Any]
    label: str

    @property
    def kind(self) -> str | None:
        """``"timm"``, ``"hf"``, or ``None`` for a module that this package does not know."""
        if not all(key.startswith("model.") for key in self.state):
            return None
        return "timm" if _VISION <= set(self.hparams) else "hf" if _LANGUAGE <= set(self.hparams) else None


def export(ckpt: str | Path, format: str | None, out: str | Path) -> Path:
    """Write the weights of a checkpoint into the folder `out`, which must be new or empty.

    Args:
        ckpt: a Lightning checkpoint of this package's modules, or of a user's own.
        format: ``"timm"``, ``"hf"``, ``"peft"``, or ``None``: what the checkpoint holds.
        out: the folder to make.

    Returns:
        `out`.

    Raises:
        ConfigError: an unreadable or foreign checkpoint, or a format that it cannot be written in.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError("format", format, f"must be one of {', '.join(FORMATS)}")
    out, ckpt = Path(local_path(out, "out")), local_path(ckpt, "ckpt")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("out", str(out), "must be a new or an empty folder")
    source = read(Path(ckpt))
    if format == "peft":
        return _write_peft(source, out)
    if format is not None and source.kind not in (format, None):
        raise ConfigError("format", format, f"{source.label} holds a {source.kind} model; use format={source.kind}")
    return _write(source, out)


def export_module(module: torch.nn.Module, out: str | Path) -> Path:
    """Write a live LightningModule's merged weights into the folder `out`, over an earlier export of it.

    The module itself is not changed, with or without adapters, on whatever device.

    Returns:
        `out`.

    Raises:
        ValueError: the adapters hold numbers that are not finite.
    """
    state = {key: value.detach().cpu() for key, value in _tensors(plain_state(module)).items()}
    return _write(Source(state, dict(getattr(module, "hparams", {})), {}, type(module).__name__), Path(out))


def read(path: Path) -> Source:
    """A checkpoint file, with nothing executed that it may hold.

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
    if lowrank.get("format", 1) != 1:
        raise ConfigError("ckpt", str(path), f"was written in format {lowrank['format']}; this version reads 1")
    hparams = found.get("hyper_parameters", {})
    return Source(_tensors(state), dict(hparams) if isinstance(hparams, Mapping) else {}, lowrank, str(path))


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict (a module's extra state may be anything), without torch.compile's names."""
    return {key.replace("_orig_mod.", ""): value for key, value in state.items() if isinstance(value, Tensor)}


def _write(source: Source, out: Path) -> Path:
    """One ``.safetensors`` in `out`, with its ``config.json`` where the network is known."""
    if source.kind is None:
        out.mkdir(parents=True, exist_ok=True)
        # copies: safetensors refuses tensors that share memory, as tied weights do
        save_file({key: value.clone().contiguous() for key, value in source.state.items()}, out / "model.safetensors")
        log.info("%s: not a module of this package, written as its merged state dict under its own names", source.label)
        return out
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn only to be overwritten
        network = _network(source)
    if source.kind == "timm":
        from timm.models import save_for_hf

        args = {key: value for key, value in network.created_with.items() if not key.endswith(("drop_rate", "path_rate"))}
        save_for_hf(network, str(out), model_args=args, safe_serialization=True)
    else:
        network.config.use_cache = network.generation_config.use_cache = True
        from transformers.utils import logging as hf_logging

        bars = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()  # one file needs no bar of its own
        try:
            network.save_pretrained(out, max_shard_size="1000GB")
        finally:
            if bars:
                hf_logging.enable_progress_bar()
    return out


def _network(source: Source) -> torch.nn.Module:
    """The plain timm or transformers network with the source's weights.

    Raises:
        ConfigError: weights and constructor arguments do not belong together.
    """
    if source.kind == "timm":
        from lowrank_pretrain.models.vision import VisionClassifier as Module
    else:
        from lowrank_pretrain.models.language import CausalLM as Module

    known = inspect.signature(Module).parameters
    for key in known.keys() & source.hparams.keys():
        if unread(source.hparams[key]) is not None:
            raise ConfigError(
                "ckpt", source.label, f"its hyper-parameter {key} is a {unread(source.hparams[key])}, which is not read from a "
                "file: give the module plain values (numbers, text, lists, dicts); the weights are in its state_dict"
            )  # fmt: skip
    module = Module(**{key: value for key, value in source.hparams.items() if key in known})
    module.on_load_checkpoint({"state_dict": source.state})
    dtypes = {value.dtype for value in source.state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        module.to(dtypes.pop())  # a model trained in bfloat16 stays one
    try:
        module.load_state_dict(source.state)
    except RuntimeError as error:
        raise ConfigError("ckpt", source.label, f"its weights do not fit its model: {one_line(error)}") from error
    return module.model.eval()


def _write_peft(source: Source, out: Path) -> Path:
    """Adapters in `out`, the weights that they belong to in ``out/base``."""
    exact: Mapping[str, Tensor] = _tensors(source.lowrank.get("exact", {}))
    if not adapted_layers(exact):
        raise ConfigError("format", "peft", f"{source.label} holds no adapters; leave format= out for its merged weights")
    unmerged = {key: value for key, value in exact.items() if key.endswith(".weight")}
    _write(source._replace(state={**source.state, **unmerged}), out / "base")
    # names count from the network, or from the whole of a user's own module
    prefix = "model." if source.kind else ""
    write_adapters(exact, source.lowrank.get("alpha"), out, prefix, "CAUSAL_LM" if source.kind == "hf" else None)
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code (2: wrong arguments or an unusable checkpoint)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(str(__doc__))
        return 0 if argv else 2
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lowrank_pretrain").setLevel(logging.INFO)
    logging.getLogger("timm").setLevel(logging.ERROR)  # it warns of a mean for other channels than the model's
    try:
        given = dict(arg.partition("=")[::2] for arg in argv)
        for key in given:
            if key not in ("ckpt", "format", "out"):
                raise ConfigError(key, given[key], f"no such argument; {closest(key, ('ckpt', 'format', 'out'))}")
        for key in ("ckpt", "out"):
            if not given.get(key):
                raise ConfigError(key, None, "is missing; usage: ckpt=PATH out=DIR [format=timm|hf|peft]")
        out = export(given["ckpt"], given.get("format"), given["out"])
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error, 600)}\n")
        return 2
    print(f"written: {', '.join(str(path) for path in sorted(out.rglob('*')) if path.is_file())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
