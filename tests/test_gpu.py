"""What only a CUDA device can show. `python -m pytest -m gpu`."""

import copy
import gc

import pytest
import torch
from torch import nn

from lowrank_pretrain import PreLoRA
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.lora import model as lora
from tests.toy import AtEnd, adapters, loader, toy, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def steps(**kwargs) -> PreLoRA:
    return PreLoRA(**{"ranks": (2, 4, 8), "window": 2, "window_unit": "step", "windows": 2, "latest": 4, "warmup": 3,
                      "loss_tol": 1e-6, **kwargs})  # fmt: skip


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_three_phases_in_every_precision(tmp_path, precision):
    module, callback = toy(), steps()
    trainer(tmp_path, callback, max_epochs=4, accelerator="cuda", devices=1, precision=precision).fit(module, loader())
    assert (callback.phase, callback.switch_step, callback.freeze_step) == ("lowrank", 8, 14)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert adapters(module) and all(factor.any() for factor in adapters(module).values())
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {dtype}


@pytest.mark.parametrize("targets", ["all", ["q", "v", "fc1"]])
def test_resume_equals_no_interruption(tmp_path, targets):
    """Lightning moves the module to the CPU at the end of fit, so row blocks that are views must survive the move."""

    def run(path, ckpt=None):
        module = toy(scheduler="sequential")
        fit = trainer(path, steps(targets=targets), every=1, max_epochs=4, accelerator="cuda", devices=1)
        fit.fit(module, loader(), ckpt_path=ckpt)
        return module

    whole = run(tmp_path / "whole")
    for at in (5, 8, 11, 14, 19):
        again = run(tmp_path / "again", tmp_path / "whole" / f"step={at}.ckpt")
        for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name, s=at: f"{n} from {s}: {m}")


def test_ddp_over_nccl_keeps_its_hook_sends_what_trains_and_resumes(tmp_path):
    """On CUDA Lightning registers the strategy's hook, on each wrapper; one process is enough for NCCL."""
    from lightning.pytorch.strategies import DDPStrategy
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    trained: list[int] = []

    def run(path, ckpt=None):
        sent = []

        def hook(state, bucket):
            sent.append(bucket.buffer().numel())
            return allreduce_hook(None, bucket)

        module = toy(scheduler="sequential")
        count = AtEnd(lambda _, module: trained.append(sum(p.numel() for p in module.parameters() if p.requires_grad)))
        fit = trainer(
            path, steps(), count, every=1, max_epochs=4, accelerator="cuda", devices=1, use_distributed_sampler=False,
            strategy=DDPStrategy(ddp_comm_hook=hook),
        )  # fmt: skip
        fit.fit(module, loader(), ckpt_path=ckpt)
        return module, sent

    whole, sent = run(tmp_path / "whole")
    assert len(sent) == 24 and sent[0] < sent[8] and sent[-1] == trained[0] < sent[0]
    for at in (5, 8, 11, 14, 19):
        again, _ = run(tmp_path / "again", tmp_path / "whole" / f"step={at}.ckpt")
        for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name, s=at: f"{n} from {s}: {m}")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("n", [64, 50_000])
def test_one_lora_linear_on_the_device_matches_float64(autocast, n):
    torch.manual_seed(0)
    net = nn.ModuleDict({"qkv": nn.Linear(256, 768)}).cuda()
    lora.inject(net, {"qkv.q": 8, "qkv.k": 4, "qkv.v": 16})
    for _, p in lora.adapter_parameters(net):
        p.data.normal_(std=0.05)
    exact = copy.deepcopy(net)
    x = torch.randn(n, 256, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = net["qkv"](x)
    y.float().square().mean().backward()
    grads = {name: p.grad.double() for name, p in net.named_parameters()} | {"x": x.grad.double()}
    exact.double()
    x64 = x.detach().double().requires_grad_()
    exact["qkv"](x64).square().mean().backward()
    limit = 2e-2 if autocast else 2e-3  # float32 products may run in tf32
    for name, p in [*exact.named_parameters(), ("x", x64)]:
        assert (grads[name] - p.grad).norm() / p.grad.norm() < limit, name


def test_the_low_rank_phase_needs_less_memory_than_the_full_one():
    """ViT-L/16 224, batch 16, bf16-mixed, AdamW: allocator peak of a step after the freeze against the full step."""
    import timm

    peaks = {}
    for phase in ("full", "lowrank", "lowrank, freeze_rest"):
        model = timm.create_model("vit_large_patch16_224", num_classes=1000).cuda()
        if phase != "full":
            plan = dict.fromkeys(find_targets(model), 16)
            lora.inject(model, plan)
            lora.freeze(model, plan, freeze_rest="rest" in phase)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        x, y = torch.randn(16, 3, 224, 224, device="cuda"), torch.randint(0, 1000, (16,), device="cuda")
        for step in range(3):
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peaks[phase] = torch.cuda.max_memory_allocated() / 2**30
        del model, optimizer, loss, x, y
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\npeak GiB of a ViT-L step: { {k: round(v, 2) for k, v in peaks.items()} }")
    assert peaks["lowrank"] < 0.8 * peaks["full"]


@pytest.mark.parametrize("how", [{"overlap": 2}, {"fragments": 2}], ids=str)
def test_whole_weights_keep_their_copies_in_pinned_memory(tmp_path, how):
    """A lone worker with an outer step keeps W_base and momentum; where they lie changes no bit."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lowrank_pretrain.lte import LTEStrategy
    from tests.lte_workers import Net, Samples

    ends = []
    for keep_on in ("device", "cpu"):
        module = Net(dtype=torch.float32)
        strategy = LTEStrategy(update="full", merge_every=4, outer_lr=0.7, outer_momentum=0.9, keep_on=keep_on, **how)
        run = pl.Trainer(
            accelerator="gpu", devices=1, max_epochs=-1, max_steps=12, strategy=strategy, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        run.fit(module, DataLoader(Samples(dtype=torch.float32), batch_size=8))
        local = strategy.local
        kept = [*local.outer.buffers.values(), *(W for one in local.fragments for W in one.base.values())]
        assert all(t.is_pinned() if keep_on == "cpu" else t.is_cuda for t in kept) and kept
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("how", [{}, {"reset": True}, {"overlap": 2}, {"mode": "sequential"}], ids=str)
def test_lte_trains_validates_and_resumes_on_one_gpu(tmp_path, precision, how):
    """NCCL, inference_mode in validation, and a resume between merges."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lowrank_pretrain.lte import LTEStrategy
    from tests.lte_workers import Net, Samples, Save, loader

    def fit(folder, steps, ckpt=None):
        module = Net(dtype=torch.float32)
        run = pl.Trainer(
            accelerator="gpu", devices=1, precision=precision, max_epochs=-1, max_steps=steps, val_check_interval=3,
            strategy=LTEStrategy(rank=2, heads=2, merge_every=4, **how), callbacks=[Save(folder, [6])], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        data = Samples(dtype=torch.float32)
        run.fit(module, loader(data, 8), DataLoader(data, batch_size=8, generator=torch.Generator()), ckpt_path=ckpt)
        return module

    whole, again = fit(tmp_path, 12), None
    again = fit(tmp_path / "again", 12, tmp_path / "step=6.ckpt")
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, msg=lambda m, n=name: f"{n}: {m}")
