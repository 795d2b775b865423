"""The contract of a hypergradient, and the template that fulfils it.

A new estimator is a frozen dataclass under `Estimator` (or `Trained`, where the inner problem is trained by an
optimizer) with one method, `differentiate`. Everything else that `Hypergradient` asks for is done here, once.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false
# (Every parameter and result has a type; what jax returns has not always one that is known.)

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer

from bilevel.data import slots
from bilevel.differentiation import optimizers
from bilevel.differentiation.flat import PASSES
from bilevel.differentiation.gradients import Point, reverse_gradient
from bilevel.differentiation.influence import arrives, refuse_reverse_rules, replayed_marks, report
from bilevel.differentiation.loss_checks import (
    ORDERS,
    explained,
    refuse_captured,
    traced_losses,
    warn_if_misplaced,
)
from bilevel.differentiation.optimizers import Optimizer
from bilevel.differentiation.tracing import detached, evaluate, reading
from bilevel.hypergradients.arguments import check_call, check_estimate, refuse_complex_variables
from bilevel.hypergradients.query import Answer, Query, split_keys
from bilevel.hypergradients.training import InnerState, Trace, begin, train
from bilevel.problem import Problem, is_problem
from bilevel.settings import check_fields, checked, having, integer, register, setting
from bilevel.trees import Batch, Inner, Key, Outer, PyTree, at_step


class Aux(NamedTuple):
    """What came with an estimate.

    Attributes:
      inner: what `inner_loss` returned beside its value, stacked over the inner steps; None without `has_aux`.
      outer: what `outer_loss` returned beside its value; None without `has_aux`.
      info: the estimator's own numbers; always `inner_loss[steps]`.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Implicit(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> estimate.aux.info["inner_loss"].shape
      (20,)
      >>> bool(estimate.aux.info["linear_residual"] < 1e-3)
      True
    """

    inner: Inner
    outer: Outer
    info: dict[str, Any]


class Estimate(NamedTuple):
    """A hypergradient.

    Attributes:
      value: the outer loss at the trained point, a scalar.
      grad: estimate of d value / d outer, a tree like `outer` with None at leaves that are not inexact.
      inner_state: the inner problem after its `steps` steps.
      aux: an `Aux`.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.value), 4), round(float(estimate.grad), 4)
      (0.0556, 0.1429)
      >>> [round(float(w), 3) for w in estimate.inner_state.params]
      [0.75, 0.6]
    """

    value: jax.Array
    grad: PyTree
    inner_state: InnerState
    aux: Aux


class Hypergradient(Protocol):
    """A way to estimate d outer_loss / d outer. Every estimator in `bilevel` has these three methods and `steps`.

    What whoever calls them relies on, and the tests try on every estimator:

    - All three are pure functions of their arguments that can be jitted; the estimator itself is a pytree.
    - `inner_batches` leads with an axis of length `steps`, or is `Indexed(data, index)`, a `FullBatch`, or None.
    - With `inner_state=None`, `estimate` starts the inner problem itself, so that `init_inner`'s dependence on `outer`
      is a part of what is differentiated. An `inner_state` that is given is a constant.
    - Optimizer state that depends on `outer` is made anew at the `outer` given, or the state is refused.
    - Keys are those of `split_keys(key, steps)`. No key is consumed twice; recomputations clone them.
    - `grad` has an entry for every inexact leaf of `outer` and None for others, which are constants.
    - A leaf whose hypergradient is 0 by construction is warned of (`StructuralZeroWarning`); if all are, ValueError.
    - A loss that captured `outer`, or that cannot be differentiated as needed, is refused in a sentence.
    - Where the inner loss has a derivative of its own (`jax.custom_vjp`), the estimate is right or refused.
    - `aux.info` has `inner_loss[steps]`, and whatever tells how exact the estimate is.

    `Estimator` does most of this for one that is derived from it.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> outer, batches, key = jax.numpy.zeros(()), bilevel.FullBatch(train), jax.random.key(0)
      >>> def slope(hypergradient: bilevel.Hypergradient):
      ...     estimate = hypergradient.estimate(problem, None, outer, batches, val, key)
      ...     return round(float(estimate.grad), 3)
      >>> slope(bilevel.Unrolled(optax.sgd(0.5), steps=20)), slope(bilevel.OneStep(optax.sgd(0.5), steps=20))
      (0.143, 0.107)
    """

    @property
    def steps(self) -> int:
        """K, inner steps an outer iteration."""
        ...

    def init(self, problem: Problem, outer: Outer, key: Key) -> InnerState:
        """The inner state before any training."""
        ...

    def solve(
        self, problem: Problem, inner_state: InnerState | None, outer: Outer, inner_batches: Batch, key: Key
    ) -> InnerState:
        """Trains K steps from `inner_state` (None: from the start), as a function that may be differentiated again."""
        ...

    def estimate(
        self,
        problem: Problem,
        inner_state: InnerState | None,
        outer: Outer,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key,
    ) -> Estimate:
        """Trains as `solve` does, then the outer loss, its hypergradient and the state that training has reached."""
        ...


is_hypergradient = having("a hypergradient, such as bilevel.Unrolled(...)", "steps", "init", "solve", "estimate")
"""The rule of a setting that is a `Hypergradient`."""


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
          ValueError: if every leaf's is; if a loss captured a leaf of `outer` from outside; if a loss holds an
            operation that cannot be differentiated as it is needed: names it.
        """
        check_estimate(self, problem, inner_state, outer, inner_batches, outer_batch, key)
        params = jax.eval_shape(problem.start_inner, key, outer) if inner_state is None else inner_state.params
        refuse_complex_variables(self, problem.split(params)[0], outer)
        losses = traced_losses(problem, params, outer, inner_batches, outer_batch, key, self.steps)
        refuse_captured(losses, outer)
        if not isinstance(key, Tracer):  # where it is traced, `run` has looked at them
            warn_if_misplaced(losses)
        heeds = type(self).meet_custom_rule is not Estimator.meet_custom_rule
        for loss in losses:
            if heeds and loss.name == "inner_loss" and (name := loss.custom_rule()):
                self.meet_custom_rule(name)
        keys = split_keys(key, self.steps)
        query = Query(problem, self.steps, inner_state, outer, inner_batches, outer_batch, keys)
        with explained(losses, ORDERS):
            answer = self._answer(query)
        info = {"inner_loss": answer.trace.value} | answer.info
        return Estimate(answer.value, answer.grad, answer.state, Aux(answer.trace.aux, answer.aux, info))

    def _answer(self, query: Query) -> Answer:
        """`differentiate`, with a warning for every leaf of the hypergradient that the outer loss does not reach."""
        weight, count = jnp.ones(()), len(jax.tree.leaves(query.moving))
        # What is looked at is then evaluated, so that nothing is traced twice.
        closed, shape = jax.make_jaxpr(
            lambda weight: self.differentiate(dataclasses.replace(query, weight=weight)), return_shape=True
        )(weight)
        refuse_reverse_rules(closed.jaxpr)
        reached = self.reached(query)
        if reached is None:
            grads = range(1, 1 + count)  # after the value
            reached = [reads[0] for reads in reading(closed.jaxpr, grads)]
        leaves = evaluate(detached(closed), *closed.consts, weight)
        answer = jax.tree.unflatten(jax.tree.structure(shape), leaves)
        if not all(reached):
            self._report(query, answer, reached)
        return answer

    def _report(self, query: Query, answer: Answer, reached: list[bool]) -> None:
        """Says why the hypergradient of some leaves is 0: what it does not see, or where an influence ends."""
        params = answer.state.params
        trained = lambda moving: self.trained(query, moving)  # noqa: E731
        direct = lambda moving: query.outer_loss(params, query.at(moving))[0]  # noqa: E731
        if self.blind is None:
            acts = [False] * len(reached)
            flat = replayed_marks(lambda moving: (trained(moving), direct(moving)), query.moving)
        else:
            inside = replayed_marks(trained, query.moving)
            acts = [mark == PASSES for mark in inside]
            flat = [a or b for a, b in zip(inside, replayed_marks(direct, query.moving), strict=True)]
        report(reached, query.moving, type(self).__name__, self.blind, acts, lambda: self.lost(query), flat)

    def reached(self, query: Query) -> list[bool] | None:
        """For each leaf of `query.moving`, whether it has an influence that the estimator sees; None: by the trace."""
        return None

    def trained(self, query: Query, moving: Outer) -> PyTree:
        """What training gives, as a function of the inexact leaves of `outer`: only looked at, never evaluated."""
        raise NotImplementedError

    def lost(self, query: Query) -> list[str | None]:
        """For each leaf of `query.moving`, where its influence is lost, if it has one that no derivative shows."""
        return [None] * len(jax.tree.leaves(query.moving))

    def meet_custom_rule(self, name: str) -> None:
        """Told where the inner loss has a derivative of its own, by a function of this name, so that its second
        derivatives need not commute: to warn or to refuse."""


_WARM = (
    "it acts through init_inner, and a warm start is a constant: start training anew at each outer step, with "
    "Nested(..., inner_start='cold') or inner_state=None"
)

_BETWEEN = (
    "it acts through the gradient of inner_loss, and the update of the inner optimizer has no derivative by its "
    "gradient (lion and other sign methods): use another optimizer"
)

INSIDE_TRAINING = "it acts only inside training, where this estimator does not look; use Unrolled or Implicit"
"""`blind` of an estimator that sees the direct influence on the outer loss alone."""


@register
@dataclasses.dataclass(frozen=True)
class Trained(Estimator):
    """An inner problem trained by `steps` steps of `optimizer`; the base of the estimators that do so.

    Examples:
      >>> import dataclasses, jax, optax
      >>> from bilevel.extend import Answer, INSIDE_TRAINING, Trained, register
      >>> from bilevel.testing import quadratic
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class DirectTerm(Trained):
      ...     blind = INSIDE_TRAINING
      ...     def differentiate(self, query):
      ...         state, trace = self.trajectory(query)
      ...         loss = lambda moving: query.outer_loss(state.params, query.at(moving))
      ...         (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(query.moving)
      ...         return Answer(value, grad, state, trace, aux)
      >>> arguments = quadratic().problem, None, {"tilt": jax.numpy.ones(3)}, None, None, jax.random.key(0)
      >>> DirectTerm(optax.sgd(0.5), steps=10).estimate(*arguments).grad["tilt"].tolist()  # as `FirstOrder`
      [1.0, 1.0, 1.0]
    """

    optimizer: Optimizer = dataclasses.field(metadata=setting(optimizers.is_optimizer))
    steps: int = dataclasses.field(metadata=setting(integer(1)))

    def __post_init__(self):
        check_fields(self)

    def init(self, problem: Problem, outer: Outer, key: Key) -> InnerState:
        """The inner problem before its first step: `init_inner(key, outer)` and a fresh optimizer state."""
        check_call(f"{type(self).__name__}.init", problem=problem, outer=outer, key=key)
        return begin(problem, self.optimizer, outer, key)

    def solve(
        self, problem: Problem, inner_state: InnerState | None, outer: Outer, inner_batches: Batch, key: Key
    ) -> InnerState:
        """The training map: `steps` steps from `inner_state`, differentiable in `inner_state` and `outer`.

        With `inner_state=None` it starts from `init_inner`. A third level is built on this method.
        """
        return self.trajectory(self.asked(problem, inner_state, outer, inner_batches, key))[0]

    def asked(self, problem: Problem, inner_state: Any, outer: Outer, inner_batches: Batch, key: Key) -> Query:
        """The arguments of `solve`, checked, as a `Query` without an outer batch."""
        method = f"{type(self).__name__}.solve"
        check_call(method, problem=problem, inner_state=inner_state, outer=outer, key=key)
        return Query(problem, self.steps, inner_state, outer, inner_batches, None, split_keys(key, self.steps))

    def trajectory(self, query: Query, **options: Any) -> tuple[InnerState, Trace]:
        """Training as `query` says, and what its steps reported. `options` go to `training.train`."""
        problem, outer, batches = query.problem, query.outer, query.inner_batches
        return train(problem, self.optimizer, self.resume(query), outer, batches, query.keys.inner, **options)

    def resume(self, query: Query) -> InnerState:
        """The inner state ready for a step at `query.outer`; a start of its own where there is none."""
        problem, state, outer = query.problem, query.inner_state, query.outer
        if state is None:
            return self.init(problem, outer, query.keys.start)
        moving, _ = problem.split(state.params)
        optimizers.check_state(self.optimizer, outer, moving, state.opt_state)
        opt_state = optimizers.refresh(self.optimizer, outer, moving, state.opt_state)
        return state._replace(opt_state=opt_state)

    def trained(self, query: Query, moving: Outer) -> PyTree:
        # A gradient with a rule of its own would hide from the trace what it reads.
        moved = dataclasses.replace(query, outer=query.at(moving))
        return self.trajectory(moved, gradient=reverse_gradient)[0].params

    def lost(self, query: Query) -> list[str | None]:
        problem, keys = query.problem, query.keys

        def start(moving: Outer) -> Inner:
            return problem.split(problem.start_inner(keys.start, query.at(moving)))[0]

        def gradient(moving: Outer) -> Inner:
            state = jax.lax.stop_gradient(self.resume(query))
            params, rest = problem.split(state.params)
            xs, bind = slots(query.inner_batches, self.steps)
            batch = bind(jax.tree.map(lambda x: x[0], xs))
            fixed = at_step(query.fixed, 0)
            return reverse_gradient(Point(params, moving, rest, fixed, problem, batch, keys.inner[0])).grad

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warm = query.inner_state is not None
            by_start = arrives(start, query.moving) if warm else [False] * len(jax.tree.leaves(query.moving))
            by_gradient = arrives(gradient, query.moving)
        return [
            _WARM if starts else (self.between() if inside else None)
            for starts, inside in zip(by_start, by_gradient, strict=True)
        ]

    def between(self) -> str:
        """What is between the inner gradient, which a leaf enters, and the hypergradient, which it does not reach."""
        return _BETWEEN


def value_and_hypergrad(problem: Problem, hypergradient: Hypergradient) -> Callable[..., tuple[jax.Array, PyTree]]:
    """The hypergradient as a plain function of `outer`, for any other method of optimization.

    Returns:
      `f(outer, inner_state, inner_batches, outer_batch, key) -> (value, grad)`: the arguments of `estimate`, that by
      which is differentiated first.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> function = bilevel.value_and_hypergrad(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20))
      >>> value, grad = function(jax.numpy.zeros(()), None, bilevel.FullBatch(train), val, jax.random.key(0))
      >>> round(float(value), 4), round(float(grad), 4)
      (0.0556, 0.1429)
    """
    checked("value_and_hypergrad", "problem", problem, is_problem)
    checked("value_and_hypergrad", "hypergradient", hypergradient, is_hypergradient)

    def function(
        outer: Outer, inner_state: InnerState | None, inner_batches: Batch, outer_batch: Batch, key: Key
    ) -> tuple[jax.Array, Outer]:
        estimate = hypergradient.estimate(problem, inner_state, outer, inner_batches, outer_batch, key)
        return estimate.value, estimate.grad

    return function
