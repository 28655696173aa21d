"""MLP-Mixer of ViT-Ti's width, which timm has no name for (and the ``embed_dim`` of its Mixers cannot be overridden).

Importing this registers the name with timm. timm's own class builds the network, so its weights load into a stock
``MlpMixer(num_blocks=8, embed_dim=192)``; but ``timm.create_model("mixer_ti16_224")`` needs this module to be imported.
"""

from typing import Any

from timm.models import build_model_with_cfg, is_model, register_model
from timm.models.mlp_mixer import MlpMixer

default_cfgs = {
    "mixer_ti16_224": {
        "input_size": (3, 224, 224), "num_classes": 1000, "crop_pct": 0.875, "interpolation": "bicubic",
        "fixed_input_size": True, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.proj", "classifier": "head",
    }
}  # fmt: skip


def mixer_ti16_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """Build Mixer-Ti/16: 8 layers of width 192, compared with Mixer-S's 512. There are no published weights."""
    return build_model_with_cfg(MlpMixer, "mixer_ti16_224", pretrained, patch_size=16, num_blocks=8, embed_dim=192, **kwargs)


if not is_model("mixer_ti16_224"):  # a future timm may have it
    register_model(mixer_ti16_224)
