"""Norms and units of trees, at every size that a number can have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.trees import global_norm, power_of_two, times

SIZES = {
    jnp.float32: [0.0, 4e-38, 1e-25, 3.0, 1e25, 2e38, np.inf, np.nan],
    jnp.float64: [0.0, 6e-308, 1e-200, 3.0, 1e200, 1e308, np.inf, np.nan],
}


@pytest.mark.parametrize(("dtype", "size"), [(t, x) for t, sizes in SIZES.items() for x in sizes])
def test_a_norm_is_right_at_every_size(dtype, size):
    tree = {"a": jnp.asarray([0.6 * size], dtype), "b": jnp.asarray([[-0.8 * size]], dtype)}
    for norm in (global_norm, jax.jit(global_norm)):
        np.testing.assert_allclose(float(norm(tree)), size, rtol=4 * jnp.finfo(dtype).eps)
        assert norm(tree).dtype == dtype
    unit = power_of_two(tree)
    mantissa, _ = np.frexp(np.asarray(unit, np.float64))
    assert mantissa == 0.5  # a power of two
    back = times(times(tree, 1 / unit), unit)
    for name, leaf in tree.items():
        np.testing.assert_array_equal(back[name], leaf)


def test_the_derivative_of_a_norm():
    np.testing.assert_allclose(jax.grad(global_norm)(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-15)
    direction = jnp.array([1e-200, -2e-200])
    np.testing.assert_allclose(jax.grad(global_norm)(direction), [1 / 5**0.5, -2 / 5**0.5], rtol=1e-14)


def test_trees_of_mixed_and_half_precision():
    tree = {"half": jnp.asarray([3e-5], jnp.float16), "single": jnp.asarray([4e20], jnp.float32)}
    assert global_norm(tree).dtype == jnp.float32
    np.testing.assert_allclose(float(global_norm(tree)), 4e20, rtol=1e-6)
    assert times(tree, jnp.float32(2))["half"].dtype == jnp.float16
    assert float(power_of_two({})) == 1 and float(global_norm({})) == 0
