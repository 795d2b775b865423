"""LoRA as a hook: its identities and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods.adapters import LoRAConfig
from tests.methods.lora_files import BASE, SHAPES, L, forward, same_bits, trained


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


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("form", ["layer", "rank"])
def test_a_nan_in_what_is_masked_reaches_nothing_forwards_or_backwards(form, dora):
    config = LoRAConfig(rank=4, targets=["q_proj"], dora=dora)
    params, gate = trained(config), jnp.ones((L, 4))
    mask = jnp.arange(4)[None] < jnp.array([[4], [2], [4]]) if form == "rank" else jnp.array([True, False, True])
    wide = jnp.broadcast_to(mask if mask.ndim == 2 else mask[:, None], (L, 4))

    def loss(params, gate, kernel, x):
        hook = config.bind(params, {"q_proj": gate}, {"q_proj": mask}, BASE)
        layer = jax.tree.map(lambda leaf: leaf[1], hook)
        return (layer("q_proj", x, x @ kernel) ** 2).sum()

    x, kernel = jax.random.normal(jax.random.key(3), (2, 5, 6)), BASE["q_proj"]["kernel"][1]
    of = jax.value_and_grad(loss, (0, 1, 2, 3))
    wanted = of(params, gate, kernel, x)
    hidden = {"a": ~wide[:, None, :], "b": ~wide[:, :, None], "m": ~wide.any(axis=1, keepdims=True)}
    for name in ("a", "b", "gate", *(["m"] if dora and form == "layer" else [])):
        broken = {k: jnp.where(hidden[k], jnp.nan, leaf) if k == name else leaf for k, leaf in params["q_proj"].items()}
        broken_gate = jnp.where(~wide, jnp.nan, gate) if name == "gate" else gate
        found = of({"q_proj": broken}, broken_gate, kernel, x)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert same_bits(one, other), name
    of_params, of_gate = wanted[1][0]["q_proj"], wanted[1][1]
    assert not jnp.where(hidden["a"], of_params["a"], 0).any() and not jnp.where(hidden["b"], of_params["b"], 0).any()
    assert not jnp.where(~wide, of_gate, 0).any()


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
        high, low = jax.jit(high), jax.jit(low)
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


@pytest.mark.parametrize("config", [LoRAConfig(rank=2, layers=[1], rslora=True), LoRAConfig(rank=2, dora=True)])
def test_unmerge_undoes_merge(config):
    params, gate = trained(config), jnp.array([1.0, 0.7, 2.0])
    kernels = {site: linear["kernel"] for site, linear in BASE.items()}
    merged = config.merge(kernels, params, gate)
    base = kernels if config.dora else None
    for site, kernel in config.unmerge(merged, params, gate, base=base).items():
        np.testing.assert_allclose(kernel, kernels[site], rtol=1e-12, atol=1e-13)
    assert jnp.abs(merged["q_proj"][1] - kernels["q_proj"][1]).max() > 0.1
    if config.dora:
        with pytest.raises(
            ValueError, match=r"DoRA needs the frozen matrix at 'q_proj': give base=weights\['blocks'\]"
        ):
            config.unmerge(merged, params, gate)


def test_dora_turns_columns_of_given_lengths(stack):
    config = LoRAConfig(rank=2, alpha=3.0, dora=True, targets=["q_proj"], layers=[0, 1])
    start = config.init(jax.random.key(0), SHAPES, L, jnp.float64, BASE)
    x, base = stack[1], BASE["q_proj"]
    at = lambda hook, i: jax.tree.map(lambda leaf: leaf[i], hook)  # noqa: E731
    y = x @ base["kernel"][1] + base["bias"][1][None, None]
    np.testing.assert_allclose(at(config.bind(start, base=BASE), 1)("q_proj", x, y), y, rtol=1e-12, atol=1e-13)
    params = trained(config)
    params["q_proj"]["m"] = params["q_proj"]["m"] * 1.3
    hook = config.bind(params, 0.5 * jnp.ones(L), base=BASE)
    v = base["kernel"][1] + 0.5 * 1.5 * params["q_proj"]["a"][1] @ params["q_proj"]["b"][1]
    v = v * (params["q_proj"]["m"][1] / np.linalg.norm(v, axis=0))[None]
    np.testing.assert_allclose(at(hook, 1)("q_proj", x, y), x @ v + base["bias"][1][None, None], rtol=1e-12, atol=1e-13)
    assert same_bits(at(hook, 2)("q_proj", x, y), y)  # not an adapted layer
    merged = config.merge({"q_proj": base["kernel"]}, params, 0.5 * jnp.ones(L))["q_proj"]
    np.testing.assert_allclose(merged[1], v, rtol=1e-12, atol=1e-13)


def test_rank_and_alpha_by_pattern(stack):
    config = LoRAConfig(4, 8.0, rank_pattern={r"1\.q_proj": 2, "v_proj": 6}, alpha_pattern={"[02].q_proj": 2.0})
    assert (config.width, config.module("q_proj", 1), config.module("v_proj", 0)) == (6, (2, 8.0), (6, 8.0))
    params = trained(config)
    assert params["q_proj"]["a"].shape == (L, 6, 6)
    gates = jnp.array([2.0 / 4, 8.0 / 2, 2.0 / 4])  # s of each layer, with s = 1 below
    plain = LoRAConfig(6, 6.0)
    mask = {"q_proj": jnp.arange(6)[None, :] < jnp.array([[4], [2], [4]])}
    expected = plain.bind(params, {"q_proj": gates}, mask)
    np.testing.assert_allclose(forward(config.bind(params), *stack), forward(expected, *stack), rtol=1e-13)
    gradient = jax.grad(lambda p: forward(config.bind(p), *stack).sum())(params)["q_proj"]
    assert not gradient["b"][1, 2:].any() and gradient["b"][1, :2].any() and gradient["b"][0, :4].any()
    # 14 inputs and outputs of q_proj, 10 of v_proj.
    assert config.size(SHAPES, L) == (4 + 2 + 4) * 14 + 3 * 6 * 10
    assert LoRAConfig(2, dora=True, layers=[1], targets=["q_proj"]).size(SHAPES, L) == 2 * 14 + 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAConfig(rank_pattern={"q_proj": 0}), r"LoRA rank 0 is not a positive integer\."),
        (lambda: LoRAConfig(alpha_pattern={"q_(": 1.0}), r"LoRA alpha_pattern 'q_\(' is no regular expression \("),
        (
            lambda: trained(LoRAConfig(rank_pattern={"3.q_proj": 2})),
            r"rank_pattern '3\.q_proj' matches no adapted module: they are called 0\.q_proj to 2\.v_proj, with",
        ),
        (
            lambda: LoRAConfig(dora=True).bind(trained(LoRAConfig())),
            r"parameters of LoRA, but the config is one of DoRA",
        ),
        (
            lambda: LoRAConfig(dora=True).init(jax.random.key(0), SHAPES, L),
            r"DoRA needs the frozen matrix at 'q_proj': give base=weights\['blocks'\] of the model\.",
        ),
        (lambda: LoRAConfig(targets="("), r"LoRA targets '\(' is no regular expression \("),
        (lambda: LoRAConfig(targets="(?!q).*"), r"LoRA targets '\(\?!q\)\.\*' cannot be matched in bounded time \("),
        (lambda: LoRAConfig(rank_pattern={3: 2}), r"LoRA rank_pattern 3 is no regular expression"),
        (lambda: LoRAConfig(alpha="8"), r"LoRA alpha '8' is not a positive number"),
        (lambda: LoRAConfig(rank=True), r"LoRA rank True is not a positive integer"),
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
