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
