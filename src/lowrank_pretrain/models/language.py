"""Causal language modelling with any causal-LM configuration of transformers.

Shapes: B batch, T tokens, V vocabulary.
"""

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.core.protocols import TriesOut
from lowrank_pretrain.core.text import closest, one_line
from lowrank_pretrain.models.checks import check_count, check_layers, plain, run_once
from lowrank_pretrain.models.fsdp import shard
from lowrank_pretrain.models.optim import Optim

with optional_import():
    from transformers import AutoConfig, AutoModelForCausalLM  # isort: skip  first, so that its extra is named
    from safetensors.torch import load_file
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

log = logging.getLogger(__name__)


class TokenLoss(Metric):
    """Average the token loss since the last reset, over all processes.

    torchmetrics' MeanMetric does not fit: it drops a NaN, and with ``nan_strategy="disable"`` it drops the weights.
    """

    full_state_update = False
    loss: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: int) -> None:
        """Add a batch: the mean `loss` (scalar) of its `tokens` predicted tokens."""
        self.loss += loss.float() * tokens
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return the mean, a scalar."""
        return self.loss / self.tokens


class Perplexity(TokenLoss):
    """Exponentiate the mean token loss."""

    def compute(self) -> Tensor:
        """Return the perplexity, a scalar."""
        return super().compute().exp()


# files of weights that a folder may hold, in the order of preference
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# keys of a folder's configuration that do not describe the network
NOT_OF_THE_NETWORK: tuple[str, ...] = (
    "architectures",
    "model_type",
    "transformers_version",
    "vocab_size",
    "dtype",
    "torch_dtype",
    "use_cache",
)
NOT_OF_THE_NETWORK += ("_name_or_path", "auto_map", "quantization_config")


class CausalLM(TriesOut, LightningModule):
    """Train a transformers causal language model on packed blocks of tokens.

    The network is ``self.model``. ``self.optim`` (:class:`Optim`) may be replaced any time before ``fit``.

    Args:
        name: a transformers model type: ``"gpt2"``, ``"llama"``, …
        vocab_size: V.
        seq_len: T, the length of a block; the model is made for this many positions unless `config` says more.
        config: any keys of the model's transformers configuration (``n_layer``, ``hidden_size``, …).
        pretrained_file: local weights to start from: a folder as ``save_pretrained`` writes it, whose configuration stands
            where `config` says nothing, or a ``.safetensors``, a ``.bin`` or the ``.index.json`` of several. None: random.

    Raises:
        ConfigError: an unknown model type or configuration key, values that do not fit together, or weights that are missing,
            unreadable or of another model.
    """

    model: Any  # transformers' models have methods that nn.Module does not declare

    def __init__(
        self,
        name: str,
        vocab_size: int,
        seq_len: int,
        config: dict[str, Any] | None = None,
        pretrained_file: str | None = None,
    ) -> None:
        super().__init__()
        config = plain(config) or {}
        if not isinstance(config, dict):
            raise ConfigError("config", config, "must be a group of transformers' configuration keys")
        if pretrained_file is not None:
            config = {**config_of(Path(pretrained_file), name), **config}
        check_layers("config", config)
        # the file is the weights' origin, not part of the network: a checkpoint must load without it
        self.save_hyperparameters(ignore=["pretrained_file"])
        self.optim = Optim()
        check_count("vocab_size", vocab_size, least=2)
        check_count("seq_len", seq_len, least=2)
        self.model = create(name, vocab_size, seq_len, config)
        if pretrained_file is not None:
            self.model = load_weights(self.model, Path(pretrained_file))
        self.metrics = nn.ModuleDict(
            {f"{stage}_{key}": kind() for stage in ("val", "test") for key, kind in (("loss", TokenLoss), ("ppl", Perplexity))}
        )

    def try_out(self) -> None:
        """Run the network on two tokens: transformers builds networks that cannot run.

        Raises:
            ConfigError: the network cannot run.
        """
        ids = torch.zeros(1, 2, dtype=torch.int64)
        run_once(self.model, "config", self.hparams["config"] or self.hparams["name"], lambda: self(ids))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits (B, T, V) of token ids (B, T)."""
        return self.model(input_ids=input_ids, use_cache=False).logits

    def configure_model(self) -> None:
        """Shard the network over the ranks where the strategy is ModelParallelStrategy (FSDP2); else do nothing."""
        shard(self.model, self.device_mesh)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and schedule of ``self.optim``."""
        return cast(OptimizerLRSchedulerConfig, self.optim.configure(self))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check token ids while they are in host memory.

        There it costs no device sync, and on a GPU a wrong id ends in an unreadable assertion.
        """
        ids = batch["input_ids"]
        if ids.device.type == "cpu" and ids.numel():
            low, high, vocab = int(ids.min()), int(ids.max()), self.hparams["vocab_size"]
            if low < 0 or high >= vocab:
                wrong = low if low < 0 else high
                raise ConfigError("vocab_size", vocab, f"the data holds token id {wrong}; ids are 0..{vocab - 1}")
        return batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load a head that is tied in this model and untied in the checkpoint, because it was a target of low-rank training.

        Without this, the head would overwrite the embedding without a warning. A resumed fit starts from the tied model: its
        callback or strategy unties the head again, and has its exact weights. In all other cases the head is untied now.
        """
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        # a distributed checkpoint (FSDP2's) has no state_dict here: the strategy reads its parts into the present model
        if head is None or head.weight is not embedding.weight or "state_dict" not in checkpoint:
            return
        names = {id(module): name for name, module in self.named_modules()}
        head_name, state = names[id(head)], checkpoint["state_dict"]
        looked_up, projected = (state.get(names[id(m)] + ".weight") for m in (embedding, head))
        if looked_up is None or projected is None or torch.equal(looked_up, projected):
            return
        try:
            fitting = self.trainer.state.fn == TrainerFn.FITTING
        except RuntimeError:  # load_from_checkpoint: no trainer
            fitting = False
        plans = (checkpoint.get("lowrank_pretrain", {}).get("plan", {}), checkpoint.get("lte_state", {}).get("targets", {}))
        if fitting and any(head_name in plan for plan in plans):
            state[head_name + ".weight"] = looked_up
        else:
            head.weight = nn.Parameter(head.weight.detach().clone())
            self.model.config.tie_word_embeddings = False
            log.info("%s has weights of its own: it was untied from the embedding to be a target", head_name)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        ids = batch["input_ids"]  # (B, T); the model shifts the labels itself
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy of the next token."""
        loss = self._loss(batch)
        size = len(batch["input_ids"])
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True, batch_size=size)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/ppl`` over the whole set, each token counted once."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the same as validation, under ``test/``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return logits (B, T, V)."""
        return self(batch["input_ids"])

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        rows, length = batch["input_ids"].shape
        loss = self._loss(batch)
        for key in ("loss", "ppl"):
            metric: Any = self.metrics[f"{stage}_{key}"]
            metric.update(loss, rows * (length - 1))
            self.log(f"{stage}/{key}", metric, on_epoch=True, prog_bar=True, batch_size=rows)


def create(name: str, vocab_size: int, seq_len: int, config: dict[str, Any]) -> nn.Module:
    """Create a freshly initialised causal LM; nothing is downloaded.

    Raises:
        ConfigError: transformers does not know the name or a key, or refuses the values.
    """
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        names = closest(str(name), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError("name", name, f"transformers has no such causal LM; {names}")
    default = AutoConfig.for_model(name)
    aliases = default.attribute_map  # e.g. gpt2: hidden_size -> n_embd
    known = set(default.to_dict()) | set(aliases) | {"attn_implementation"}
    for key in config:
        # transformers accepts any key, and ignores it
        if key not in known:
            raise ConfigError("config", key, f"{name} has no such setting; {closest(key, known)}")
        if key in ("vocab_size", "model_type"):
            own = "data.vocab_size" if key == "vocab_size" else "model.name"
            raise ConfigError("config", key, f"is not for config; it has a key of its own, {own}")
    values = {aliases.get(key, key): value for key, value in config.items()}
    positions = aliases.get("max_position_embeddings", "max_position_embeddings")
    if hasattr(default, positions):
        if values.setdefault(positions, seq_len) < seq_len:
            raise ConfigError("seq_len", seq_len, f"must be at most the model's {positions}={values[positions]}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # the defaults belong to the published tokenizer, e.g. 50256 for gpt2
        token = getattr(default, key, None)
        if isinstance(token, int) and token >= vocab_size:
            values.setdefault(key, None)
    attention = values.pop("attn_implementation", None)  # None: what transformers takes for this model
    try:
        built = AutoConfig.for_model(name, vocab_size=vocab_size, **values)
        built.use_cache = False  # nothing is generated here; an export sets it back
        chosen = {} if attention is None else {"attn_implementation": attention}
        model = AutoModelForCausalLM.from_config(built, **chosen)
        model.loss_type = "ForCausalLM"  # what it takes anyway; of GPT-2 it says at each run that it has to guess
        return model
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers validates with its own exceptions and huggingface_hub's
        if attention is not None and _about_attention(error, attention):
            cure = "leave it out, or take +model.config.attn_implementation=eager"
            raise ConfigError("config.attn_implementation", attention, f"{name} has none of that name; {cure}") from error
        raise ConfigError("config", config, f"{name} cannot be built with these: {one_line(error)}") from error


def _about_attention(error: Exception, attention: str) -> bool:
    text = str(error).lower()
    return "attention implementation" in text or "attn_implementation" in text or str(attention).lower() in text


def config_of(path: Path, name: str) -> dict[str, Any]:
    """Read the description of the network in the ``config.json`` next to local weights; {} if there is none.

    Raises:
        ConfigError: nothing is there, or it is the configuration of another kind of model than ``name``.
    """
    if not path.exists():
        allowed = "no such file or folder; give a folder that save_pretrained wrote, or a .safetensors, .bin or .index.json"
        raise ConfigError("pretrained_file", str(path), allowed)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = found.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError("pretrained_file", str(file), f"cannot be read: {one_line(error)}") from error
    if kind is None and not path.is_dir():
        return {}  # of something else
    if kind != name:
        words = (
            f"must be {kind} (with model.config=null for its sizes), the kind of model"
            if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            else f"does not fit: no causal LM but {kind!r} is"
        )
        raise ConfigError("name", name, f"{words} in {path}")
    default = AutoConfig.for_model(name)
    known = set(default.to_dict()) | set(default.attribute_map)
    return {key: value for key, value in found.items() if key in known and key not in NOT_OF_THE_NETWORK}


def load_weights(model: Any, path: Path) -> nn.Module:
    """Return the same network with local weights: all of them, and no others.

    Args:
        model: the network, with random weights.
        path: see :class:`CausalLM`.

    Returns:
        A network of the same class, in float32.

    Raises:
        ConfigError: unreadable weights, a weight that is missing, too many, or of another shape.
    """
    from transformers.utils import logging as hf_logging

    source, state = _weights(path)
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()  # its report of many lines is one line below
    config, attention = model.config, model.config._attn_implementation
    try:
        loaded, info = type(model).from_pretrained(
            source, config=config, state_dict=state, attn_implementation=attention, output_loading_info=True,
            ignore_mismatched_sizes=True, local_files_only=True,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a truncated or foreign file fails in many ways
        raise ConfigError("pretrained_file", str(path), f"cannot be read: {one_line(error)}") from error
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
    _check_loaded(info, model, path)
    loaded.loss_type = model.loss_type
    return loaded.float().train()


def _weights(path: Path) -> tuple[str | None, dict[str, Tensor] | None]:
    """Return a folder for transformers to read, or the weights themselves.

    Raises:
        ConfigError: there are none, or they cannot be read.
    """
    if path.is_dir():
        if not any((path / name).is_file() for name in WEIGHTS):
            raise ConfigError("pretrained_file", str(path), f"must hold weights: one of {', '.join(WEIGHTS)}")
        return str(path), None
    try:
        if path.name.endswith(".index.json"):
            files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            parts = [_tensors(path.parent / file) for file in files]
            return None, {key: value for part in parts for key, value in part.items()}
        return None, _tensors(path)
    except ConfigError:
        raise
    except Exception as error:  # a truncated or foreign file fails in many ways
        raise ConfigError("pretrained_file", str(path), f"cannot be read: {one_line(error)}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, dict) and "pytorch-lightning_version" in found:
        cure = f"python -m lowrank_pretrain.export ckpt={path} format=hf out=DIR"
        raise ConfigError("pretrained_file", str(path), f"is a training checkpoint; export it first: {cure}")
    found = found.get("state_dict", found) if isinstance(found, dict) else None
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("it holds no weights by name")
    return found


def _check_loaded(info: dict[str, Any], model: Any, path: Path) -> None:
    """Refuse weights that stayed random, or that the network has no place for."""
    if info["mismatched_keys"]:
        embedding = next(name for name, m in model.named_modules() if m is model.get_input_embeddings())
        mismatched = sorted((str(k), tuple(a), tuple(b)) for k, a, b in info["mismatched_keys"])
        for key, theirs, ours in mismatched:
            if key == f"{embedding}.weight" and theirs[1:] == ours[1:]:
                allowed = f"must be {theirs[0]}, the vocabulary of the weights in {path}: data.vocab_size={theirs[0]}"
                raise ConfigError("vocab_size", ours[0], allowed)
        key, theirs, ours = mismatched[0]
        described = ((path if path.is_dir() else path.parent) / "config.json").is_file()
        cure = "model.config=null takes the sizes in its config.json" if described else "set model.config"
        raise ConfigError("pretrained_file", str(path), f"does not fit: {key} is {theirs} there and {ours} here; {cure}")
    for words, keys in (("lacks", info["missing_keys"]), ("holds what the model has no place for,", info["unexpected_keys"])):
        if keys:
            names = ", ".join(sorted(keys)[:4]) + (", …" if len(keys) > 4 else "")
            raise ConfigError("pretrained_file", str(path), f"does not fit: it {words} {len(keys)} weights: {names}")
