"""What every library of the comparison is given, and what it hands back.

A file for each library is beside this one, with functions `task, *options -> Ready`. It imports its library, so it is
itself imported only where that is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks.hypergradients.measure import compile_ahead
from benchmarks.hypergradients.problems import Case, data_weighting, lora_transformer, quadratic


@dataclasses.dataclass(frozen=True)
class Task:
    """A hypergradient to compute: the derivative of the outer loss, by `outer`, through K steps of training.

    Attributes:
      case: the problem; its losses are JAX functions.
      optimizer: a key of `OPTIMIZERS`.
      rate: its learning rate.
      steps: K.
      outer, start: the point, and the inner variable before the first step, a constant.
      batch, outer_batch: the data of every inner step, and of the outer loss.
    """

    case: Case
    optimizer: str
    rate: float
    steps: int
    outer: Any
    start: Any
    batch: Any
    outer_batch: Any

    @property
    def optax(self) -> optax.GradientTransformation:
        return OPTIMIZERS[self.optimizer](self.rate)

    def inner_loss(self, problem: Any, params: Any, outer: Any) -> jax.Array:
        return problem.inner_value(params, outer, self.batch, KEY)[0]

    def outer_loss(self, problem: Any, params: Any, outer: Any) -> jax.Array:
        return problem.outer_value(params, outer, self.outer_batch, KEY)[0]


EPS = 1e-20
"""Of Adam. The first step's derivative is about 1 / eps at every gradient entry as small as eps: with the usual 1e-8 a
few entries of many decide the hypergradient, and higher, which adds eps before the bias correction where the others add
it after, trains otherwise and gets another one. Where no entry is nearly that small, eps does not matter."""

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": partial(optax.adam, eps=EPS),
    "adam, rooted": partial(optax.adam, eps_root=1e-8),
}
"""Of a rate. "adam, rooted" is for LoRA, whose gradients are exactly 0 at the start: without `eps_root` the derivative
of the square root is NaN there in the other libraries."""

KEY = jax.random.key(0)
"""Handed to losses that make no use of it."""


class Ready(NamedTuple):
    """A hypergradient that is ready to be computed.

    Attributes:
      call: computes it; complete when it returns.
      warm: makes a library start up (threads, kernels), with as little memory as it can.
      temporary: bytes of temporary memory of the compiled program; None for a library that does not compile.
      compile_seconds: of tracing and compiling, or None.
    """

    call: Callable[[], np.ndarray]
    warm: Callable[[], Any]
    temporary: int | None = None
    compile_seconds: float | None = None


TASKS: dict[str, tuple[Callable[[], Case], str, float]] = {
    "quadratic": (quadratic, "sgd", 0.5),
    "data weighting": (lambda: data_weighting(samples=64, size=64, features=256, width=256), "adam", 1e-3),
    "transformer": (lambda: lora_transformer(layers=4, width=64, tokens=64, size=2), "adam, rooted", 1e-3),
}
"""Name -> how to make the problem, the inner optimizer and its learning rate."""


def make_task(name: str, steps: int) -> Task:
    """The task of this name, in the floating-point type that JAX is set to."""
    make, optimizer, rate = TASKS[name]
    case = make()
    outer = case.problem.start_outer(KEY)
    start = case.problem.start_inner(KEY, outer)
    batches = case.batch(jax.random.key(1)), case.batch(jax.random.key(2))
    return Task(case, optimizer, rate, steps, outer, start, *batches)


def compiled(hypergradient: Callable[[Task, Any, Any, Any], Any], task: Task) -> Ready:
    """`hypergradient(task, problem, outer, start)` compiled. Weights inside `problem` are arguments of the program, as
    everywhere else. It warms up with two steps."""
    arguments = task.case.problem, task.outer, task.start
    found = compile_ahead(partial(hypergradient, task), *arguments)

    def warm():
        short = dataclasses.replace(task, steps=min(2, task.steps))
        jax.block_until_ready(compile_ahead(partial(hypergradient, short), *arguments).call(*arguments))

    return Ready(
        call=lambda: np.asarray(found.call(*arguments)),
        warm=warm,
        temporary=found.temporary,
        compile_seconds=found.trace_seconds + found.compile_seconds,
    )
