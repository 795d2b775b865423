"""What the tests of implicit differentiation share: a quadratic, a compiled estimate, Newton's method."""

import jax
import jax.numpy as jnp
import optax

from tests.bilevel.quadratic import KEY, Quadratic

Q = Quadratic.random()
SGD = optax.sgd(Q.eta)


@jax.jit
def estimate(hypergradient, problem, state, outer, batches=None, outer_batch=None, key=KEY):
    return hypergradient.estimate(problem, state, outer, batches, outer_batch, key)


def newton(problem, outer, batch, key, tol=1e-13):
    """Minimises the inner loss, to a tolerance."""

    def loss(w):
        return problem.inner_value(w, outer, batch, key)[0]

    def going(w):
        return jnp.linalg.norm(jax.grad(loss)(w)) > tol

    def step(w):
        return w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w))

    return jax.lax.while_loop(going, step, problem.init_inner(key, outer))
