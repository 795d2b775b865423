"""Second derivatives by differences of first ones: DARTS and SAMA."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from bilevel.data import narrow, slots
from bilevel.differentiation import optimizers
from bilevel.differentiation.influence import dependence
from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.query import Answer, Query
from bilevel.hypergradients.training import InnerState, Trace, train
from bilevel.problem.problem import split_inner
from bilevel.settings.fields import register, setting
from bilevel.settings.numeric import real
from bilevel.trees import cast_like, combine, global_norm, widened


@register
@dataclasses.dataclass(frozen=True)
class _Differences(Trained):
    """What both have in common: `_states` says where the difference is taken, where the outer loss, and the trace."""

    radius: float = dataclasses.field(default=0.01, kw_only=True, metadata=setting(real(above=0.0)))

    takes_frozen: ClassVar[bool] = True

    def meet_custom_rule(self, name: str) -> None:
        """Refuses an inner loss with a derivative of its own, by a function of this name."""
        raise ValueError(
            f"{type(self).__name__}: inner_loss has a derivative of its own (`{name}`, by jax.custom_vjp or "
            "custom_jvp), so second derivatives need not commute, which a difference of gradients in outer takes for "
            "granted: use OneStep or Unrolled."
        )

    blind: ClassVar[str | None] = (
        "it does not act through the gradient of inner_loss, where alone this estimator looks; use Unrolled, or "
        "OneStep if it acts in the last step"
    )

    def differentiate(self, query: Query) -> Answer:
        """Costs `steps` + 3 inner gradients (at most) and one outer gradient."""
        return _difference(self, query, *self._states(query))

    def _states(self, query: Query) -> tuple[InnerState, InnerState, Trace]:
        raise NotImplementedError


@register
@dataclasses.dataclass(frozen=True)
class FiniteDifference(_Differences):
    r"""`OneStep` from first derivatives only: the last step's mixed second derivative is a central difference,

    $$
    \widehat{\frac{dF}{d\lambda}} = \partial_\lambda F(w_K, \lambda) + \frac{\partial_\lambda f(w^+, \lambda)
      - \partial_\lambda f(w^-, \lambda)}{2h}, \quad w^\pm = w_{K-1} \pm h u, \quad
      u = (\partial_g U)^\top\, \partial_w F(w_K, \lambda),
    $$

    f being the loss of the last batch and U the last update as a function of its gradient g. For gradient descent with
    step $\eta$, $u = -\eta\, \partial_w F$: DARTS. No second derivative of a loss is taken, so a loss need
    only have one; memory is that of a gradient.

    Its bias is that of `OneStep`, plus $O(h^2)$ times a third derivative (none if f is quadratic in w), plus
    rounding of about eps / h. It sees `outer` through the gradient of `inner_loss` only: learning rates and decoupled
    weight decays get 0 and a warning.

    Args:
      optimizer, steps: as for `Unrolled`.
      radius: the length of h u; DARTS's 0.01.

    Raises:
      ValueError: for steps < 1 or a radius that is not positive.

    References:
      Liu et al. 2019 (DARTS), arXiv 1806.09055.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.FiniteDifference(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)  # as `OneStep`: the loss is quadratic
      0.107
    """

    def _states(self, query: Query) -> tuple[InnerState, InnerState, Trace]:
        problem, outer, batches, keys = query.problem, query.outer, query.inner_batches, query.keys.inner
        slots(batches, self.steps)  # refuses batches for another number of steps
        before = self.resume(query)
        last = self.steps - 1
        traces = []
        if last:
            first = narrow(batches, 0, last)
            before, trace = train(problem, self.optimizer, before, outer, first, keys[:last])
            traces.append(trace)
        final = narrow(batches, last, last + 1)
        after, trace = train(problem, self.optimizer, before, outer, final, keys[last:], first=last)
        return before, after, jax.tree.map(lambda *xs: jnp.concatenate(xs), *traces, trace)


@register
@dataclasses.dataclass(frozen=True)
class SAMA(_Differences):
    r"""The identity for the inverse Hessian, adapted to the optimizer, by differences of first derivatives:

    $$
    \widehat{\frac{dF}{d\lambda}} = \partial_\lambda F + \frac{\partial_\lambda f(w_K + h u, \lambda)
      - \partial_\lambda f(w_K - h u, \lambda)}{2h}, \quad
      u = (\partial_g U)^\top\, \partial_w F(w_K, \lambda),
    $$

    all at the trained point, with the last batch, and with $\partial_g U$ the derivative of the optimizer's next
    update by its gradient: $-\eta$ for gradient descent, a diagonal for Adam, in general whatever reverse mode
    gives for the optimizer at hand.

    Its bias is that of `OneStep` (it is that estimator one step later), plus $O(h^2)$ times a third derivative
    of f (none if f is quadratic in w). Learning rates and decoupled weight decays get 0 and a warning, as in
    `FiniteDifference`. The paper also moves w along u after each estimate; that changes training and is left out here.

    Args:
      optimizer, steps: as for `Unrolled`.
      radius: the length of h u.

    Raises:
      ValueError: for steps < 1 or a radius that is not positive.

    References:
      Choe et al. 2023 (SAMA), arXiv 2310.05674.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.SAMA(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)  # the whole is 0.143
      0.107
    """

    def _states(self, query: Query) -> tuple[InnerState, InnerState, Trace]:
        state, trace = self.trajectory(query)
        return state, state, trace


def _difference(estimator: _Differences, query: Query, at: InnerState, state: InnerState, trace: Trace) -> Answer:
    """The hypergradient with u and the difference taken at the inner state `at`, and the outer loss at `state`."""
    problem, moving = query.problem, query.moving
    params, inner_fixed = split_inner(problem, at.params)
    trained, after_fixed = split_inner(problem, state.params)

    def inner_loss(params, moving):
        return query.inner_loss(combine(params, inner_fixed), query.at(moving), estimator.steps - 1)

    def outer_loss(params, moving):
        return query.outer_loss(combine(params, after_fixed), query.at(moving))

    value, pull_loss, aux = jax.vjp(outer_loss, trained, moving, has_aux=True)
    inner_value, gradient = jax.value_and_grad(inner_loss)(params, moving)
    transform = optimizers.transformation(estimator.optimizer, query.outer)
    updates = lambda grad: optimizers.update(transform, grad, at.opt_state, params, inner_value)[0]  # noqa: E731
    slope = jax.grad(inner_loss, argnums=1)
    # The difference depends on the direction through its length even where the slope does not.
    sees = jax.tree.unflatten(
        jax.tree.structure(moving), [any(row) for row in dependence(lambda w: slope(w, moving), params)]
    )

    toward_w, direct = pull_loss(jnp.ones_like(value))
    image, pull_updates = jax.vjp(updates, gradient)
    (direction,) = pull_updates(cast_like(toward_w, image))
    norm = global_norm(widened(direction))
    h = estimator.radius / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    shifted = lambda h: jax.tree.map(lambda w, u: w + h.astype(w.dtype) * u.astype(w.dtype), params, direction)  # noqa: E731
    ahead, behind = slope(shifted(h), moving), slope(shifted(-h), moving)
    cross = jax.tree.map(
        lambda a, b, sees: (a - b) / (2 * h).astype(a.dtype) if sees else jnp.zeros_like(a), ahead, behind, sees
    )
    return Answer(value, jax.tree.map(jnp.add, direct, cross), state, trace, aux)
