"""hypertorch (pip install git+https://github.com/prolearner/hypertorch; it installs a module named `hypergrad`).

Its own optimizers are descent and momentum, so Adam is written as an update map here. `reverse` keeps the iterates and
recomputes a step's graph on the way back; `reverse_unroll` keeps every graph.
"""

from __future__ import annotations

import torch
from hypergrad.hypergradients import reverse, reverse_unroll

from benchmarks.hypergradients.peers.base import EPS, Ready, Task
from benchmarks.hypergradients.peers.torch_losses import TorchTask, eager, to_torch


def recomputing(task: Task) -> Ready:
    problem = to_torch(task)
    begin, update, outer_loss = _training(problem, task)

    def hypergradient(steps: int) -> torch.Tensor:
        maps = [lambda state, hparams, t=t: update(state, hparams, t, graph=True) for t in range(1, steps + 1)]
        history = [begin()]
        for t in range(1, steps + 1):
            state = [leaf.detach().requires_grad_() for leaf in history[-1]]
            history.append([leaf.detach() for leaf in update(state, [problem.outer], t, graph=False)])
        return reverse(history, [problem.outer], maps, outer_loss, set_grad=False)[0]

    return eager(hypergradient, task)


def storing(task: Task) -> Ready:
    problem = to_torch(task)
    begin, update, outer_loss = _training(problem, task)

    def hypergradient(steps: int) -> torch.Tensor:
        state = begin()
        for t in range(1, steps + 1):
            state = update(state, [problem.outer], t, graph=True)
        return reverse_unroll(state, [problem.outer], outer_loss, set_grad=False)[0]

    return eager(hypergradient, task)


def _training(problem: TorchTask, task: Task):
    """`(begin, update, outer_loss)` on one list of tensors: the inner variable and, for Adam, its two moments."""
    count = len(problem.start)

    def begin():
        moments = [torch.zeros_like(p) for p in problem.start * 2] if task.optimizer == "adam" else []
        return [*problem.start, *moments]

    def update(state, hparams, t, graph):
        params, moments = state[:count], state[count:]
        grads = torch.autograd.grad(problem.inner_loss(params, hparams[0]), params, create_graph=graph)
        if task.optimizer == "sgd":
            return [p - task.rate * g for p, g in zip(params, grads, strict=True)]
        first = [0.9 * m + 0.1 * g for m, g in zip(moments[:count], grads, strict=True)]
        second = [0.999 * v + 0.001 * g**2 for v, g in zip(moments[count:], grads, strict=True)]
        root = [(v / (1 - 0.999**t)).sqrt() + EPS for v in second]
        params = [p - task.rate / (1 - 0.9**t) * m / r for p, m, r in zip(params, first, root, strict=True)]
        return [*params, *first, *second]

    def outer_loss(state, hparams):
        return problem.outer_loss(state[:count], hparams[0])

    return begin, update, outer_loss
