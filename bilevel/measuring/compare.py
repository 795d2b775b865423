"""Hypergradients side by side, on the user's own problem."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bilevel.differentiation.captures import forget_outdated
from bilevel.hypergradients.base import Estimate, Hypergradient, is_hypergradient
from bilevel.hypergradients.contract import driven_from_host, traceable
from bilevel.hypergradients.implicit_function import AtSolution
from bilevel.hypergradients.implicit_solve import ImplicitSolve
from bilevel.hypergradients.per_task import PerTask
from bilevel.hypergradients.query import outer_value, split_keys
from bilevel.hypergradients.training import InnerState
from bilevel.measuring.flops import flops, gradient_flops, has_while, hvp_flops, operations
from bilevel.measuring.point import Point
from bilevel.measuring.smoothness import Smoothness, measured
from bilevel.measuring.variance import require_batches, variance
from bilevel.problem.problem import Problem
from bilevel.settings.fields import checked, shown
from bilevel.settings.numeric import integer, real
from bilevel.settings.rules import optional
from bilevel.trees import Outer, PyTree, global_norm, power_of_two


@dataclasses.dataclass(frozen=True)
class Row:
    """What one hypergradient gave and cost.

    Attributes:
      name: its name in the comparison.
      value: outer loss at its trained point.
      norm: Euclidean norm of its gradient.
      cosine: cosine of the angle to the reference's gradient; NaN where one of them is 0 or not finite.
      relative_error: |g - g_ref| / |g_ref|.
      variance: `Variance.relative`, over batches; None where it was not asked for.
      seconds: least time of an estimate, compiled and warm.
      gradients: its floating-point operations, in those of one inner gradient (of `PerTask`, of one task's). An
        iterative linear solver counts as many products as it took.
      at_least: whether `gradients` is only a lower bound: a loop without a known length, in a loss or in a solver of
        your own, counts one turn.
      hvps: Hessian-vector products it took of one batch's loss, of all tasks together, as `aux.info["hvps"]` says; 0
        where an estimator says nothing of it.
      temporary: bytes of temporary memory.
      compile_seconds: of tracing and compiling.
      grad: the gradient.
    """

    name: str
    value: float
    norm: float
    cosine: float
    relative_error: float
    variance: float | None
    seconds: float
    gradients: float
    at_least: bool
    hvps: int
    temporary: int
    compile_seconds: float
    grad: PyTree


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, the reference first; prints as a table.

    Attributes:
      rows: what each gave and cost.
      reference: the name of the one that the others are measured against.
      smoothness: whether the reference foretells steps of the size that was asked for; None where none was, NaN where
        a training such a step away is not finite. Below the table it is said if it does not.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> training = optax.sgd(0.5), 20
      >>> ways = {"unrolled": bilevel.Unrolled(*training), "one step": bilevel.OneStep(*training)}
      >>> comparison = bilevel.compare(problem, ways, reference="unrolled", inner_data=train, outer_data=val)
      >>> [row.name for row in comparison.rows], round(comparison["one step"].cosine, 3)
      (['unrolled', 'one step'], 1.0)
    """

    rows: tuple[Row, ...]
    reference: str
    smoothness: Smoothness | None = None

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} was not compared: there are {', '.join(row.name for row in self.rows)}.")

    def __rich__(self) -> Any:
        from rich.table import Table  # slow to import

        table = Table(title=f"Hypergradients, against {self.reference}")
        columns = "estimator, outer loss, cosine, relative error, seconds, gradients, HVPs, temporary MB, compile s"
        if any(row.variance is not None for row in self.rows):
            columns += ", variance"
        for i, column in enumerate(columns.split(", ")):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            numbers = f"{row.value:.6g}", f"{row.cosine:.6f}", f"{row.relative_error:.2e}", f"{row.seconds:.2e}"
            costs = f"{row.temporary / 1e6:.2f}", f"{row.compile_seconds:.1f}"
            counts = f"{'>= ' if row.at_least else ''}{row.gradients:.1f}", str(row.hvps)
            spread = () if row.variance is None else (f"{row.variance:.2e}",)
            table.add_row(row.name, *numbers, *counts, *costs, *spread)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120)
        with console.capture() as captured:
            console.print(self)
        said = captured.get().rstrip()
        if self[self.reference].norm == 0:
            return said + (
                f"\nThe gradient of {self.reference} is exactly 0 here, so that nothing can be measured against it: "
                "check_hypergradient says whether that is right, and at which leaf."
            )
        rough = self.smoothness is not None and not self.smoothness.is_smooth
        return said + (f"\n{self.smoothness}" if rough else "")

    def plot(self, axes: Any = None) -> Any:
        """Relative error against cost (inner gradients) and against temporary memory; returns the matplotlib axes."""
        from bilevel.measuring.plots import cost_and_error

        return cost_and_error(self.rows, self.reference, axes)


def compare(
    problem: Problem,
    hypergradients: Mapping[str, Hypergradient],
    *,
    reference: str,
    outer: Outer = None,
    inner_state: InnerState | None = None,
    inner_data: Any = None,
    outer_data: Any = None,
    key: jax.Array | None = None,
    repeats: int = 3,
    samples: int | None = None,
    step: float | None = 1e-2,
) -> Comparison:
    """Estimates the same hypergradient in several ways, from one start and with the same data and random keys.

    Args:
      problem: the problem.
      hypergradients: name -> estimator; they may train for different numbers of steps.
      reference: name of the one that the others are measured against.
      outer: the point; by default `problem.start_outer(key)`.
      inner_state: a warm start for all of them; None for a cold one.
      inner_data, outer_data: as for `run`, without iterators.
      key: randomness; None is `jax.random.key(0)`.
      repeats: how often each is timed; they take turns, and the least time counts.
      samples: on how many batches each is estimated again for its `variance` over them; None for no such column.
      step: a size of outer steps, by which the `smoothness` of the reference's training is measured along two random
        directions (five trainings more): an exact derivative is of no use where it does not hold for a step. None for
        no such measure.

    Raises:
      ValueError: if `reference` is not among `hypergradients`, for repeats < 1, samples < 2 or step <= 0, or for an
        argument of another kind.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> training = optax.sgd(0.5), 20
      >>> ways = {"unrolled": bilevel.Unrolled(*training), "one step": bilevel.OneStep(*training)}
      >>> comparison = bilevel.compare(problem, ways, reference="unrolled", inner_data=train, outer_data=val)
      >>> round(comparison["one step"].relative_error, 3)  # 0.107 instead of 0.143
      0.252
    """
    if isinstance(hypergradients, Mapping) and reference not in hypergradients:
        raise ValueError(f"The reference {reference!r} is not among the hypergradients {', '.join(hypergradients)}.")
    forget_outdated(problem, hypergradients)
    point = Point.of("compare", problem, outer, inner_state, inner_data, outer_data, key)
    if not isinstance(hypergradients, Mapping):
        raise ValueError(f"compare(hypergradients={shown(hypergradients)}): must be a dict, name -> estimator.")
    for name, estimator in hypergradients.items():
        checked("compare", f"hypergradients[{name!r}]", estimator, is_hypergradient)
    checked("compare", "repeats", repeats, integer(1))
    checked("compare", "samples", samples, optional(integer(2)))
    checked("compare", "step", step, optional(real(above=0.0)))
    if samples is not None:
        require_batches("compare(samples=...)", inner_data, outer_data)
    compiled, costs, results = {}, {}, {}
    for name, estimator in hypergradients.items():
        arguments = estimator, *point.arguments(estimator.steps)
        begun = time.perf_counter()
        if driven_from_host(estimator):
            by_hand: Any = estimator
            temporary = by_hand.temporary_bytes(*arguments[1:])
            function = _estimate
            function(*arguments)  # compiles what it calls
        else:
            function = jax.jit(_estimate).lower(*arguments).compile()
            temporary = getattr(function.memory_analysis(), "temp_size_in_bytes", 0)
        costs[name] = {"temporary": temporary, "compile_seconds": time.perf_counter() - begun}
        compiled[name] = lambda function=function, arguments=arguments: function(*arguments)
        results[name] = jax.block_until_ready(compiled[name]())
        costs[name] |= _counts(results[name], *arguments)
    seconds = _times(compiled, repeats)
    target = results[reference].grad
    same = {"inner_data": inner_data, "outer_data": outer_data, "inner_state": inner_state, "key": key}

    def relative_variance(name: str) -> float | None:
        if samples is None:
            return None
        return variance(problem, hypergradients[name], outer=point.outer, samples=samples, **same).relative

    def row(name: str) -> Row:
        estimate = results[name]
        return Row(
            name=name,
            value=float(estimate.value),
            norm=float(global_norm(estimate.grad)),
            cosine=_cosine(estimate.grad, target),
            relative_error=_relative_error(estimate.grad, target),
            variance=relative_variance(name),
            seconds=seconds[name],
            grad=estimate.grad,
            **costs[name],
        )

    names = [reference, *(name for name in hypergradients if name != reference)]
    smooth = _smoothness(hypergradients[reference], point, target, step)
    return Comparison(tuple(row(name) for name in names), reference, smooth)


def _smoothness(hypergradient: Hypergradient, point: Point, grad: PyTree, step: float | None) -> Smoothness | None:
    if step is None:
        return None
    try:
        return measured(traceable(hypergradient), point.arguments(hypergradient.steps), grad, point.keys[0], step, 2)
    except FloatingPointError:  # a training a step away from the point, or at it, ends in no number
        nowhere = np.full(2, np.nan)
        return Smoothness(nowhere, step, nowhere, nowhere)


def _estimate(hypergradient, *arguments):
    return hypergradient.estimate(*arguments)


def _counts(
    estimate: Estimate, hypergradient, problem, inner_state, outer, batches, outer_batch, key
) -> dict[str, Any]:
    """`gradients`, `at_least` and `hvps` of a `Row`."""
    again = getattr(hypergradient, "advanced_steps", 0)
    hypergradient = traceable(hypergradient)
    unit = gradient_flops(problem, hypergradient, outer, batches, key)
    each = np.asarray(estimate.aux.info.get("hvps", 0))  # of `PerTask` there is a number for each task
    hvps = int(each.sum())
    single = hypergradient.hypergradient if isinstance(hypergradient, PerTask) else hypergradient
    if not isinstance(single, (AtSolution, ImplicitSolve)):
        whole = jax.make_jaxpr(_estimate)(hypergradient, problem, inner_state, outer, batches, outer_batch, key).jaxpr
        return {"gradients": operations(whole) / unit + again, "at_least": has_while(whole), "hvps": hvps}
    # The loop of the linear solver has a length that only the run knows: its products are counted by that.
    training = jax.make_jaxpr(hypergradient.solve)(problem, inner_state, outer, batches, key).jaxpr

    alone, own_key = hypergradient, key
    if isinstance(hypergradient, PerTask):
        alone, _, outer_batch, own_key = hypergradient.first_task(batches, key)

    def evaluate(params, outer):
        keys = split_keys(own_key, alone.steps)
        return outer_value(problem, alone.steps, params, outer, outer_batch, keys)[0]

    trained = estimate.inner_state.params
    last = each.size * flops(jax.grad(evaluate, argnums=(0, 1), allow_int=True), trained, outer)
    product = hvp_flops(problem, hypergradient, outer, batches, key)
    total = operations(training) + last + hvps * product
    return {"gradients": total / unit, "at_least": has_while(training), "hvps": hvps}


def _times(calls: Mapping[str, Any], repeats: int) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            begun = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], time.perf_counter() - begun)
    return best


def _flat(tree: PyTree) -> np.ndarray:
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def _cosine(a: PyTree, b: PyTree) -> float:
    a, b = (_flat(x) / _unit(x) for x in (a, b))
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.real(np.vdot(a, b)) / scale) if scale else float("nan")


def _relative_error(a: PyTree, b: PyTree) -> float:
    a, b = _flat(a) / _unit(b), _flat(b) / _unit(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)) if b.any() else float("nan")


def _unit(tree: PyTree) -> np.ndarray:
    return np.asarray(power_of_two(tree))
