"""DiLoCo as its Algorithm 1 writes it (arXiv 2311.08105): N whole models in one process, torch's SGD with Nesterov outside."""

import copy

import torch


def diloco(module, batches, loss_of, optimizer_of, every, lr=1.0, momentum=0.0):
    """Train and return the parameters: those of the last outer step, moved by the mean of what was done since.

    batches: per step a list of N batches. loss_of(model, batch) -> loss. optimizer_of(list of parameters) -> Optimizer.
    """
    N = len(batches[0])
    base, models = copy.deepcopy(module), [copy.deepcopy(module) for _ in range(N)]
    outer = torch.optim.SGD(base.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    inner = [optimizer_of(list(model.parameters())) for model in models]
    for step, of_workers in enumerate(batches, 1):
        for model, optimizer, batch in zip(models, inner, of_workers, strict=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        if step % every == 0:
            for theta, *of_models in zip(base.parameters(), *(model.parameters() for model in models), strict=True):
                theta.grad = sum(theta.detach() - p.detach() for p in of_models) / N  # the outer gradient
            outer.step()
            for model in models:
                model.load_state_dict(base.state_dict())
    names = [name for name, _ in base.named_parameters()]
    return {name: sum(dict(model.named_parameters())[name].detach() for model in models) / N for name in names}


def streaming_diloco(module, batches, loss_of, optimizer_of, every, parts, delay, lr=1.0, momentum=0.0):
    """Train as Streaming DiLoCo's Algorithm 2 does (arXiv 2501.18512), and return the mean of the models.

    parts: lists of parameter names; the p-th is sent at the steps t with t = (p + 1) · every / len(parts) mod every. What
    was sent at step t is applied at step t + delay. There a model takes the outer weights and what it has learnt since step
    t: nothing is lost. (The paper takes a weighted mean of the model and the outer weights.)
    """
    N = len(batches[0])
    base, models = copy.deepcopy(module), [copy.deepcopy(module) for _ in range(N)]
    theta, of_models = dict(base.named_parameters()), [dict(model.named_parameters()) for model in models]
    outer = [torch.optim.SGD([theta[n] for n in names], lr=lr, momentum=momentum, nesterov=momentum > 0) for names in parts]
    inner = [optimizer_of(list(model.parameters())) for model in models]
    sent = {}  # (part, step) -> per model its parameters then
    for step, of_workers in enumerate(batches, 1):
        for model, optimizer, batch in zip(models, inner, of_workers, strict=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
        for p, names in enumerate(parts):
            if (step - (p + 1) * every // len(parts)) % every == 0:
                sent[p, step] = [{n: of[n].detach().clone() for n in names} for of in of_models]
            if (then := sent.pop((p, step - delay), None)) is None:
                continue
            for name in names:
                theta[name].grad = sum(theta[name].detach() - snapshot[name] for snapshot in then) / N
            outer[p].step()
            with torch.no_grad():
                for of, snapshot in zip(of_models, then, strict=True):
                    for name in names:
                        of[name].copy_(theta[name] + of[name] - snapshot[name])
    return {name: sum(of[name].detach() for of in of_models) / N for name in theta}
