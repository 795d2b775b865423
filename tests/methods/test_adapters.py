"""LoRA as a hook: its identities, its errors, and PEFT's folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods.adapters import LoRAConfig

SHAPES = {"q_proj": (6, 8), "v_proj": (6, 4), "down_proj": (10, 6)}
L = 3


def trained(config, seed=0, dtype=jnp.float64):
    """Parameters with B != 0, as after some training."""
    params = config.init(jax.random.key(seed), SHAPES, L, dtype)
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    return {
        site: {"a": leaves["a"], "b": jax.random.normal(key, leaves["b"].shape, dtype)}
        for key, (site, leaves) in zip(keys, params.items(), strict=True)
    }


def forward(hook, weights, x):
    """A stack of L layers scanned with the hook beside them, as a model does it."""

    def layer(carry, sliced):
        w, adapt = sliced
        return carry + jnp.tanh(adapt("q_proj", carry, carry @ w))[..., :6], None

    return jax.lax.scan(layer, x, (weights, hook))[0]


@pytest.fixture
def stack():
    key = jax.random.key(7)
    return jax.random.normal(key, (L, 6, 8), jnp.float64), jax.random.normal(key, (2, 5, 6), jnp.float64)


def same_bits(left, right):
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_init_is_kaiming_uniform_and_zero():
    config = LoRAConfig(rank=64, targets=("q_proj",))
    params = config.init(jax.random.key(0), {"q_proj": (100, 30)}, 4)
    a = params["q_proj"]["a"]
    assert a.shape == (4, 100, 64) and a.dtype == jnp.float32
    assert params["q_proj"]["b"].shape == (4, 64, 30) and not params["q_proj"]["b"].any()
    assert 0.099 < float(jnp.abs(a).max()) <= 0.1  # 1/sqrt(100)
    assert abs(float(a.std()) - 0.1 / 3**0.5) < 1e-3


def test_what_a_site_draws_does_not_depend_on_the_other_targets():
    one = LoRAConfig(targets=["v_proj"]).init(jax.random.key(0), SHAPES, L)
    two = LoRAConfig(targets="[qv]_proj").init(jax.random.key(0), SHAPES, L)
    assert same_bits(one["v_proj"]["a"], two["v_proj"]["a"])
    assert set(two) == {"q_proj", "v_proj"}


def test_update_is_scale_times_x_a_b(stack):
    _, x = stack
    config = LoRAConfig(rank=2, alpha=3.0)
    params = trained(config)
    layer = jax.tree.map(lambda leaf: leaf[1], config.bind(params, jnp.array([1.0, -0.5, 2.0])))
    y = jnp.ones((2, 5, 8))
    expected = y - 0.5 * 1.5 * (x @ params["q_proj"]["a"][1] @ params["q_proj"]["b"][1])
    np.testing.assert_allclose(layer("q_proj", x, y), expected, rtol=1e-13)
    assert layer("o_proj", x, y) is y


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("form", ["layer", "rank", "site"])
def test_gate_of_one_is_plain_lora_bit_for_bit(stack, form, jit, dtype):
    gate = {"layer": jnp.ones(L), "rank": jnp.ones((L, 4)), "site": {"q_proj": jnp.ones(L)}}[form]
    config = LoRAConfig(rank=4, alpha=7.3)
    params = trained(config, dtype=dtype)
    weights, x = (leaf.astype(dtype) for leaf in stack)
    run = jax.jit(forward) if jit else forward
    assert same_bits(run(config.bind(params), weights, x), run(config.bind(params, gate), weights, x))


def test_b_zero_is_the_base_model_and_its_gate_gradient_is_exactly_zero(stack):
    config = LoRAConfig(rank=4)
    params = config.init(jax.random.key(0), SHAPES, L, jnp.float64)
    loss = lambda gate: (forward(config.bind(params, gate), *stack) ** 2).sum()  # noqa: E731
    weights, x = stack
    for w in weights:
        x = x + jnp.tanh(x @ w)[..., :6]
    np.testing.assert_allclose(loss(jnp.ones(L)), (x**2).sum(), rtol=1e-14)
    assert not jax.grad(loss)(jnp.ones(L)).any()
    assert jax.grad(lambda p: (forward(config.bind(p), *stack) ** 2).sum())(params)["q_proj"]["b"].any()
