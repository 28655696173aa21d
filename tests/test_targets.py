import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan, fit_ranks
from lowrank_pretrain.core.targets import all_targets, check_patterns, families, find_targets, select
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
    with pytest.warns(UserWarning, match="a shares its weight with b; b shares its weight with a"):
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


# -- what cannot be a target --------------------------------------------------------------------------------------------


def frozen(layer):
    return layer.requires_grad_(False)


def old_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def bias_only(layer):
    prune.l1_unstructured(layer, "bias", 0.5)
    return layer


def of_integers(layer):
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return layer


UNFIT = {
    "frozen": (frozen, "is frozen"),
    "weight_norm": (parametrizations.weight_norm, "is parametrized (WeightNorm)"),
    "spectral_norm": (parametrizations.spectral_norm, "is parametrized (SpectralNorm)"),
    "orthogonal": (parametrizations.orthogonal, "is parametrized (Orthogonal)"),
    "old weight_norm": (old_norm, "has weight_norm"),
    "old spectral_norm": (nn.utils.spectral_norm, "has spectral_norm"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "is pruned by a mask"),
    "pruned bias": (bias_only, "is pruned by a mask"),
    "complex": (lambda _: nn.Linear(8, 8, dtype=torch.cfloat), "is complex"),
    "lazy": (lambda _: nn.LazyLinear(8), "is lazy and has no shape yet"),
    "integers": (of_integers, "holds torch.int8"),
    "empty": (lambda _: nn.Linear(8, 0), "has shape (0, 8)"),
    "float8": (lambda layer: layer.to(torch.float8_e4m3fn), "holds torch.float8_e4m3fn"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", UNFIT)
def test_a_preset_leaves_out_what_cannot_be_a_target_and_a_name_is_refused_with_the_cause(kind):
    spoil, cause = UNFIT[kind]
    net = nn.ModuleDict({"good": nn.Linear(8, 8), "odd": spoil(nn.Linear(8, 8))})
    for patterns in ("all", "*"):
        with pytest.warns(UserWarning) as said:
            assert list(find_targets(net, patterns)) == ["good"]
        assert len(said) == 1 and f"odd {cause.partition(' (')[0]}" in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(find_targets(net, ["all", "!odd"])) == list(find_targets(net, "good")) == ["good"]
    for patterns in ("odd", ["good", "odd"], "od*"):
        with pytest.raises(ConfigError) as error:
            find_targets(net, patterns)
        assert cause in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("targets='odd': ")
    del net["good"]
    with pytest.raises(ConfigError, match="targets='all': leaves no target: odd "):
        find_targets(net, "all")


def test_many_layers_of_one_family_are_one_entry_of_the_warning():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "blocks": nn.ModuleList(frozen(nn.Linear(4, 4)) for _ in range(12))})
    assert select(net).left_out.keys() == {f"blocks.{i}" for i in range(12)}
    with pytest.warns(UserWarning, match=r"blocks\.\* \(12\) is frozen$"):
        find_targets(net)


def test_frozen_matrices_on_request_and_reasons_of_the_callers_own():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": frozen(nn.Linear(4, 4))})
    assert list(find_targets(net, frozen=True)) == ["a", "b"]
    chosen = select(net, unfit=lambda target: "is mine" if target.name == "a" else None, frozen=True)
    assert list(chosen.targets) == ["b"] and chosen.left_out == {"a": "is mine"}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["all", "!fc1"], {"qkv.q", "qkv.k", "qkv.v", "fc2", "gate"}),
        (["!fc1", "all"], {"qkv.q", "qkv.k", "qkv.v", "fc2", "gate"}),
        ("!mlp", {"qkv.q", "qkv.k", "qkv.v", "gate"}),
        (["!*.q", "!gate"], {"qkv.k", "qkv.v", "fc1", "fc2"}),
        (["fc*", "!*2"], {"fc1"}),
        (["qkv", "!qkv.k"], {"qkv.q", "qkv.v"}),
        (("mlp", "gate", "!fc?"), {"gate"}),
    ],
)
def test_exclusions(patterns, names):
    net = nn.ModuleDict({"qkv": nn.Linear(8, 24), "fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8), "gate": nn.Linear(8, 2)})
    assert set(find_targets(net, patterns)) == names


@pytest.mark.parametrize(
    ("patterns", "line"),
    [
        ("!nope", "targets='!nope': matches no target; allowed are .* fc1, fc2"),
        (["fc1", "!nope"], "targets='!nope': matches no target"),
        (["fc1", "!fc1"], "leaves no target: everything is excluded"),
        ("!", "with one ! before it"),
        ("!!fc1", "with one ! before it"),
        (None, "targets=None: must be one of all, "),
        (5, "targets=5: must be one of all, "),
        (["all", None], "targets=None: each entry"),
        ({"all": 1}, "must be one of all, "),
        (b"all", "must be one of all, "),
        (len, "must be one of all, "),
        ("", "each entry"),
    ],
)
def test_words_that_are_no_patterns(patterns, line):
    with pytest.raises(ConfigError, match=line):
        find_targets(nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}), patterns)


def test_patterns_of_other_types_become_plain():
    assert check_patterns(np.array(["fc1", "!fc2"])) == ["fc1", "!fc2"]
    assert type(check_patterns(np.str_("all"))) is str and check_patterns(("all",)) == ["all"]


def test_exclusions_on_the_command_line(composed):
    cfg = composed("method=lora", 'method.targets=[all,"!head","!*.cpb_mlp.*"]')
    assert list(cfg.method.targets) == ["all", "!head", "!*.cpb_mlp.*"]
    assert composed("method=lora", "method.targets='!head'").method.targets == "!head"


def test_a_layer_called_like_a_preset_is_meant_where_no_model_names_its_head():
    net = nn.ModuleDict({"head": nn.Linear(8, 3), "body": nn.Linear(8, 8)})
    assert list(find_targets(net, "head")) == ["head"] and list(find_targets(net, "!head")) == ["body"]
    net["head"].requires_grad_(False)
    with pytest.raises(ConfigError, match="targets='head': is frozen"):
        find_targets(net, "head")


def test_a_second_name_of_a_layer_is_understood_but_names_stay():
    net = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    net["taps"] = nn.ModuleList([net["net"][1]])
    assert list(find_targets(net)) == ["net.0", "net.1"]
    assert list(find_targets(net, "taps.*")) == ["net.1"] and list(find_targets(net, "!taps.*")) == ["net.0"]
    net["net"].up = net  # a cycle
    assert list(find_targets(net, "taps.0")) == ["net.1"]


def test_a_rank_is_cut_down_under_a_preset_and_refused_for_a_named_target():
    net = nn.ModuleDict({"a": nn.Linear(16, 16), "gate": nn.Linear(16, 2)})
    ranks, said = fit_ranks(net, "all", find_targets(net), 8)
    assert ranks == {"a": 8, "gate": 2} and said == "rank=8: gate (2 x 16) gets at most 2"
    assert (
        fit_ranks(net, "*", find_targets(net), 8)[0] == ranks
        and fit_ranks(net, "!gate", find_targets(net, "!gate"), 8)[1] is None
    )
    for patterns in ("gate", ["all", "gate"], "g*"):
        with pytest.raises(ConfigError, match=r"ranks=8: gate is 2 x 16: at most 2 = min\(D, O\)"):
            fit_ranks(net, patterns, find_targets(net, patterns), 8, key="ranks")
    assert Plan({"a": np.int64(4)}).to_json() == Plan({"a": 4}).to_json()


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError])
def test_a_model_whose_accessor_of_its_head_fails_has_no_known_head(error):
    class Fails(nn.Sequential):
        def get_classifier(self):
            raise error("no classifier for task None")

    assert set(find_targets(Fails(nn.Linear(8, 8), nn.Linear(8, 2)))) == {"0", "1"}


def test_a_name_that_reads_like_a_glob_is_taken_as_it_is():
    module = nn.ModuleDict({"d": nn.ModuleDict({"[x]": nn.Linear(8, 8)}), "y": nn.Linear(8, 8)})
    for pattern in ("d.[x]", "[x]", "!y"):
        assert set(find_targets(module, pattern)) == {"d.[x]"}
