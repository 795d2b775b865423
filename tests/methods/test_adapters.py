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


def test_unselected_layers_change_no_bit_and_get_no_gradient(stack):
    config = LoRAConfig(rank=4, layers=[2, 0])
    params = trained(config)
    layer = jax.tree.map(lambda leaf: leaf[1], config.bind(params))
    y = jnp.array([[-0.0, 1.0, 0.0, -3.0, jnp.inf, 2.0, 5e-324, 1.0]])
    assert same_bits(layer("q_proj", jnp.full((1, 6), 1e300), y), y)  # even where x A overflows
    loss = lambda params, gate: (forward(config.bind(params, gate), *stack) ** 2).sum()  # noqa: E731
    of_params, of_gate = jax.grad(loss, (0, 1))(params, jnp.ones(L))
    for gradient in of_params["q_proj"].values():
        assert not gradient[1].any() and gradient[0].any() and gradient[2].any()
    assert of_gate[1] == 0.0 and of_gate[0] != 0.0
    weights, x = stack
    frozen = {**params, "q_proj": jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), params["q_proj"])}
    assert same_bits(forward(config.bind(params), weights, x), forward(config.bind(frozen), weights, x))


def test_rank_mask_is_lora_of_smaller_rank(stack):
    big, small = LoRAConfig(rank=4, alpha=8.0), LoRAConfig(rank=3, alpha=6.0)
    params = trained(big)
    cut = {site: {"a": leaves["a"][..., :3], "b": leaves["b"][:, :3]} for site, leaves in params.items()}
    mask = jnp.broadcast_to(jnp.arange(4) < 3, (L, 4))
    hook = big.bind(params, mask={"q_proj": mask})
    np.testing.assert_allclose(forward(hook, *stack), forward(small.bind(cut), *stack), rtol=1e-13)


def test_gate_derivatives_up_to_the_third_agree_with_differences(stack):
    config = LoRAConfig(rank=2)
    params = trained(config)
    value = lambda t: (forward(config.bind(params, t * jnp.array([1.0, -0.3, 0.5])), *stack) ** 2).sum()  # noqa: E731
    derivatives = [value]
    for _ in range(3):
        derivatives.append(jax.jacfwd(derivatives[-1]) if len(derivatives) % 2 else jax.grad(derivatives[-1]))
        h, low, high = 1e-5, *derivatives[-2:]
        np.testing.assert_allclose(high(0.4), (low(0.4 + h) - low(0.4 - h)) / (2 * h), rtol=1e-6)


def test_float32_adapter_on_bfloat16_model_keeps_the_models_dtype():
    config = LoRAConfig(rank=2, targets=["q_proj"])
    params = config.init(jax.random.key(0), SHAPES, L)
    layer = jax.tree.map(lambda leaf: leaf[0], config.bind(params, jnp.ones(L, jnp.float64)))
    assert layer("q_proj", jnp.ones((1, 2, 6), jnp.bfloat16), jnp.ones((1, 2, 8), jnp.bfloat16)).dtype == jnp.bfloat16


def test_merged_kernels_are_the_same_function(stack):
    config = LoRAConfig(rank=2, layers=[1], rslora=True)
    params, gate, (weights, x) = trained(config), jnp.array([1.0, 0.7, 2.0]), stack
    merged = config.merge({"q_proj": weights, "v_proj": jnp.zeros((L, 6, 4))}, params, gate)["q_proj"]
    off = config.bind(params, jnp.zeros(L))
    np.testing.assert_allclose(forward(off, merged, x), forward(config.bind(params, gate), weights, x), rtol=1e-12)
    np.testing.assert_array_equal(merged[0], weights[0])
    with pytest.raises(ValueError, match=r"LoRA site 'v_proj' has shape \(3, 6, 4\) where the model has no kernel\."):
        config.merge({"q_proj": weights}, params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAConfig(rank=0), r"LoRA rank 0 is not a positive integer\."),
        (lambda: LoRAConfig(rank=-3), r"LoRA rank -3 is not a positive integer\."),
        (lambda: LoRAConfig(alpha=0.0), r"LoRA alpha 0\.0 is not a positive number: it scales the update\."),
        (lambda: LoRAConfig(targets=()), r"LoRA targets is empty: name the sites"),
        (lambda: LoRAConfig(layers=[-1]), r"LoRA layers \(-1,\) must be one or more indices from 0 up"),
        (lambda: LoRAConfig(layers=[]), r"LoRA layers \(\) must be one or more indices from 0 up"),
        (
            lambda: LoRAConfig(targets="query|value").init(jax.random.key(0), SHAPES, L),
            r"'query\|value' matches no site of this model, which has q_proj, v_proj, down_proj\.",
        ),
        (
            lambda: LoRAConfig(targets=["q_proj", "o_proj"]).init(jax.random.key(0), SHAPES, L),
            r"'o_proj' matches no site of this model, which has q_proj, v_proj, down_proj\.",
        ),
        (
            lambda: LoRAConfig(layers=[0, 3]).init(jax.random.key(0), SHAPES, L),
            r"LoRA layer 3 is out of range: the model has layers 0 to 2\.",
        ),
        (lambda: LoRAConfig().bind({}), r"These LoRA parameters are empty: they adapt no site\."),
        (
            lambda: LoRAConfig(rank=4).bind(trained(LoRAConfig())),
            r"These LoRA parameters have rank 8, but the config says 4\.",
        ),
        (
            lambda: LoRAConfig(targets=["q_proj"]).bind(trained(LoRAConfig())),
            r"These LoRA parameters adapt q_proj, v_proj, but the config's targets \('q_proj',\) only q_proj\.",
        ),
        (
            lambda: LoRAConfig().bind(trained(LoRAConfig()), jnp.ones(4)),
            r"LoRA gate of site 'q_proj' has shape \(4,\): it must be \(3,\), one a layer, or \(3, 8\), one a rank\.",
        ),
        (
            lambda: LoRAConfig().bind(trained(LoRAConfig()), mask={"o_proj": jnp.ones(3)}),
            r"LoRA mask names site 'o_proj', which is not adapted; adapted are q_proj, v_proj\.",
        ),
    ],
)
def test_errors_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
