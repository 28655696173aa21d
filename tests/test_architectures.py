"""Train every architecture that is listed in ``architectures.py`` (slow)."""

import pytest

from tests import architectures

pytestmark = pytest.mark.slow
pytest.importorskip("timm", reason="timm's models")
pytest.importorskip("transformers", reason="transformers' models")

HEADS_VISION = (
    "beit_base_patch16_224", "cait_xxs24_224", "convnext_atto", "eva02_tiny_patch14_224", "hiera_tiny_224", "levit_128s",
    "mixer_s16_224", "pvt_v2_b0", "swinv2_tiny_window8_256", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
)  # fmt: skip
HEADS_LANGUAGE = (
    "albert", "bert", "bloom", "deberta-v2", "fnet", "gemma2", "gpt2", "gpt_neo", "gptj", "llama", "mamba", "mixtral", "mpt",
    "opt", "phi3", "qwen2_moe", "qwen3", "roberta", "rwkv", "starcoder2",
)  # fmt: skip


@pytest.mark.parametrize("name", [*architectures.VISION, *architectures.LANGUAGE])
def test_trains_through_all_phases_or_is_refused_before_the_first_step(name):
    outcome = architectures.prelora(name)
    assert outcome.passed, outcome


@pytest.mark.parametrize("name", [*HEADS_VISION, *HEADS_LANGUAGE])
def test_every_target_moves_with_two_heads(name):
    outcome = architectures.lte(name)
    assert outcome.passed, outcome


@pytest.mark.parametrize("name", [*HEADS_VISION, *HEADS_LANGUAGE])
def test_every_target_moves_with_two_workers(ranks, name):
    for outcome in ranks(2, architectures.lte, name, 2, timeout=300):
        assert outcome.passed, outcome
