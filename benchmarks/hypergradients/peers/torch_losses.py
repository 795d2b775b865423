"""The problems in torch, with the numbers of the JAX ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from benchmarks.hypergradients.peers.base import Ready, Task
from benchmarks.hypergradients.problems import DECAY

Loss = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]


class TorchTask(NamedTuple):
    """`Task` in torch; `start` is a list of tensors in the order of the JAX leaves."""

    inner_loss: Loss
    outer_loss: Loss
    start: list[torch.Tensor]
    outer: torch.Tensor


def tensors(tree: Any) -> Any:
    """Arrays as tensors of their own memory; integers become int64."""
    arrays = jax.tree.map(lambda x: np.array(x), tree)
    return jax.tree.map(lambda x: torch.tensor(x, dtype=torch.int64 if x.dtype.kind == "i" else None), arrays)


def to_torch(task: Task) -> TorchTask:
    """Raises KeyError for a problem that is not written in torch."""
    inner_loss, outer_loss = {"quadratic": _quadratic, "data-weighting": _data_weighting}[task.case.name](task)
    start = [tensors(leaf).requires_grad_() for leaf in jax.tree.leaves(task.start)]
    return TorchTask(inner_loss, outer_loss, start, tensors(task.outer).requires_grad_())


def _quadratic(task: Task) -> tuple[Loss, Loss]:
    hessian, coupling = tensors(task.case.problem.inner_loss.args)
    (target,) = tensors(task.case.problem.outer_loss.args)
    noise = tensors(task.batch)

    def inner(params, outer):
        (w,) = params
        return 0.5 * w @ hessian @ w - (coupling @ outer + noise) @ w

    def outer(params, outer):
        (w,) = params
        return 0.5 * ((w - target) ** 2).sum() + 0.005 * (outer**2).sum()

    return inner, outer


def _data_weighting(task: Task) -> tuple[Loss, Loss]:
    train, validation = tensors(task.batch), tensors(task.outer_batch)

    def losses(params, batch):
        x, layers = batch["x"], len(params) // 2
        for i in range(layers):
            x = torch.addmm(params[2 * i + 1], x, params[2 * i])
            x = torch.tanh(x) if i < layers - 1 else x
        return torch.nn.functional.cross_entropy(x, batch["y"], reduction="none")

    def inner(params, outer):
        decay = 0.5 * DECAY * sum((p**2).sum() for p in params)
        return (torch.sigmoid(outer[train["row"]]) * losses(params, train)).mean() + decay

    def outer(params, outer):
        return losses(params, validation).mean()

    return inner, outer


def eager(hypergradient: Callable[[int], torch.Tensor], task: Task) -> Ready:
    """`hypergradient(steps)` is ready; it warms up with two steps."""
    return Ready(
        call=lambda: hypergradient(task.steps).detach().numpy(), warm=lambda: hypergradient(min(2, task.steps))
    )
