"""File, export and live model are the same model, under every name; behind a fit the module is a plain one."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

import lowrank_pretrain
from lowrank_pretrain import LoRA, PreLoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.export.weights import export_module
from lowrank_pretrain.lora import model as lora
from tests.toy import AtEnd, Toy, adapters, loader, toy, trainer


def steps(**kwargs) -> PreLoRA:
    """Switch behind step 2, freeze behind step 3."""
    settings = {"ranks": (2, 4), "window": 1, "window_unit": "step", "windows": 2, "latest": 2, "warmup": 1, "loss_tol": 1e-6}
    return PreLoRA(**(settings | kwargs))


def seeded(kind: type[Toy], **kwargs) -> Toy:
    torch.manual_seed(7)
    return kind(**kwargs)


# -- one weight, two ways to it ------------------------------------------------------------------------------------------


class Twice(Toy):
    """Layers under a second name, a weight in a ParameterList, and a whole part under a name that begins otherwise."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.taps = nn.ModuleList([self.embed, self.blocks[1].fc1])
        self.penalised = nn.ParameterList([self.blocks[0].fc2.weight])
        self.body = self.blocks


class Compiled(Toy):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.fast = torch.compile(self.blocks, backend="eager", disable=True)


@pytest.mark.parametrize("kind", [Twice, Compiled])
@pytest.mark.parametrize("method", ["prelora", "lora"])
def test_the_file_is_the_trained_model_under_every_name(tmp_path, kind, method):
    from safetensors.torch import load_file

    x, keys = torch.randn(4, 12), set(seeded(kind).state_dict())
    module, written = seeded(kind), {}

    def look(fit, module):
        fit.save_checkpoint(tmp_path / "live.ckpt")
        export_module(module, tmp_path / "out")
        written.update(copy.deepcopy(module.state_dict()))
        return module.eval()(x)

    end = AtEnd(look)
    fit = trainer(tmp_path, steps() if method == "prelora" else LoRA(2), end, max_epochs=1)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "after.ckpt")
    files = [torch.load(tmp_path / name, weights_only=True)["state_dict"] for name in ("live.ckpt", "after.ckpt")]
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(exported) == {key.replace("_orig_mod.", "") for key in keys}
    for state in (*files, written, module.state_dict()):
        assert set(state) == keys
        other = seeded(kind)
        other.load_state_dict(state)
        torch.testing.assert_close(other.eval()(x), end.found, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(state[key], files[0][key]) for key in keys)
    assert all(torch.equal(exported[key.replace("_orig_mod.", "")], files[0][key]) for key in keys)


def test_a_teacher_that_follows_by_state_dict_follows_the_merged_student(tmp_path):
    class Taught(Toy):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.blocks).requires_grad_(False)

        def on_train_batch_end(self, *_):
            for name, value in self.blocks.state_dict().items():
                self.teacher.state_dict()[name].copy_(value)

    module, x = seeded(Taught), torch.randn(4, 16)

    def look(fit, module):
        module.eval()
        return [nn.Sequential(*part)(x) for part in (module.blocks, module.teacher)]

    end = AtEnd(look)
    trainer(tmp_path, steps(targets="blocks.*"), end, max_epochs=1).fit(module, loader())
    torch.testing.assert_close(*end.found, rtol=1e-4, atol=1e-5)


X = torch.randn(8, 12, generator=torch.Generator().manual_seed(3))


# -- keys that a user filters, renames or adds ----------------------------------------------------------------------------


class Dropping(Toy):
    strict_loading = False

    def state_dict(self, *args, **kwargs):
        return {name: v for name, v in super().state_dict(*args, **kwargs).items() if not name.startswith("embed.")}


class Renaming(Toy):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {f"net.{name}": v for name, v in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name.removeprefix("net."): v for name, v in checkpoint["state_dict"].items()}


class OnlyTrained(Toy):
    strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {name: v for name, v in self.state_dict().items() if name in trained}


class Growing(Toy):
    """A buffer and a module that appear in mid-run."""

    strict_loading = False

    def on_train_batch_end(self, *_):
        if self.global_step == 4:
            self.register_buffer("seen", torch.ones(3))
            self.late = nn.Linear(2, 2)


@pytest.mark.parametrize("kind", [Dropping, Renaming, OnlyTrained, Growing])
@pytest.mark.parametrize("when", ["live", "after"])
def test_what_a_user_filters_renames_or_adds_is_as_the_user_left_it(tmp_path, kind, when):
    module = seeded(kind)
    fit = trainer(tmp_path, steps(), max_epochs=1, every=5 if when == "live" else None)
    fit.fit(module, loader())
    path = tmp_path / "step=5.ckpt"
    if when == "after":
        fit.save_checkpoint(path)
    file = torch.load(path, weights_only=True)
    names = set(file["state_dict"])
    assert not any("lora_" in name for name in names)
    plain = set(toy().state_dict())
    if kind is Dropping:
        assert names == {name for name in plain if not name.startswith("embed.")}
    elif kind is Renaming:
        assert names == {f"net.{name}" for name in plain}
    elif kind is Growing:
        assert names == plain | {"seen", "late.weight", "late.bias"}
    exact = file["lowrank_pretrain"]["exact"]
    assert "embed.lora_A" in exact and not any(name.startswith(("seen", "late")) for name in exact)
    if kind is Growing:
        return
    resumed = seeded(kind)
    trainer(tmp_path, steps(), max_epochs=2).fit(resumed, loader(), ckpt_path=path)  # and the side entry has what it needs
    assert len(resumed.losses) == 12 - file["global_step"]


def trained_names(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


class FilteringState(Toy):
    strict_loading = False

    def state_dict(self, *args, **kwargs):
        keep = trained_names(self)
        return {name: v for name, v in super().state_dict(*args, **kwargs).items() if name in keep}


class ListingParameters(Toy):
    strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


class Replacing(Toy):
    """Has its ``state_dict`` replaced on the module itself, as fine-tuning scripts do."""

    strict_loading = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        plain = self.state_dict
        self.state_dict = lambda *a, **kw: {name: v for name, v in plain(*a, **kw).items() if name in trained_names(self)}


@pytest.mark.parametrize("kind", [FilteringState, ListingParameters, OnlyTrained, Replacing])
@pytest.mark.parametrize("weights_only", [False, True])
def test_who_keeps_only_what_trains_keeps_the_trained_model(tmp_path, kind, weights_only):
    """Behind the freeze W trains no more, but what was trained lies there."""

    class Look(AtEnd):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "it.ckpt", weights_only)
                self.out = module.eval()(X).detach()
                module.train()
                assert not module.blocks[0].fc1.weight.requires_grad
                assert any(True for _ in lora.adapter_parameters(module))

    module, look = seeded(kind), Look(lambda *_: None)
    module.embed.requires_grad_(False)  # by the user: stays out
    before = vars(module).get("state_dict")
    trainer(tmp_path, steps(), look, max_epochs=1).fit(module, loader())
    found = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    assert set(found) == {name for name in toy().state_dict() if not name.startswith("embed.")}
    plain = seeded(Toy)
    plain.load_state_dict(found, strict=False)
    torch.testing.assert_close(plain.eval()(X), look.out, rtol=1e-4, atol=1e-5)
    assert vars(module).get("state_dict") is before and "on_save_checkpoint" not in vars(module)


def test_adapters_on_a_frozen_base_are_what_trains_and_copies_write_themselves(tmp_path):
    module, copies = seeded(FilteringState), []

    class Look(AtEnd):
        def on_train_batch_end(self, trainer, module, *_):
            copies.append((copy.deepcopy(module), copy.deepcopy(module.state_dict())))

    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=1e-2)
    for block in module.blocks:
        block.requires_grad_(False)
    trainer(tmp_path, LoRA(rank=2, targets="blocks.*"), Look(lambda *_: None), max_epochs=1).fit(module, loader())
    for copied, live in copies:  # of each step, though the module has gone on
        assert "blocks.1.fc1.weight" in live and "blocks.1.norm.weight" not in live
        state = copied.state_dict()
        assert state.keys() == live.keys() and all(torch.equal(state[name], live[name]) for name in live)
    assert not torch.equal(copies[0][1]["blocks.1.fc1.weight"], copies[-1][1]["blocks.1.fc1.weight"])


# -- behind a fit --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("method", ["prelora", "prelora joint", "lora", "freeze_rest", "partial"])
def test_the_module_is_plain_by_itself(tmp_path, method):
    callbacks = {
        "prelora": steps(), "prelora joint": steps(warmup=9), "lora": LoRA(2), "freeze_rest": steps(freeze_rest=True),
        "partial": steps(targets=["q", "v"]),
    }  # fmt: skip
    module, x = toy(), torch.randn(4, 12)
    end = AtEnd(lambda fit, module: module.eval()(x))
    trainer(tmp_path, callbacks[method], end, max_epochs=1).fit(module, loader())
    assert {type(child) for child in module.modules() if isinstance(child, nn.Linear)} == {nn.Linear}
    assert not [key for key in module.__dict__ if key.startswith("_lowrank")] and not module._state_dict_hooks
    assert all(p.requires_grad for p in module.parameters())
    toy().load_state_dict(module.state_dict())
    module.eval()
    torch.testing.assert_close(module(x), end.found, rtol=1e-4, atol=1e-5)
    layer, z = module.blocks[0].fc1, torch.randn(2, 16)
    for traced in (torch.jit.script(layer), torch.fx.symbolic_trace(layer)):
        torch.testing.assert_close(traced(z), layer(z))
    copy.deepcopy(module).to("meta")(x.to("meta"))
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(module), {nn.Linear})
    assert sum(child._get_name() == "DynamicQuantizedLinear" for child in quantised.modules()) == 8
    module.trainer = None
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    before = copy.deepcopy(module.state_dict())
    module.train()
    trainer(tmp_path, max_epochs=1).fit(module, loader())  # fine-tuning by a plain Trainer
    assert all(not torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("callback", [steps, lambda: LoRA(2)])
@pytest.mark.parametrize("moved", [False, True])
def test_a_file_written_behind_the_fit_goes_on_like_one_written_at_its_end(tmp_path, callback, moved):
    """Unless the module moved on since: then the file holds what it is now."""
    module = toy()
    fit = trainer(tmp_path, callback(), AtEnd(lambda fit, _: fit.save_checkpoint(tmp_path / "end.ckpt")), max_epochs=1)
    fit.fit(module, loader())
    if moved:
        with torch.no_grad():
            module.embed.weight.add_(0.5)
    fit.save_checkpoint(tmp_path / "after.ckpt")
    end, after = (torch.load(tmp_path / name, weights_only=True) for name in ("end.ckpt", "after.ckpt"))
    sides = [file["lowrank_pretrain"] for file in (end, after)]
    assert {key: sides[0][key] for key in ("plan", "phase", "groups", "settings")} == {
        key: sides[1][key] for key in ("plan", "phase", "groups", "settings")
    }
    for file, side in zip((end, after), sides, strict=True):
        assert set(side["exact"]) == set(sides[0]["exact"]) and set(file["state_dict"]) == set(toy().state_dict())
    same = {name for name, value in sides[0]["exact"].items() if torch.equal(value, sides[1]["exact"][name])}
    assert set(sides[0]["exact"]) - same == ({"embed.weight", "embed.lora_B.W"} if moved else set())
    runs = []
    for name in ("end.ckpt", "after.ckpt"):
        resumed = toy()
        trainer(tmp_path, callback(), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / name)
        runs.append(resumed.state_dict())
    assert moved != all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


def test_the_factors_stay_readable_until_the_next_fit_and_nothing_holds_the_module(tmp_path):
    module, callback = toy(), steps()
    fit = trainer(tmp_path, callback, max_epochs=1)
    fit.fit(module, loader())
    assert len(adapters(module)) == 6 * 2 + 2 * 4 - 2 and not any("lora_" in name for name, _ in module.named_parameters())
    gone = weakref.ref(module)
    trainer(tmp_path, max_epochs=1).fit(module, loader())
    copy.deepcopy(callback)
    trainer(tmp_path, steps(latest=None, windows=6), max_epochs=1).fit(module, loader())
    assert not adapters(module)  # they were another fit's
    assert gone() is module


def test_merge_gives_the_plain_module_back_in_mid_run_and_after_an_interrupted_fit(tmp_path):
    x, found = torch.randn(4, 12), []

    class Stop(AtEnd):
        def on_train_batch_start(self, trainer, module, *_):
            if trainer.global_step == 4:
                with pytest.raises(RuntimeError, match="the module is being trained: merge a copy"):
                    lowrank_pretrain.merge(module)
                plain = lowrank_pretrain.merge(copy.deepcopy(module))
                assert type(plain.embed) is nn.Linear and all(p.requires_grad for p in plain.parameters())
                assert set(plain.state_dict()) == set(toy().state_dict()) and list(lora.lora_layers(module))
                torch.testing.assert_close(plain.eval()(x), module.eval()(x), rtol=1e-4, atol=1e-5)
                found.append(module(x))
                raise ZeroDivisionError

    module = toy()
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, steps(), Stop(print), max_epochs=1).fit(module, loader())
    assert list(lora.lora_layers(module))
    assert lowrank_pretrain.merge(module) is module and type(module.embed) is nn.Linear
    assert all(p.requires_grad for p in module.parameters())
    torch.testing.assert_close(module.eval()(x), found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["interrupted", "ended"])
def test_a_good_file_replaces_what_diverged(tmp_path, how):
    class Breaks(AtEnd):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 5:
                module.embed.lora_A.data.fill_(float("nan"))
                if how == "interrupted":
                    raise ZeroDivisionError

    good = trainer(tmp_path, steps(), max_epochs=1, every=4)
    good.fit(toy(), loader())
    module = toy()
    broken = trainer(tmp_path, steps(), Breaks(print), max_epochs=1)
    if how == "interrupted":
        with pytest.raises(ZeroDivisionError):
            broken.fit(module, loader())
        with pytest.raises(
            ValueError, match="not finite when its last fit ended: give a good file"
        ):  # no file: nothing to go on from
            trainer(tmp_path, steps(), max_epochs=1).fit(module, loader())
    else:
        broken.fit(module, loader())
    trainer(tmp_path, steps(), max_epochs=1).fit(module, loader(), ckpt_path=tmp_path / "step=4.ckpt")
    whole = toy()
    trainer(tmp_path, steps(), max_epochs=1).fit(whole, loader(), ckpt_path=tmp_path / "step=4.ckpt")
    for (name, a), b in zip(module.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b), name


# -- a resumed run with other arguments ---------------------------------------------------------------------------------

OTHER = {
    "train_A": False, "adapter_lr": 2.0, "adapter_weight_decay": 0.5, "freeze_rest": True, "targets": "mlp", "ranks": (1, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained_files(tmp_path_factory):
    """Files from every phase: behind steps 1 (full), 3 (joint) and 6 (lowrank)."""
    folder = tmp_path_factory.mktemp("phases")
    trainer(folder, steps(warmup=2), every=1, max_epochs=1).fit(toy(), loader())
    return {"full": folder / "step=1.ckpt", "joint": folder / "step=3.ckpt", "lowrank": folder / "step=6.ckpt"}


@pytest.mark.parametrize("key", OTHER)
@pytest.mark.parametrize("phase", ["full", "joint", "lowrank"])
def test_each_argument_that_differs_on_resume_is_named_or_wins(tmp_path, trained_files, key, phase):
    module, callback = toy(), steps(warmup=2, **{key: OTHER[key]})
    run = trainer(tmp_path, callback, max_epochs=2, max_steps=8)
    wins = phase == "full" and key != "targets" or (phase, key) == ("joint", "freeze_rest")
    if wins:
        run.fit(module, loader(), ckpt_path=trained_files[phase])
        assert callback.phase == "lowrank"
        return
    with pytest.raises(ConfigError, match=f"^{key}=.*the checkpoint's run has") as error:
        run.fit(module, loader(), ckpt_path=trained_files[phase])
    assert not module.losses and "\n" not in str(error.value)


def test_several_are_named_at_once_and_other_words_for_the_same_layers_are_no_difference(tmp_path, trained_files):
    with pytest.raises(ConfigError, match=r"^train_A=False: .*; adapter_lr=3.0, there 1.0"):
        trainer(tmp_path, steps(warmup=2, train_A=False, adapter_lr=3.0), max_epochs=2).fit(
            toy(), loader(), ckpt_path=trained_files["lowrank"]
        )
    same = steps(warmup=2, targets=["embed", "blocks.*"])
    trainer(tmp_path, same, max_epochs=2, max_steps=7).fit(toy(), loader(), ckpt_path=trained_files["lowrank"])
    assert same.phase == "lowrank"
