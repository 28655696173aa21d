"""Keep facts of the data for an export: classes, preprocessing, tokenizer. Every checkpoint holds them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lowrank_pretrain.checkpoints.format import SIDE

KEY = "data"  # in a checkpoint's side entry


@dataclass
class Facts:
    """Hold what a reader of the weights must know about the training data.

    A user's own data module gives these facts by attributes of the same names, all optional. There, `tokenizer` is an object of
    the library ``tokenizers``; here it is its JSON text.

    Args:
        dataset_name: for people.
        class_names: in the order of the labels.
        preprocessing: of evaluation, with the arguments of ``timm.data.create_transform``.
        tokenizer: JSON text.
        end_id: the token after each document.
        bos_id: the token before each document; None: there is none.
        pad_id: the token of padding; None: there is none.
        seq_len: tokens in a sequence.
    """

    dataset_name: str | None = None
    class_names: list[str] | None = None
    preprocessing: dict[str, Any] | None = None
    tokenizer: str | None = None
    end_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    seq_len: int | None = None

    @classmethod
    def of(cls, data: Any) -> "Facts":
        """Read the facts of a data module after its ``setup``; missing facts stay None."""
        found = {field.name: getattr(data, field.name, None) for field in fields(cls)}
        names, tokenizer = found["class_names"], found["tokenizer"]
        if names is not None:
            found["class_names"] = [str(name) for name in (names.values() if isinstance(names, Mapping) else names)]
        if tokenizer is not None and not isinstance(tokenizer, str):
            # transformers' own wraps one of the library
            found["tokenizer"] = getattr(tokenizer, "backend_tokenizer", tokenizer).to_str()
        return cls.from_state(json.loads(json.dumps(found, default=_plain)))

    @classmethod
    def from_state(cls, state: Any) -> "Facts":
        """Build the facts from ``asdict``'s result; values of a wrong type and keys of newer versions are ignored."""
        known = state if isinstance(state, dict) else {}
        fine = {key: known[key] for key, kind in KINDS.items() if isinstance(known.get(key), kind)}
        try:
            json.dumps(fine)
        except (TypeError, ValueError):
            return cls()
        return cls(**fine)


KINDS = {
    "dataset_name": str, "class_names": list, "preprocessing": dict, "tokenizer": str,
    "end_id": int, "bos_id": int, "pad_id": int, "seq_len": int,
}  # fmt: skip


def _plain(value: Any) -> Any:
    """Convert types that JSON lacks, such as arrays and OmegaConf's lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) else str(value)


class RememberFacts(Callback):
    """Write the facts into every checkpoint, so that a checkpoint alone can be exported.

    Args:
        data: the run's data module.
    """

    def __init__(self, data: LightningDataModule) -> None:
        self._data = data
        self._facts: dict[str, Any] | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._facts = asdict(Facts.of(self._data))  # once: a tokenizer of 100,000 words takes a while to write down

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._facts is not None:
            checkpoint.setdefault(SIDE, {})[KEY] = self._facts


def facts_of_checkpoint(path: Path) -> Facts:
    """Return a checkpoint's facts, or empty facts if there is no such file."""
    from lowrank_pretrain.checkpoints.files import inspect

    return Facts.from_state(inspect(path).get(SIDE, {}).get(KEY)) if path.is_file() else Facts()
