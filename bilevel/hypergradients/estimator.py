"""The template that fulfils the contract of a hypergradient (contract.py), around one method, `differentiate`."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false
# (Every parameter and result has a type; what jax returns has not always one that is known.)

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bilevel.differentiation.captures import forget_outdated, look_again
from bilevel.differentiation.flat import PASSES, of_loss
from bilevel.differentiation.influence import refuse_reverse_rules, replayed_marks, report
from bilevel.differentiation.loss_checks import (
    ORDERS,
    TracedLoss,
    explained,
    refuse_captured,
    traced_losses,
    warn_if_misplaced,
)
from bilevel.differentiation.tracing import detached, evaluate, reading
from bilevel.hypergradients.answers import Unmet, check_asked, checked_answer
from bilevel.hypergradients.arguments import check_estimate, refuse_complex_variables
from bilevel.hypergradients.contract import Aux, Estimate
from bilevel.hypergradients.query import Answer, Query, split_keys
from bilevel.hypergradients.training import InnerState
from bilevel.problem.problem import Problem, split_inner
from bilevel.trees import Batch, Key, Outer, PyTree, combine


class Estimator:
    """The base of an estimator: all of a `Hypergradient` but `steps`, `init`, `solve` and `differentiate`.

    Examples:
      >>> import dataclasses, bilevel, jax
      >>> from bilevel.extend import Answer, Estimator, Trace, register
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class Midpoint(Estimator):  # of a training that goes half of the way from 0 to `outer`
      ...     steps = 1
      ...     def differentiate(self, query):
      ...         state = bilevel.InnerState(query.outer / 2, (), jax.numpy.array(1))
      ...         loss = lambda moving: query.outer_loss(query.at(moving) / 2, query.at(moving))
      ...         (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(query.moving)
      ...         return Answer(value, grad, state, Trace(jax.numpy.zeros(1), None), aux)
      >>> loss = lambda w, outer, batch, key: (w - 3) ** 2 + 0 * outer
      >>> problem = bilevel.Problem(loss, loss, lambda key, outer: 0 * outer, lambda key: jax.numpy.ones(()))
      >>> float(Midpoint().estimate(problem, None, jax.numpy.array(2.0), None, None, jax.random.key(0)).grad)
      -2.0
    """

    blind: ClassVar[str | None] = None
    """How a leaf of `outer` may act that this estimator does not see, and what to use there; None if it sees all."""

    takes_complex: ClassVar[bool] = False
    """Whether inner and outer variables may be complex."""

    takes_constants: ClassVar[bool] = False
    """Whether `outer` may hold nothing that is differentiated, so that only training is done."""

    takes_frozen: ClassVar[bool] = False
    """Whether the estimate is right where the optimizer never moves a part of the inner variable (`optax.set_to_zero`,
    masks): true of what differentiates training steps themselves. What solves for all of the inner variable at the
    trained point is wrong there, and asks `Trained.trainable` what moves."""

    steps: int
    """K, inner steps an outer iteration."""

    def differentiate(self, query: Query) -> Answer:
        """Trains, and differentiates the outer loss.

        It calls `query.outer_loss` for the outer loss; whatever of `grad` that loss's derivative does not reach is
        taken for 0 by construction, and is warned of.
        """
        raise NotImplementedError

    def estimate(
        self,
        problem: Problem,
        inner_state: InnerState | None,
        outer: Outer,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key,
    ) -> Estimate:
        """See `Hypergradient`.

        Warns:
          StructuralZeroWarning: names leaves of `outer` whose hypergradient is 0 whatever their value.

        Raises:
          ValueError: if no leaf acts on anything; if a loss captured a leaf of `outer` from outside; if a loss holds an
            operation that cannot be differentiated as it is needed: names it; if `differentiate` did not do what it
            has to: says what.
        """
        query, params, losses = self.looked_over(problem, inner_state, outer, inner_batches, outer_batch, key)
        return self.answered(query, key, losses, lambda: self._answer(query, params))

    def looked_over(
        self,
        problem: Problem,
        inner_state: InnerState | None,
        outer: Outer,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key,
    ) -> tuple[Query, PyTree, list[TracedLoss]]:
        """The arguments of `estimate` as a `Query`, the shapes of the inner variable, and the losses that were traced.

        Warns and raises as `estimate` does of what is wrong with its arguments.
        """
        check_estimate(self, problem, inner_state, outer, inner_batches, outer_batch, key)
        compiled = isinstance(key, Tracer)  # by whoever calls it, who has to look at what it reads
        if not compiled:
            forget_outdated(self, problem, outer)
        params = jax.eval_shape(problem.start_inner, key, outer) if inner_state is None else inner_state.params
        refuse_complex_variables(self, split_inner(problem, params)[0], outer)
        losses = traced_losses(problem, params, outer, inner_batches, outer_batch, key, self.steps)
        refuse_captured(losses, outer)
        if not compiled:  # otherwise `run` has looked at them
            warn_if_misplaced(losses)
        for loss in losses:
            if self._heeds_rules and loss.name == "inner_loss" and (name := loss.custom_rule()):
                self.meet_custom_rule(name)
        keys = split_keys(key, self.steps)
        return Query(problem, self.steps, inner_state, outer, inner_batches, outer_batch, keys), params, losses

    def answered(self, query: Query, key: Key, losses: list[TracedLoss], answer_of: Callable[[], Answer]) -> Estimate:
        """What `answer_of()` answers to a query that was looked over, as an `Estimate`. Raises as `estimate`."""
        try:
            with explained(losses, ORDERS):
                answer = answer_of()
        except Unmet as unmet:
            raise ValueError(f"{type(self).__name__}: {unmet}.") from None
        if not isinstance(key, Tracer):
            look_again(self, query.problem, query.outer)
        info = {"inner_loss": answer.trace.value} | answer.info
        return Estimate(answer.value, answer.grad, answer.state, Aux(answer.trace.aux, answer.aux, info))

    @property
    def _differentiates(self) -> bool:
        """Whether it takes derivatives: one that does not says itself what its values depend on."""
        return type(self).reached is Estimator.reached

    @property
    def _heeds_rules(self) -> bool:
        return self._differentiates or type(self).meet_custom_rule is not Estimator.meet_custom_rule

    def _answer(self, query: Query, params: PyTree) -> Answer:
        """`differentiate`, with a warning for every leaf of the hypergradient that the outer loss does not reach."""
        closed, shape, reached = self.looked_at(query, params)
        leaves = evaluate(detached(closed), *closed.consts, jnp.ones(()))
        answer = jax.tree.unflatten(jax.tree.structure(shape), leaves)
        if not all(reached):
            self._report(query, answer, reached)
        return answer

    def looked_at(self, query: Query, params: PyTree) -> tuple[Any, Answer, list[bool]]:
        """`differentiate`, traced: its jaxpr, whose argument is the weight of derivatives, the shapes of its answer,
        and which leaves of the hypergradient the outer loss reaches."""
        weight, count = jnp.ones(()), len(jax.tree.leaves(query.moving))

        def answered(weight: jax.Array) -> Answer:
            weighted = dataclasses.replace(query, weight=weight)
            return checked_answer(self.differentiate(weighted), weighted, params)

        # What is looked at is then evaluated, so that nothing is traced twice.
        closed, shape = jax.make_jaxpr(answered, return_shape=True)(weight)
        refuse_reverse_rules(closed.jaxpr)
        check_asked(query.ledger, self._differentiates and count > 0)
        if self._differentiates and not self.takes_frozen and not query.ledger.divided:
            self.refuse_frozen(query, shape.state)
        reached = self.reached(query)
        if reached is None:
            grads = range(1, 1 + count)  # after the value
            reached = [reads[0] for reads in reading(closed.jaxpr, grads)]
        return closed, shape, reached

    def _report(self, query: Query, answer: Answer, reached: list[bool]) -> None:
        """Says why the hypergradient of some leaves is 0: what it does not see, or where an influence ends."""
        params = answer.state.params
        trained = lambda moving: self.trained(query, moving)  # noqa: E731
        direct = lambda moving: query.outer_loss(params, query.at(moving))[0]  # noqa: E731
        own, rest = split_inner(query.problem, params)
        by_inner = replayed_marks(lambda own: query.outer_loss(combine(own, rest), query.outer)[0], own)
        if PASSES not in by_inner and (end := next(filter(None, by_inner), None)):  # no estimator sees training then
            lost = [mark if mark is None else of_loss(end) for mark in replayed_marks(trained, query.moving)]
            nothing = [False] * len(reached)
            report(reached, query.moving, type(self).__name__, [None] * len(reached), nothing, lambda: lost)
            return
        if self.blind is None:
            acts = [False] * len(reached)
            flat = replayed_marks(lambda moving: (trained(moving), direct(moving)), query.moving)
        else:
            inside = replayed_marks(trained, query.moving)
            acts = [mark == PASSES for mark in inside]
            flat = [a or b for a, b in zip(inside, replayed_marks(direct, query.moving), strict=True)]
        remedies = self.unseen(query) if any(acts) else [None] * len(reached)
        report(reached, query.moving, type(self).__name__, remedies, acts, lambda: self.lost(query), flat)

    def reached(self, query: Query) -> list[bool] | None:
        """For each leaf of `query.moving`, whether it has an influence that the estimator sees; None: by the trace.

        An estimator that takes no derivative of the losses overrides this: the trace then does not say it.
        """
        return None

    def trained(self, query: Query, moving: Outer) -> PyTree:
        """What training gives, as a function of the inexact leaves of `outer`: only looked at, never evaluated."""
        raise NotImplementedError

    def unseen(self, query: Query) -> list[str | None]:
        """For each leaf of `query.moving`, how it acts if the estimator does not see that, and what to use there."""
        return [self.blind] * len(jax.tree.leaves(query.moving))

    def lost(self, query: Query) -> list[str | None]:
        """For each leaf of `query.moving`, where its influence is lost, if it has one that no derivative shows."""
        return [None] * len(jax.tree.leaves(query.moving))

    def refuse_frozen(self, query: Query, state: InnerState) -> None:
        """Told the shapes of the trained state where nothing was asked of what moves: refuses what is frozen there."""

    def meet_custom_rule(self, name: str) -> None:
        """Told where the inner loss has a derivative of its own, by a function of this name: warns or refuses.

        Its second derivatives then need not commute: forward over reverse is wrong, and a Hessian not symmetric. An
        estimator for which that makes no difference overrides this by doing nothing.

        Raises:
          ValueError: unless it is overridden, by an estimator that takes derivatives.
        """
        raise ValueError(
            f"{type(self).__name__}: inner_loss has a derivative of its own (`{name}`, by jax.custom_vjp or "
            "custom_jvp), so second derivatives need not commute, and this estimator does not say that it heeds that: "
            "use OneStep or Unrolled; if it is yours and takes second derivatives in reverse mode alone, override its "
            "meet_custom_rule."
        )
