"""How good the default refresh is, on gradients of a model that really trains (a small LLaMA on the King James text)."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.text.bins import open_bin
from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups, subspace

RANK, GAP, STEPS = 24, 40, 200


@pytest.fixture(scope="module")
def trained():
    """Share of a full SVD's captured energy at every refresh after the first, by matrix; overlaps; first and last loss."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=2048, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3, use_cache=False
        )  # fmt: skip
    )
    tokens = torch.from_numpy(open_bin(SAMPLES / "kjv_train.bin")[0].astype(np.int64))
    optimizer = GaLoreAdamW(galore_param_groups(model, RANK, update_proj_gap=GAP), lr=1e-2)
    matrices = optimizer.param_groups[0]["params"]
    draw = torch.Generator().manual_seed(0)
    shares, overlaps, losses = {i: [] for i in range(len(matrices))}, [], []
    for step in range(STEPS):
        start = torch.randint(len(tokens) - 64, (8, 1), generator=draw)
        batch = tokens[start + torch.arange(64)]
        logits = model(input_ids=batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        before = [optimizer.state[p]["proj"].clone() if optimizer.state[p] else None for p in matrices]
        optimizer.step()
        for i, (p, old) in enumerate(zip(matrices, before, strict=True)):
            new = optimizer.state[p]["proj"]
            if step and not torch.equal(old, new):
                grad = optimizer.projected(p).matrix(p.grad)
                energy = torch.linalg.svdvals(grad).square()
                best = energy[:RANK].sum() / energy.sum()
                shares[i].append((subspace.captured(grad, new) / best).item())
                overlaps.append(optimizer.metrics()["galore/overlap"])
    return shares, overlaps, losses


def test_default_refresh_captures_what_a_full_svd_captures(trained):
    shares, _, _ = trained
    assert all(len(each) == STEPS // GAP or len(each) == STEPS // GAP - 1 for each in shares.values())
    means = [sum(each) / len(each) for each in shares.values()]
    print(f"captured, of a full SVD's: mean {sum(means) / len(means):.4f}, least {min(min(e) for e in shares.values()):.4f}")
    assert sum(means) / len(means) >= 0.98
    assert min(min(each) for each in shares.values()) >= 0.94


def test_bases_move_but_are_not_redrawn(trained):
    _, overlaps, losses = trained
    chance = RANK / 96
    print(f"overlap of successive bases: {sum(overlaps) / len(overlaps):.3f} (two random ones: {chance:.2f})")
    assert chance + 0.1 < sum(overlaps) / len(overlaps) < 0.95
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_cold_start_captures_nearly_all():
    g = torch.Generator().manual_seed(0)
    for decay in (0.5, 1.0):
        spectrum = torch.arange(1, 97.0) ** -decay
        u, v = (torch.linalg.qr(torch.randn(n, 96, generator=g))[0] for n in (96, 256))
        grad = u @ torch.diag(spectrum) @ v.T
        best = spectrum[:RANK].square().sum() / spectrum.square().sum()
        assert subspace.captured(grad, subspace.range_finder(grad, RANK, g)) > 0.985 * best
