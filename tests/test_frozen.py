"""A frozen W in a cheaper type: its products, what is stored and merged, resume, composition, and what is refused."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from safetensors.torch import load_file
from torch import nn

from lowrank_pretrain import LoRA, PreLoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.export import export
from lowrank_pretrain.galore import GaLoreAdamW
from lowrank_pretrain.lora import frozen, storing
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.frozen import KINDS
from lowrank_pretrain.lte import LTEStrategy
from tests import lte_workers, prelora_workers
from tests.reference.frozen import kept_weight
from tests.reference.frozen import layer as reference_layer
from tests.test_resume import assert_equal, run, steps
from tests.toy import AtEnd, Toy, loader, toy, trainer

ERROR = {"bfloat16": 2**-8, "float16": 2**-20, "int8": 2**-8, "float8": 2**-19}  # of rounding in the products, relative


def one_layer(transposed=False, fused=True, rank=4):
    """A layer called qkv (or fc) with drawn adapters, its module and its plan."""
    torch.manual_seed(3)
    if transposed:
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(96, 32)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(32, 96)
    name = "qkv" if fused else "fc"
    module = nn.ModuleDict({name: layer})
    plan = dict.fromkeys([f"qkv.{p}" for p in "qkv"] if fused else ["fc"], rank)
    lora.inject(module, plan, alpha=6.0)
    for _, p in lora.adapter_parameters(module):
        nn.init.normal_(p, std=0.1)
    return module, layer, plan


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lockstep_with_the_reference(kind, fused, transposed):
    module, layer, plan = one_layer(transposed, fused)
    W = (layer.weight.t() if transposed else layer.weight).detach().clone()
    lora.freeze(module, plan, frozen_dtype=kind)
    x, dy = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 96)
    y = layer(x)
    y.backward(dy)
    blocks = [(p.start, layer.lora_A[p.a : p.a + p.rank], layer.lora_B[p.name], p.scale) for p in layer._parts]
    flat = x.detach().reshape(-1, 32)
    want, dx, grads = reference_layer(flat, dy.reshape(-1, 96), W, layer.bias.detach(), blocks, kind)
    for got, right in ((y.reshape(-1, 96), want), (x.grad.reshape(-1, 32), dx)):
        assert (got.double() - right).norm() <= ERROR[kind] * right.norm()
    for p, (dA, dB) in zip(layer._parts, grads, strict=True):  # thin products are in x's dtype: nothing of them is rounded away
        torch.testing.assert_close(layer.lora_A.grad[p.a : p.a + p.rank].double(), dA, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.lora_B[p.name].grad.double(), dB, rtol=1e-5, atol=1e-5)
    assert y.dtype == x.grad.dtype == torch.float32 and layer.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_update_is_not_rounded_away(kind):
    """B A a million times smaller than W: in W's type the sum would be W."""
    module, layer, plan = one_layer(fused=False)
    with torch.no_grad():
        layer.lora_B["W"].mul_(1e-6)
    lora.freeze(module, plan, frozen_dtype=kind)
    x = torch.randn(4, 32)
    with_update = layer(x)
    moved = layer.merged_weight() - layer.base_weight()
    with torch.no_grad():
        layer.lora_B["W"].zero_()
    assert (layer(x) != with_update).any() and moved.any()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_copies_and_state_dicts(kind):
    module, layer, plan = one_layer()
    before, W = layer.weight.nbytes, layer.weight.detach().clone()
    lora.freeze(module, plan, frozen_dtype=kind)
    extra = sum(t.nbytes for t in layer._stored.operands())
    assert layer.weight.nbytes == before / (2 if kind.endswith("16") else 4)
    assert layer.weight.nbytes + extra <= before * 0.6
    x, plain = torch.randn(3, 32), nn.Linear(32, 96)
    plain.load_state_dict(layer.state_dict())  # float32, under the plain names
    held = kept_weight(W, kind)[0].float()
    torch.testing.assert_close(layer.base_weight(), held, rtol=1e-6, atol=1e-7)
    twin = copy.deepcopy(module)
    assert torch.equal(twin["qkv"](x), layer(x))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    twin.load_state_dict(state)  # the merged model: B = 0, and W is stored again in the same type
    assert twin["qkv"].weight.dtype == layer.weight.dtype
    torch.testing.assert_close(twin["qkv"](x), layer(x), rtol=0.1, atol=0.1)
    lora.merge(module)  # W has its own type again
    assert layer.weight.dtype == torch.float32 and layer._stored is None
    torch.testing.assert_close(layer(x), plain(x))


def test_the_original_is_what_is_merged_if_it_is_kept():
    for keep in (False, True):
        module, layer, plan = one_layer(fused=False)
        exact = layer.merged_weight()
        lora.freeze(module, plan, frozen_dtype="bfloat16", keep_original=keep)
        assert torch.equal(layer.merged_weight(), exact) is keep
        lora.eject(module)
        assert torch.equal(layer.weight, exact) is keep and type(layer) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_original_that_is_kept_follows_what_is_loaded(dtype):
    """Also where the weight that comes has the stored dtype already."""
    module = nn.ModuleDict({"fc": nn.Linear(32, 16)}).to(dtype)
    lora.inject(module, {"fc": 2})
    lora.freeze(module, {"fc": 2}, frozen_dtype="bfloat16", keep_original=True)
    given = {name: 2 * value.bfloat16() for name, value in module.state_dict().items()}
    module.load_state_dict(given)
    assert all(torch.equal(value.bfloat16(), given[name]) for name, value in module.state_dict().items())
    exact = lora.exact_state(module)
    moved = 3 * exact.pop("fc.weight")  # others wrote into it after the fit: the file has no original
    del exact["fc.frozen_original"]
    lora.load_exact(module, {**exact, "fc.weight": moved})
    assert torch.equal(module.state_dict()["fc.weight"].bfloat16(), moved)


@pytest.mark.parametrize("kind", KINDS)
def test_other_paths_see_the_same_layer(kind):
    """Second derivatives, torch.func and LoRA-FA, and an expert that gets no row."""
    module, layer, plan = one_layer()
    lora.freeze(module, plan, frozen_dtype=kind)
    x = torch.randn(4, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    dx.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()
    jacobian = torch.func.jacrev(layer)(x.detach()[0])
    wanted = layer.merged_weight()
    torch.testing.assert_close(jacobian, wanted, rtol=1e-4, atol=1e-5)
    assert layer(x[:0]).shape == (0, 96)
    layer.lora_A.requires_grad_(False)
    layer(x.detach()).sum().backward()
    assert layer.lora_B["q"].grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind):
    module, layer, plan = one_layer()
    lora.freeze(module, plan, frozen_dtype=kind)
    x = torch.randn(4, 32, requires_grad=True)
    found = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        x.grad = None
        y = call(x)
        y.square().sum().backward()
        found.append([y.detach().clone(), x.grad.clone(), layer.lora_A.grad.clone(), layer.lora_B["v"].grad.clone()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


# -- the phases -------------------------------------------------------------------------------------------------------


def test_it_happens_once_at_the_freeze_rank_0_included(tmp_path):
    def look(fit, module):
        return {n: (p.dtype, p.requires_grad) for n, p in module.named_parameters() if n.endswith(".weight")}, dict(
            module.state_dict()
        )

    seen, module = AtEnd(look), toy()
    callback = steps(ranks=(0, 4), frozen_dtype="bfloat16")
    trainer(tmp_path, callback, seen, max_epochs=4, every=1).fit(module, loader())
    assert 0 in callback.plan.values()
    dtypes, state = seen.found
    targets = {name.removesuffix(name[-2:]) if name[-2:] in (".q", ".k", ".v") else name for name in callback.plan}
    assert {n for n, (dtype, _) in dtypes.items() if dtype == torch.bfloat16} == {f"{name}.weight" for name in targets}
    assert all(value.dtype == torch.float32 for value in state.values())
    Toy().load_state_dict(state)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())  # plain again
    file = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    assert file["lowrank_pretrain"]["frozen_dtype"] == "bfloat16"
    assert file["lowrank_pretrain"]["exact"]["blocks.0.fc1.weight"].dtype == torch.bfloat16
    early = torch.load(tmp_path / "step=10.ckpt", weights_only=True)["lowrank_pretrain"]  # joint: still as it was
    assert "frozen_dtype" not in early and early["exact"]["blocks.0.fc1.weight"].dtype == torch.float32


def test_layers_that_are_left_out_are_named_and_stay(tmp_path):
    callback = steps(targets=["q", "v", "fc1"], frozen_dtype="bfloat16")
    seen = AtEnd(lambda fit, module: {n: p.dtype for n, p in module.named_parameters()})
    with pytest.warns(UserWarning, match=r"leaves out blocks.\*.qkv has row blocks that are no targets and train on"):
        trainer(tmp_path, callback, seen, max_epochs=4).fit(toy(), loader())
    assert seen.found["blocks.0.fc1.weight"] == torch.bfloat16 and seen.found["blocks.0.qkv.weight"] == torch.float32


@pytest.mark.parametrize("rank", [0, 2])
def test_an_output_head_is_stored_once_it_has_a_weight_of_its_own(rank):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def get_output_embeddings(self):
            return self.head

    module, plan = Tied(), {"head": rank}
    assert "head shares its weight with embed" in storing.check_frozen(module, {"head": 0}, False, "int8")
    lora.inject(module, plan)
    lora.freeze(module, plan, frozen_dtype="int8")
    assert module.embed.weight.dtype == torch.float32  # a lookup reads W itself
    assert module.head.weight.dtype == (torch.int8 if rank else torch.float32)


@pytest.mark.parametrize("keep", [False, True])
def test_lora_resumes_and_says_what_it_merges(tmp_path, keep):
    settings = {"rank": 4, "frozen_dtype": "int8", "keep_original": keep}
    whole = run(tmp_path / "whole", LoRA(**settings), toy())
    for at in (1, 7):
        again = run(tmp_path / "again", LoRA(**settings), toy(), ckpt=tmp_path / "whole" / f"step={at}.ckpt")
        assert_equal(again, whole)
    exact = torch.load(tmp_path / "whole" / "step=7.ckpt", weights_only=True)["lowrank_pretrain"]["exact"]
    assert ("blocks.0.fc1.frozen_original" in exact) is keep
    base = storing.unmerged_weights(exact, toy().state_dict())["blocks.0.fc1.weight"]
    assert torch.equal(base, toy().blocks[0].fc1.weight) is keep and base.dtype == torch.float32


def test_a_target_that_the_first_step_finds_unfit_goes_on_from_its_own_weight(tmp_path):
    class Outside(Toy):
        def forward(self, x):
            return super().forward(nn.functional.linear(x, self.embed.weight) @ self.embed.weight)

    weights = []
    for kind in (None, "int8"):
        torch.manual_seed(7)
        module, seen = Outside(), AtEnd(lambda fit, m: {n: p.dtype for n, p in m.named_parameters()})
        callback = LoRA(rank=2, frozen_dtype=kind)
        with pytest.warns(UserWarning, match="embed its weight is also used outside of its layer"):
            trainer(tmp_path, callback, seen, max_steps=2).fit(module, loader())
        assert "embed" not in callback.plan
        weights.append(module.embed.weight)
    assert torch.equal(*weights)
    assert seen.found["embed.weight"] == torch.float32 and seen.found["blocks.0.fc1.weight"] == torch.int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_works_where_the_cpu_lacks_the_kernel(monkeypatch, dtype):
    torch.manual_seed(3)
    weight, stored = frozen.store(torch.randn(48, 32, dtype=dtype), "float8", False)
    x, dy, found = torch.randn(16, 32, dtype=dtype), torch.randn(16, 48, dtype=dtype), []
    for has in {frozen._CPU_HAS_FLOAT8, False}:
        monkeypatch.setattr(frozen, "_CPU_HAS_FLOAT8", has)
        found.append((
            frozen.product(x, weight, "float8", stored.operands(), None, False),
            frozen.gradient_product(dy, weight, "float8", stored.operands(), False),
        ))  # fmt: skip
    for a, b in zip(found[0], found[-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_file_written_after_the_fit_goes_on_like_one_written_at_its_end(tmp_path, moved, kind):
    module, settings = toy(), {"frozen_dtype": kind, "targets": "blocks.*"}
    fit = trainer(tmp_path, steps(**settings), AtEnd(lambda fit, _: fit.save_checkpoint(tmp_path / "end.ckpt")), max_epochs=3)
    fit.fit(module, loader())
    if moved:
        with torch.no_grad():
            module.blocks[0].fc1.weight.add_(0.5)
    fit.save_checkpoint(tmp_path / "after.ckpt")
    runs = []
    for name in ("end.ckpt", "after.ckpt"):
        resumed = toy()
        trainer(tmp_path, steps(**settings), max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / name)
        runs.append(resumed.state_dict())
    assert moved != all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_exports_say_which_weight_was_merged(tmp_path, keep):
    trainer(tmp_path, LoRA(rank=4, frozen_dtype="int8", keep_original=keep), max_epochs=1, every=1).fit(toy(), loader())
    file = tmp_path / "step=6.ckpt"
    for kind, folder in ((None, tmp_path / "merged"), ("peft", tmp_path / "adapters")):
        export(file, kind, folder)
        said = (folder / "README.md").read_text()
        assert ("The W merged here is the original" in said) is keep and ("the one as stored" in said) is not keep
    base = load_file(tmp_path / "adapters" / "base" / "model.safetensors")["blocks.0.fc1.weight"]
    assert base.dtype == torch.float32 and torch.equal(base, toy().blocks[0].fc1.weight) is keep
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert_equal(merged, dict(torch.load(file, weights_only=True)["state_dict"]))


def test_the_type_may_change_until_the_freeze(tmp_path):
    run(tmp_path, steps(), toy())
    again = run(tmp_path / "a", steps(frozen_dtype="bfloat16"), toy(), ckpt=tmp_path / "step=11.ckpt")
    assert_equal(again, run(tmp_path / "b", steps(frozen_dtype="bfloat16"), toy()))
    with pytest.raises(ConfigError, match=r"frozen_dtype='bfloat16': the checkpoint's run has None"):
        run(tmp_path / "c", steps(frozen_dtype="bfloat16"), toy(), ckpt=tmp_path / "step=19.ckpt")


@pytest.mark.parametrize("kind", ["bfloat16", "float8"])
def test_two_processes_are_equal_and_resume(ranks, tmp_path, kind):
    how = {"method": {"frozen_dtype": kind, "targets": "blocks.*", "freeze_rest": True}}
    assert ranks(2, prelora_workers.resumed, 2, tmp_path, [5, 11, 14, 19], **how) == [{5: [], 11: [], 14: [], 19: []}] * 2


# -- LTE --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["parallel", "joint", "sequential"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_heads_multiply_in_it_and_merge_into_w_itself(tmp_path, mode, kind):
    net = {"dtype": torch.float32}
    plain = lte_workers.saved(1, tmp_path, [], steps=12, mode=mode, net=net)
    whole = lte_workers.saved(1, tmp_path, [6, 8], steps=12, mode=mode, net=net, frozen_dtype=kind)
    assert whole["losses"] != plain["losses"] or kind == "float16"  # the products are others
    torch.testing.assert_close(torch.tensor(whole["losses"]), torch.tensor(plain["losses"]), rtol=0.02, atol=0.02)
    for at in (6, 8):
        again = lte_workers.saved(
            1, tmp_path / "again", [], steps=12, mode=mode, net=net, frozen_dtype=kind, ckpt=str(tmp_path / f"step={at}.ckpt")
        )
        assert whole["losses"][at:] == again["losses"]
        assert all(torch.equal(whole["weights"][name], again["weights"][name]) for name in whole["weights"])


def test_prelora_hands_it_on_to_heads(tmp_path):
    """W stays in float32, where merges add to it; heads multiply in bfloat16 from the freeze on."""
    runs = []
    for kind in (None, "bfloat16"):
        module, seen = toy(), AtEnd(lambda fit, m: {n: p.dtype for n, p in m.named_parameters()})
        strategy = LTEStrategy(heads=2, merge_every=3, frozen_dtype=kind)
        trainer(tmp_path, steps(frozen_dtype=kind), seen, strategy=strategy, max_epochs=4).fit(module, loader())
        assert set(seen.found.values()) == {torch.float32}
        runs.append(module.losses)
    assert runs[0][:14] == runs[1][:14] and runs[0][14:] != runs[1][14:]
    assert runs[0] == pytest.approx(runs[1], abs=0.02)
    with pytest.raises(ConfigError, match="is for the callback's own adapters, and LTEStrategy takes the targets over"):
        strategy = LTEStrategy(heads=2, merge_every=3)
        trainer(tmp_path, steps(frozen_dtype="bfloat16"), strategy=strategy, max_epochs=4).fit(toy(), loader())


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: PreLoRA(frozen_dtype="fp8"), "frozen_dtype='fp8': must be one of null, auto, bfloat16, float16, float8, int8"),
        (lambda: LoRA(frozen_dtype=16), "frozen_dtype=16: must be one of null, auto, bfloat16, float16, float8, int8"),
        (lambda: PreLoRA(keep_original=True), "keep_original=True: is for frozen_dtype: without it W stays as it is"),
        (lambda: PreLoRA(frozen_dtype="int8", then="galore"),
         "frozen_dtype='int8': is for a frozen W next to adapters, and then=\"galore\" has none: leave it out"),
        (lambda: PreLoRA(frozen_dtype="int8", then="factorize", ranks=[0.25]),
         "frozen_dtype='int8': is for a frozen W next to adapters, and then=\"factorize\" has none: leave it out"),
        (lambda: LTEStrategy(frozen_dtype="int8"),
         "frozen_dtype='int8': saves memory only, and merges need W in full: use bfloat16 or float8"),
        (lambda: LTEStrategy(frozen_dtype="bfloat16", update="galore"),
         "frozen_dtype='bfloat16': is for a frozen W next to heads, and update=galore trains W: leave it out"),
        (lambda: LTEStrategy(frozen_dtype="bfloat16", update="full"),
         "frozen_dtype='bfloat16': is for a frozen W next to heads, and update=full trains W: leave it out"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(make, line):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == line


@pytest.mark.parametrize("kind", ["bfloat16", None])
def test_auto_is_bfloat16_where_the_device_has_instructions_for_it_and_goes_on_so(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("lowrank_pretrain.phases.adoption.multiplies_bfloat16", lambda device: kind is not None)
    given = run(tmp_path / "given", steps(frozen_dtype=kind), toy())
    chosen = run(tmp_path / "auto", steps(frozen_dtype="auto"), toy())
    assert_equal(given, chosen)
    for at in (8, 19):  # before and after the freeze
        again = run(tmp_path / f"{at}", steps(frozen_dtype="auto"), toy(), ckpt=tmp_path / "auto" / f"step={at}.ckpt")
        assert_equal(given, again)


def refused(tmp_path, callback, *others, module=None, **kwargs):
    module = toy() if module is None else module
    with pytest.raises(ConfigError) as error:
        trainer(tmp_path, callback, *others, **kwargs).fit(module, loader())
    assert "\n" not in str(error.value)
    return str(error.value), module


def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch):
    line, module = refused(tmp_path, steps(frozen_dtype="float8"))
    assert line == (
        "frozen_dtype='float8': embed is 16 x 12, and float8's kernel wants multiples of 16: leave it out of the targets, or "
        "use bfloat16"
    )
    assert not module.losses
    for average in (EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(1e-2)):
        line, _ = refused(tmp_path, steps(frozen_dtype="bfloat16"), average)
        assert "keeps an average of W, which a cheaper type would round away" in line

    def lacks(*_, **__):
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0")

    monkeypatch.setattr(torch, "_scaled_mm", lacks)
    monkeypatch.setattr(frozen, "_CPU_HAS_FLOAT8", True)
    line, module = refused(tmp_path, steps(frozen_dtype="float8", targets="blocks.*"))
    assert "frozen_dtype='float8': cpu cannot multiply in it (torch._scaled_mm is only supported" in line
    assert line.endswith("use bfloat16, or leave frozen_dtype out") and not module.losses


def test_an_optimizer_that_takes_the_plan_has_no_frozen_weight(tmp_path):
    class Projected(Toy):
        def configure_optimizers(self):
            return GaLoreAdamW(self.parameters(), lr=1e-2)

    line, _ = refused(tmp_path, steps(frozen_dtype="bfloat16"), module=Projected())
    assert line.startswith("frozen_dtype='bfloat16': is for the callback's own adapters, and GaLoreAdamW takes the targets")


def test_an_overflow_at_the_cast_is_named_and_nothing_is_changed(tmp_path):
    module = toy()
    with torch.no_grad():
        module.blocks[1].fc2.weight[0, 0] = 1e6
    line, _ = refused(tmp_path, LoRA(rank=2, frozen_dtype="float16"), module=module)
    assert line.startswith("frozen_dtype='float16': blocks.1.fc2 holds numbers up to 1e+06, which it cannot: leave it out")
    assert not module.losses and all(p.dtype == torch.float32 for p in module.parameters())
    trainer(tmp_path, LoRA(rank=2, frozen_dtype="int8"), max_steps=3).fit(module, loader())  # a scale holds any number


@pytest.mark.parametrize("kind", KINDS)
def test_this_device_multiplies_in_it(kind):
    assert frozen.refuses(kind, torch.device("cpu")) is None


# -- learning -----------------------------------------------------------------------------------------------------------


def test_it_learns_as_float32_does():
    """The short form of benchmarks/frozen_learning.py, whose record has three seeds and the whole length."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import frozen_learning as study

    losses = {}
    for kind in (None, "bfloat16"):
        module = study.fit("vit", 1, 60, kind, 60, None)
        losses[kind] = study.evaluate(module.model, "vit", study.data("vit", "cpu")[2])
    assert losses["bfloat16"] == pytest.approx(losses[None], rel=3e-3)
