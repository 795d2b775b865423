"""A quadratic finite sum with closed forms: what the stochastic solvers are run on."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import Batches, Problem

INNER, OUTER, ROWS, OUTER_ROWS = 5, 4, 12, 9
KEY = jax.random.key(0)


def _spd(rng, rows, size):
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    noise = 0.2 * rng.normal(size=(rows, size, size))
    return (basis * np.linspace(0.5, 1.0, size)) @ basis.T + 0.3 * noise @ noise.transpose(0, 2, 1)


def _data():
    rng = np.random.default_rng(0)
    inner = {
        "H": _spd(rng, ROWS, INNER),
        "C": 0.5 * rng.normal(size=(ROWS, OUTER, INNER)),
        "b": rng.normal(size=(ROWS, INNER)),
    }
    outer = {
        "A": _spd(rng, OUTER_ROWS, INNER),
        "c": rng.normal(size=(OUTER_ROWS, INNER)),
        "R": _spd(rng, OUTER_ROWS, OUTER),
        "r": rng.normal(size=(OUTER_ROWS, OUTER)),
    }
    return jax.tree.map(jnp.asarray, (inner, outer))


DATA, OUTER_DATA = _data()
FULL = Batches(DATA, ROWS), Batches(OUTER_DATA, OUTER_ROWS)
SMALL = Batches(DATA, 3), Batches(OUTER_DATA, 3)


def inner_loss(w, lam, batch, key):
    H, C, b = (batch[k].mean(0) for k in "HCb")
    return 0.5 * w @ H @ w + lam @ C @ w + b @ w


def outer_loss(w, lam, batch, key):
    A, c, R, r = (batch[k].mean(0) for k in "AcRr")
    return 0.5 * w @ A @ w + c @ w + 0.5 * lam @ R @ lam + r @ lam


PROBLEM = Problem(inner_loss, outer_loss, lambda key, lam: jnp.zeros(INNER), lambda key: -2 * jnp.ones(OUTER))


@jax.jit
def distance(lam):
    """`|grad h|^2` at `lam`, in units of its value at the start; h in closed form."""

    def square(lam):
        H, C, b = (DATA[k].mean(0) for k in "HCb")
        h = jax.grad(lambda lam: outer_loss(jnp.linalg.solve(H, -b - C.T @ lam), lam, OUTER_DATA, None))
        return jnp.sum(h(lam) ** 2)

    return square(lam) / square(-2 * jnp.ones(OUTER))
