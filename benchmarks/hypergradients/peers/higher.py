"""higher (pip install higher): torch's own optimizers made differentiable."""

from __future__ import annotations

import higher
import torch

from benchmarks.hypergradients.peers.base import EPS, Ready, Task
from benchmarks.hypergradients.peers.torch_losses import eager, to_torch


def unrolled(task: Task) -> Ready:
    problem = to_torch(task)

    def hypergradient(steps: int) -> torch.Tensor:
        params, outer = list(problem.start), problem.outer
        adam = task.optimizer == "adam"
        own = torch.optim.Adam(params, lr=task.rate, eps=EPS) if adam else torch.optim.SGD(params, lr=task.rate)
        optimizer = higher.get_diff_optim(own, params, track_higher_grads=True)
        for _ in range(steps):
            params = list(optimizer.step(problem.inner_loss(params, outer), params=params))
        return torch.autograd.grad(problem.outer_loss(params, outer), outer)[0]

    return eager(hypergradient, task)
