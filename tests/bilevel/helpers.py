"""What several test files share: compiled entry points, comparisons, and small problems."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from bilevel.hypergradients.contract import driven_from_host

KEY = jax.random.key(7)

# Problem and hypergradient are arguments, so that cases which differ in their arrays share a compilation.
jitted_estimate = jax.jit(lambda problem, hypergradient, *args: hypergradient.estimate(problem, *args))
_solve = jax.jit(lambda problem, hypergradient, *args: hypergradient.solve(problem, *args))
step = jax.jit(lambda solver, *args: solver.step(*args))


def estimate(problem: Any, hypergradient: Any, *args: Any) -> Any:
    """`hypergradient.estimate`, compiled unless it runs compiled programs itself."""
    if driven_from_host(hypergradient):
        return hypergradient.estimate(problem, *args)
    return jitted_estimate(problem, hypergradient, *args)


def solve(problem: Any, hypergradient: Any, *args: Any) -> Any:
    """`hypergradient.solve`, likewise."""
    if driven_from_host(hypergradient):
        return hypergradient.solve(problem, *args)
    return _solve(problem, hypergradient, *args)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Each leaf within `tolerance` of the expected one, relative to its norm; a leaf of zeros exactly."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        error = np.linalg.norm(a - b)
        assert error <= tolerance * np.linalg.norm(b), f"{jax.tree_util.keystr(path)}: {error} off {b}"


def without_keys(tree: Any) -> Any:
    """`tree` with typed random keys as integers, for comparison."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


def assert_equal(actual: Any, expected: Any) -> None:
    """Same structure, dtypes and bits."""
    actual, expected = without_keys(actual), without_keys(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, jax.tree_util.keystr(path)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# A two-layer network with dropout. The outer variables weigh the rows of a batch and the decay. Rational functions
# compile several times faster than tanh and log.

X = np.asarray(jax.random.normal(jax.random.key(1), (12, 3)))
Y = np.asarray(jax.random.normal(jax.random.key(2), (12, 2)))


def network(inner, x, key):
    hidden = x @ inner["W"] + inner["b"][None]
    hidden = hidden / (1.0 + hidden**2)
    keep = jax.random.bits(key, hidden.shape, jnp.uint32) < np.uint32(0.8 * 2**32)
    return jnp.where(keep, hidden / 0.8, 0.0) @ inner["V"]


def network_inner(inner, outer, batch, key):
    weight = outer["weight"][batch["row"]] ** 2
    fit = jnp.mean(weight[:, None] * (network(inner, batch["x"], key) - batch["y"]) ** 2)
    return fit + outer["decay"] ** 2 * sum(jnp.sum(leaf**2) for leaf in inner.values())


def network_outer(inner, outer, batch, key):
    miss = (network(inner, batch["x"], key) - batch["y"]) ** 2
    return jnp.mean(miss / (1.0 + miss)) + 0.01 * jnp.sum(outer["weight"] ** 2) + 0.01 * outer["decay"] ** 2


def network_start(key, outer):
    first, second = jax.random.split(key)
    return {
        "W": 0.5 * jax.random.normal(first, (3, 4)),
        "b": jnp.full(4, 0.01),
        "V": 0.5 * jax.random.normal(second, (4, 2)),
    }


def network_outer_start(key):
    return {"weight": jnp.linspace(0.5, 1.5, 12), "decay": jnp.asarray(0.2)}


NETWORK = bilevel.Problem(network_inner, network_outer, network_start, network_outer_start)
ROWS = {"x": X, "y": Y, "row": np.arange(12)}


def network_batches(steps: int, size: int = 5) -> bilevel.Indexed:
    """`steps` batches of rows; integers among them."""
    index = jax.random.randint(jax.random.key(3), (steps, size), 0, 12)
    return bilevel.Indexed(jax.tree.map(jnp.asarray, ROWS), index)


# The smallest problem with a training in it, for tests of what surrounds the estimate.


def line_inner(inner, outer, batch, key):
    return jnp.sum((inner - outer) ** 2)


def line_outer(inner, outer, batch, key):
    return jnp.sum((inner - 1.0) ** 2)


LINE = bilevel.Problem(line_inner, line_outer, lambda key, outer: jnp.zeros(2), lambda key: jnp.full(2, 0.3))
LINE_SOLVER = bilevel.Nested(LINE, bilevel.Unrolled(optax.sgd(0.1), 3), optax.adam(0.05))
