"""Looking at low-rank training: the maths against slow twins, the callbacks on runs of every kind, the figure."""

import csv
import math
import warnings

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lowrank_pretrain import LoRA, PreLoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Merges
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.lora.products import Part
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.observe import spectra
from lowrank_pretrain.observe.rank_analysis import EffectiveRank, HeadOrthogonality, local_heads, present_matrices
from tests.test_resume import assert_equal
from tests.toy import AtEnd, loader, toy, trainer


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- slow twins: the definitions, word for word ---------------------------------------------------------------------------


def slow_effective_rank(matrix: torch.Tensor) -> float:
    values = torch.linalg.svd(matrix.double())[1].tolist()
    total = sum(values)
    return math.exp(-sum(v / total * math.log(v / total) for v in values if v > 0))


def slow_cosine(A1, B1, A2, B2) -> float:
    first, second = (B1 @ A1).flatten(), (B2 @ A2).flatten()
    return float(first @ second / (first.norm() * second.norm()))


def slow_overlap(A1, A2) -> float:
    """Mean cos² of the principal angles: projectors instead of bases."""
    project = [A.T @ torch.linalg.inv(A @ A.T) @ A for A in (A1.double(), A2.double())]
    return float((project[0] @ project[1]).trace() / len(A1))


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 9), (12, 12)])
def test_effective_rank_equals_its_definition(shape):
    M = rand(*shape)
    assert spectra.singular_values(M) == pytest.approx(torch.linalg.svdvals(M.double()), rel=1e-9)
    assert float(spectra.effective_rank(M)) == pytest.approx(slow_effective_rank(M), rel=1e-9)
    assert float(spectra.effective_rank(M.bfloat16())) == pytest.approx(slow_effective_rank(M.bfloat16()), rel=1e-9)


def test_effective_rank_of_known_matrices():
    assert float(spectra.effective_rank(torch.eye(6))) == pytest.approx(6.0)
    assert float(spectra.effective_rank(rand(5, 1) @ rand(1, 8, seed=1))) == pytest.approx(1.0, abs=1e-4)
    assert float(spectra.effective_rank(torch.zeros(3, 4))) == 0.0
    assert math.isnan(spectra.effective_rank(torch.tensor([[1.0, math.inf], [0.0, 1.0]])))
    values = torch.tensor([4.0, 1.0, 0.1, 0.0])
    assert [float(spectra.tolerance_rank(values, tol)) for tol in (0.5, 0.2, 0.01)] == [1, 2, 3]
    assert float(spectra.tolerance_rank(torch.zeros(4), 0.1)) == 0 and spectra.tolerance_rank(values * math.nan, 0.1).isnan()


@pytest.mark.parametrize("dims", [(4, 3, 9, 7), (2, 1, 5, 6), (3, 8, 8, 20)])
def test_cosines_of_updates_equal_those_of_the_products(dims):
    N, R, D, O = dims  # noqa: E741
    A, B = rand(N, R, D), rand(N, O, R, seed=1)
    cosines, overlaps = spectra.update_cosines(A, B), spectra.row_space_overlaps(A)
    for i in range(N):
        for j in range(N):
            assert float(cosines[i, j]) == pytest.approx(slow_cosine(A[i], B[i], A[j], B[j]), abs=1e-5)
            assert float(overlaps[i, j]) == pytest.approx(slow_overlap(A[i], A[j]), abs=1e-5)
            cos = spectra.principal_cosines(A[i], A[j])
            assert float(cos.square().mean()) == pytest.approx(float(overlaps[i, j]), abs=1e-5)
    pairs = [abs(slow_cosine(A[i], B[i], A[j], B[j])) for i in range(N) for j in range(i + 1, N)]
    assert float(spectra.mean_of_pairs(cosines)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_orthogonal_equal_and_empty_heads():
    eye = torch.eye(6)
    A, B = torch.stack([eye[:2], eye[2:4], eye[:2]]), rand(3, 5, 2)
    B[2] = -2 * B[0]
    cosines = spectra.update_cosines(A, B)
    assert float(cosines[0, 1]) == pytest.approx(0.0, abs=1e-6) and float(cosines[0, 2]) == pytest.approx(-1.0, abs=1e-6)
    assert spectra.principal_cosines(A[0], A[2]) == pytest.approx(torch.ones(2), abs=1e-6)
    assert spectra.principal_cosines(A[0], A[1]) == pytest.approx(torch.zeros(2), abs=1e-6)
    B[1] = 0  # a head that has not learned yet has no direction
    assert float(spectra.mean_of_pairs(spectra.update_cosines(A, B))) == pytest.approx(1.0, abs=1e-6)
    assert spectra.mean_of_pairs(spectra.update_cosines(A, B * 0)).isnan()


# -- runs ---------------------------------------------------------------------------------------------------------------


def fit(path, *callbacks, module=None, ckpt=None, **kwargs):
    """(trainer, module, rows of metrics.csv by step)."""
    module = toy() if module is None else module
    kwargs = {"max_epochs": 2, "limit_val_batches": 1, "num_sanity_val_steps": 1, **kwargs}
    made = trainer(path, *callbacks, logger=CSVLogger(path, name="", version=""), log_every_n_steps=1, **kwargs)
    made.fit(module, loader(), loader(), ckpt_path=ckpt)
    file = path / "metrics.csv"
    rows = list(csv.DictReader(file.open())) if file.exists() else []
    return made, module, rows


def column(rows, key) -> dict[int, float]:
    return {int(row["step"]): float(row[key]) for row in rows if row.get(key)}


def test_full_training_logs_gradients_and_update(tmp_path):
    module = toy()
    start = {name: t.matrix().detach().clone() for name, t in find_targets(module, "all").items()}
    grads = {}
    module.on_before_optimizer_step = lambda optimizer: grads.update(
        {module.global_step: {n: t.rows_of_grad().clone() for n, t in find_targets(module, "all").items()}}
    )
    _, module, rows = fit(tmp_path, EffectiveRank(every=4, tol=0.3), module=module)
    gradient, update = column(rows, "lte/effective_rank/gradient"), column(rows, "lte/effective_rank/update")
    assert list(gradient) == [3, 7, 11] and list(update) == [5, 11]
    for step, value in gradient.items():
        twins = {n: slow_effective_rank(g) for n, g in grads[step].items()}
        assert value == pytest.approx(sum(twins.values()) / len(twins), rel=1e-5)
        q = [v for n, v in twins.items() if n.endswith("qkv.q")]
        assert column(rows, "lte/effective_rank/gradient/blocks.*.qkv.q")[step] == pytest.approx(sum(q) / 2, rel=1e-5)
    moved = [t.matrix().detach().double() - start[n].double() for n, t in find_targets(module, "all").items()]
    assert update[11] == pytest.approx(sum(map(slow_effective_rank, moved)) / len(moved), rel=1e-5)
    ranks = [int((torch.linalg.svdvals(m) > 0.3 * torch.linalg.svdvals(m)[0]).sum()) for m in moved]
    assert column(rows, "lte/rank/update")[11] == pytest.approx(sum(ranks) / len(ranks))


def test_under_adapters_the_update_is_theirs_and_the_gradient_is_said_to_be_missing(tmp_path):
    updates, present = [], set()

    def measure(_, module):
        for layer in (m for m in module.modules() if hasattr(m, "lora_A")):
            for p in layer._parts:
                updates.append((p.scale * layer.lora_B[p.name] @ layer.lora_A[p.a : p.a + p.rank]).detach())
        present.update(dict(present_matrices(find_targets(module, "all", warn=False, frozen=True))))

    with pytest.warns(UserWarning, match="W is frozen and has no gradient") as said:
        _, module, rows = fit(tmp_path, LoRA(rank=2), EffectiveRank(every=1), AtEnd(measure))
    assert sum("W is frozen" in str(w.message) for w in said) == 1
    assert not any("gradient" in key for key in rows[0])
    wanted = sum(slow_effective_rank(m.detach()) for m in updates) / len(updates)
    assert column(rows, "lte/effective_rank/update")[11] == pytest.approx(wanted, rel=1e-3)
    assert column(rows, "lte/rank/update")[11] <= 2.0
    assert present == find_targets(module, "all").keys()


def test_it_follows_prelora_through_its_phases(tmp_path):
    compared = []

    def compare(_, module):
        targets = find_targets(module, "all", warn=False, frozen=True)
        merged = dict(present_matrices(targets))
        for name, target in targets.items():
            layer = target.layer
            part = next(p for p in layer._parts if p.name == target.part)
            delta = part.scale * layer.lora_B[part.name] @ layer.lora_A[part.a : part.a + part.rank]
            assert torch.allclose(merged[name], target.matrix() + delta, atol=1e-6), name
            compared.append(name)

    phases = PreLoRA(ranks=(2,), window=2, window_unit="step", windows=2, latest=2, warmup=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, module, rows = fit(tmp_path, phases, EffectiveRank(every=2), AtEnd(compare))
    assert phases.phase == "lowrank"
    assert list(column(rows, "lte/effective_rank/gradient")) == [1, 3, 5, 7]
    assert list(column(rows, "lte/effective_rank/update")) == [5, 11]
    assert len(compared) == len(find_targets(module, "all"))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_looking_changes_no_bit_and_draws_nothing(tmp_path, method):
    def run(path, *watch):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, module, _ = fit(path, *([LoRA(rank=2)] if method == "lora" else []), *watch, module=toy(scheduler="cosine"))
        return dict(module.state_dict()), made.optimizers[0].state_dict(), module.losses, torch.get_rng_state()

    plain = run(tmp_path / "a")
    assert_equal(plain, run(tmp_path / "b", EffectiveRank(every=1), HeadOrthogonality(every=1)))


def test_a_resumed_run_counts_from_the_same_start(tmp_path):
    _, _, whole = fit(tmp_path / "a", EffectiveRank(every=4), every=5)
    ckpt = tmp_path / "a" / "step=5.ckpt"
    held = torch.load(ckpt, weights_only=True)["callbacks"]["EffectiveRank"]["start"]
    assert all(t.device.type == "cpu" for t in held.values()) and held.keys() == find_targets(toy(), "all").keys()
    _, _, resumed = fit(tmp_path / "b", EffectiveRank(every=4), ckpt=ckpt)
    for key in ("lte/effective_rank/update", "lte/effective_rank/gradient", "lte/rank/update/blocks.*.fc1"):
        late = {step: value for step, value in column(whole, key).items() if step >= 5}
        assert late and column(resumed, key) == late
    with pytest.raises(ConfigError, match="targets='mlp': the checkpoint holds the start of other matrices"):
        fit(tmp_path / "c", EffectiveRank("mlp"), ckpt=ckpt)


def test_accumulation_looks_once_per_optimizer_step(tmp_path):
    _, _, rows = fit(tmp_path, EffectiveRank(every=2), accumulate_grad_batches=2)
    assert list(column(rows, "lte/effective_rank/gradient")) == [1, 3, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EffectiveRank(every=0), "every=0: must be 1 or more optimizer steps"),
        (lambda: EffectiveRank(tol=1.0), "tol=1.0: must be a share"),
        (lambda: HeadOrthogonality(every=None), "every=None: must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_pattern_without_a_match_stops_the_run(tmp_path):
    with pytest.raises(ConfigError, match="targets='nothing'"):
        fit(tmp_path, EffectiveRank("nothing"))


# -- heads --------------------------------------------------------------------------------------------------------------


class Headed(nn.Linear):
    """What a layer with heads looks like from outside: lora_A (H, ΣR, D), lora_B[part] (H, O_part, R_part), _parts."""

    def __init__(self, d: int, o: int, parts: tuple[Part, ...], heads: int, seed: int) -> None:
        super().__init__(d, o)
        self._parts = parts
        self.lora_A = nn.Parameter(rand(heads, sum(p.rank for p in parts), d, seed=seed))
        self.lora_B = nn.ParameterDict({p.name: rand(heads, p.rows, p.rank, seed=seed + i + 1) for i, p in enumerate(parts)})


def headed(heads: int = 3):
    """The toy with heads on its fused and one plain layer; they get gradients from a penalty, so that they move."""
    module = toy()
    for i, block in enumerate(module.blocks):
        parts = (Part("q", 0, 16, 0, 2, 1.0), Part("v", 32, 16, 2, 3, 0.5))
        block.qkv = Headed(16, 48, parts, heads, seed=10 * i)
        block.fc1 = Headed(16, 32, (Part("W", 0, 32, 0, 4, 2.0),), heads, seed=10 * i + 5)
    return module


def expected(module) -> tuple[dict[str, float], dict[str, float]]:
    cosines, overlaps = {}, {}
    for i, block in enumerate(module.blocks):
        for name, layer in (("qkv", block.qkv), ("fc1", block.fc1)):
            for p in layer._parts:
                A, B = layer.lora_A.detach()[:, p.a : p.a + p.rank], layer.lora_B[p.name].detach()
                key = f"blocks.{i}.{name}" + ("" if p.name == "W" else f".{p.name}")
                pairs = [(a, b) for a in range(len(A)) for b in range(a + 1, len(A))]
                cosines[key] = sum(abs(slow_cosine(A[a], B[a], A[b], B[b])) for a, b in pairs) / len(pairs)
                overlaps[key] = sum(slow_overlap(A[a], A[b]) for a, b in pairs) / len(pairs)
    return cosines, overlaps


def test_orthogonality_of_a_modules_heads(tmp_path):
    module = headed()
    cosines, overlaps = expected(module)
    _, _, rows = fit(tmp_path, HeadOrthogonality(every=5), module=module)
    logged = column(rows, "lte/orthogonality")
    assert list(logged) == [4, 9]
    assert logged[4] == pytest.approx(sum(cosines.values()) / len(cosines), rel=1e-4)
    assert column(rows, "lte/row_space_overlap")[4] == pytest.approx(sum(overlaps.values()) / len(overlaps), rel=1e-4)
    family = [v for k, v in cosines.items() if k.endswith("qkv.v")]
    assert column(rows, "lte/orthogonality/blocks.*.qkv.v")[4] == pytest.approx(sum(family) / 2, rel=1e-4)
    assert len([key for key in rows[0] if key.startswith("lte/orthogonality/")]) == 3


def test_heads_of_all_workers_come_from_the_strategy(tmp_path):
    module, whole = headed(heads=1), headed(heads=4)
    made = trainer(tmp_path, HeadOrthogonality(every=3), max_epochs=1, logger=CSVLogger(tmp_path, name="", version=""))
    every_head = {"all_heads": lambda _: local_heads(whole)}
    made.strategy.__class__ = type("Merging", (SingleDeviceStrategy, Merges), every_head)
    made.fit(module, loader())
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    cosines, _ = expected(whole)
    assert column(rows, "lte/orthogonality")[2] == pytest.approx(sum(cosines.values()) / len(cosines), rel=1e-4)


def test_one_head_is_said_once_and_zero_heads_log_only_their_row_spaces(tmp_path):
    with pytest.warns(UserWarning, match="no target has two heads") as said:
        fit(tmp_path / "a", HeadOrthogonality(every=2))
    assert sum("two heads" in str(w.message) for w in said) == 1
    module = headed()
    for block in module.blocks:
        for layer in (block.qkv, block.fc1):
            for B in layer.lora_B.values():
                B.data.zero_()
    _, _, rows = fit(tmp_path / "b", HeadOrthogonality(every=2), module=module)
    assert column(rows, "lte/row_space_overlap") and "lte/orthogonality" not in rows[0]


# -- under LTE ----------------------------------------------------------------------------------------------------------


def test_lte_is_looked_at_as_the_merged_model_in_the_middle_of_a_window(tmp_path):
    module = toy()
    start = {name: t.matrix().detach().clone() for name, t in find_targets(module, "all").items()}
    strategy = LTEStrategy(rank=2, heads=3, merge_every=4)
    with pytest.warns(UserWarning, match="W is frozen and has no gradient"):
        callbacks = EffectiveRank(every=5), HeadOrthogonality(every=5)
        _, module, rows = fit(tmp_path, *callbacks, module=module, strategy=strategy, max_epochs=3)
    # steps 6, 12, 18: two steps behind a merge, at one, and at the end, where the module is the merged model
    update = column(rows, "lte/effective_rank/update")
    moved = {n: t.matrix().detach().double() - start[n].double() for n, t in find_targets(module, "all").items()}
    assert list(update) == [5, 11, 17]
    assert update[17] == pytest.approx(sum(map(slow_effective_rank, moved.values())) / len(moved), rel=1e-5)
    assert all(0 < value <= 6 for value in column(rows, "lte/rank/update").values())  # N R
    orthogonality, overlap = column(rows, "lte/orthogonality"), column(rows, "lte/row_space_overlap")
    assert list(orthogonality) == [4, 9, 14] == list(overlap)
    assert all(0 < value < 0.9 for value in (*orthogonality.values(), *overlap.values()))


@pytest.mark.parametrize("settings", [{}, {"reset": True}], ids=["live on", "reset"])
def test_looking_at_lte_changes_no_bit(tmp_path, settings):
    def run(path, *watch):
        strategy = LTEStrategy(rank=2, heads=2, merge_every=5, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, module, rows = fit(path, *watch, strategy=strategy)
        return dict(module.state_dict()), module.losses, torch.get_rng_state(), rows

    plain, watched = run(tmp_path / "a"), run(tmp_path / "b", EffectiveRank(every=1), HeadOrthogonality(every=5))
    assert_equal(plain[:3], watched[:3])
    # looked at in the step that merges, before it resets them
    assert list(column(watched[3], "lte/orthogonality")) == [4, 9]
