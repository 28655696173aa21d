"""What runs on text import besides."""

import datasets  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import lowrank_pretrain.models.language  # noqa: F401
