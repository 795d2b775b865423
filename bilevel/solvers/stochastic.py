"""What the single-loop and stochastic solvers share: state, step sizes, one outer iteration, oracle counts.

Throughout, w is `inner`, lambda `outer`, f `inner_loss`, F `outer_loss`, H = d2f/dw2, C = d2f/(dlambda dw), and v an
estimate of H^-1 dF/dw; the hypergradient is dF/dlambda - C v. rho is `inner_step`, gamma `outer_step`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import bijectors
from bilevel.differentiation.flat import marks
from bilevel.differentiation.gradients import Point, own_rule, reverse_gradient
from bilevel.differentiation.influence import arrives, dependence, report
from bilevel.hypergradients.arguments import refuse_complex
from bilevel.hypergradients.training import InnerState
from bilevel.problem.arguments import check_outer
from bilevel.problem.problem import Problem, is_problem, projected
from bilevel.settings.fields import check_fields, checked, child, register
from bilevel.settings.numeric import scalar, step_size
from bilevel.settings.rules import instance, random_key
from bilevel.solvers.oracles import Draws, Oracles, leading
from bilevel.trees import PyTree, advance_keys, at_step, combine, distinct, global_norm, partition

StepSize = float | jax.Array | Callable[[jax.Array], Any]
"""A constant, or a schedule `step -> size` such as those of optax; `step` counts outer iterations from 0."""


@register
@dataclasses.dataclass(frozen=True)
class Power:
    """The schedule `value / (step + 1) ** exponent` that the papers state their step sizes in.

    Examples:
      >>> import bilevel
      >>> schedule = bilevel.Power(1.0, 0.5)
      >>> [round(float(schedule(step)), 3) for step in range(4)]
      [1.0, 0.707, 0.577, 0.5]
    """

    value: float | jax.Array = dataclasses.field(metadata=child(scalar(low=0.0)))
    exponent: float | jax.Array = dataclasses.field(metadata=child(scalar()))

    def __post_init__(self):
        check_fields(self)

    def __call__(self, step: jax.Array) -> jax.Array:
        return self.value / (jnp.asarray(step, jnp.result_type(float)) + 1) ** self.exponent


class State(NamedTuple):
    """State of a stochastic solver.

    Attributes:
      outer: the outer variable.
      inner: the inner problem; `inner.params` is the inner variable, `inner.step` counts its updates.
      memory: what the solver keeps beside (adjoint, momenta, tables); its own docstring says what.
      step: outer iterations taken, int32.
      key: randomness of the run; a step takes what it needs from it and from its number.
    """

    outer: PyTree
    inner: InnerState
    memory: PyTree
    step: jax.Array
    key: jax.Array


class Calls(NamedTuple):
    """Oracle calls of one outer iteration, in batches: gradients of both losses, Hessian-vector products (H v), and
    mixed products (C v, the mixed second derivative times a vector).

    A pass over a whole data set of N rows counts as ceil(N / b) calls, b being the rows of a batch.

    Examples:
      >>> from bilevel.extend import Calls
      >>> calls = Calls(inner_gradients=1, mixed_products=1)
      >>> calls.hvps, sum(calls)
      (0, 2)
    """

    inner_gradients: Any = 0
    outer_gradients: Any = 0
    hvps: Any = 0
    mixed_products: Any = 0


class Iterate(NamedTuple):
    """What one outer iteration gives: the new variables, the direction lambda moved along, losses, and counts.

    Examples:
      >>> import jax
      >>> from bilevel.extend import Calls, Iterate
      >>> w, lam, zero = jax.numpy.zeros(2), jax.numpy.ones(()), jax.numpy.zeros(())
      >>> new = Iterate(w, lam, (), zero, inner_loss=zero, outer_loss=zero, calls=Calls(inner_gradients=1))
      >>> new.calls.inner_gradients, new.memory  # this solver remembers nothing
      (1, ())
    """

    inner: PyTree
    outer: PyTree
    memory: PyTree
    direction: PyTree
    inner_loss: jax.Array
    outer_loss: jax.Array
    calls: Calls


@dataclasses.dataclass(frozen=True)
class Iteration(Oracles):
    """One outer iteration as a solver sees it: where it stands, its draws, and both losses.

    Attributes:
      w, lam: moving leaves of inner and outer.
      memory: of the state.
      step: number of the iteration.
      draws, outer_draws: batches and keys of the two losses.
      key: randomness of the solver itself.
      inner_step, linear_step, outer_step: step sizes of w, of linear systems in H and of lambda, now.

    Examples:
      >>> import dataclasses, bilevel
      >>> from bilevel.extend import Calls, Iterate, Iteration, Stochastic, descend, register
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class Training(Stochastic):  # moves w alone
      ...     def iterate(self, at: Iteration):
      ...         outside = at.outer_gradient(at.w, at.lam, at.outer_draws[0])
      ...         inside = at.products(at.w, at.lam, outside.inner, at.draws[0])
      ...         w, rest = descend(at.w, at.inner_step, inside.grad), 0 * at.lam
      ...         return Iterate(w, at.move_outer(rest), (), rest, inside.value, outside.value, Calls(1, 1))
      >>> solver = Training(problem, inner_step=0.5, outer_step=1.0)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=20, progress=False)
      >>> [round(float(w), 3) for w in result.inner.params]
      [0.75, 0.6]
    """

    w: PyTree
    lam: PyTree
    memory: PyTree
    step: jax.Array
    draws: Draws
    outer_draws: Draws
    key: jax.Array
    inner_step: Any
    linear_step: Any
    outer_step: Any

    def move_outer(self, direction: PyTree) -> PyTree:
        """The whole `outer` after a step against `direction`: keys advanced, then projected."""
        free, direction = bijectors.free_gradient(self.problem.domain, self.lam, direction)
        moved = bijectors.natural(self.problem.domain, descend(free, self.outer_step, direction))
        outer = combine(moved, advance_keys(self.outer_fixed))
        return projected(self.problem, outer)


@register
@dataclasses.dataclass(frozen=True)
class Stochastic:
    """Base of the solvers whose outer iteration is a fixed number of gradients and products.

    Subclasses say what an iteration does (`iterate`), what it remembers (`start`), and how many batches it wants.

    Args:
      problem: the bilevel problem.
      inner_step: step size rho of the inner variable, a number or a schedule.
      outer_step: step size gamma of the outer variable, likewise.

    Metrics of a step: `outer_loss`, `inner_loss` (on this step's batches), `direction_norm` (of the direction that
    `outer` moved along, which momentum makes longer than the hypergradient), and the oracle calls made:
    `inner_gradients`, `outer_gradients`, `hvps`, `mixed_products`.

    Warns:
      StructuralZeroWarning: at a step, for a leaf of `outer` that has no influence on either loss with a derivative.

    Raises:
      ValueError: if a count among the settings is not an integer >= 1, a step size is neither a number >= 0 nor a
        schedule, or the problem has mutable entries.

    Examples:
      >>> import dataclasses, math, bilevel
      >>> from bilevel.extend import Calls, Iterate, Stochastic, descend, register
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> @register
      ... @dataclasses.dataclass(frozen=True)
      ... class OneStepDescent(Stochastic):  # T1-T2 on mini-batches
      ...     def iterate(self, at):
      ...         outside = at.outer_gradient(at.w, at.lam, at.outer_draws[0])
      ...         inside = at.products(at.w, at.lam, outside.inner, at.draws[0])
      ...         direction = descend(outside.outer, at.inner_step, inside.mixed)
      ...         w, lam = descend(at.w, at.inner_step, inside.grad), at.move_outer(direction)
      ...         return Iterate(w, lam, (), direction, inside.value, outside.value, Calls(1, 1, 0, 1))
      >>> solver = OneStepDescent(problem, inner_step=0.5, outer_step=1.0)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=100, progress=False)
      >>> round(math.exp(result.outer), 3)
      0.5
    """

    problem: Problem = dataclasses.field(metadata=child(is_problem))
    inner_step: StepSize = dataclasses.field(metadata=child(step_size()))
    outer_step: StepSize = dataclasses.field(metadata=child(step_size()))

    def __post_init__(self):
        check_fields(self)
        if self.problem.mutable:
            raise ValueError(
                f"{type(self).__name__} takes gradient steps of its own and carries no mutable entries "
                f"({', '.join(self.problem.mutable)}): use Nested."
            )

    @property
    def inner_batches_per_step(self) -> int:
        """Inner batches a step wants."""
        return 1

    @property
    def outer_batches_per_step(self) -> int:
        """Outer batches a step wants; where it is not 1, `step`'s `outer_batch` has a leading axis of this length."""
        return 1

    def start(self, w: PyTree, lam: PyTree) -> PyTree:
        """`State.memory` before the first iteration."""
        return ()

    def iterate(self, at: Iteration) -> Iterate:
        """One outer iteration."""
        raise NotImplementedError

    commuting: ClassVar[bool] = False
    """Whether an iteration is right only where second derivatives of the inner loss commute."""

    def _examined(self, at: Iteration, state: State) -> Iteration:
        """`at`, with what the traces of the losses say of their derivatives.

        Warns:
          StructuralZeroWarning: names leaves of outer on which the direction does not depend, whatever their value.

        Raises:
          ValueError: if there is no other leaf, or the inner loss has a derivative of its own that does not apply.
        """
        draw, name = at.draws[0], type(self).__name__
        point = Point(
            at.w, at.lam, at.inner_fixed, at_step(at.outer_fixed, draw.number), self.problem, draw.batch, draw.key
        )
        rule = own_rule(point)
        if rule and self.commuting:
            raise ValueError(f"{name}: inner_loss has a derivative of its own (`{rule}`), {_REFUSED}.")

        def mixed(v):
            if rule is None:  # forward over reverse, as the iteration takes it
                by_outer = lambda w: jax.grad(lambda lam: at.inner_value(w, lam, draw))(at.lam)  # noqa: E731
                return jax.jvp(by_outer, (at.w,), (v,))[1]
            return jax.vjp(lambda lam: reverse_gradient(point._replace(outer=lam)).grad, at.lam)[1](v)[0]

        def direction(one, v):
            outside = jax.vjp(lambda lam: at.outer_value(at.w, lam, at.outer_draws[0]), at.lam)[1](one)[0]
            return list(zip(jax.tree.leaves(outside), jax.tree.leaves(mixed(v)), strict=True))

        def start(lam):
            return partition(self.problem.start_inner(state.key, combine(lam, at.outer_fixed)))[0]

        def lost():
            return [_AT_START if starts else None for starts in arrives(start, at.lam)]

        try:
            value = jax.eval_shape(lambda: at.outer_value(at.w, at.lam, at.outer_draws[0]))
            rows = dependence(lambda both: direction(*both), (jnp.ones((), value.dtype), at.w))
        except Exception:  # a loss without a second derivative: the iteration needs none, or will say so itself
            return dataclasses.replace(at, commutes=rule is None)
        reached = [any(a) or any(b) for a, b in zip(rows[::2], rows[1::2], strict=True)]
        if not all(reached):
            seen = lambda lam: (  # noqa: E731
                reverse_gradient(point._replace(outer=lam)).grad,
                at.outer_value(at.w, lam, at.outer_draws[0]),
            )
            nothing = [None] * len(reached)
            report(reached, at.lam, name, nothing, [False] * len(reached), lost, marks(seen, at.lam))
        return dataclasses.replace(at, commutes=rule is None)

    def init(self, key: jax.Array) -> State:
        """The state before the first outer iteration."""
        checked(f"{type(self).__name__}.init", "key", key, random_key)
        outer_key, inner_key, key = jax.random.split(key, 3)
        outer = self.problem.start_outer(outer_key)
        check_outer("init_outer returned", outer)
        inner = self.problem.start_inner(inner_key, outer)
        for what, tree in (("inner", inner), ("outer", outer)):
            remedy = "use Nested with Unrolled, or write them in real and imaginary parts"
            refuse_complex(type(self).__name__, what, tree, remedy)
        memory = self.start(partition(inner)[0], partition(outer)[0])
        zero = jnp.zeros((), jnp.int32)
        return distinct(State(outer, InnerState(inner, (), zero), memory, zero, key))

    def step(self, state: State, inner_batches: PyTree, outer_batch: PyTree) -> tuple[State, dict[str, jax.Array]]:
        """One outer iteration; batches in any of the forms that `bilevel.data` names.

        Draw t of the inner loss sees the t-th inner batch and every random key of `outer` folded with t; those of the
        outer loss are numbered on from `inner_batches`.

        Raises:
          ValueError: if a leading axis is not as long as `inner_batches_per_step` or `outer_batches_per_step` says.
        """
        name = f"{type(self).__name__}.step"
        checked(name, "state", state, instance(State, "a state that init(key) of a stochastic solver returned"))
        at = self.iteration(state, inner_batches, outer_batch)
        new = self.iterate(at)
        inner = InnerState(combine(new.inner, at.inner_fixed), (), state.inner.step + 1)
        metrics = {
            "outer_loss": new.outer_loss,
            "inner_loss": new.inner_loss,
            "direction_norm": global_norm(new.direction),
            **{name: jnp.asarray(n, jnp.int32) for name, n in new.calls._asdict().items()},
        }
        return State(new.outer, inner, new.memory, state.step + 1, state.key), metrics

    def iteration(self, state: State, inner_batches: PyTree, outer_batch: PyTree) -> Iteration:
        """What `iterate` is given by the step from `state` on these batches; warns and raises as `step`."""
        # A function of the step, so that randomness that nobody reads is never made.
        key, own = jax.random.split(jax.random.fold_in(state.key, state.step))
        count = self.inner_batches_per_step
        if self.outer_batches_per_step == 1:
            outer_batch = leading(outer_batch)
        (w, inner_fixed), (lam, outer_fixed) = partition(state.inner.params), partition(state.outer)
        linear_step = getattr(self, "linear_step", None)
        at = Iteration(
            self.problem,
            inner_fixed,
            outer_fixed,
            True,
            w,
            lam,
            state.memory,
            state.step,
            Draws(inner_batches, key, 0, count, "inner calls"),
            Draws(outer_batch, key, count, self.outer_batches_per_step, "outer calls"),
            own,
            size(self.inner_step, state.step),
            size(self.inner_step if linear_step is None else linear_step, state.step),
            size(self.outer_step, state.step),
        )
        return self._examined(at, state)


_AT_START = (
    "it acts through init_inner, which is left behind after the first step: use Nested(..., inner_start='cold') with "
    "Unrolled"
)

_REFUSED = (
    "so second derivatives need not commute, which differences of gradients in outer take for granted: use SOBA, "
    "StocBiO or another solver of linear systems, or Nested with Unrolled"
)


def size(step_size: StepSize, step: jax.Array) -> Any:
    """Evaluates a step size, which may be a schedule, at outer iteration `step`."""
    with jax.numpy_dtype_promotion("standard"):  # a schedule is the user's, or optax's
        found = step_size(step) if callable(step_size) else step_size
    if jnp.shape(found):
        raise ValueError(f"A step size is a single number, but one here is an array of shape {jnp.shape(found)}.")
    return found


def descend(tree: PyTree, step: Any, direction: PyTree) -> PyTree:
    """`tree - step * direction`, each leaf in its own dtype.

    Examples:
      >>> import jax
      >>> from bilevel.extend import descend
      >>> descend(jax.numpy.array([1.0, 2.0]), 0.5, jax.numpy.array([2.0, 2.0])).tolist()
      [0.0, 1.0]
    """
    return jax.tree.map(lambda x, d: x - jnp.asarray(step).astype(x.dtype) * d.astype(x.dtype), tree, direction)


def plus(a: PyTree, b: PyTree) -> PyTree:
    """`a + b`."""
    return jax.tree.map(jnp.add, a, b)


def minus(a: PyTree, b: PyTree) -> PyTree:
    """`a - b`."""
    return jax.tree.map(jnp.subtract, a, b)


def zeros(tree: PyTree) -> PyTree:
    """Zeros like `tree`."""
    return jax.tree.map(jnp.zeros_like, tree)
