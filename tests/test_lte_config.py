"""LTE from the command line's side: every experiment with each of its methods composes and builds; the sweeps; bad values."""

import inspect
from datetime import timedelta
from pathlib import Path

import pytest
import timm
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import find_targets, output_heads
from lowrank_pretrain.data.images.sources import open_images
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.restarts import JaggedRestarts
from lowrank_pretrain.models.vision import VisionClassifier
from lowrank_pretrain.observe.rank_analysis import EffectiveRank, HeadOrthogonality
from lowrank_pretrain.run.build import build, plain
from lowrank_pretrain.run.method import build as build_method
from lowrank_pretrain.run.trainer import build_trainer, refuse_popen_sweep

CONF = Path(__file__).parents[1] / "conf"
METHODS = ["lte", "lte_sequential", "mhlora", "relora"]
VARIANTS = {
    "lte_pocket": ["lte_pocket"],
    "lte_gpt2_pocket": ["lte_pocket"],
    "lte_vits32": ["lte_published"],
    "lte_vit_scales": ["lte_published"],
    "lte_mixer": ["lte_published"],
    "lte_gpt2": ["lte_gpt2"],
}


@pytest.mark.parametrize(
    ("experiment", "method"),
    [(e, m) for e, own in VARIANTS.items() for m in [*own, *METHODS, "full"]],
)
def test_every_experiment_composes_with_each_method(composed, experiment, method):
    config = plain(composed(f"experiment={experiment}", f"method={method}"))
    assert config["method"]["name"] == method
    built = build_method(config["method"])
    assert isinstance(built.strategy, LTEStrategy) is ("lte" in config["method"]["uses"])
    build("data", config["data"])
    build("optim", config["optim"])


@pytest.mark.parametrize("experiment", VARIANTS)
def test_an_experiment_brings_its_own_method_and_sets_none_of_its_keys(composed, experiment):
    config = plain(composed(f"experiment={experiment}"))
    assert [config["method"]["name"]] == VARIANTS[experiment]
    assert "method" not in OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")


def test_the_method_files_key_by_key_are_the_strategys_defaults(composed):
    config = plain(composed("experiment=none", "method=lte"))["method"]
    defaults = {k: p.default for k, p in inspect.signature(LTEStrategy).parameters.items() if p.default is not p.empty}
    assert {key: config[key] for key in defaults} == defaults
    assert config.keys() - defaults.keys() == {"name", "uses", "start_method"}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lte_sequential", {"mode": "sequential"}),
        ("mhlora", {"mode": "joint"}),
        ("relora", {"heads": 1, "reset": True, "prune": 0.9, "rank": 128, "merge_every": 1000}),
        ("lte_published", {"heads": 32, "rank": 32, "alpha": 4096}),
        ("lte_pocket", {"heads": 4, "rank": 64}),
        ("lte_gpt2", {"heads": 4, "rank": 8, "alpha": 128, "targets": "attention", "merge_every": 10}),
    ],
)
def test_what_sets_each_method_apart_from_lte(composed, method, expected):
    base = plain(composed("experiment=none", "method=lte"))["method"]
    config = plain(composed("experiment=none", f"method={method}"))["method"]
    changed = {
        key: value for key, value in config.items() if key in base and value != base[key] and key not in ("name", "uses")
    }
    assert changed == {key: value for key, value in expected.items() if base[key] != value}
    assert {key: config[key] for key in expected} == expected
    strategy = build_method(config).strategy
    assert strategy.merge_every == config["merge_every"]


def test_relora_restarts_where_it_merges(composed):
    method = build_method(
        plain(composed("experiment=none", "method=relora", "method.merge_every=40", "method.restart_warmup=20"))["method"]
    )
    (jagged,) = method.callbacks
    assert isinstance(jagged, JaggedRestarts)
    assert (jagged.every, jagged.warmup, jagged.start, method.strategy.merge_every) == (40, 20, 0, 40)


def test_the_observations_can_be_switched_on_for_any_method():
    full = build_method({"uses": ["effective_rank"], "gradient_every": 7, "targets": "mlp"})
    (ranks,) = full.callbacks
    assert isinstance(ranks, EffectiveRank) and (ranks.every, ranks.targets, full.strategy) == (7, "mlp", None)
    lte = build_method(
        {"uses": ["lte", "effective_rank", "orthogonality"], "rank": 4, "targets": ["q", "v"], "orthogonality_every": 3}
    )
    ranks, orthogonality = lte.callbacks
    assert ranks.targets == ["q", "v"] == list(lte.strategy.targets)  # one key for both
    assert isinstance(orthogonality, HeadOrthogonality) and orthogonality.every == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"uses": ["lte"], "rank": 0}, r"method\.rank=0"),
        ({"uses": ["lte"], "heads": 0}, r"method\.heads=0"),
        ({"uses": ["lte"], "merge_every": 0}, r"method\.merge_every=0"),
        ({"uses": ["lte"], "mode": "serial"}, r"method\.mode='serial'"),
        ({"uses": ["lte"], "start_method": "threads"}, r"method\.start_method='threads': must be one of popen, spawn"),
        ({"uses": ["lte"], "find_unused_parameters": True}, r"method\.find_unused_parameters=True: is no key of this method"),
        ({"uses": ["lte"], "head": 2}, r"method\.head=2: .*did you mean heads\?"),
        (
            {"uses": ["lte", "jagged"], "merge_every": 5, "restart_warmup": 5},
            r"method\.restart_warmup=5: must be fewer than the 5",
        ),
        ({"uses": ["effective_rank"], "gradient_every": 0}, r"method\.gradient_every=0: must be 1 or more"),
        ({"uses": ["effective_rank"], "rank_tol": 2}, r"method\.rank_tol=2: must be a share"),
        ({"uses": ["orthogonality"], "orthogonality_every": -1}, r"method\.orthogonality_every=-1"),
        ({"uses": ["jagged"], "every": 5}, r"method\.every=5: is no key of this method; .*merge_every"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key_as_it_was_given(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_method(config)
    assert "\n" not in str(error.value)


# -- sweeps -------------------------------------------------------------------------------------------------------------


def choices(sweep: str) -> dict[str, list[str]]:
    params = OmegaConf.load(CONF / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return {o.key_or_group: [*o.sweep_string_iterator()] for o in parsed}


def test_the_reports_three_tables():
    assert choices("lte_heads_rank") == {"method.heads": ["2", "4", "8"], "method.rank": ["1", "4", "16", "64"]}
    assert choices("lte_merge_every") == {"method.merge_every": ["10", "20", "30", "40"]}
    layers = choices("layers_replaced")["method.targets"]
    assert len(layers) == len(set(layers)) == 7  # every subset of the three but the empty one


@pytest.mark.parametrize(
    ("sweep", "experiment"),
    [
        ("lte_heads_rank", "lte_gpt2"),
        ("lte_merge_every", "lte_gpt2"),
        ("layers_replaced", "lte_gpt2"),
        ("lte_vit_scales", "lte_vit_scales"),
        ("lte_mixer", "lte_mixer"),
    ],
)
def test_every_job_of_a_sweep_composes(composed, sweep, experiment):
    for key, values in choices(sweep).items():
        for value in values:
            config = plain(composed(f"experiment={experiment}", f"sweep={sweep}", f"{key}={value}"))
            assert isinstance(build_method(config["method"]).strategy, LTEStrategy)
            assert "hydra" not in config


def test_the_layers_of_gpt2_are_what_the_report_replaced(composed):
    small = [
        "model.config.n_layer=2",
        "model.config.n_head=2",
        "model.config.n_embd=32",
        "data.vocab_size=64",
        "data.seq_len=32",
    ]
    config = plain(composed("experiment=lte_gpt2", *small))
    module = build("model", config["model"])
    heads = output_heads(module)
    for value in choices("layers_replaced")["method.targets"]:
        chosen = plain(composed("experiment=lte_gpt2", f"method.targets={value}"))["method"]["targets"]
        found = find_targets(module, chosen)
        kinds = {"head" if id(t.layer) in heads else "attention" if ".attn." in name else "mlp" for name, t in found.items()}
        assert kinds == set([chosen] if isinstance(chosen, str) else chosen)


# -- models and data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "width", "depth"),
    [("mixer_ti", 192, 8), ("mixer_s", 512, 8), ("mixer_b", 768, 12), ("mixer_l", 1024, 24),
     ("vit_tiny", 192, 12), ("vit_small", 384, 12), ("vit_base", 768, 12), ("vit_large", 1024, 24)],
)  # fmt: skip
def test_the_models_of_the_scaling_studies(composed, model, width, depth):
    config = plain(composed("experiment=lte_mixer" if "mixer" in model else "experiment=lte_vit_scales", f"model={model}"))[
        "model"
    ]
    with torch.device("meta"):
        network = timm.create_model(config["name"], num_classes=config["num_classes"], **config["model_kwargs"])
    assert (network.embed_dim, len(network.blocks), network.num_classes) == (width, depth, 100)
    stem = network.stem if "mixer" in model else network.patch_embed
    assert stem.patch_size == ((16, 16) if "mixer" in model else (32, 32))


def test_a_mixer_of_the_smallest_width_trains_and_exports_under_timms_names(tmp_path):
    from lowrank_pretrain.export.weights import export_module

    module = VisionClassifier("mixer_ti16_224", num_classes=7, img_size=32, model_kwargs={"drop_path_rate": 0.1})
    assert all(name.partition(".blocks.")[2] for name in find_targets(module, "all"))
    export_module(module.eval(), tmp_path / "export")
    again = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert type(again) is timm.models.mlp_mixer.MlpMixer and torch.equal(again(x), module(x))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "caltech256", "sun397", "stanford_cars"])
def test_the_five_smaller_sets_are_names_that_are_known(tmp_path, name):
    with pytest.raises(ConfigError, match="^root=|does not exist"):  # the name is right, the folder is empty
        open_images(f"torch/{name}", str(tmp_path), "train", "train_split")


# -- several devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["popen", "spawn"])
def test_a_sweep_over_several_devices_needs_spawn_and_says_so(composed, tmp_path, start):
    config = plain(composed("experiment=lte_pocket", "trainer.devices=2", f"method.start_method={start}"))
    strategy = build_method(config["method"]).strategy
    trainer = build_trainer(config["trainer"], tmp_path, [], [], strategy)
    assert trainer.world_size == 2 and trainer.strategy is strategy
    refuse_popen_sweep(trainer, multirun=False)
    if start == "spawn":
        refuse_popen_sweep(trainer, multirun=True)
        return
    with pytest.raises(ConfigError, match=r"trainer.strategy='LTEStrategy'.*method\.start_method=spawn") as error:
        refuse_popen_sweep(trainer, multirun=True)
    assert "trainer.devices=1" in str(error.value)


def test_one_device_may_sweep(composed, tmp_path):
    config = plain(composed("experiment=lte_pocket"))
    trainer = build_trainer(config["trainer"], tmp_path, [], [], build_method(config["method"]).strategy)
    assert trainer.world_size == 1
    refuse_popen_sweep(trainer, multirun=True)


UNKNOWN = [
    ({"merge_evry": 5}, "did you mean merge_every"), ({"hedas": 8}, "did you mean heads"), ({"sync": "step"}, "sync_rest"),
    ({"find_unused_params": True}, "did you mean find_unused_parameters"), ({"device_ids": [0]}, "is no argument"),
    ({"zzz": 1}, "its own are rank, heads"), ({"module": None}, "is no argument"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "hint"), UNKNOWN, ids=str)
def test_an_unknown_argument_is_one_line_before_anything_starts(wrong, hint):
    """DDP, which would refuse it, is not even built on one device."""
    with pytest.raises(ConfigError) as error:
        LTEStrategy(rank=2, **wrong)
    assert error.value.key == next(iter(wrong)) and hint in str(error.value) and "\n" not in str(error.value)


def test_arguments_of_ddp_are_welcome():
    known = {
        "find_unused_parameters": True, "static_graph": False, "bucket_cap_mb": 5, "gradient_as_bucket_view": True,
        "broadcast_buffers": False, "process_group_backend": "gloo", "timeout": timedelta(hours=1), "start_method": "spawn",
    }  # fmt: skip
    assert LTEStrategy(**known).merge_timeout == 3600
    assert LTEStrategy(timeout=None).merge_timeout == 600
    for wrong in (3600, timedelta(0)):
        with pytest.raises(ConfigError, match="timeout=.*must be a datetime.timedelta above 0"):
            LTEStrategy(timeout=wrong)
