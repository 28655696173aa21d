"""Image classification with any network of timm.

Shapes: B batch, C channels, H×W pixels, K classes.
"""

import inspect
import logging
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.core.protocols import TriesOut
from lowrank_pretrain.core.text import closest, one_line
from lowrank_pretrain.models.checks import check_count, check_layers, plain, run_once
from lowrank_pretrain.models.fsdp import shard
from lowrank_pretrain.models.optim import Optim

with optional_import():
    import timm
    from timm.layers import PatchEmbed
    from timm.models import load_state_dict

    import lowrank_pretrain.models.mixer  # noqa: F401  registers a network with timm

log = logging.getLogger(__name__)

# what timm's constructors raise for arguments that do not fit together
BAD_ARGUMENTS: tuple[type[Exception], ...] = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    MemoryError,
    AttributeError,
    NotImplementedError,
)
BAD_ARGUMENTS += (KeyError, IndexError, ZeroDivisionError, OverflowError)

_NOT_ARCHITECTURE = ("num_classes", "pretrained", "pretrained_cfg_overlay")


class VisionClassifier(TriesOut, LightningModule):
    """Train a timm network with cross entropy.

    The network is ``self.model``. ``self.optim`` (:class:`Optim`) may be replaced any time before ``fit``.

    Args:
        name: any name that ``timm.create_model`` knows, e.g. ``"vit_small_patch16_224"``.
        num_classes: K, at least 2.
        img_size: pixels per side; given only to networks that ask for it (a ResNet takes any size).
        in_chans: C.
        pretrained_file: a local timm checkpoint (``.safetensors``, ``.pth``, ``.bin``) to start from. Its head may have
            another number of classes: then the head is newly initialised. timm adapts patch projection and positions.
        model_kwargs: further arguments of ``timm.create_model`` (``embed_dim``, ``depth``, ``drop_path_rate``, …).

    Raises:
        ConfigError: an unknown name or argument, an image size that the patches do not divide, a checkpoint that
            is missing, unreadable or does not fit.
    """

    model: Any  # timm's networks have methods that nn.Module does not declare

    def __init__(
        self,
        name: str,
        num_classes: int,
        img_size: int = 224,
        in_chans: int = 3,
        pretrained_file: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        model_kwargs = plain(model_kwargs) or {}
        if not isinstance(model_kwargs, dict):
            raise ConfigError("model_kwargs", model_kwargs, "must be a group of timm.create_model's arguments")
        check_layers("model_kwargs", model_kwargs)
        # the file is the weights' origin, not part of the network: a checkpoint must load without it
        self.save_hyperparameters(ignore=["pretrained_file"])
        self.optim = Optim()
        check_count("num_classes", num_classes, least=2)
        check_count("img_size", img_size)
        check_count("in_chans", in_chans)
        if "pretrained" in model_kwargs:
            cure = "nothing is downloaded; give timm's weights as a local file: model.pretrained_file=PATH"
            raise ConfigError("model_kwargs", "pretrained", f"is not for model_kwargs; {cure}")
        for key in ("img_size", "in_chans", "num_classes"):
            if key in model_kwargs:
                raise ConfigError("model_kwargs", key, f"is not for model_kwargs; it has a key of its own, data.{key}")
        kwargs = {"img_size": img_size, "in_chans": in_chans, **model_kwargs}
        if pretrained_file is None:
            self.model = create(name, num_classes=num_classes, **kwargs)
        else:
            self.model = create_from_file(name, num_classes, str(pretrained_file), kwargs)
        check_patches(self.model, name, img_size)

        tops = (1, 5) if num_classes >= 5 else (1,)
        self.accuracy = nn.ModuleDict(
            {
                f"{stage}_acc{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)
                for stage in ("val", "test")
                for k in tops
            }
        )

    def try_out(self) -> None:
        """Run the network on one image: timm builds networks that cannot run, with a negative number of heads for example.

        Raises:
            ConfigError: the network cannot run.
        """
        options = self.hparams
        image = torch.zeros(1, options["in_chans"], options["img_size"], options["img_size"])
        run_once(self.model, "model_kwargs", options["model_kwargs"] or options["name"], lambda: self.model(image))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W)."""
        return self.model(x)

    def configure_model(self) -> None:
        """Shard the network over the ranks where the strategy is ModelParallelStrategy (FSDP2); else do nothing."""
        shard(self.model, self.device_mesh)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and schedule of ``self.optim``."""
        return cast(OptimizerLRSchedulerConfig, self.optim.configure(self))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check labels while they are in host memory: on a GPU a wrong one ends in an unreadable assertion."""
        if isinstance(batch, Tensor):
            return batch  # images alone, to predict
        y = batch[1]
        if y.device.type == "cpu" and not y.is_floating_point() and y.numel():
            low, high, classes = int(y.min()), int(y.max()), self.hparams["num_classes"]
            if low < 0 or high >= classes:
                wrong = low if low < 0 else high
                raise ConfigError("num_classes", classes, f"the data holds label {wrong}; labels are 0..{classes - 1}")
        return batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy with classes (B,) int64, or with probabilities (B, K) if mixup made them."""
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss``, ``val/acc1`` and, with 5 classes or more, ``val/acc5``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the same as validation, under ``test/``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return logits (B, K) of images alone, or of images with labels."""
        return self.model(batch if isinstance(batch, Tensor) else batch[0])

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits.float(), y)
        self.log(f"{stage}/loss", loss, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(x))
        metric: Any  # a module of ModuleDict; all are torchmetrics'
        for key, metric in self.accuracy.items():
            if key.startswith(stage):
                metric.update(logits, y)
                self.log(key.replace("_", "/"), metric, on_epoch=True, prog_bar=key.endswith("1"), batch_size=len(x))


def create(name: str, **kwargs: Any) -> nn.Module:
    """Call ``timm.create_model`` for a name of its registry, with errors that a user can act on.

    Raises:
        ConfigError: timm does not know the name or refuses the arguments.
    """
    if not isinstance(name, str) or not timm.is_model(name):  # also keeps names like hf-hub:… off the network
        raise ConfigError("name", name, f"timm has no such model; {closest(str(name), timm.list_models())}")
    try:
        model: Any = timm.create_model(name, **kwargs)
        # an export's config.json names them, so that stock timm can build the same network
        model.created_with = {key: kwargs[key] for key in kwargs if key not in _NOT_ARCHITECTURE}
        return model
    except torch.OutOfMemoryError:
        raise
    except BAD_ARGUMENTS as error:
        text = one_line(error)
        if "unexpected keyword argument 'img_size'" in text:
            return create(name, **{key: value for key, value in kwargs.items() if key != "img_size"})
        if "Invalid pretrained tag" in text:
            tags = timm.list_pretrained(name.split(".")[0] + ".*")
            raise ConfigError("name", name, f"timm has no such tag; {closest(name, tags)}") from error
        if "unexpected keyword argument" in text:
            key = text.split("'")[-2]
            raise ConfigError("model_kwargs", key, f"{name} has no such argument; {_arguments(name, text)}") from error
        raise ConfigError("model_kwargs", kwargs, f"{name} cannot be built with these: {text}") from error


def _arguments(name: str, text: str) -> str:
    """Return close matches among the arguments of the class in `text`: "Class.__init__() got … 'key'"."""
    owner = text.split(".__init__")[0].split(".")[-1]
    module = inspect.getmodule(timm.model_entrypoint(name.split(".")[0]))
    if not hasattr(module, owner):
        return f"see {getattr(module, '__name__', 'timm')}"
    return closest(text.split("'")[-2], set(inspect.signature(getattr(module, owner)).parameters) - {"kwargs", "args"})


def create_from_file(name: str, num_classes: int, path: str, kwargs: dict[str, Any]) -> nn.Module:
    """Create a network with the weights of a local timm checkpoint; its head is new if the number of classes differs.

    timm loads strictly into a network with the *file's* number of classes, and adapts positions and patch projection to the
    image size and channels that are asked for. Only then is the head replaced. Loading directly into the wanted number of
    classes would turn strictness off: a checkpoint of another network would load nothing, without a warning.

    Raises:
        ConfigError: the arguments are wrong, or the file is missing, unreadable or of another network.
    """
    create(name, num_classes=num_classes, **kwargs)  # so that any failure below is the file's fault
    if not Path(path).is_file():
        raise ConfigError("pretrained_file", path, "no such file; give a local timm checkpoint (.safetensors, .pth)")
    try:
        shapes = {key: tuple(value.shape) for key, value in load_state_dict(path, weights_only=True).items()}
    except Exception as error:  # a truncated or foreign file fails in many ways
        raise ConfigError("pretrained_file", path, f"cannot be read: {one_line(error)}") from error
    if shapes and all(key.startswith("model.") for key in shapes):
        cure = f"python -m lowrank_pretrain.export ckpt={path} format=timm out=DIR"
        raise ConfigError("pretrained_file", path, f"is a training checkpoint; export it first: {cure}")

    cfg: Any = timm.get_pretrained_cfg(name)
    head, conv = _first(cfg.classifier) + ".weight", _first(cfg.first_conv) + ".weight"
    classes = shapes[head][0] if head in shapes else 0
    overlay: dict[str, Any] = {"file": path, "num_classes": classes, "label_offset": 0}
    if len(shapes.get(conv, ())) == 4:
        overlay["input_size"] = (shapes[conv][1], *cfg.input_size[1:])
    try:
        model: Any = create(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes, **kwargs)
    except ConfigError as error:
        raise ConfigError("pretrained_file", path, f"does not fit {name}: {one_line(error.__cause__ or error)}") from error
    model.pretrained_cfg.pop("file", None)
    if classes != num_classes:
        model.reset_classifier(num_classes)
        log.info("%s: its head has %d classes, not %d; the head starts fresh", path, classes, num_classes)
    return model


def _first(names: str | tuple[str, ...] | None) -> str:
    """Return the first of timm's layer names, which are a string, a tuple or nothing."""
    return names if isinstance(names, str) else (names or ("",))[0]


def check_patches(model: nn.Module, name: str, img_size: int) -> None:
    """Refuse an image that the patches do not cover; timm would fail only at the first batch.

    Raises:
        ConfigError: the image size is not a multiple of the patch size.
    """
    embed = next((module for module in model.modules() if isinstance(module, PatchEmbed)), None)
    if embed is None or embed.dynamic_img_pad:
        return
    patch = embed.patch_size[0]
    if img_size % patch:
        near = max(patch, img_size // patch * patch)
        cure = f"such as data.img_size={near}; a patch size that the experiment has chosen goes with experiment=none"
        raise ConfigError("img_size", img_size, f"must be a multiple of {name}'s patch size {patch}, {cure}")
