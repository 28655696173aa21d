import pytest
import torch
from torch import nn

from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.plan import Plan
from lowrank_pretrain.targets import all_targets, families, find_targets
from tests.toy import toy


@pytest.fixture(scope="module")
def vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=48, num_heads=3, img_size=32, num_classes=10)


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0))


def test_fused_qkv_has_three_row_blocks_that_share_memory(vit):
    targets = find_targets(vit, "attention")
    q, k = targets["blocks.1.attn.qkv.q"], targets["blocks.1.attn.qkv.k"]
    assert (q.start, q.rows, q.cols, k.start) == (0, 48, 48, 48)
    assert torch.equal(k.matrix(), vit.blocks[1].attn.qkv.weight[48:96])
    assert k.matrix().data_ptr() == vit.blocks[1].attn.qkv.weight[48:].data_ptr()


def test_conv1d_is_seen_as_out_by_in(gpt2):
    target = find_targets(gpt2, "*.c_attn.k")["transformer.h.0.attn.c_attn.k"]
    weight = gpt2.transformer.h[0].attn.c_attn.weight  # (D, O)
    assert (target.rows, target.cols) == (32, 32)
    assert torch.equal(target.matrix(), weight[:, 32:64].t())


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("all", 18), ("attention", 12), ("mlp", 6), ("head", 1), ("qkv", 9), ("*.q", 3), ("q", 3), ("blocks.0.*", 6), ("fc1", 3)],
)
def test_presets_and_globs(vit, pattern, count):
    assert len(find_targets(vit, pattern)) == count


def test_names_count_from_the_module_handed_in(vit):
    wrapped = nn.ModuleDict({"model": vit})
    assert next(iter(find_targets(wrapped))) == "model.blocks.0.attn.qkv.q"
    assert find_targets(wrapped, "blocks.0.mlp.fc1").keys() == {"model.blocks.0.mlp.fc1"}


def test_mixer_presets():
    import timm

    mixer = timm.create_model("mixer_s32_224", num_classes=4, img_size=64)
    assert {f for f in families(mixer, find_targets(mixer)).values()} == {
        f"blocks.*.mlp_{kind}.fc{i}" for kind in ("tokens", "channels") for i in (1, 2)
    }


def test_no_match_prints_what_there_is(vit):
    with pytest.raises(ConfigError, match=r"targets='nope'.*all, attention, mlp, head.*blocks\.\*\.mlp\.fc1 \(3\)"):
        find_targets(vit, ["mlp", "nope"])


def test_empty_pattern_list_is_refused(vit):
    with pytest.raises(ConfigError, match="name at least one"):
        find_targets(vit, [])


def test_tied_head_is_no_part_of_all_but_may_be_named(gpt2):
    assert "lm_head" not in find_targets(gpt2, "all")
    assert list(find_targets(gpt2, "head")) == ["lm_head"]


def test_other_tied_weights_are_refused():
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    net["b"].weight = net["a"].weight
    assert list(find_targets(net, "all")) == ["c"]
    with pytest.raises(ConfigError, match="shares its weight with b"):
        find_targets(net, "a")


def test_out_proj_of_multihead_attention_is_refused():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    assert list(find_targets(layer)) == ["linear1", "linear2"]
    with pytest.raises(ConfigError, match="never calls it"):
        find_targets(layer, "*out_proj")


def test_families_keep_the_full_suffix_and_unequal_lists_keep_their_index():
    class Bert(nn.Module):
        def __init__(self):
            super().__init__()
            block = lambda: nn.ModuleDict(  # noqa: E731
                {"attention": nn.ModuleDict({"output": nn.Linear(4, 4)}), "output": nn.Linear(4, 4)}
            )
            self.layer = nn.ModuleList([block(), block()])
            self.mixed = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    net = Bert()
    assert set(families(net, find_targets(net)).values()) == {
        "layer.*.attention.output",
        "layer.*.output",
        "mixed.0",
        "mixed.2",
    }


def test_compiled_names_are_plain():
    compiled = nn.ModuleDict({"net": torch.compile(nn.Sequential(nn.Linear(4, 4)))})
    assert list(find_targets(compiled)) == ["net.0"]


def test_a_multi_query_projection_is_one_target():
    net = nn.ModuleDict({"qkv": nn.Linear(8, 20)})
    assert list(all_targets(net)) == ["qkv"]


def test_plan_is_sorted_json_and_checked():
    plan = Plan({"b": 4, "a": 0})
    assert list(plan) == ["a", "b"] and Plan.from_json(plan.to_json()) == plan
    assert Plan({"b": 4, "a": 0}).to_json() == Plan({"a": 0, "b": 4}).to_json()
    assert plan.summary() == {0: 1, 4: 1}
    targets = all_targets(toy())
    with pytest.raises(ConfigError, match="is no target of this model"):
        plan.check(targets)
    with pytest.raises(ConfigError, match=r"rank=64: blocks\.0\.fc1 is 32 x 16: at most 16"):
        Plan({"blocks.0.fc1": 64}).check(targets)
    for bad in ({"a": -1}, {"a": 1.5}, {"a": True}):
        with pytest.raises(ConfigError, match="integer of 0 or more"):
            Plan(bad)
    for text in ("[1]", "{", "3"):
        with pytest.raises(ConfigError):
            Plan.from_json(text)
