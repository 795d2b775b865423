"""TorchOpt (pip install torchopt): functional optimizers, the whole training one differentiable graph."""

from __future__ import annotations

import torch
import torchopt

from benchmarks.hypergradients.peers.base import EPS, Ready, Task
from benchmarks.hypergradients.peers.torch_losses import eager, to_torch


def unrolled(task: Task) -> Ready:
    problem = to_torch(task)
    optimizer = torchopt.adam(lr=task.rate, eps=EPS) if task.optimizer == "adam" else torchopt.sgd(lr=task.rate)

    def hypergradient(steps: int) -> torch.Tensor:
        params, outer = tuple(problem.start), problem.outer
        state = optimizer.init(params)
        for _ in range(steps):
            grads = torch.autograd.grad(problem.inner_loss(list(params), outer), params, create_graph=True)
            updates, state = optimizer.update(grads, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return torch.autograd.grad(problem.outer_loss(list(params), outer), outer)[0]

    return eager(hypergradient, task)
