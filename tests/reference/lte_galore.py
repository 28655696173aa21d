"""LTE × GaLore as one loop over N whole models: each steps GaLore's twin on its own weights, now and then all become one.

Nothing is told as factors here: a worker's update is the difference of dense matrices. A merge makes
W = mean(C)·W_base + mean(Wₙ − Cₙ·W_base), C what decay has left of W_base; that is the mean of the workers' weights.
The rest has one set of parameters, its gradient the workers' mean (``sync_rest="step"``), and plain AdamW.
"""

import torch
from torch.func import functional_call

from tests.reference.galore import Twin, orth


def lte_galore(module, targets, batches, loss_of, rest_optimizer, every, shared=False, names=None, outer=None, **galore):
    """Train and return the merged parameters.

    targets: {parameter name: rank}. batches: per step a list of N batches. loss_of(f, batch) -> mean loss.
    rest_optimizer(list of parameters). names: the optimizer's names of the targets (they seed the cold starts).
    outer: (lr, momentum) of torch's SGD with Nesterov, which steps what the last merge left by the workers' mean increment.
    """
    plain = {name: p.detach().clone() for name, p in module.named_parameters()}
    rest = {name: p.requires_grad_() for name, p in plain.items() if name not in targets}
    N = len(batches[0])
    names = names or {t: t for t in targets}
    W = {t: [plain[t].clone().requires_grad_() for _ in range(N)] for t in targets}
    # the twins' own clocks never strike: `renew` does
    twins = {t: [Twin(W[t][n].data, r, names[t], gap=10**9, offset=1, **galore) for n in range(N)] for t, r in targets.items()}
    optimizer = rest_optimizer(list(rest.values()))
    base = {t: plain[t].clone() for t in targets}
    steps = torch.optim.SGD(list(base.values()), lr=outer[0], momentum=outer[1], nesterov=outer[1] > 0) if outer else None
    for step, of_workers in enumerate(batches):
        grads, own = [torch.zeros_like(p) for p in rest.values()], {t: [] for t in targets}
        for n, batch in enumerate(of_workers):
            used = {t: W[t][n] for t in targets}
            loss = loss_of(lambda x, used=used: functional_call(module, {**rest, **used}, (x,)), batch)
            found = torch.autograd.grad(loss, [*used.values(), *rest.values()])
            for t, g in zip(targets, found, strict=False):
                own[t].append(g)
            for total, g in zip(grads, found[len(targets) :], strict=True):
                total += g / N
        for t in targets:
            if step % every == 0:
                renew(twins[t], own[t], shared)
            for n in range(N):
                twins[t][n].step(own[t][n])
        for p, g in zip(rest.values(), grads, strict=True):
            p.grad = g
        optimizer.step()
        if (step + 1) % every == 0:
            means = {t: sum(w.data for w in W[t]) / N for t in targets}
            if outer:
                for t in targets:
                    base[t].grad = base[t] - means[t]
                steps.step()
                means = base
            for t in targets:
                for w in W[t]:
                    w.data.copy_(means[t])
    return {**{n: p.detach() for n, p in rest.items()}, **{t: sum(w.data for w in W[t]) / N for t in targets}}


def renew(twins, grads, shared):
    """Every worker's basis at the first step of a window: its own, or one for all."""
    turned = [g.T if twin.turned else g for twin, g in zip(twins, grads, strict=True)]
    if not shared:
        for twin, g in zip(twins, turned, strict=True):
            if twin.p is not None:
                twin.renew(g)
        return
    old = twins[0].p
    if old is None:  # worker 0's, for all
        twins[0].renew(turned[0])
        new = twins[0].p
        for twin, g in zip(twins, turned, strict=True):
            twin.v = torch.full((twin.r, g.shape[1]), 1e-300, dtype=g.dtype)  # not zero: that would mean "no basis yet"
    else:
        sketch = sum(g @ ((g.T @ old) / (g.T @ old).norm()) for g in turned) / len(turned)
        new = orth(sketch, old)
    for twin in twins:
        if twin.p is not None and old is not None and twin.rotate:
            c = new.T @ old
            twin.m, twin.v = c @ twin.m, c**2 @ twin.v
        twin.p = new
