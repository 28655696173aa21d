"""What every run imports, once for all of them; ``preload_text`` adds what runs on text need."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch  # noqa: E402, F401
import safetensors.torch  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch  # noqa: E402
import torchmetrics  # noqa: E402, F401

import lowrank_pretrain.export  # noqa: E402, F401
import lowrank_pretrain.models.vision  # noqa: E402, F401
import lowrank_pretrain.run.train  # noqa: E402, F401

torch.set_num_threads(1)
