"""HiddenKey: rates and the KL weight act in training alone, and a hypergradient through training sees them."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from methods import hiddenkey
from methods.adapters.dropout import DropoutConfig
from methods.held import held
from methods.models.hooks import identity
from methods.tasks.loss import bidirectional_kl, cross_entropy
from tests.methods.small import LAYERS, given, predicted, setting, trained

KEY = jax.random.key(5)

def dropout(temperature=0.3, rules=hiddenkey.RULES):
    return DropoutConfig(rules, temperature)


def outer_start(config, rate=0.1, beta=1.0):
    return hiddenkey.start_outer(config, dict.fromkeys(config.positions, rate), beta, KEY)


def problem(config, **options):
    return hiddenkey.problem(given(), lambda key: outer_start(config), config, **options)


@functools.cache
def compiled_loss(config):
    _, _, train, _ = setting()
    params = trained(by=0.1)
    return jax.jit(lambda outer, active: problem(config, active=active).inner_value(params, outer, train, None)[0])


def inner_loss(config, outer, active=True):
    return compiled_loss(config)(outer, jnp.broadcast_to(active, (LAYERS,)))


@pytest.mark.parametrize("rules", [hiddenkey.RULES, ("ffn_hidden element js",)])
def test_without_dropout_it_is_plain_lora_and_the_two_passes_agree(rules):
    weights, _, train, _ = setting()
    config = dropout(0.0, rules)
    value = inner_loss(config, outer_start(config, rate=0.0, beta=100.0))
    plain = jax.jit(lambda: cross_entropy(predicted(weights, trained(by=0.1), identity, train)))()
    np.testing.assert_allclose(value, plain, rtol=1e-12)


def test_the_same_key_gives_the_same_masks_and_the_next_key_others():
    config = dropout(0.0)
    outer = outer_start(config, rate=0.3)
    first, again = inner_loss(config, outer), inner_loss(config, outer)
    assert first == again
    assert first != inner_loss(config, outer | {"key": jax.random.fold_in(KEY, 1)})


def test_layers_that_are_not_active_drop_nothing():
    config = dropout(0.0)
    outer = outer_start(config, rate=0.5)
    none = inner_loss(config, outer, active=jnp.zeros(LAYERS, bool))
    assert none == inner_loss(config, outer_start(config, rate=0.0))
    some = inner_loss(config, outer, active=jnp.arange(LAYERS) >= LAYERS // 2)
    assert len({float(x) for x in (none, some, inner_loss(config, outer))}) == 3


def test_one_pass_has_half_the_gradient_of_the_term_on_average():
    # By symmetry; here for the two orders of one pair of passes, whose one-pass gradients add up to the whole.
    a, b = jax.random.normal(KEY, (2, 3, 4))
    kl = lambda a, b: bidirectional_kl(a, b, jnp.ones(3, bool))  # noqa: E731
    w = jnp.asarray(0.3)
    whole = jax.grad(lambda w: kl(w * a, b + w**2 * a))(w)
    first = jax.grad(lambda w: kl(w * a, held(b + w**2 * a, 0.0)))(w)
    second = jax.grad(lambda w: kl(b + w**2 * a, held(w * a, 0.0)))(w)
    np.testing.assert_allclose(first + second, whole, rtol=1e-12)


@pytest.mark.parametrize("backward", ["one", "both"])
def test_one_pass_takes_the_term_without_the_gradient_of_the_second(backward):
    _, _, train, _ = setting()
    weights, config, outer, params = setting()[0], dropout(0.0), outer_start(dropout(0.0), rate=0.3), trained(by=0.1)
    hooks = [config.bind(jax.random.fold_in(KEY, i), outer["rates"], LAYERS) for i in range(2)]

    def by_hand(params, second):
        passes = [predicted(weights, p, hook, train) for p, hook in zip((params, second), hooks, strict=True)]
        return cross_entropy(passes[0]) + bidirectional_kl(passes[0].logits, passes[1].logits, passes[0].mask)

    @jax.jit
    def gradients(params):
        of = problem(config, backward=backward)
        return jax.grad(lambda p: of.inner_value(p, outer, train, None)[0])(params), jax.grad(by_hand, (0, 1))(
            params, params
        )

    got, (first, second) = gradients(params)
    expected = first if backward == "one" else jax.tree.map(jnp.add, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)
    assert any(jnp.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(second))


def gradient_by(estimator, config=None, **options):
    _, _, train, validation = setting()  # drawn here, not in a trace
    of, batch = problem(config or dropout(), **options), bilevel.FullBatch(train)
    return jax.jit(lambda outer: estimator.estimate(of, None, outer, batch, validation, jax.random.key(0)).grad)


def jitted(backward, mode):
    _, _, train, validation = setting()
    estimator = bilevel.Unrolled(optax.adam(1e-2), 3, mode=mode, checkpoint="step")
    of = problem(dropout(), backward=backward)

    def value(outer):
        state = estimator.solve(of, None, outer, bilevel.FullBatch(train), jax.random.key(0))
        return of.outer_value(state.params, outer, validation, None)[0]

    return jax.jit(value), gradient_by(estimator, backward=backward)


@pytest.mark.parametrize("backward, mode", [("one", "reverse"), ("both", "mixed")])
def test_hypergradient_is_the_derivative_of_the_training(backward, mode):
    value, gradient = jitted(backward, mode)
    outer = outer_start(dropout(), rate=0.2)
    grad = gradient(outer)
    assert grad["key"] is None
    step = 1e-6

    def central(shift):
        return (value(shift(step)) - value(shift(-step))) / (2 * step)

    for position in outer["rates"]:
        moved = lambda h, p=position: outer | {"rates": outer["rates"] | {p: outer["rates"][p] + h}}  # noqa: E731
        np.testing.assert_allclose(grad["rates"][position], central(moved), rtol=1e-5)
    np.testing.assert_allclose(
        grad["log_beta"], central(lambda h: outer | {"log_beta": outer["log_beta"] + h}), rtol=1e-5
    )


@pytest.mark.parametrize("words", ["attention_weights column stop_gradient_rescale", "ffn_hidden element js"])
def test_rates_of_single_layers_have_their_own_derivative(words):
    _, _, train, validation = setting()
    config = dropout(rules=(words,))
    estimator = bilevel.Unrolled(optax.adam(1e-2), 2, mode="reverse", checkpoint="step")
    (position,) = config.positions
    outer = outer_start(config, rate=jnp.linspace(0.1, 0.3, LAYERS))
    grad = gradient_by(estimator, config)(outer)["rates"][position]
    of = problem(config)

    @jax.jit
    def value(rates):
        moved = outer | {"rates": {position: rates}}
        state = estimator.solve(of, None, moved, bilevel.FullBatch(train), jax.random.key(0))
        return of.outer_value(state.params, moved, validation, None)[0]

    for layer in range(LAYERS):
        step = jnp.zeros(LAYERS).at[layer].set(1e-6)
        central = (value(outer["rates"][position] + step) - value(outer["rates"][position] - step)) / 2e-6
        np.testing.assert_allclose(grad[layer], central, rtol=1e-4, atol=1e-9)
    assert len({float(g) for g in grad}) == LAYERS


def test_one_pass_under_mixed_mode_is_differentiated_in_reverse():
    outer = outer_start(dropout())
    with pytest.warns(bilevel.CustomDerivativeWarning, match="mode='reverse'"):
        found = gradient_by(bilevel.Unrolled(optax.sgd(1e-2), 2))(outer)
    expected = gradient_by(bilevel.Unrolled(optax.sgd(1e-2), 2, mode="reverse"))(outer)
    numbers = [x for x in jax.tree.leaves(found)]
    for a, b in zip(numbers, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-15)


def test_first_order_gradient_is_exactly_zero_and_said_to_be():
    estimator = bilevel.FirstOrder(optax.adam(1e-2), 2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        grad = gradient_by(estimator)(outer_start(dropout()))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grad))
    sentences = [str(w.message) for w in said if issubclass(w.category, bilevel.StructuralZeroWarning)]
    assert len(sentences) == 1
    for name in ("['rates']['attention_logits']", "['rates']['ffn_hidden']", "['log_beta']", "use Unrolled"):
        assert name in sentences[0]


def test_implicit_gradient_of_two_passes_is_that_of_the_damped_system():
    """-d2 f v, with (H + damping) v = the gradient of the outer loss, solved by hand at the trained point."""
    _, _, train, validation = setting()
    damping, of, outer = 1.0, problem(dropout(), backward="both"), outer_start(dropout())
    estimator = bilevel.Implicit(optax.sgd(1e-2), 2, linear_solver=bilevel.Dense(), damping=damping)
    grad = gradient_by(estimator, backward="both")(outer)

    @jax.jit
    def by_hand(outer):
        params = estimator.solve(of, None, outer, bilevel.FullBatch(train), jax.random.key(0)).params
        flat, unflatten = jax.flatten_util.ravel_pytree(params)
        moving = {name: leaf for name, leaf in outer.items() if name != "key"}

        def gradient(flat, moving):
            def value(flat):  # of both steps, each with its masks
                keys = jax.vmap(lambda step: jax.random.fold_in(outer["key"], step))(jnp.arange(2))
                full = lambda key: outer | moving | {"key": key}  # noqa: E731
                return jax.vmap(lambda key: of.inner_value(unflatten(flat), full(key), train, None)[0])(keys).mean()

            return jax.grad(value)(flat)

        hessian = jax.jacfwd(gradient)(flat, moving)
        right = jax.grad(lambda flat: of.outer_value(unflatten(flat), outer, validation, None)[0])(flat)
        v = jnp.linalg.solve(hessian + damping * jnp.eye(flat.size), right)
        return jax.tree.map(jnp.negative, jax.vjp(lambda moving: gradient(flat, moving), moving)[1](v)[0])

    expected = by_hand(outer)
    for position, value in expected["rates"].items():
        np.testing.assert_allclose(grad["rates"][position], value, rtol=1e-6)
    np.testing.assert_allclose(grad["log_beta"], expected["log_beta"], rtol=1e-6)
