"""A ridge regression on four rows with closed forms, on which the examples of the reference are shown."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevel.problem.problem import Problem


def ridge() -> tuple[Problem, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    r"""The problem of the examples in this reference: the decay of a ridge regression on four rows, from its logarithm.

    With the training rows $(X, y)$ and the validation rows $(Z, t)$,

    $$
    f(w, \lambda) = \tfrac18 |X w - y|^2 + \tfrac12 e^\lambda |w|^2, \qquad
      F(w, \lambda) = \tfrac14 |Z w - t|^2 .
    $$

    The rows are such that $X^\top X / 4 = \mathrm{diag}(1, 1/4)$, $X^\top y / 4 = (3/2, 3/4)$, Z is the
    identity and $t = (1, 1)$. So everything has a closed form. With $s = e^\lambda$,

    $$
    w^*(\lambda) = \Big(\frac{3/2}{1 + s}, \frac{3/4}{1/4 + s}\Big), \qquad
      \frac{dF}{d\lambda} = \frac{s}{2} \Big(\frac{(1 - w_1^*)\, w_1^*}{1 + s}
      + \frac{(1 - w_2^*)\, w_2^*}{1/4 + s}\Big) .
    $$

    The search starts at $\lambda = 0$, where $w^* = (0.75, 0.6)$ and $dF/d\lambda = 0.142875$. It
    ends at the decay $s = 1/2$, where $w^* = (1, 1)$ and F is 0. Training starts at 0, and gradient descent
    with a rate of 0.5 comes to rest within 20 steps.

    Returns:
      `(problem, train, val)`: the data are pairs of rows and targets.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Implicit(optax.sgd(0.5), steps=20)
      >>> function = bilevel.value_and_hypergrad(problem, hypergradient)
      >>> value, grad = function(jax.numpy.zeros(()), None, bilevel.FullBatch(train), val, jax.random.key(0))
      >>> round(float(grad), 3)
      0.143
    """
    train = jnp.array([[1.0, 0.5], [1.0, -0.5], [-1.0, 0.5], [-1.0, -0.5]]), jnp.array([3.0, 0.0, 0.0, -3.0])
    val = jnp.eye(2), jnp.ones(2)
    return Problem(_ridge_inner, _ridge_outer, _ridge_start, _ridge_log_decay), train, val


def _mean_squares(w, batch):
    rows, targets = batch
    return 0.5 * jnp.mean((rows @ w - targets) ** 2)


def _ridge_inner(w, log_decay, batch, key):
    return _mean_squares(w, batch) + 0.5 * jnp.exp(log_decay) * jnp.sum(w**2)


def _ridge_outer(w, log_decay, batch, key):
    return _mean_squares(w, batch)


def _ridge_start(key, log_decay):
    return jnp.zeros(2)


def _ridge_log_decay(key):
    return jnp.zeros(())
