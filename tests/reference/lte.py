"""LTE as the paper's algorithm 1 writes it (arXiv 2402.16828): N heads, each with a model of its own weights, in one loop.

Head n computes with W + s(BₙAₙ − B'ₙA'ₙ), W what the last merge made and B'ₙA'ₙ what it took from this head.
Without reset W = W₀ + (s/N) Σ BₙAₙ at every merge. The rest is one set of parameters, its gradient the heads' mean.
"""

import torch
from torch.func import functional_call


def lte(
    module, targets, batches, loss_of, optimizer_of, factors, every, scale=1.0, reset=False, redraw=None, overlap=0, outer=None
):
    """Train and return the merged parameters.

    targets: parameter names of the W's. batches: per step a list of N batches. loss_of(f, batch) -> mean loss, f(x) the model.
    optimizer_of(list of parameters) -> Optimizer. factors: {target: (A (N,R,D), B (N,O,R))}. redraw(target, head, merges) -> A.
    outer: (lr, momentum) of torch's SGD with Nesterov, which steps W by the heads' mean gain since the last merge.
    """
    plain = {name: p.detach().clone() for name, p in module.named_parameters()}
    rest = {name: p.requires_grad_() for name, p in plain.items() if name not in targets}
    W0 = {name: plain[name].clone() for name in targets}
    W = {name: plain[name].clone() for name in targets}
    N = len(batches[0])
    A = {t: [factors[t][0][n].clone().requires_grad_() for n in range(N)] for t in targets}
    B = {t: [factors[t][1][n].clone().requires_grad_() for n in range(N)] for t in targets}
    prev = {t: [torch.zeros_like(W[t]) for _ in range(N)] for t in targets}
    optimizers = [optimizer_of([*(A[t][n] for t in targets), *(B[t][n] for t in targets)]) for n in range(N)]
    rest_optimizer = optimizer_of(list(rest.values()))
    merges, pending = 0, {}
    steps = torch.optim.SGD(list(W.values()), lr=outer[0], momentum=outer[1], nesterov=outer[1] > 0) if outer else None
    for step, of_heads in enumerate(batches, 1):
        grads = [torch.zeros_like(p) for p in rest.values()]
        for n, batch in enumerate(of_heads):
            used = {t: W[t] + scale * B[t][n] @ A[t][n] - prev[t][n] for t in targets}
            loss = loss_of(lambda x, used=used: functional_call(module, {**rest, **used}, (x,)), batch)
            mine = [*(A[t][n] for t in targets), *(B[t][n] for t in targets)]
            found = torch.autograd.grad(loss, [*mine, *rest.values()])
            for p, g in zip(mine, found, strict=False):
                p.grad = g
            for total, g in zip(grads, found[len(mine) :], strict=True):
                total += g / N
        for p, g in zip(rest.values(), grads, strict=True):
            p.grad = g
        for optimizer in (*optimizers, rest_optimizer):
            optimizer.step()
        if step % every == 0:
            pending[step + overlap] = {t: [(scale * B[t][n] @ A[t][n]).detach() for n in range(N)] for t in targets}
        if step in pending:
            merges += 1
            deltas = pending.pop(step)
            for t in targets:
                if outer:
                    W[t].grad = -sum(delta - before for delta, before in zip(deltas[t], prev[t], strict=True)) / N
                else:
                    W[t] = (W[t] if reset else W0[t]) + sum(deltas[t]) / N
                prev[t] = deltas[t]
            if outer:
                steps.step()
            if reset:
                for t in targets:
                    prev[t] = [torch.zeros_like(W[t]) for _ in range(N)]
                    for n in range(N):
                        B[t][n].data.zero_()
                        A[t][n].data.copy_(redraw(t, n, merges))
                for optimizer in optimizers:
                    optimizer.state.clear()
    now = {t: sum((scale * B[t][n] @ A[t][n]).detach() for n in range(N)) / N for t in targets}
    start = {t: W[t] - sum(prev[t]) / N if outer else W[t] if reset else W0[t] for t in targets}
    return {name: p.detach() for name, p in rest.items()} | {t: start[t] + now[t] for t in targets}
