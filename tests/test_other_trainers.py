"""GaLoreAdamW in other people's trainers: HF Trainer, Accelerate, Fabric, a plain loop, Lightning's manual optimization.

Each trains the same model on the same batches, with accumulation, clipping and a resume, and must end with the bits of the
plain loop that is written out here.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lowrank_pretrain import ConfigError, GaLoreAdamW, galore_param_groups

STEPS, ACCUMULATE, CLIP, BATCH = 6, 2, 0.1, 4


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    """Accelerate takes the variables that another test's fit has left for a job of several processes, and wraps in DDP."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "NODE_RANK",
        "GROUP_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


class Net(nn.Module):
    """Takes and gives what HF's Trainer wants: keyword arguments, and the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x, labels=None, **_):
        y = self.head(x + self.fc2(torch.tanh(self.fc1(x))))
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


class Rows(Dataset):
    def __init__(self, n: int = STEPS * ACCUMULATE * BATCH) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(n, 6, generator=draw), torch.randint(3, (n,), generator=draw)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict:
        return {"x": self.x[index], "labels": self.y[index]}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def optimizer_of(model: nn.Module, **kwargs) -> GaLoreAdamW:
    groups = galore_param_groups(model, rank=2, targets=["fc1", "fc2"], update_proj_gap=2, scale=1.0)
    return GaLoreAdamW(groups, lr=1e-2, seed=0, **kwargs)


def micro_batches() -> list[dict]:
    return list(DataLoader(Rows(), batch_size=BATCH))


def plain_loop(clip: bool = True, dtype: torch.dtype | None = None) -> Net:
    """The reference: accumulation by dividing the loss, clipping by the norm, one step."""
    model = net()
    optimizer, batches = optimizer_of(model), micro_batches()
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = model(**batch)["loss"]
            (loss / ACCUMULATE).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model


def assert_same(model: nn.Module, other: nn.Module, **tolerance) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or {"rtol": 0, "atol": 0}))


# -- HF Trainer ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf():
    pytest.importorskip("accelerate", reason="HF's Trainer needs it")
    transformers = pytest.importorskip("transformers")

    def trainer(folder: Path, model: nn.Module, optimizer=None, kind=None, **options):
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), use_cpu=True, per_device_train_batch_size=BATCH, max_steps=STEPS, report_to=[],
            lr_scheduler_type="constant", learning_rate=1e-2, disable_tqdm=True, logging_strategy="no", seed=0,
            **{"gradient_accumulation_steps": ACCUMULATE, "max_grad_norm": CLIP, "save_strategy": "no", **options},
        )  # fmt: skip

        class InOrder(transformers.Trainer):
            """The rows as they come, as in the plain loop."""

            def _get_train_sampler(self, *_):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        how = {"optimizers": (optimizer, None)} if optimizer is not None else {"optimizer_cls_and_kwargs": kind}
        return InOrder(model=model, args=arguments, train_dataset=Rows(), **how)

    return trainer


def test_hf_trainer_equals_the_plain_loop(hf, tmp_path):
    model = net()
    hf(tmp_path, model, optimizer_of(model)).train()
    assert_same(model, plain_loop(), rtol=1e-5, atol=1e-6)


def test_hf_trainer_under_bf16_equals_the_plain_loop_under_autocast(hf, tmp_path):
    model = net()
    hf(tmp_path, model, optimizer_of(model), bf16=True).train()
    assert_same(model, plain_loop(dtype=torch.bfloat16), rtol=1e-4, atol=1e-5)


def test_hf_trainer_makes_it_from_its_class_and_arguments(hf, tmp_path):
    """With the model among the arguments the targets are projected; a rank without it is refused before the first step."""
    arguments = {"rank": 2, "targets": ["fc1", "fc2"], "lr": 1e-2, "update_proj_gap": 2, "scale": 1.0, "seed": 0}
    model = net()
    made = hf(tmp_path, model, kind=(GaLoreAdamW, {"model": model, **arguments}))
    made.train()
    assert [group.get("rank") for group in made.optimizer.optimizer.param_groups] == [2, None, None]
    assert_same(model, plain_loop(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="^rank=2: needs the model"):
        hf(tmp_path, net(), kind=(GaLoreAdamW, dict(arguments))).train()


def test_hf_trainer_resumes_bit_for_bit(hf, tmp_path):
    whole = net()
    hf(tmp_path / "whole", whole, optimizer_of(whole)).train()
    first = net()
    hf(tmp_path / "cut", first, optimizer_of(first), save_strategy="steps", save_steps=3).train()
    again = net()
    hf(tmp_path / "cut", again, optimizer_of(again)).train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert_same(again, whole)


def test_hf_trainer_clips_layerwise_updates_as_normal_ones(hf, tmp_path):
    normal, layerwise = net(), net()
    for index, (model, kind) in enumerate(((normal, {}), (layerwise, {"layerwise": True}))):
        hf(tmp_path / str(index), model, optimizer_of(model, **kind), gradient_accumulation_steps=1).train()
    assert_same(normal, layerwise, rtol=1e-4, atol=1e-5)


# -- Accelerate ---------------------------------------------------------------------------------------------------------


def test_accelerate_equals_the_plain_loop_and_resumes(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def run(folder: Path | None, upto: int, resume: bool = False) -> Net:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
        model = net()
        optimizer = optimizer_of(model)
        model, optimizer = accelerator.prepare(model, optimizer)
        if resume:
            accelerator.load_state(str(folder))
        batches = micro_batches()[(3 * ACCUMULATE if resume else 0) : upto * ACCUMULATE]
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
        if folder is not None and not resume:
            accelerator.save_state(str(folder))
        return accelerator.unwrap_model(model)

    assert_same(run(None, STEPS), plain_loop())
    run(tmp_path / "state", 3)
    assert_same(run(tmp_path / "state", STEPS, resume=True), plain_loop())


# -- Fabric -------------------------------------------------------------------------------------------------------------


def fabric_run(precision: str = "32-true", clip: bool = True, **kwargs) -> Net:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    plain = net()
    model, optimizer = fabric.setup(plain, optimizer_of(plain, **kwargs))
    for index, batch in enumerate(micro_batches()):
        fabric.backward(model(**batch)["loss"] / ACCUMULATE)
        if index % ACCUMULATE == ACCUMULATE - 1:
            if clip:
                fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return plain


def test_fabric_equals_the_plain_loop():
    assert_same(fabric_run(), plain_loop(), rtol=1e-6, atol=1e-7)  # the norm is summed in the optimizer's order


def test_fabric_resumes_bit_for_bit(tmp_path):
    from lightning.fabric import Fabric

    def run(upto: int, start: int = 0) -> Net:
        fabric, plain = Fabric(accelerator="cpu", devices=1), net()
        model, optimizer = fabric.setup(plain, optimizer_of(plain))
        if start:
            fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
        for batch in micro_batches()[start:upto]:
            optimizer.zero_grad()
            fabric.backward(model(**batch)["loss"])
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
        if not start:
            fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
        return plain

    whole = run(6)
    run(3)
    assert_same(run(6, start=3), whole)


def test_fabric_in_bf16_equals_the_plain_loop_under_autocast():
    assert_same(fabric_run("bf16-mixed"), plain_loop(dtype=torch.bfloat16), rtol=1e-3, atol=1e-3)  # bf16 rounds elsewhere


# -- Lightning, by hand -------------------------------------------------------------------------------------------------


class ByHand(pl.LightningModule):
    """Manual optimization, with and without the wrapper that Lightning puts around optimizers."""

    def __init__(self, raw: bool, clip: bool, **kwargs) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.raw, self.clip, self.kwargs = net(), raw, clip, kwargs

    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        self.manual_backward(self.net(**batch)["loss"] / ACCUMULATE)
        if index % ACCUMULATE == ACCUMULATE - 1:
            if self.clip:
                self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return optimizer_of(self.net, **self.kwargs)


def fit(module: pl.LightningModule, folder: Path, **options) -> None:
    pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    ).fit(module, DataLoader(Rows(), batch_size=BATCH))  # fmt: skip


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_manual_optimization_equals_the_plain_loop(tmp_path, raw, precision):
    module = ByHand(raw, clip=True)
    fit(module, tmp_path, precision=precision)
    if precision == "32-true":
        assert_same(module.net, plain_loop(), rtol=1e-6, atol=1e-7)  # the norm is summed in the optimizer's order
    else:
        assert_same(module.net, plain_loop(dtype=torch.bfloat16), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["by hand", "fabric"])
def test_clipping_layerwise_updates_of_several_micro_batches_is_refused(tmp_path, way):
    with pytest.raises((ConfigError, RuntimeError), match="layerwise"):
        if way == "by hand":
            fit(ByHand(raw=False, clip=True, layerwise=True), tmp_path)
        else:
            fabric_run(layerwise=True)


def test_clipping_layerwise_updates_in_a_plain_loop_is_that_of_normal_ones():
    results = []
    for layerwise in (False, True):
        model = net()
        optimizer = optimizer_of(model, layerwise=layerwise)
        for batch in micro_batches():
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        results.append(model)
    assert_same(*results, rtol=1e-4, atol=1e-5)


def test_layerwise_without_clipping_equals_the_normal_step(tmp_path):
    normal, layerwise = ByHand(raw=True, clip=False), ByHand(raw=True, clip=False, layerwise=True)
    for index, module in enumerate((normal, layerwise)):
        fit(module, tmp_path / str(index))
    assert_same(normal.net, layerwise.net, rtol=1e-5, atol=1e-6)
    assert_same(fabric_run(clip=False), fabric_run(clip=False, layerwise=True), rtol=1e-5, atol=1e-6)
