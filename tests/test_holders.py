"""What keeps a model's parameters across a switch: averages, copies and lists are named, or refused, when a fit starts."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lowrank_pretrain import merge
from lowrank_pretrain.core.errors import ConfigError
from tests.test_rehearsal import Distilled, Net, fit, pre

ema = pytest.importorskip("timm.utils.model_ema")


class Late(Callback):
    """Keeps, from the start, what it needs only after the switch: ``build`` makes it."""

    def __init__(self, build, at_start=False):
        self.build, self.at_start, self.held = build, at_start, None

    def on_fit_start(self, trainer, pl_module):
        self.held = None if self.at_start else self.build(pl_module)

    def on_train_start(self, trainer, pl_module):
        self.held = self.build(pl_module) if self.at_start else self.held


class Shadow:
    """The average that many scripts copy: by name of the parameters."""

    def __init__(self, model):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("build, match", [
    (lambda m: copy.deepcopy(m), "Late.held looks like a copy of Net, .*update it by name"),
    (lambda m: [copy.deepcopy(m)], r"Late.held\[0\] looks like a copy of Net"),
    (Shadow, "Late.held.shadow holds a value for each parameter of Net, .*state_dict"),
    (lambda m: [p.detach().clone() for p in m.parameters()], "Late.held holds a value for each parameter of Net"),
    (lambda m: [p for p in m.parameters() if p.ndim > 1], "Late.held holds parameters of fc1 that .*anew"),
])  # fmt: skip
def test_what_keeps_parameters_for_later_is_named_at_the_start(tmp_path, build, match, at_start):
    with pytest.warns(UserWarning, match=match) as caught:
        fit(tmp_path, Net(), Late(build, at_start), pre())
    assert sum("Late.held" in str(w.message) for w in caught) == 1


class Buffers(nn.Module):
    """Latent diffusion's LitEma: an average in buffers, named after the parameters."""

    def __init__(self, model):
        super().__init__()
        self.register_buffer("decay", torch.tensor(0.5))
        for name, p in model.named_parameters():
            self.register_buffer(name.replace(".", ""), p.detach().clone())


class Keeps(Net):
    """Makes ``build(module)`` an attribute, which a child module may be."""

    def __init__(self, build):
        super().__init__()
        self.held = build(self)


class Anchored(Net):
    """Elastic weight consolidation's way: two buffers for each parameter, on the module itself."""

    def on_train_start(self):
        for name, p in list(self.named_parameters()):
            self.register_buffer(name.replace(".", "_") + "_mean", p.detach().clone())
            self.register_buffer(name.replace(".", "_") + "_fisher", torch.zeros_like(p))


def clones(module, trains=False):
    return nn.ParameterList([nn.Parameter(p.detach().clone(), trains) for p in module.parameters()])


@pytest.mark.parametrize("make, match", [
    (lambda: Keeps(Buffers), "held, in its buffers, holds a value for each parameter of Keeps, "),
    (lambda: Keeps(lambda m: [Buffers(m)]), r"Keeps.held\[0\], in its buffers, holds a value for each parameter of Keeps, "),
    (Anchored, "Anchored, in its buffers, holds a value for each parameter of Anchored, "),
    (lambda: Keeps(clones), "held holds a value for each parameter of Keeps, "),
    (lambda: Keeps(partial(clones, trains=True)), "held holds a value for each parameter of Keeps, "),
    (lambda: Keeps(lambda m: nn.utils.parameters_to_vector(m.parameters()).detach()), "Keeps.held holds a value for each "),
])  # fmt: skip
def test_values_in_buffers_lists_of_parameters_and_one_flat_tensor_are_named(tmp_path, make, match):
    with pytest.warns(UserWarning, match=match) as caught:
        fit(tmp_path, make(), pre())
    assert sum("holds a value" in str(w.message) for w in caught) == 1


class Table(nn.Module):
    """Buffers of all the shapes of a model's parameters, in another order."""

    def __init__(self, model):
        super().__init__()
        for i, p in enumerate(reversed(list(model.parameters()))):
            self.register_buffer(f"b{i}", torch.ones_like(p))
        self.norm = nn.BatchNorm1d(16)


@pytest.mark.parametrize("build", [
    Table, lambda m: nn.ParameterList(nn.Parameter(torch.zeros_like(p)) for p in m.parameters()),
])  # fmt: skip
def test_other_buffers_and_parameters_are_no_copies(tmp_path, build):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds")
        fit(tmp_path, Keeps(build), pre())


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Lengthless:
    def __len__(self):
        raise RuntimeError("not known before training")


@pytest.mark.parametrize("build", [
    lambda _: torch.utils.data.DataLoader(Endless()), lambda _: np.array(0.5), lambda _: Lengthless(),
])  # fmt: skip
def test_the_length_of_an_attribute_is_not_asked(tmp_path, build):
    phases = pre()
    fit(tmp_path, Keeps(build), AfterTwo(build), phases, max_epochs=6)
    assert phases.phase == "lowrank"


class AfterTwo(Callback):
    """Begins to keep something after the second step."""

    def __init__(self, build):
        self.build, self.held = build, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            self.held = self.build(pl_module)


class Hooked(Callback):
    """Hooks of its own on the optimizer, after everybody else's."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        optimizer.register_step_post_hook(lambda *_: None)


@pytest.mark.parametrize("then", ["lora", "factorize"])
@pytest.mark.parametrize("build, match", [
    (lambda m: copy.deepcopy(m), "AfterTwo.held looks like a copy of Net, .*update it by name"),
    (Shadow, "AfterTwo.held.shadow holds a value for each parameter of Net, .*state_dict"),
    (lambda m: [p for p in m.parameters() if p.ndim > 1], "AfterTwo.held holds parameters of fc1 that .*anew"),
    (AveragedModel, "Net: AfterTwo.held pairs its parameters with these by position"),
])  # fmt: skip
def test_what_is_made_between_the_first_step_and_the_switch_is_named_before_it(tmp_path, build, match, then):
    phases = pre(then=then, ranks=(0.25,) if then == "factorize" else (2,))
    with pytest.warns(UserWarning, match=match) as caught:
        fit(tmp_path, Net(), AfterTwo(build), phases, Hooked(), max_epochs=6)
    assert sum("AfterTwo.held" in str(w.message) for w in caught) == 1 and phases.phase == "lowrank"


@pytest.mark.parametrize("then", ["lora", "factorize"])
def test_averages_that_pair_by_position_are_refused_even_if_they_begin_late(tmp_path, then):
    settings = {"then": then, "ranks": (0.25,) if then == "factorize" else (2,)}
    for build in (AveragedModel, lambda m: {"ema": AveragedModel(m)}, partial(ema.ModelEmaV3, exclude_buffers=True)):
        module = Net()
        with pytest.raises(ConfigError, match="targets='Net': Late.held.* pairs its parameters with these by position"):
            fit(tmp_path, module, Late(build), pre(**settings))
        assert not module.losses
    module = Distilled(lambda *_: None)
    del module.teacher
    module.teacher = AveragedModel(module.body)
    with pytest.raises(ConfigError, match="teacher pairs its parameters"):
        fit(tmp_path, module, pre(**settings))
    module = Net()
    module.average = AveragedModel(nn.Sequential(nn.Linear(16, 5), nn.Linear(5, 5)))  # of another model
    fit(tmp_path, module, pre(**settings))


@pytest.mark.parametrize("then", ["lora", "factorize"])
@pytest.mark.parametrize("kind", [ema.ModelEmaV2, ema.ModelEmaV3])
def test_timms_averages_go_on_after_the_switch_and_nothing_is_said(tmp_path, kind, then):
    class Averaging(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.average = kind(pl_module, decay=0.5)

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step > 5:
                self.average.update(pl_module)

    module, callback = Net(), Averaging()
    phases = pre(then=then, ranks=(0.25,) if then == "factorize" else (2,))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*average")
        fit(tmp_path, module, callback, phases, max_epochs=6)
    assert phases.phase == "lowrank"
    for name, value in callback.average.module.state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[name], rtol=0.2, atol=0.05)


@pytest.mark.parametrize("then", ["lora", "factorize"])
@pytest.mark.parametrize("kind", [ema.ModelEmaV2, ema.ModelEmaV3])
def test_an_average_that_copied_a_changed_module_says_that_its_updates_are_lost(tmp_path, kind, then):
    class Averaging(Callback):
        cure = staticmethod(lambda module: module)

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 20:
                self.average = kind(self.cure(copy.deepcopy(pl_module)), decay=0.5)
            if trainer.global_step > 20:
                self.average.update(pl_module)

    settings = {"then": then, "ranks": (0.25,) if then == "factorize" else (2,)}
    with pytest.raises(RuntimeError, match="a weight from state_dict.. of a layer with adapters or factors was written into"):
        fit(tmp_path, Net(), Averaging(), pre(**settings), max_epochs=6)
    cured, module = Averaging(), Net()
    cured.cure = merge
    fit(tmp_path, module, cured, pre(**settings), max_epochs=6)
    assert not any("_shown" in layer.__dict__ for layer in module.modules())
    for name, value in cured.average.module.state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[name], rtol=0.2, atol=0.05)
