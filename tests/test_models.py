"""The two LightningModules, their optimizer and schedule, and the shipped model and optim configurations."""

import logging
import math
import socket
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.models import fsdp as parallel
from lowrank_pretrain.models.checks import name_fused_experts
from lowrank_pretrain.models.language import CausalLM
from lowrank_pretrain.models.optim import Optim
from lowrank_pretrain.models.vision import VisionClassifier

CONF = Path(__file__).parent.parent / "conf"
TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
TINY_GPT = {"n_layer": 2, "n_head": 2, "n_embd": 16}
TINY_LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def vit(num_classes=10, **kwargs):
    kwargs = {"img_size": 8, "in_chans": 1, "model_kwargs": TINY, **kwargs}
    return VisionClassifier("vit_tiny_patch16_224", num_classes, **kwargs)


def images(n, num_classes=10, soft=False, batch_size=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 8, 8, generator=generator)
    y = torch.randint(num_classes, (n,), generator=generator)
    if soft:
        y = torch.softmax(torch.randn(n, num_classes, generator=generator), dim=1)
    return DataLoader(list(zip(x, y, strict=True)), batch_size=batch_size)


def trainer(**kwargs):
    return Trainer(accelerator="cpu", **{**QUIET, "max_epochs": 1, **kwargs})


def wrong(call, *words):
    """`call` must raise a ConfigError of one line that holds all `words`."""
    with pytest.raises(ConfigError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, f"{word!r} not in: {line}"


# --- vision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_training_loss_is_cross_entropy_of_hard_and_soft_targets(soft):
    module = vit()
    x, y = next(iter(images(4, soft=soft)))
    log_probs = torch.log_softmax(module.model(x), dim=1)
    targets = y if soft else F.one_hot(y, 10)
    module.log = lambda *args, **kwargs: None
    torch.testing.assert_close(module.training_step((x, y), 0), -(targets * log_probs).sum(1).mean())


def test_validation_metrics_are_those_of_the_whole_set():
    module = vit().eval()
    loader = images(10)  # batches of 4, 4, 2: a mean of batch means would be wrong
    metrics = trainer().validate(module, loader, verbose=False)[0]
    x = torch.cat([batch[0] for batch in loader])
    y = torch.cat([batch[1] for batch in loader])
    logits = module(x).detach()
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert metrics["val/acc1"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    top5 = logits.topk(5).indices.eq(y[:, None]).any(1)
    assert metrics["val/acc5"] == pytest.approx(top5.float().mean().item())
    assert set(trainer().test(module, loader, verbose=False)[0]) == {"test/loss", "test/acc1", "test/acc5"}


def test_top5_needs_five_classes():
    module = vit(num_classes=3)
    assert set(trainer().validate(module, images(4, 3), verbose=False)[0]) == {"val/loss", "val/acc1"}


@pytest.mark.parametrize("name", ["mixer_s32_224", "resnet10t"])
def test_other_networks_and_img_size_only_where_taken(name):
    module = VisionClassifier(name, 4, img_size=64, in_chans=1).eval()
    assert module(torch.zeros(2, 1, 64, 64)).shape == (2, 4)


def test_wrong_vision_arguments_are_one_line():
    make = VisionClassifier
    wrong(lambda: make("vit_tinny_patch16_224", 10), "name='vit_tinny_patch16_224'", "vit_tiny_patch16_224")
    wrong(lambda: make("hf-hub:timm/vit_tiny_patch16_224", 10), "name=")
    wrong(lambda: make("vit_tiny_patch16_224.nope", 10), "vit_tiny_patch16_224.")
    wrong(lambda: vit(model_kwargs={"embed_dimm": 16}), "model_kwargs='embed_dimm'", "embed_dim")
    wrong(lambda: vit(model_kwargs={**TINY, "num_heads": 3}), "num_heads", "divisible")
    wrong(lambda: vit(model_kwargs={"img_size": 8}), "model_kwargs='img_size'", "data.img_size")
    wrong(lambda: vit(model_kwargs={"pretrained": True}), "model_kwargs='pretrained'", "model.pretrained_file=PATH")
    wrong(lambda: vit(img_size=10), "img_size=10", "patch size 4", "such as data.img_size=8", "experiment=none")
    wrong(lambda: vit(img_size=2), "img_size=2", "such as data.img_size=4")
    wrong(lambda: vit(num_classes=1), "num_classes=1", "at least 2")
    wrong(lambda: vit(in_chans=0), "in_chans=0")


def test_predict_takes_images_alone():
    module, x = vit().eval(), torch.randn(1, 1, 8, 8)
    (logits,) = trainer().predict(module, DataLoader(x, batch_size=1))
    torch.testing.assert_close(logits, module(x))


def test_label_outside_the_classes_is_one_line():
    wrong(lambda: trainer().fit(vit(num_classes=3), images(8, num_classes=9)), "num_classes=3", "label", "0..2")


# --- starting from a checkpoint file ----------------------------------------------------------------------------


def source(tmp_path, num_classes, suffix=".safetensors", **kwargs):
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **{"img_size": 8, **TINY, **kwargs})
    path = tmp_path / f"weights{suffix}"
    save_file(model.state_dict(), path) if suffix == ".safetensors" else torch.save(model.state_dict(), path)
    return model, str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_pretrained_file_with_another_head(tmp_path, caplog, suffix):
    model, path = source(tmp_path, 7, suffix)
    with caplog.at_level(logging.INFO, logger="lowrank_pretrain"):
        module = vit(num_classes=10, in_chans=3, pretrained_file=path)
    ours = module.model.state_dict()
    for key, value in model.state_dict().items():
        if key.startswith("head."):
            assert ours[key].shape[0] == 10
        else:
            assert torch.equal(ours[key], value)
    assert [record.message.count("head starts fresh") for record in caplog.records] == [1]
    # the file need not exist where a checkpoint is loaded
    assert "pretrained_file" not in module.hparams


def test_pretrained_file_with_the_same_head_is_loaded_whole(tmp_path, caplog):
    model, path = source(tmp_path, 10)
    with caplog.at_level(logging.INFO, logger="lowrank_pretrain"):
        module = vit(in_chans=3, pretrained_file=path).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(module(x), model.eval()(x), rtol=0, atol=0)
    assert not caplog.records


def test_pretrained_file_adapts_channels_and_image_size(tmp_path):
    model, path = source(tmp_path, 7)
    module = vit(in_chans=1, img_size=16, pretrained_file=path)
    torch.testing.assert_close(module.model.patch_embed.proj.weight, model.patch_embed.proj.weight.sum(1, keepdim=True))
    assert module.model.pos_embed.shape == (1, 17, 16)
    torch.testing.assert_close(module.model.pos_embed[:, 0], model.pos_embed[:, 0])
    _, grey = source(tmp_path, 7, in_chans=1)
    assert vit(in_chans=1, pretrained_file=grey).model.patch_embed.proj.weight.shape[1] == 1


def test_wrong_pretrained_files_are_one_line(tmp_path):
    wrong(lambda: vit(pretrained_file=str(tmp_path / "none.pth")), "pretrained_file=", "no such file")
    _, path = source(tmp_path, 7, embed_dim=32)
    wrong(lambda: vit(in_chans=3, pretrained_file=path), "pretrained_file=", "does not fit")
    # another network's weights, with another number of classes: must not load nothing in silence
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), tmp_path / "resnet.pth")
    wrong(lambda: vit(pretrained_file=str(tmp_path / "resnet.pth")), "does not fit")
    for suffix in (".safetensors", ".pth"):
        _, path = source(tmp_path, 7, suffix)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        wrong(lambda path=path: vit(pretrained_file=path), "cannot be read")
    torch.save({"state_dict": vit().state_dict()}, tmp_path / "last.ckpt")
    wrong(lambda: vit(pretrained_file=str(tmp_path / "last.ckpt")), "lowrank_pretrain.export")


# --- language ---------------------------------------------------------------------------------------------------


def gpt(**kwargs):
    return CausalLM(**{"name": "gpt2", "vocab_size": 50, "seq_len": 8, "config": TINY_GPT, **kwargs})


def blocks(n, vocab_size=50, length=8, batch_size=4):
    ids = torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row} for row in ids], batch_size=batch_size)


def test_gpt2_head_is_tied_and_loss_is_next_token_cross_entropy():
    module = gpt().eval()
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    batch = next(iter(blocks(4)))
    logits = module(batch["input_ids"])  # (B, T, V)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    module.log = lambda *args, **kwargs: None
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    assert module.model.config.use_cache is False
    assert module.model.config._attn_implementation == "sdpa"


def test_perplexity_weighs_tokens_not_batches():
    module = CausalLM("llama", 50, 8, TINY_LLAMA).eval()
    loader = blocks(7)  # batches of 4 and 3
    metrics = trainer().validate(module, loader, verbose=False)[0]
    ids = torch.cat([batch["input_ids"] for batch in loader])
    loss = F.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert set(metrics) == {"val/loss", "val/ppl"}
    assert metrics["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["val/ppl"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_positions_follow_seq_len_unless_the_configuration_has_more():
    assert gpt().model.transformer.wpe.weight.shape[0] == 8
    assert gpt(config={**TINY_GPT, "max_position_embeddings": 32}).model.transformer.wpe.weight.shape[0] == 32
    wrong(lambda: gpt(config={**TINY_GPT, "n_positions": 4}), "seq_len=8", "n_positions=4")


def test_wrong_language_arguments_are_one_line():
    wrong(lambda: gpt(name="gpt3"), "name='gpt3'", "gpt2")
    wrong(lambda: gpt(config={"n_layers": 2}), "config='n_layers'", "n_layer")
    wrong(lambda: gpt(config={"vocab_size": 2}), "config='vocab_size'")
    wrong(lambda: gpt(config={**TINY_GPT, "n_head": 3}), "n_head", "divisible")
    wrong(lambda: gpt(config={**TINY_GPT, "n_layer": "two"}), "n_layer")
    wrong(
        lambda: CausalLM("bloom", 50, 8, {"n_layer": 1, "attn_implementation": "sdpa"}),
        "config.attn_implementation='sdpa'",
        "+model.config.attn_implementation=eager",
    )
    wrong(lambda: gpt(config={**TINY_GPT, "attn_implementation": "sdqa"}), "config.attn_implementation='sdqa'", "eager")
    wrong(lambda: gpt(vocab_size=0), "vocab_size=0")
    wrong(lambda: gpt(seq_len=1), "seq_len=1")


def test_token_beyond_the_vocabulary_is_one_line():
    for step in (lambda t, data: t.fit(gpt(), data), lambda t, data: t.validate(gpt(), data)):
        wrong(lambda step=step: step(trainer(), blocks(8, vocab_size=4000)), "vocab_size=50", "token id 3", "0..49")


# what transformers itself would take; the user set nothing
WITHOUT_SDPA = {
    "bloom": {"n_layer": 1, "hidden_size": 16, "n_head": 2},
    "gemma2": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8,
    },
    "gpt_neo": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "mamba": {"num_hidden_layers": 1, "hidden_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_SDPA)
def test_the_model_chooses_its_attention_where_the_user_does_not(name):
    module = CausalLM(name, 50, 8, WITHOUT_SDPA[name])
    module.try_out()
    assert module.model.config._attn_implementation == "eager"
    chosen = gpt(config={**TINY_GPT, "attn_implementation": "eager"})
    assert chosen.model.config._attn_implementation == "eager"


# --- language models from local weights ----------------------------------------------------------------------------

SMALL_LLAMA = {**TINY_LLAMA, "num_hidden_layers": 2}
TINY_MIXTRAL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_local_experts": 3,
}  # fmt: skip
KINDS = {"gpt2": TINY_GPT, "llama": SMALL_LLAMA, "mixtral": TINY_MIXTRAL}


def saved(folder, name="gpt2", vocab_size=50, dtype=torch.float32, **kwargs):
    torch.manual_seed(5)
    model = CausalLM(name, vocab_size, 8, KINDS[name]).model.to(dtype)
    model.save_pretrained(folder, **kwargs)
    return model.float().eval()


def same_weights(module, model):
    ours, theirs = module.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == torch.float32 for key in ours)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("how", ["folder", "file", "sharded", "index", "bfloat16"])
def test_a_language_model_starts_from_local_weights(tmp_path, name, how):
    shards = {"max_shard_size": "10KB"} if how in ("sharded", "index") else {}
    model = saved(tmp_path, name, dtype=torch.bfloat16 if how == "bfloat16" else torch.float32, **shards)
    path = {"file": tmp_path / "model.safetensors", "index": tmp_path / "model.safetensors.index.json"}.get(how, tmp_path)
    module = CausalLM(name, 50, 8, pretrained_file=str(path))  # sizes from config.json
    assert same_weights(module, model)
    fresh = CausalLM(name, 50, 8, KINDS[name])  # its buffers were never rounded
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), fresh.buffers(), strict=True))
    fresh.model.load_state_dict(model.state_dict())
    assert module.model.training and "pretrained_file" not in module.hparams
    again = CausalLM(**module.hparams)  # as a checkpoint is loaded where the file is gone
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    ids = torch.arange(8)[None]
    torch.testing.assert_close(module.eval()(ids), fresh.eval()(ids), rtol=0, atol=0)
    if name == "gpt2":
        assert module.model.lm_head.weight is module.model.transformer.wte.weight


@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_weights_of_the_bare_network_are_enough(tmp_path, suffix):
    model = saved(tmp_path / "whole")
    bare = {k.removeprefix("transformer."): v for k, v in model.state_dict().items() if not k.startswith("lm_head")}
    torch.save(bare, tmp_path / f"weights{suffix}")
    assert same_weights(gpt(pretrained_file=str(tmp_path / f"weights{suffix}")), model)


def test_positions_and_sizes_come_with_the_weights(tmp_path):
    saved(tmp_path)  # 8 positions
    assert CausalLM("gpt2", 50, 4, pretrained_file=str(tmp_path)).model.config.n_positions == 8
    wrong(lambda: CausalLM("gpt2", 50, 16, pretrained_file=str(tmp_path)), "seq_len=16", "n_positions=8")


def test_wrong_language_weights_are_one_line(tmp_path):
    folder = tmp_path / "gpt2"
    model = saved(folder)
    file, key = str(folder / "model.safetensors"), "pretrained_file="
    wrong(lambda: gpt(pretrained_file=str(tmp_path / "none")), key, "no such file or folder", ".safetensors")
    wrong(lambda: CausalLM("llama", 50, 8, pretrained_file=str(folder)), "name='llama'", "must be gpt2")
    wrong(lambda: CausalLM("gpt2", 60, 8, pretrained_file=str(folder)), "vocab_size=60", "data.vocab_size=50")
    wider = {**TINY_GPT, "n_embd": 32}
    wrong(lambda: gpt(config=wider, pretrained_file=file), key, "(48,) there and (96,) here", "model.config=null")
    wrong(lambda: gpt(config={**TINY_GPT, "n_layer": 3}, pretrained_file=file), key, "lacks 12 weights", "h.2.")
    wrong(lambda: gpt(config={**TINY_GPT, "n_layer": 1}, pretrained_file=file), key, "no place for", "h.1.")
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("lm_head")}
    lacking = {name: value for name, value in state.items() if "h.1.mlp.c_fc.weight" not in name}
    save_file(lacking, tmp_path / "lacking.safetensors")
    wrong(lambda: gpt(pretrained_file=str(tmp_path / "lacking.safetensors")), "lacks 1 weights", "h.1.mlp.c_fc.weight")
    for name in ("cut.safetensors", "cut.bin"):
        (tmp_path / name).write_bytes(Path(file).read_bytes()[:900])
        wrong(lambda name=name: gpt(pretrained_file=str(tmp_path / name)), key, "cannot be read")
    torch.save([1, 2], tmp_path / "list.bin")
    wrong(lambda: gpt(pretrained_file=str(tmp_path / "list.bin")), key, "cannot be read", "no weights by name")
    torch.save({"state_dict": gpt().state_dict(), "pytorch-lightning_version": "2"}, tmp_path / "last.ckpt")
    wrong(lambda: gpt(pretrained_file=str(tmp_path / "last.ckpt")), key, "lowrank_pretrain.export", "format=hf")
    (tmp_path / "empty").mkdir()
    wrong(lambda: gpt(pretrained_file=str(tmp_path / "empty")), key, "must hold weights")
    (folder / "config.json").write_text("{")
    wrong(lambda: gpt(pretrained_file=str(folder)), key, "config.json", "cannot be read")
    (folder / "config.json").write_text('{"model_type": "t5"}')
    wrong(lambda: gpt(pretrained_file=str(folder)), "name='gpt2'", "'t5'")


def test_experts_in_one_tensor_are_named_once():
    module = CausalLM("mixtral", 50, 8, TINY_MIXTRAL)
    if not any(param.ndim == 3 for param in module.parameters()):
        pytest.skip("this transformers keeps each expert's matrices by themselves")
    with pytest.warns(UserWarning, match=r"2 weights of experts, \d+% of the parameters, stay out of the targets: .*experts\."):
        name_fused_experts(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        name_fused_experts(gpt())


# --- both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vision", "language"])
def test_checkpoint_loads_without_arguments_and_with_weights_only(tmp_path, kind):
    torch.manual_seed(3)
    config = OmegaConf.create(TINY if kind == "vision" else TINY_GPT)  # must be stored as plain types
    module = vit(model_kwargs=config) if kind == "vision" else gpt(config=config)
    data = images(8) if kind == "vision" else blocks(8)
    fit = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    fit.fit(module, data, data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = type(module).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    x = next(iter(data))
    x = x[0] if kind == "vision" else x["input_ids"]
    torch.testing.assert_close(again.eval()(x), module.eval()(x), rtol=0, atol=0)
    trainer().test(module, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_fsdp2_shards_layer_by_layer_and_only_where_there_is_a_mesh():
    found = {
        "vit": (vit().model, "blocks"),
        "gpt2": (gpt().model, "transformer.h"),
        "llama": (CausalLM("llama", 50, 8, {**TINY_LLAMA, "num_hidden_layers": 2}).model, "model.layers"),
        "mixer": (VisionClassifier("mixer_s32_224", 4, img_size=64, in_chans=1).model, "blocks"),
    }
    for name, (model, where) in found.items():
        assert list(parallel.blocks(model)) == list(model.get_submodule(where).children()), name
    module = gpt()
    before = {name: type(layer) for name, layer in module.named_modules()}
    trainer(max_steps=1).fit(module, blocks(4))  # calls configure_model; two processes: test_galore_distributed
    assert {name: type(layer) for name, layer in module.named_modules()} == before


# --- optimizer and schedule -------------------------------------------------------------------------------------


def names(module, group):
    of = {id(param): name for name, param in module.named_parameters()}
    return {of[id(param)] for param in group["params"]}


def test_decay_touches_matrices_only():
    module = vit()
    decay, rest = Optim(weight_decay=0.3).groups(module)
    assert decay["weight_decay"] == 0.3 and rest["weight_decay"] == 0
    assert {"model.blocks.0.attn.qkv.weight", "model.patch_embed.proj.weight", "model.head.weight"} <= names(module, decay)
    assert {"model.pos_embed", "model.cls_token", "model.norm.weight", "model.head.bias"} <= names(module, rest)
    assert len(decay["params"]) + len(rest["params"]) == len(list(module.parameters()))

    module = gpt()
    decay, rest = Optim().groups(module)
    assert {"model.transformer.h.0.attn.c_attn.weight", "model.transformer.h.1.mlp.c_fc.weight"} <= names(module, decay)
    assert {"model.transformer.wte.weight", "model.transformer.wpe.weight"} <= names(module, rest)

    module.model.transformer.wte.weight.requires_grad_(False)
    assert "model.transformer.wte.weight" not in names(module, Optim().groups(module)[1])


class LearningRates(Callback):
    """The rate that each optimizer step used."""

    def __init__(self):
        self.used = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.used.append(optimizer.param_groups[0]["lr"])


def rates(optim, **kwargs):
    module, seen = vit(), LearningRates()
    module.optim = optim
    trainer(callbacks=[seen], **kwargs).fit(module, images(40))
    return seen.used


@pytest.mark.filterwarnings("error::UserWarning:torch.optim")
@pytest.mark.parametrize("warmup", [4, 0.2])
def test_rate_rises_linearly_then_follows_the_cosine(warmup):
    steps, warm = 20, 4
    expected = [(s + 1) / (warm + 1) for s in range(warm)]
    expected += [0.5 * (1 + math.cos(math.pi * s / (steps - warm))) for s in range(steps - warm)]
    assert rates(Optim(lr=0.1, warmup=warmup), max_epochs=2) == pytest.approx([0.1 * rate for rate in expected])


def test_the_cosine_ends_at_a_share_of_each_groups_own_peak():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.4}, {"params": weights[1:], "lr": 0.1}])
    scheduler = Optim(lr=0.4, warmup=0.1, final_lr=0.1).scheduler(optimizer, 20)
    used = []
    for _ in range(25):  # beyond its end it stays there: a cosine would rise again
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    shares = [(s + 1) / 3 for s in range(2)]
    shares += [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * s / 18)) for s in range(18)] + [0.1] * 5
    assert [row[0] / 0.4 for row in used] == pytest.approx(shares)
    assert [row[1] / 0.1 for row in used] == pytest.approx(shares)


def test_steps_count_optimizer_steps_under_accumulation():
    used = rates(Optim(lr=1.0, warmup=2), max_epochs=2, accumulate_grad_batches=5)
    assert used == pytest.approx([1 / 3, 2 / 3, 1, 0.5])


def test_constant_schedule_and_a_run_without_end():
    assert rates(Optim(lr=1.0, warmup=2, schedule="constant")) == pytest.approx([1 / 3, 2 / 3] + [1] * 8)
    endless = {"max_epochs": -1, "max_time": {"seconds": 1}, "limit_train_batches": 2}
    assert set(rates(Optim(lr=1.0, schedule="constant"), **endless)) == {1.0}
    wrong(lambda: rates(Optim(), **endless), "schedule='cosine'", "known length")
    wrong(lambda: rates(Optim(schedule="constant", warmup=0.1), **endless), "warmup=0.1", "known length")


def test_build_replaces_the_optimizer_and_keeps_the_schedule():
    def build(module: LightningModule, optim: Optim):
        return torch.optim.SGD(optim.groups(module), lr=optim.lr)

    module = vit()
    module.optim = Optim(lr=0.5, warmup=1, build=build)
    fit = trainer()
    fit.fit(module, images(8))
    assert isinstance(fit.optimizers[0], torch.optim.SGD)
    assert fit.lr_scheduler_configs[0].interval == "step"


def test_wrong_optimizer_values_are_one_line():
    for key, value in {
        "lr": 0,
        "weight_decay": -0.1,
        "eps": float("nan"),
        "betas": [0.9],
        "warmup": 1.0,
        "schedule": "linear",
        "final_lr": 1.0,
    }.items():
        wrong(lambda key=key, value=value: Optim(**{key: value}), f"{key}={value!r}")
    wrong(lambda: Optim(lr="1e-3"), "lr='1e-3'")
    wrong(lambda: Optim(betas=[0.9, 1.0]), "betas=")
    wrong(lambda: Optim(warmup=-1), "warmup=-1")
    wrong(lambda: rates(Optim(warmup=10)), "warmup=10", "10 optimizer steps")


# --- shipped configurations -------------------------------------------------------------------------------------

SIZES = {  # millions of parameters
    "vit_pocket": (1.0, 1.3),
    "vit_small": (21, 23),
    "vit_small_patch32": (22, 24),
    "vit_base": (85, 88),
    "vit_large": (303, 306),
    "vit_tiny": (5, 6),
    "mixer_ti": (2, 4),
    "mixer_s": (18, 19),
    "mixer_b": (59, 61),
    "mixer_l": (207, 209),
    "gpt2": (124, 125),
    "gpt2_pocket": (1, 2),
    "llama_pocket": (1, 2),
}


def test_every_model_configuration_is_listed_here():
    assert {path.stem for path in (CONF / "model").glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_model_configuration_has_the_size_it_says(name):
    pocket = name.endswith("_pocket")
    data = {"num_classes": 10 if pocket else 1000, "img_size": 28 if pocket else 224, "in_chans": 1 if pocket else 3}
    data |= {"vocab_size": 2048 if pocket else 50257, "seq_len": 128 if pocket else 1024}
    config = OmegaConf.create({"data": data, "model": OmegaConf.load(CONF / "model" / f"{name}.yaml")})
    with torch.device("cpu" if pocket else "meta"):
        module = instantiate(config.model, _convert_="all")
    low, high = SIZES[name]
    assert low <= sum(param.numel() for param in module.parameters()) / 1e6 <= high


@pytest.mark.parametrize("path", sorted((CONF / "optim").glob("*.yaml")), ids=lambda path: path.stem)
def test_optim_configuration(path):
    optim = instantiate(OmegaConf.load(path), _convert_="all")
    assert isinstance(optim, Optim) and isinstance(optim.betas, tuple) and isinstance(optim.lr, float)
