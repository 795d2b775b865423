"""What estimators are derived from: `Estimator`, the template, and `Trained`, where an optimizer trains.

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
from typing import Any

import jax

from bilevel.data import slots
from bilevel.differentiation import optimizers
from bilevel.differentiation.gradients import Point, reverse_gradient
from bilevel.differentiation.influence import arrives
from bilevel.differentiation.optimizers import Optimizer
from bilevel.hypergradients.answers import Unmet
from bilevel.hypergradients.arguments import check_call
from bilevel.hypergradients.contract import Aux as Aux
from bilevel.hypergradients.contract import Estimate as Estimate
from bilevel.hypergradients.contract import Hypergradient as Hypergradient
from bilevel.hypergradients.contract import is_hypergradient as is_hypergradient
from bilevel.hypergradients.estimator import Estimator as Estimator
from bilevel.hypergradients.optimality import require_constant_held, trained_part
from bilevel.hypergradients.query import Query, split_keys
from bilevel.hypergradients.training import InnerState, Trace, begin, train
from bilevel.problem.problem import Problem, is_problem, split_inner
from bilevel.settings.fields import check_fields, checked, register, setting
from bilevel.settings.numeric import integer
from bilevel.trees import Batch, Inner, Key, Outer, PyTree, at_step, combine, leaf_names, named

_WARM = (
    "it acts through init_inner, and a warm start is a constant: start training anew at each outer step, with "
    "Nested(..., inner_start='cold') or inner_state=None"
)

_BETWEEN = (
    "it acts through the gradient of inner_loss, and the update of the inner optimizer has no derivative by its "
    "gradient (lion and other sign methods): use another optimizer"
)

_LEFT_OUT = (
    "it acts through the gradient of inner_loss, from which no derivative leads on to the hypergradient: outer_loss "
    "does not depend on what it moves, or this estimator leaves that out (its `blind` should then say so)"
)

INSIDE_TRAINING = "it acts only inside training, where this estimator does not look; use Unrolled"
"""`blind` of an estimator that sees the direct influence on the outer loss alone. ("or Implicit" is added where a leaf
acts through the gradient of the inner loss.)"""


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

    def trainable(self, query: Query, state: InnerState) -> tuple[PyTree, Callable[[PyTree], Inner]]:
        """The part of the inner variable that the optimizer moves, and the way back to all of it.

        Returns:
          `(params, whole)`: the leaves of `state.params` that are trained and not frozen, and a function
          `whole(params)` that gives the inner variable of these, everything else being constant. (Of a leaf that is
          frozen in part, derivatives by `params` are 0 at the entries that do not move.)

        Raises:
          ValueError: if nothing is ever moved, or if the start makes leaves from `outer` that are then never moved.
        """
        query.ledger.divided = True
        problem, name = query.problem, type(self).__name__
        division, params = trained_part(name, problem, self.optimizer, query.outer, state)
        if query.inner_state is None:
            require_constant_held(name, problem, division, query.outer, query.keys.start)
        trained, rest = split_inner(problem, state.params)
        rest = combine(division.split(trained)[1], rest)
        return params, lambda params: combine(division.pinned(params), rest)

    def refuse_frozen(self, query: Query, state: InnerState) -> None:
        division, _ = trained_part(type(self).__name__, query.problem, self.optimizer, query.outer, state)
        names = leaf_names(split_inner(query.problem, state.params)[0])
        if frozen := [name for name, kind in zip(names, division.kinds, strict=True) if kind != "moving"]:
            raise Unmet(
                f"the optimizer never moves {named('inner', *frozen)} (at least in part), and this estimator does not "
                "say that it heeds that: use Unrolled or Implicit; if it is yours, take the part that moves from "
                "self.trainable(query, state), or set takes_frozen = True if it differentiates the training steps"
            )

    def resume(self, query: Query) -> InnerState:
        """The inner state ready for a step at `query.outer`; a start of its own where there is none."""
        problem, state, outer = query.problem, query.inner_state, query.outer
        if state is None:
            return self.init(problem, outer, query.keys.start)
        moving, _ = split_inner(problem, state.params)
        optimizers.check_state(self.optimizer, outer, moving, state.opt_state)
        opt_state = optimizers.refresh(self.optimizer, outer, moving, state.opt_state)
        return state._replace(opt_state=opt_state)

    def trained(self, query: Query, moving: Outer) -> PyTree:
        # A gradient with a rule of its own would hide from the trace what it reads.
        moved = dataclasses.replace(query, outer=query.at(moving))
        return self.trajectory(moved, gradient=reverse_gradient)[0].params

    def unseen(self, query: Query) -> list[str | None]:
        if self.blind != INSIDE_TRAINING:
            return super().unseen(query)
        return [INSIDE_TRAINING + " or Implicit" * acts for acts in self._by_gradient(query)]

    def lost(self, query: Query) -> list[str | None]:
        problem, keys = query.problem, query.keys

        def start(moving: Outer) -> Inner:
            return split_inner(problem, problem.start_inner(keys.start, query.at(moving)))[0]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warm = query.inner_state is not None
            by_start = arrives(start, query.moving) if warm else [False] * len(jax.tree.leaves(query.moving))
        rows = zip(by_start, self._by_gradient(query), self._by_gradient(query, updated=True), strict=True)
        return [
            _WARM if starts else (_LEFT_OUT if moves else self.between()) if inside else None
            for starts, inside, moves in rows
        ]

    def _by_gradient(self, query: Query, *, updated: bool = False) -> list[bool]:
        """For each leaf of `query.moving`, whether the first inner gradient has a derivative by it; if `updated`,
        whether the update of the optimizer has one through that gradient."""

        def first(moving: Outer) -> PyTree:
            state = jax.lax.stop_gradient(self.resume(query))
            params, rest = split_inner(query.problem, state.params)
            xs, bind = slots(query.inner_batches, self.steps)
            batch, fixed = bind(jax.tree.map(lambda x: x[0], xs)), at_step(query.fixed, 0)
            point = Point(params, moving, rest, fixed, query.problem, batch, query.keys.inner[0])
            result = reverse_gradient(point)
            if not updated:
                return result.grad
            transform = optimizers.transformation(self.optimizer, query.outer)
            return optimizers.update(transform, result.grad, state.opt_state, params, result.value)[0]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return arrives(first, query.moving)

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
