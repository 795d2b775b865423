"""Proximal gradient steps as an optax transformation: inner problems with a penalty that is not smooth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.settings import checked, function, scalar
from bilevel.trees import PyTree


def proximal_gradient(learning_rate: Any, prox: Callable[[PyTree, Any], PyTree]) -> optax.GradientTransformation:
    r"""The proximal gradient step, :math:`w \leftarrow \mathrm{prox}_{\eta g}(w - \eta \nabla f(w))`.

    It minimises `inner_loss` + g, and goes with `Unrolled` and `FixedPoint`.

    Args:
      learning_rate: :math:`\eta`, a number or an array; below 2 / (largest eigenvalue of the Hessian) it converges.
      prox: `prox(w, eta)`, the proximal operator of :math:`\eta g` on trees like the inner variable. With
        `lambda outer: proximal_gradient(eta, lambda w, eta: soft_threshold(w, eta * outer))` as the optimizer, the
        strength of the penalty is an outer variable.

    References:
      Daubechies et al. 2004 (ISTA), arXiv math/0307152.
    """

    checked("proximal_gradient", "learning_rate", learning_rate, scalar(low=0.0))
    checked("proximal_gradient", "prox", prox, function("w", "eta"))

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("proximal_gradient needs the parameters: call update(grads, state, params).")
        moved = prox(jax.tree.map(lambda w, g: w - learning_rate * g, params, updates), learning_rate)
        return jax.tree.map(jnp.subtract, moved, params), state

    return optax.GradientTransformation(init, update)


def soft_threshold(tree: PyTree, threshold: Any) -> PyTree:
    """The proximal operator of `threshold * |w|_1`: every entry moves `threshold` towards 0, and stops there."""
    return jax.tree.map(lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0), tree)
