"""Training gone wrong: numbers that are none, losses that shoot up, loaders that hang, ranks that drift apart."""

import re
import time

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lowrank_pretrain import GaLoreAdamW, LoRA, LTEStrategy, PreLoRA, galore_param_groups
from lowrank_pretrain.core.agreement import Disagreement
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.loaders.batch import Fetched
from lowrank_pretrain.data.loaders.epoch import EpochBatches, EpochLoader
from lowrank_pretrain.guards import stall
from lowrank_pretrain.guards.divergence import DivergenceGuard
from lowrank_pretrain.guards.finite import Diverged
from lowrank_pretrain.guards.ranks import RanksAgree
from lowrank_pretrain.guards.stall import Stalled, StallGuard
from lowrank_pretrain.run import failures
from tests.conftest import SHORT, TINY, VIT
from tests.test_train import rows
from tests.toy import Pairs, Toy, loader, trainer

BATCHES = 24  # in the one epoch of the toy's runs


class Plain(Toy):
    """Without dropout, so that nothing depends on a batch's number; with GaLoreAdamW if asked for."""

    def __init__(self, galore: bool = False, lr: float = 1e-2):
        super().__init__(lr=lr)
        self.save_hyperparameters()
        for block in self.blocks:
            block.drop.p = 0.0

    def configure_optimizers(self):
        if not self.hparams.galore:
            return super().configure_optimizers()
        return GaLoreAdamW(galore_param_groups(self, rank=4, update_proj_gap=5), lr=self.hparams.lr)


class Spoiled(Pairs):
    """Batches that hold NaN, by their number in the epoch's order; ``lacking`` leaves them out instead."""

    def __init__(self, order: list[list[int]], bad: set[int]) -> None:
        super().__init__(8 * BATCHES)
        self.bad = {tuple(order[number]) for number in bad}
        self.seen: list[tuple[int, ...]] = []

    def fetch(self, epoch: int, indices: list[int]) -> Fetched:
        self.seen.append(tuple(indices))
        (x, y), _, _ = super().fetch(epoch, indices)
        return Fetched((x * float("nan") if tuple(indices) in self.bad else x, y), [])


class Lacking(EpochBatches):
    """The epoch's batches without some."""

    def __init__(self, *args, without: set[int] = frozenset(), **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.without = without

    def __len__(self) -> int:
        return self.batches - len(self.without)

    def __iter__(self):
        for number, item in enumerate(super().__iter__(), self.start):
            if number not in self.without:
                yield item


def data(bad: set[int] = frozenset(), without: set[int] = frozenset()) -> EpochLoader:
    batches = Lacking(8 * BATCHES, 8, shuffle=True, seed=0, without=without)
    order = [indices for _, indices in EpochBatches(8 * BATCHES, 8, shuffle=True, seed=0)]
    return EpochLoader(Spoiled(order, bad), batches)


def prelora() -> PreLoRA:
    # the switch behind step 8, the freeze behind step 12
    settings = {"ranks": (2, 4), "window": 4, "window_unit": "step", "windows": 2, "latest": 2, "warmup": 1, "loss_tol": 1e-6}
    return PreLoRA(**settings)


METHODS = {
    "full": lambda: (Plain(), [], {}),
    "prelora": lambda: (Plain(), [prelora()], {}),
    "lora": lambda: (Plain(), [LoRA(rank=4)], {}),
    "galore": lambda: (Plain(galore=True), [], {}),
    "lte": lambda: (Plain(), [], {"strategy": LTEStrategy(rank=4, heads=2, merge_every=3)}),
}


def fit(tmp_path, method: str, stream: EpochLoader, guard: DivergenceGuard | None = None, every: int = 3):
    torch.manual_seed(7)
    module, callbacks, options = METHODS[method]()
    guard = guard or DivergenceGuard()
    fitting = trainer(tmp_path, guard, *callbacks, every=every, max_epochs=1, **options)
    guard.fit(fitting, module, stream)
    return module, guard, fitting


# checkpoints are written behind every third step; so the batches from 3 * (k // 3) on are left out with batch k
CASES = [
    ("full", {10}), ("full", {4, 10}), ("full", {9}), ("galore", {10}), ("lora", {10}),
    ("lte", {10}),  # between two merges, with heads' moments under way
    ("prelora", {4}),  # in phase full
    ("prelora", {8}),  # the first batch of the joint phase, back to the full one across the switch
    ("prelora", {10}),  # joint
    ("prelora", {13}),  # lowrank, back to joint across the freeze
    ("prelora", {19}),  # lowrank
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "bad"), CASES)
def test_a_rewound_run_equals_one_whose_data_lacks_the_batches(tmp_path, method, bad):
    left_out, steps, kept = set(), 0, []
    for number in range(BATCHES):  # what is seen: steps count what was trained on
        if number in bad:
            back = steps // 3 * 3
            left_out |= {number, *kept[back:]}
            steps, kept = back, kept[:back]
        else:
            kept = [*kept, number]
            steps += 1
    module, guard, fitting = fit(tmp_path / "a", method, data(bad), DivergenceGuard("rewind"))
    other, _, reference = fit(tmp_path / "b", method, data(without=left_out))
    assert (guard.rewinds, guard.skipped) == (len(bad), len(left_out))
    assert fitting.global_step == reference.global_step == BATCHES - len(left_out)
    state, expected = module.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.isfinite(tensor).all() and torch.equal(tensor, expected[name]), name


@pytest.mark.filterwarnings("ignore")
def test_the_last_rewind_is_the_last(tmp_path, capsys):
    with pytest.raises(Diverged, match="train/loss is not finite at step"):
        fit(tmp_path, "full", data({4, 8, 12}), DivergenceGuard("rewind", max_rewinds=2))
    out = capsys.readouterr().out
    assert re.findall(r"rewind (\d) of at most 2: back to .*ckpt after step (\d+), (\d) batches left out", out) == [
        ("1", "3", "2"), ("2", "6", "1"),
    ]  # fmt: skip


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    with pytest.raises(Diverged):
        fit(tmp_path, "full", data({1}), DivergenceGuard("rewind"))


def test_what_cannot_be_rewound_is_refused(tmp_path):
    plain = torch.utils.data.DataLoader([(torch.randn(12), 0) for _ in range(16)], batch_size=8)
    with pytest.raises(ConfigError, match="on_divergence='rewind': needs a training loader that can resume.*DataLoader"):
        fit(tmp_path, "full", plain, DivergenceGuard("rewind"))
    for wrong in ({"on_divergence": "go on"}, {"max_rewinds": -1}, {"max_rewinds": True}, {"loss_spike": 1}, {"patience": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DivergenceGuard(**wrong)


class NaNGradient(Plain):
    """A finite loss whose gradient is NaN at one step: the root of a zero that depends on a weight."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step == 5:
            bias = self.blocks[1].fc2.bias
            loss = loss + (bias - bias).sum().abs().sqrt()
        return loss


def test_a_gradient_that_is_no_number_is_named_before_its_loss_shows_it(tmp_path):
    with pytest.raises(Diverged) as found:
        trainer(tmp_path, DivergenceGuard(), max_epochs=1).fit(NaNGradient(), data())
    assert (found.value.what, found.value.step) == ("the gradient of blocks.1.fc2.bias", 6)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_is_looked_at_between_optimizer_steps(tmp_path, accumulate):
    with pytest.raises(Diverged) as found:
        trainer(tmp_path, DivergenceGuard(), max_epochs=1, accumulate_grad_batches=accumulate).fit(Plain(), data({10}))
    assert (found.value.what, found.value.step) == ("train/loss", 10 // accumulate + 1)


@pytest.mark.filterwarnings("ignore")
def test_a_rewind_with_accumulation_goes_on_with_a_whole_step(tmp_path):
    guard, module = DivergenceGuard("rewind"), Plain()
    fitting = trainer(tmp_path, guard, every=2, max_epochs=1, accumulate_grad_batches=3)
    guard.fit(fitting, module, data({13}))  # in step 5, back to step 4: batches 12 to 14 are left out
    assert (guard.skipped, fitting.global_step) == (3, 7)
    assert all(torch.isfinite(t).all() for t in module.state_dict().values())


class Loud(Plain):
    """The loss is a hundredfold from step 60 on, for `length` steps."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def training_step(self, batch, batch_idx):
        loud = 60 <= self.trainer.global_step < 60 + self.length
        return super().training_step(batch, batch_idx) * (100 if loud else 1)


@pytest.mark.parametrize(("length", "spike", "ends"), [(3, 10, False), (8, 10, True), (8, None, False), (8, 10_000, False)])
def test_a_loss_that_shoots_up_and_stays_there_ends_the_run_if_asked_to(tmp_path, length, spike, ends):
    module, guard = Loud(length), DivergenceGuard(loss_spike=spike)
    run = trainer(tmp_path, guard, max_epochs=4)
    if not ends:
        return run.fit(module, data())
    with pytest.raises(Diverged, match="train/loss began to exceed 10 times its running mean at step 61"):
        run.fit(module, data())
    assert run.global_step == 65  # five in a row


# -- on the command line -------------------------------------------------------------------------------------------------


class BadBatch(Callback):
    """Fills one batch's images with NaN; notes what is seen where, by the sum of the pixels."""

    seen: set[tuple[int, int, float]] = set()

    def __init__(self, epoch: int, batch: int) -> None:
        self.place = (epoch, batch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.add((trainer.current_epoch, batch_idx, round(batch[0].double().sum().item(), 3)))
        if (trainer.current_epoch, batch_idx) == self.place:
            batch[0].fill_(float("nan"))


def bad(epoch: int, batch: int) -> str:
    return f"+trainer.callbacks=[{{_target_: tests.test_divergence.BadBatch, epoch: {epoch}, batch: {batch}}}]"


# three epochs of four steps; checkpoints at epochs' ends, or behind every step
@pytest.mark.parametrize(("epoch", "batch", "every", "left_out"), [(1, 2, 0, 3), (1, 2, 1, 1), (1, 3, 0, 4), (2, 0, 0, 1)])
def test_a_run_rewinds_and_ends_well(run, capsys, epoch, batch, every, left_out):
    BadBatch.seen.clear()
    directory, summary = run("run", bad(epoch, batch), "on_divergence=rewind", f"save_every={every}")
    assert len(BadBatch.seen) == len({pixels for *_, pixels in BadBatch.seen}) == 12, "a batch was seen twice, or another one"
    assert f"rewind 1 of at most 3: back to last.ckpt after step {4 * epoch + batch - left_out + 1}, {left_out} batch" in (
        capsys.readouterr().out
    )
    assert sum(phase["steps"] for phase in summary["phases"]) == 12 - left_out
    last = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(t).all() for t in last["state_dict"].values())
    assert (last["epoch"], last["global_step"]) == (2, 12 - left_out)
    assert [int(row["step"]) for row in rows(directory) if "train/loss" in row] == [*range(12 - left_out)]
    logged = [row["divergence/skipped_batches"] for row in rows(directory) if "divergence/skipped_batches" in row]
    assert logged and set(logged) == {str(float(left_out))}


@pytest.mark.parametrize(
    "method", ["method=full", "method=galore", "method=lte method.rank=4 method.heads=2 method.merge_every=3"]
)
def test_every_kind_of_method_rewinds(run, method):
    """Crossing nothing but steps; the switch and the freeze are PreLoRA's, above."""
    directory, summary = run("run", bad(1, 2), "on_divergence=rewind", "save_every=1", *method.split(), base=[*SHORT, *VIT])
    assert sum(phase["steps"] for phase in summary["phases"]) == 11
    state = load_file(directory / "export" / "model.safetensors")
    assert all(torch.isfinite(t).all() for t in state.values())


def test_a_run_that_is_told_to_stop_names_the_last_good_checkpoint(run, composed, tmp_path):
    with pytest.raises(Diverged) as ended:
        run("run", bad(1, 2))
    line, code = failures.describe(ended.value, composed(*TINY), tmp_path / "run")
    assert code == 1 and "is not finite at step 7; the last good checkpoint is" in line and "on_divergence=rewind" in line


def test_galores_own_guard_is_the_same_kind_of_line(composed, tmp_path):
    line, code = failures.describe(
        FloatingPointError("the gradient of w is not finite; nothing\nwas applied"), composed(), tmp_path
    )
    assert code == 1 and line.startswith("error: the gradient of w is not finite; nothing was applied; no checkpoint")


# -- loaders that hang ---------------------------------------------------------------------------------------------------


class Sleepy(Pairs):
    """Hands out so many batches, and then nothing for a minute."""

    def __init__(self, batches: int) -> None:
        super().__init__(48)
        self.left = batches

    def fetch(self, epoch: int, indices: list[int]) -> Fetched:
        self.left -= 1
        if self.left < 0:
            try:
                time.sleep(60)
            except Exception:  # readers that forgive everything
                pass
        return super().fetch(epoch, indices)


def sleepy(batches: int, workers: int = 0) -> EpochLoader:
    return EpochLoader(Sleepy(batches), EpochBatches(48, 8, shuffle=False, seed=0), workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_loader_that_hangs_ends_the_run(tmp_path, composed, workers):
    began = time.monotonic()
    stream = sleepy(3, workers)
    with pytest.raises(Stalled) as found:
        trainer(tmp_path, StallGuard(0.4), max_epochs=1).fit(Plain(), stream)
    stream.close()
    assert time.monotonic() - began < 20
    line, code = failures.describe(found.value, composed(), tmp_path)
    assert code == 1 and line.startswith("error: the training loader has handed out nothing for 0.4 s"), line
    assert ("test_divergence.py" in line and "in fetch" in line) if workers == 0 else "dataloader" in line


def test_a_validation_loader_that_hangs_ends_the_run(tmp_path):
    with pytest.raises(Stalled, match="the validation loader"):
        trainer(tmp_path, StallGuard(0.4), max_epochs=1, limit_val_batches=3, num_sanity_val_steps=0).fit(
            Plain(), sleepy(9), sleepy(1)
        )


class Slow(Callback):
    """Steps, validation and checkpoints that take longer than a loader may."""

    def on_train_batch_start(self, trainer, *args):
        time.sleep(0.3 * (trainer.global_step == 1))

    def on_validation_epoch_end(self, *args):
        time.sleep(0.3)

    def on_save_checkpoint(self, *args):
        time.sleep(0.3)


def test_what_is_slow_but_no_loader_is_no_stall(tmp_path):
    import signal
    import threading

    handler = signal.getsignal(signal.SIGALRM)
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1)
    run = trainer(tmp_path, StallGuard(0.2), Slow(), saver, max_epochs=2, limit_val_batches=1, limit_train_batches=3)
    run.fit(Plain(), loader(), loader())
    assert run.global_step == 6
    assert signal.getsignal(signal.SIGALRM) is handler
    assert not any(thread.name == "stall guard" for thread in threading.enumerate())


HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end",
    "on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end", "on_save_checkpoint", "on_before_zero_grad", "on_after_backward",
)  # fmt: skip


@pytest.mark.parametrize("later", [True, False])
def test_no_hook_of_a_user_is_a_loader_that_hangs(tmp_path, later):
    """Of a callback before or after the guard, and of the module, whose hooks come last."""

    def slowly(*_):
        time.sleep(0.12)

    class Module(Plain):
        pass

    class Hooks(Callback):
        pass

    for hook in HOOKS:
        setattr(Hooks, hook, slowly)
        setattr(Module, hook, slowly)
    callbacks = [StallGuard(0.1), Hooks()]
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1)
    run = trainer(tmp_path, *callbacks[:: 1 if later else -1], saver, max_epochs=2, limit_val_batches=1, limit_train_batches=1)
    profiler = run.profiler
    run.fit(Module(), loader(), loader())
    assert run.global_step == 2 and "start" not in vars(profiler) and "stop" not in vars(profiler)


@pytest.mark.parametrize(("pauses", "ends"), [([5.0] * 4 + [86400.0] + [5.0] * 4, False), ([5.0] * 400, True)])
def test_a_process_that_was_stopped_for_a_day_has_not_waited_for_its_loader(monkeypatch, pauses, ends):
    """By SIGSTOP, say, as clusters suspend jobs: the clock went on."""
    guard, sent, now = StallGuard(1800.0), [], [0.0]

    class Over:
        def wait(self, pause: float) -> bool:
            if sent or not pauses:
                return True
            now[0] += pauses.pop()
            return False

    monkeypatch.setattr(stall.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stall.signal, "pthread_kill", lambda *_: sent.append(now[0]))
    guard._over, guard._waiting = Over(), ("the training loader", 0.0)
    guard._watch(0)
    assert bool(sent) == ends


@pytest.mark.parametrize("wrong", [0, -1, "soon", True, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match="stall_timeout"):
        StallGuard(wrong)


# -- ranks ---------------------------------------------------------------------------------------------------------------


class Drift(Callback):
    """Rank 1 goes its own way at step 3: a bit of one weight, or a gradient that is no number."""

    def __init__(self, nan: bool) -> None:
        self.nan = nan

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            weight = pl_module.head.weight.data
            weight[0, 0] = float("nan") if self.nan else weight[0, 0] * (1 + 2**-20)


def drifting(tmp_path, nan: bool, lte: bool):
    strategy = LTEStrategy(rank=4, heads=1, merge_every=50, targets=["fc1"]) if lte else "ddp"
    guards = [Drift(nan), DivergenceGuard(), RanksAgree(2)]
    run = trainer(tmp_path, *guards, max_epochs=1, devices=2, strategy=strategy, log_every_n_steps=2)
    try:
        run.fit(Plain(), torch.utils.data.DataLoader([(torch.randn(12), i % 3) for i in range(160)], batch_size=8))
    except (Disagreement, Diverged) as error:
        return type(error).__name__, str(error)
    return "ended well", ""


@pytest.mark.parametrize("lte", [False, True])
def test_a_rank_that_drifts_is_named_on_all_ranks(ranks, tmp_path, lte):
    for kind, line in ranks(2, drifting, tmp_path, False, lte):
        assert kind == "Disagreement" and "head.weight on rank 1" in line and "step 4" in line


def test_a_number_that_is_none_on_one_rank_ends_all(ranks, tmp_path):
    found = ranks(2, drifting, tmp_path, True, False)
    assert {kind for kind, _ in found} == {"Diverged"}


def test_two_processes_are_not_rewound(ranks, tmp_path):
    for line in ranks(2, refused, tmp_path):
        assert "on_divergence='rewind': must be stop on 2 processes" in line


def refused(tmp_path):
    try:
        trainer(tmp_path, DivergenceGuard("rewind"), max_epochs=1, devices=2, strategy="ddp").fit(Plain(), loader())
    except ConfigError as error:
        return str(error)
    return "accepted"
