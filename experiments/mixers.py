"""MLP-Mixers of any width, which timm has no name for; importing this registers ``mixer_pocket``."""

from typing import Any

from timm.models import build_model_with_cfg, is_model, register_model
from timm.models.mlp_mixer import MlpMixer

default_cfgs = {
    "mixer_pocket": {
        "input_size": (1, 28, 28), "num_classes": 10, "fixed_input_size": True, "mean": (0.2860,), "std": (0.3530,),
        "first_conv": "stem.proj", "classifier": "head",
    }
}  # fmt: skip


def mixer_pocket(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Two layers on patches of 7 pixels; ``embed_dim`` and all other arguments of timm's class may be given."""
    return build_model_with_cfg(MlpMixer, "mixer_pocket", pretrained, **{"patch_size": 7, "num_blocks": 2, **kwargs})


if not is_model("mixer_pocket"):
    register_model(mixer_pocket)
