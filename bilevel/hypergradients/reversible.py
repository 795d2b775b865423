"""Unrolled differentiation of momentum descent that is run backwards, bit by bit, instead of being stored."""

from __future__ import annotations

import dataclasses
import fractions
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.data import slots
from bilevel.differentiation.gradients import Point, mixed_gradient
from bilevel.hypergradients.base import Estimator, Trained
from bilevel.hypergradients.query import Answer, Query
from bilevel.hypergradients.training import InnerState, Trace
from bilevel.problem.problem import Problem
from bilevel.settings.fields import Unfit, check_fields, register, setting
from bilevel.settings.numeric import integer, real
from bilevel.settings.rules import function
from bilevel.trees import PyTree, at_step, cast_like, combine, partition, replayed


def _fraction(value: Any) -> float:
    wanted = "must be a fraction inside (0, 1) with a denominator up to 1000"
    try:
        value = real(above=0.0, below=1.0)(value)
    except Unfit:
        raise Unfit(wanted) from None
    nearest = fractions.Fraction(value).limit_denominator(1000)
    if not 0 < nearest < 1 or abs(float(nearest) - value) > 1e-12:
        raise Unfit(wanted)
    return value


def _rate_or_function(value: Any) -> Any:
    if callable(value) and not isinstance(value, type):
        function("outer", result="learning rate")(value)
        return value
    try:
        return real(above=0.0)(value)
    except Unfit as reason:
        raise Unfit(f"{reason}, or a function outer -> learning rate") from None


@register
@dataclasses.dataclass(frozen=True)
class Reversible(Estimator):
    r"""`Unrolled` for gradient descent with momentum, in memory that hardly depends on the number of steps:

    $$
    v_{t+1} = \gamma v_t + \nabla f(w_t), \quad w_{t+1} = w_t - \eta v_{t+1},
      \qquad\text{undone by}\qquad
      w_t = w_{t+1} + \eta v_{t+1}, \quad v_t = (v_{t+1} - \nabla f(w_t)) / \gamma .
    $$

    Positions and velocities are 64-bit integers in units of $2^{-bits}$. A product with $\gamma = n/d$
    loses $\log_2(d/n)$ bits; they are put away, and taken back on the way back, so that every state returns
    exactly. What is kept is the state and one word a parameter for every $(62 - 2 \log_2 d) / \log_2(d/n)$ steps:
    364 of them at momentum 0.9. (`"step"` keeps a state for each.) Its time is that of `Binomial` with few repetitions:
    two inner gradients and a Hessian-vector product a step.

    It pays where the state is large beside one gradient's working memory and there are hundreds of steps: whole
    networks trained by momentum. It does not pay for LoRA, whose states are small; nor for few steps, where `"sqrt"`
    is as small and works with every optimizer. Adam cannot be undone this way.

    Rounding makes the training differ from `optax.sgd`'s by about $2^{-bits}$ a step, and the hypergradient with
    it. The way back is checked: if it does not end at the start (a number left the range
    $\pm 2^{61 - bits}$, or a gradient was not evaluated to the same bits twice), the gradient is NaN and
    `aux.info["reversed"]` False. It allows no forward mode and no third level.

    Args:
      learning_rate: $\eta$, or `outer -> scalar`.
      momentum: $\gamma$, a fraction with a denominator up to 1000, as 0.9 or 0.995.
      steps: K.
      bits: how fine the numbers are.

    Raises:
      ValueError: for steps < 1, a momentum that is no such fraction inside (0, 1), or without 64-bit integers
        (`jax_enable_x64`).

    References:
      Maclaurin, Duvenaud & Adams 2015, arXiv 1502.03492, algorithm 3.

    Examples:
      >>> import bilevel, jax
      >>> from bilevel.testing import ridge
      >>> with jax.enable_x64(True):  # positions are 64-bit integers
      ...     problem, train, val = ridge()
      ...     hypergradient = bilevel.Reversible(0.3, momentum=0.5, steps=60)
      ...     estimate = hypergradient.estimate(
      ...         problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ...     )
      >>> round(float(estimate.grad), 3), bool(estimate.aux.info["reversed"])
      (0.143, True)
    """

    learning_rate: float | Callable[[PyTree], Any] = dataclasses.field(metadata=setting(_rate_or_function))
    momentum: float = dataclasses.field(metadata=setting(_fraction))
    steps: int = dataclasses.field(metadata=setting(integer(1)))
    bits: int = dataclasses.field(default=40, kw_only=True, metadata=setting(integer(1)))

    def __post_init__(self):
        check_fields(self)
        if self.bits > 60:
            raise ValueError(f"Reversible(bits={self.bits}): must be at most 60, of the 64 of an integer.")

    @property
    def _fraction(self) -> fractions.Fraction:
        return fractions.Fraction(self.momentum).limit_denominator(1000)

    @property
    def _steps_a_word(self) -> int:
        n, d = self._fraction.as_integer_ratio()
        return int((62 - 2 * math.log2(d)) / math.log2(d / n))

    def _rate(self, outer: PyTree) -> Any:
        return self.learning_rate(outer) if callable(self.learning_rate) else self.learning_rate

    @property
    def _trained(self) -> Trained:
        return Trained(lambda outer: optax.sgd(self._rate(outer), self.momentum), self.steps)

    def init(self, problem: Problem, outer: PyTree, key: jax.Array) -> InnerState:
        """The inner problem before its first step, its optimizer state that of `optax.sgd` with momentum."""
        return self._trained.init(problem, outer, key)

    def solve(self, problem, inner_state, outer, inner_batches, key) -> InnerState:
        """The training map in integers; it cannot be differentiated."""
        query = self._trained.asked(problem, inner_state, outer, inner_batches, key)
        return _Training(self, query, self._trained.resume(query)).run()[0]

    def trained(self, query: Query, moving: PyTree) -> PyTree:
        return self._trained.trained(query, moving)

    def lost(self, query: Query) -> list[str | None]:
        return self._trained.lost(query)

    def meet_custom_rule(self, name: str) -> None:
        """Its inner gradients are differentiated in reverse mode there."""

    def differentiate(self, query: Query) -> Answer:
        """Costs 2 `steps` inner gradients and `steps` Hessian-vector products."""

        def start(moving):
            state = self._trained.resume(dataclasses.replace(query, outer=query.at(moving)))
            return (partition(state.params)[0], _velocity(state)), state

        first, pull_start, state = jax.vjp(start, query.moving, has_aux=True)
        training = _Training(self, query, state)
        state, trace, integers, fits = training.run()
        params, params_fixed = partition(state.params)
        outer_loss = lambda params, moving: query.outer_loss(combine(params, params_fixed), query.at(moving))  # noqa: E731
        value, pull_loss, aux = jax.vjp(outer_loss, params, query.moving, has_aux=True)
        ct_params, direct = pull_loss(jnp.ones_like(value))
        cts, through, is_start = training.undo(integers, first, ct_params)
        is_reversed = fits & is_start
        (at_start,) = pull_start(cast_like(cts, first))
        grad = jax.tree.map(lambda a, b, c: a + b + c, direct, through, at_start)
        grad = jax.tree.map(lambda g: jnp.where(is_reversed, g, jnp.nan), grad)
        info = {"hvps": jnp.asarray(self.steps, jnp.int32), "reversed": is_reversed}
        return Answer(value, grad, state, trace, aux, info)


def _velocity(state: InnerState) -> PyTree:
    return optax.tree_utils.tree_get(state.opt_state, "trace")


@jax.custom_jvp
def _final(x):
    return x


@_final.defjvp
def _refuse(primals, tangents):
    raise ValueError(
        "Reversible trains in integers, which allow no forward mode and no third level: "
        "use Unrolled(checkpoint='sqrt')."
    )


class _Training:
    """Runs K training steps in integers, and undoes them one by one."""

    def __init__(self, settings: Reversible, query: Query, state: InnerState):
        problem = query.problem
        if jax.dtypes.canonicalize_dtype(jnp.int64) != jnp.int64:
            raise ValueError("Reversible needs 64-bit integers: set jax.config.update('jax_enable_x64', True).")
        if problem.mutable:
            raise ValueError(
                f"Reversible cannot undo the mutable entries {', '.join(problem.mutable)}: "
                "use Unrolled(checkpoint='sqrt')."
            )
        self.settings, self.problem, self.state = settings, problem, state
        self.outer_moving, self.outer_fixed = jax.tree.map(_final, query.moving), query.fixed
        self.fixed = partition(state.params)[1]
        self.keys = query.keys.inner
        self.xs, self.bind = slots(query.inner_batches, settings.steps)

    def point(self, params, outer_moving, t) -> Point:
        slot, key = jax.tree.map(lambda x: x[t], (self.xs, replayed(self.keys)))
        return Point(params, outer_moving, self.fixed, at_step(self.outer_fixed, t), self.problem, self.bind(slot), key)

    def gradient(self, w, t):
        """The inner gradient at integers, in integers. It must come out the same, to the bit, on the way back."""
        # Barriers: the compiler sees the same graph both times, whatever is around it.
        params, outer, t = jax.lax.optimization_barrier((self.floats(w), self.outer_moving, t))
        result = jax.lax.optimization_barrier(mixed_gradient(self.point(params, outer, t)))
        return self.integers(result.grad), Trace(result.value, result.aux)

    def integers(self, tree):
        return jax.tree.map(lambda x: jnp.rint(jnp.ldexp(x.astype(jnp.float64), self.settings.bits)).astype(int), tree)

    def floats(self, tree):
        moving = partition(self.state.params)[0]
        back = jax.tree.map(lambda x: jnp.ldexp(x.astype(jnp.float64), -self.settings.bits), tree)
        return cast_like(back, moving)

    @property
    def rate(self):
        return jnp.asarray(self.settings._rate(combine(self.outer_moving, self.outer_fixed)), jnp.float64)

    def fits(self, w, v, grad):
        """Whether these integers, and the move they make, are so small that no sum of two leaves the range."""
        moves = jax.tree.map(lambda v: self.rate * v.astype(jnp.float64), v)
        sizes = [jnp.max(jnp.abs(x.astype(jnp.float64)), initial=0.0) for x in jax.tree.leaves((w, v, grad, moves))]
        return jnp.all(jnp.stack(sizes) < 2.0**61)

    def moved(self, w, v, sign):
        rate = self.rate
        return jax.tree.map(lambda w, v: w - sign * jnp.rint(rate * v.astype(jnp.float64)).astype(int), w, v)

    def scaled(self, v, lost, t, forward: bool):
        """v times or over the momentum, with the bits it loses or needs in word `t // _steps_a_word` of `lost`."""
        n, d = self.settings._fraction.as_integer_ratio()
        if not forward:
            n, d = d, n
        word = t // self.settings._steps_a_word

        def one(v, words):
            bits = words[word] * d + v % d
            return (v // d) * n + bits % n, words.at[word].set(bits // n)

        pairs = jax.tree.map(one, v, lost)
        return jax.tree.transpose(jax.tree.structure(v), jax.tree.structure((0, 0)), pairs)

    def run(self) -> tuple[InnerState, Trace, tuple, jax.Array]:
        def step(carry, t):
            w, v, lost = carry
            grad, trace = self.gradient(w, t)
            v, lost = self.scaled(v, lost, t, forward=True)
            v = jax.tree.map(jnp.add, v, grad)
            # Integers that wrap around would be undone as well: they are told here.
            return (self.moved(w, v, 1), v, lost), (trace, self.fits(w, v, grad))

        start = jax.tree.map(_final, (partition(self.state.params)[0], _velocity(self.state)))
        w, v = self.integers(start[0]), self.integers(start[1])
        words = -(-self.settings.steps // self.settings._steps_a_word)
        lost = jax.tree.map(lambda x: jnp.zeros((words, *x.shape), int), v)
        (w, v, lost), (trace, fits) = jax.lax.scan(step, (w, v, lost), jnp.arange(self.settings.steps))
        velocity = cast_like(self.floats(v), _velocity(self.state))
        opt_state = optax.tree_utils.tree_set(self.state.opt_state, trace=velocity)
        params = combine(self.floats(w), self.fixed)
        state = InnerState(params, opt_state, self.state.step + self.settings.steps, self.state.extra)
        return state, trace, (w, v, lost), jnp.all(fits)

    def undo(self, integers, start, ct_params):
        """`(cotangents of start, of outer, whether the way back ended at the start)`."""

        def advance(params, v, outer_moving, t):
            grad = mixed_gradient(self.point(params, outer_moving, t)).grad
            v = jax.tree.map(lambda v, g: self.settings.momentum * v + g, v, grad)
            rate = self.settings._rate(combine(outer_moving, self.outer_fixed))
            return jax.tree.map(lambda w, v: w - jnp.asarray(rate, w.dtype) * v, params, v), v

        def step(carry, t):
            (w, v, lost), cts, ct_outer = carry
            w = self.moved(w, v, -1)
            v = jax.tree.map(jnp.subtract, v, self.gradient(w, t)[0])
            v, lost = self.scaled(v, lost, t, forward=False)
            _, back = jax.vjp(lambda w, v, o: advance(w, v, o, t), self.floats(w), self.floats(v), self.outer_moving)
            *cts, more = back(cts)
            return ((w, v, lost), tuple(cts), jax.tree.map(jnp.add, ct_outer, more)), None

        zeros = jax.tree.map(jnp.zeros_like, (ct_params, self.outer_moving))
        carry = (integers, (ct_params, zeros[0]), zeros[1])
        ((w, v, _), cts, ct_outer), _ = jax.lax.scan(step, carry, jnp.arange(self.settings.steps), reverse=True)
        expected = (self.integers(start[0]), self.integers(start[1]))
        same = jax.tree.map(lambda a, b: jnp.all(a == b), (w, v), expected)
        return cts, ct_outer, jnp.all(jnp.stack(jax.tree.leaves(same)))
