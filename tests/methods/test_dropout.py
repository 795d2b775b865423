"""Dropouts inside a transformer: their identities, patterns, expectations, and that no query loses all its keys."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods.adapters.dropout import (
    COMPENSATIONS,
    PATTERNS,
    POSITIONS,
    DropoutConfig,
    logit,
    raised,
    uniform,
)
from methods.held import held
from methods.tasks.loss import DIVERGENCES, bidirectional_kl, jensen_shannon

CAUSAL = jnp.tril(jnp.ones((5, 5), bool))[None, None]
LOGITS = jax.random.normal(jax.random.key(9), (2, 3, 5, 5))
DROP = jnp.asarray([False, True, False, True, False])
"""Keys of one query that are dropped by hand."""


def hook(words, rate, *, key=0, temperature=0.0, layers=1):
    """One layer of the hook of one rule."""
    config = DropoutConfig([words], temperature)
    bound = config.bind(jax.random.key(key), {config.positions[0]: logit(rate)}, layers)
    return jax.tree.map(lambda leaf: leaf[0], bound)


def attention(words, rate, logits=LOGITS, visible=CAUSAL, **options):
    """Attention weights with the dropout of `words`."""
    adapt = hook(words, rate, **options)
    shown = jnp.where(visible, adapt("attention_logits", visible, logits), -1e30)
    return adapt("attention_weights", visible, jax.nn.softmax(shown))


@pytest.mark.parametrize("compensation", [*COMPENSATIONS, *DIVERGENCES])
@pytest.mark.parametrize("position, pattern", [*itertools.product(POSITIONS, PATTERNS)])
def test_three_words_make_a_dropout(position, pattern, compensation):
    config = DropoutConfig([f"{position} {pattern} {compensation}"])
    site = config.sites(config.rules[0])[0]
    y = jnp.ones((2, 3, 5, 5)) if position.startswith("attention") else jnp.ones((2, 8, 6))
    adapt = hook((position, pattern, compensation), 0.5)
    out = adapt(site, CAUSAL, y)
    assert out.shape == y.shape and out.dtype == y.dtype and (out != y).any()
    np.testing.assert_array_equal(adapt("o_proj", y, y), y)
    if position == "attention_weights" and compensation != "none":
        y = y / y.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(hook((position, pattern, compensation), 0.0)(site, CAUSAL, y), y)


@pytest.mark.parametrize("words", ["attention_logits column", "attention_logits colunm kl", ("a", "b", "c")])
def test_other_words_are_refused(words):
    with pytest.raises(ValueError, match=r"unknown word|needs three words"):
        DropoutConfig([words])


def by_hand(g):
    """(DropKey, DropAttention with its divisor differentiated, with its divisor held) of one query's logits."""
    w = jax.nn.softmax(g)
    kept = jnp.where(DROP, 0, w)
    return jax.nn.softmax(jnp.where(DROP, -jnp.inf, g)), kept / kept.sum(), kept / jax.lax.stop_gradient(kept.sum())


def masked(words, g):
    """The hook's own answer with exactly the keys DROP dropped."""
    # A key whose draw drops the second and the fourth of five keys at rate 1/2.
    adapt = lambda key: hook(words, 0.5, key=key)  # noqa: E731
    visible = jnp.ones((1, 1, 1, 5), bool)
    site = words.split()[0]
    for key in range(400):
        probe = adapt(key)(site, visible, jnp.full((1, 1, 1, 5), 0.2))
        gone = (probe < -1e30) if site == "attention_logits" else probe == 0
        if (gone[0, 0, 0] == DROP).all():
            break
    else:
        raise AssertionError("no such draw")

    def weights(g):
        shown = adapt(key)("attention_logits", visible, g[None, None, None])
        shown = jnp.maximum(shown, float(jnp.finfo(g.dtype).min) / 2)
        return adapt(key)("attention_weights", visible, jax.nn.softmax(shown))[0, 0, 0]

    return weights(g), jax.jacrev(weights)(g)


def test_dropkey_is_dropattention_forwards_and_their_jacobians_are_as_derived():
    g = jnp.asarray([0.3, -0.7, 1.1, 0.2, -0.4])
    key, whole, stopped = (
        masked(words, g)
        for words in (
            "attention_logits element none",
            "attention_weights element rescale",
            "attention_weights element stop_gradient_rescale",
        )
    )
    for weights, _ in (key, whole, stopped):  # E1
        np.testing.assert_allclose(weights, by_hand(g)[0], rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(whole[1], key[1], rtol=1e-10, atol=1e-14)  # E2
    np.testing.assert_allclose(stopped[1], jax.jacrev(lambda g: by_hand(g)[2])(g), rtol=1e-10, atol=1e-14)
    w, dropped = jax.nn.softmax(g), key[0]  # E3
    mass = w[DROP].sum()
    for u in (0, 2, 4):
        np.testing.assert_allclose(key[1][u, u], dropped[u] * (1 - dropped[u]), rtol=1e-10)
        np.testing.assert_allclose(stopped[1][u, u], w[u] * (1 - w[u]) / (1 - mass), rtol=1e-10)
        ratio = (1 - mass - w[u]) / ((1 - mass) * (1 - w[u]))
        np.testing.assert_allclose(key[1][u, u] / stopped[1][u, u], ratio, rtol=1e-10)
        for m in (1, 3):
            assert key[1][u, m] == 0
            np.testing.assert_allclose(stopped[1][u, m], -w[u] * w[m] / (1 - mass), rtol=1e-10)


@pytest.mark.parametrize("position", ["attention_logits", "attention_weights"])
def test_columns_are_constant_over_queries_and_differ_between_heads(position):
    visible = jnp.ones((1, 1, 16, 16), bool)
    logits = jax.random.normal(jax.random.key(1), (2, 3, 16, 16))
    gone = attention(f"{position} column rescale", 0.4, logits, visible) == 0
    np.testing.assert_array_equal(gone, jnp.broadcast_to(gone[:, :, :1], gone.shape))
    rows = np.asarray(gone[:, :, 0].reshape(6, 16))
    assert len({row.tobytes() for row in rows}) == 6


def test_spans_are_contiguous_and_of_the_rates_length():
    u = uniform(jax.random.key(0), "span", (1, 1, 200, 10), jnp.float64)
    gone = np.asarray(u < 0.3)[0, 0]
    assert (np.abs(np.diff(np.concatenate([gone, gone[:, :1]], axis=1).astype(int))).sum(axis=1) == 2).all()
    np.testing.assert_array_equal(gone.sum(axis=1), 3)
    u = uniform(jax.random.key(0), "span", (50, 10, 7), jnp.float64)
    assert u.shape == (50, 10, 1)
    np.testing.assert_array_equal((u < 0.3).sum(axis=1), 3)


@pytest.mark.parametrize("temperature", [0.0, 0.1])
@pytest.mark.parametrize("words", ["attention_logits column none", "attention_weights element rescale"])
def test_no_query_loses_all_its_keys(words, temperature):
    weights = attention(words, 0.97, temperature=temperature)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(jnp.where(CAUSAL, 0, weights), 0)
    np.testing.assert_allclose(weights[:, :, 0, 0], 1.0)  # the first query sees one key


def first_query(words, logits, key, rate=0.5):
    """Weights of one query after its softmax, float32."""
    visible = jnp.ones((1, 1, 1, logits.size), bool)
    adapt = hook(words, rate, key=key)
    weights = jax.nn.softmax(logits.astype(jnp.float32)[None, None, None])
    return adapt("attention_weights", visible, weights)[0, 0, 0]


@pytest.mark.parametrize("gap", [20.0, 46.0, 80.0, 110.0])
@pytest.mark.parametrize("compensation", ["rescale", "stop_gradient_rescale"])
def test_what_is_left_beside_a_key_that_had_all_the_weight_has_finite_derivatives(gap, compensation):
    words, logits = f"attention_weights element {compensation}", jnp.asarray([gap, 0.0, 0.3])
    # A key whose draw drops the first of the three keys and no other; 110 leaves the others without weight.
    lost = lambda w: (w[0] == 0) & (w[1:] > 0).all()  # noqa: E731
    key = next(k for k in range(200) if lost(first_query(words, jnp.asarray([1.0, 0.0, 0.3]), k)))
    out = jax.jit(lambda logits: first_query(words, logits, key))
    of_second = lambda logits: out(logits)[1].astype(jnp.float64)  # noqa: E731
    if gap > 100:
        np.testing.assert_array_equal(out(logits), [1.0, 0.0, 0.0])
    else:
        np.testing.assert_allclose(out(logits)[1:], jax.nn.softmax(logits[1:]), rtol=1e-5)
    grad, second = jax.grad(of_second)(logits), jax.hessian(of_second)(logits)
    assert jnp.isfinite(grad).all() and jnp.isfinite(second).all()
    if gap < 100 and compensation == "rescale":
        w = jax.nn.softmax(logits[1:])
        np.testing.assert_allclose(grad, [0.0, w[0] * w[1], -w[0] * w[1]], rtol=1e-4, atol=1e-7)


def test_a_second_rule_leaves_a_query_one_of_the_keys_that_the_first_has_left():
    logits = jax.random.normal(jax.random.key(1), (4, 4, 8, 8), jnp.float32)
    config = DropoutConfig(["attention_logits column rescale", "attention_weights column rescale"])
    visible = jnp.tril(jnp.ones((1, 1, 8, 8), bool))

    @jax.jit
    def weights(logits):
        adapt = jax.tree.map(
            lambda leaf: leaf[0], config.bind(jax.random.key(2), dict.fromkeys(config.positions, 0.0), 1)
        )
        logits = jnp.where(visible, adapt("attention_logits", visible, logits), -jnp.inf)
        return adapt("attention_weights", visible, jax.nn.softmax(logits, axis=-1))

    np.testing.assert_allclose(weights(logits).sum(axis=-1), 1.0, rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: (weights(x) ** 2).sum())(logits)).all()


def test_only_rows_without_a_key_are_raised():
    score = jnp.asarray([[-1.0, -3.0, 2.0], [-1.0, -3.0, -2.0]])
    visible = jnp.asarray([[True, True, True], [False, True, True]])
    np.testing.assert_array_equal(raised(score, visible), [[-1, -3, 2], [1, -1, 0]])
    # A row of padding sees nothing: all the same to it, but no NaN.
    assert not jnp.isnan(raised(score, jnp.zeros((2, 3), bool))).any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hidden_features_are_kept_on_average(pattern):
    y = jax.random.normal(jax.random.key(0), (2, 6, 5))
    config = DropoutConfig([f"ffn_hidden {pattern} rescale"])
    many = config.bind(jax.random.key(1), {"ffn_hidden": logit(0.3)}, 20_000)
    mean = jax.vmap(lambda adapt: adapt("ffn_hidden", y, y))(many).mean(axis=0)
    # The standard deviation of a mean of 20,000 factors that are 1/.7 with probability .7.
    sigma = np.abs(y) * np.sqrt(0.3 / 0.7 / 20_000)
    assert (np.abs(mean - y) < 5 * sigma).all()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_relaxed_masks_tend_to_the_hard_ones_of_the_same_key_and_have_their_derivative(pattern):
    y = jnp.ones((2, 6, 5))
    words = f"ffn_hidden {pattern} none"
    hard, near = hook(words, 0.3)("ffn_hidden", y, y), hook(words, 0.3, temperature=1e-4)("ffn_hidden", y, y)
    np.testing.assert_allclose(near, hard, atol=1e-6)

    def total(rate):
        return hook(words, rate, temperature=0.5)("ffn_hidden", y, y).sum()

    central = (total(0.3 + 1e-6) - total(0.3 - 1e-6)) / 2e-6
    grad = jax.grad(total)(0.3)
    assert grad < 0
    np.testing.assert_allclose(grad, central, rtol=1e-7)


def test_layers_may_have_their_own_rate_or_drop_nothing():
    config = DropoutConfig(["ffn_hidden element none"])
    y = jnp.ones((4, 50, 50))
    bound = config.bind(jax.random.key(0), {"ffn_hidden": logit(jnp.asarray([0.1, 0.5, 0.5]))}, 3, jnp.arange(3) < 2)
    kept = jax.vmap(lambda adapt: adapt("ffn_hidden", y, y))(bound).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(kept, [0.9, 0.5, 1.0], atol=0.02)
    assert kept[2] == 1
    with pytest.raises(ValueError, match="rates are given for ffn_hidden"):
        DropoutConfig(["attention_logits column kl"]).bind(jax.random.key(0), {"ffn_hidden": 0.0}, 3)
    with pytest.raises(ValueError, match=r"must be a scalar, or \(3,\)"):
        config.bind(jax.random.key(0), {"ffn_hidden": jnp.zeros(2)}, 3)
    with pytest.raises(ValueError, match="below 1"):
        logit(1.0)


def test_divergences_against_their_definition():
    a, b = jax.random.normal(jax.random.key(0), (2, 4, 3, 6))
    p, q = jax.nn.softmax(a), jax.nn.softmax(b)
    mask = jnp.arange(12).reshape(4, 3) % 3 != 0

    def kl(p, q):
        return (p * jnp.log(p / q)).sum(axis=-1)

    m = (p + q) / 2
    np.testing.assert_allclose(bidirectional_kl(a, b, mask), ((kl(p, q) + kl(q, p)) / 2)[mask].mean(), rtol=1e-12)
    np.testing.assert_allclose(jensen_shannon(a, b, mask), ((kl(p, m) + kl(q, m)) / 2)[mask].mean(), rtol=1e-12)
    assert bidirectional_kl(a, a, mask) == 0
    np.testing.assert_allclose(jensen_shannon(a, a, mask), 0, atol=1e-15)


def test_held_is_constant_in_the_gradient_and_not_in_its_derivative():
    def gradient(x, c):
        return jax.grad(lambda x: c * x * held(x, c) ** 2)(x)

    x, c = jnp.asarray(1.5), jnp.asarray(0.7)
    assert gradient(x, c) == c * x**2  # not 3 c x^2
    np.testing.assert_allclose(jax.grad(gradient)(x, c), 2 * c * x)  # of c x^2, not 0
    with pytest.raises(ValueError, match='Unrolled\\(mode="reverse"\\)'):
        jax.grad(lambda x, c: c * x * held(x, c) ** 2, argnums=(0, 1))(x, c)


def test_two_terms_are_refused():
    with pytest.raises(ValueError, match="ask for kl and js"):
        DropoutConfig(("attention_logits column kl", "ffn_hidden element js"))
