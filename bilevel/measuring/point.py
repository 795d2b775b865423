"""The point at which hypergradients are measured: the same arguments, by the same names, for all who measure."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax

from bilevel.data import draw, draw_one
from bilevel.differentiation.captures import forget_outdated
from bilevel.differentiation.loss_checks import traced_losses
from bilevel.hypergradients.arguments import check_call, check_data, check_start
from bilevel.problem.arguments import check_outer
from bilevel.problem.problem import Problem, is_problem
from bilevel.running.unsteady import are_steady, refuse_changing
from bilevel.settings.fields import checked
from bilevel.settings.rules import optional, random_key
from bilevel.trees import Outer


class Point(NamedTuple):
    """Where and with what estimators are asked.

    Attributes:
      outer: the outer variable.
      inner_state: a warm start, or None.
      inner_data, outer_data: what batches are drawn from.
      keys: of the estimate, of the inner batches, and of the outer ones.
    """

    problem: Problem
    inner_state: Any
    outer: Outer
    inner_data: Any
    outer_data: Any
    keys: tuple[jax.Array, jax.Array, jax.Array]

    @classmethod
    def of(
        cls, what: str, problem: Any, outer: Any, inner_state: Any, inner_data: Any, outer_data: Any, key: Any
    ) -> Point:
        """Checks what `what` was given, and fills in what was left out.

        Raises:
          ValueError: names the argument.
        """
        checked(what, "problem", problem, is_problem)
        checked(what, "key", key, optional(random_key))
        if outer is not None:
            check_call(what, inner_state=inner_state, outer=outer)
            check_outer(f"{what} was given", outer)
            check_start(what, problem, outer)
        check_data("inner_data", inner_data, iterators=False)
        check_data("outer_data", outer_data, iterators=False)
        outer_key, *keys = jax.random.split(jax.random.key(0) if key is None else key, 4)
        outer = problem.start_outer(outer_key) if outer is None else outer
        return cls(problem, inner_state, outer, inner_data, outer_data, tuple(keys))

    def arguments(self, steps: int) -> tuple[Any, ...]:
        """The arguments of `estimate` for an estimator of so many inner steps.

        Raises:
          ValueError: for a loss that is another function at each call, which a trace would hold as it was at one.
        """
        start, inner, outer = self.keys
        batches = draw(self.inner_data, inner, 0, steps), draw_one(self.outer_data, outer, 0)
        params = getattr(self.inner_state, "params", None)
        traced = partial(traced_losses, self.problem, params, self.outer, *batches, start, steps)
        reads = forget_outdated(self.problem, self.outer)
        refuse_changing(reads, traced(), lambda: traced(anew=True), lambda: [])
        are_steady(reads)
        return self.problem, self.inner_state, self.outer, *batches, start
