"""Gates on frozen weights: their distribution and penalty, what they leave of a model, and the three levels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from methods import finegates
from methods.adapters import gates, slicing
from methods.models.hooks import identity
from tests.methods.small import CONFIG, LAYERS, closed, given, predicted, setting

FAMILIES = list(gates.FAMILIES)
KINDS = {"tied": gates.tied(CONFIG), "untied": gates.untied(CONFIG)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_it_is_the_pretrained_model(kind, family):
    weights, _, train, _ = setting()
    values = gates.init(jax.random.key(0), family, KINDS[kind], LAYERS)
    np.testing.assert_array_equal(gates.activation(family, jnp.concatenate([v.ravel() for v in values.values()])), 1.0)
    got = predicted(weights, None, gates.bind(values, KINDS[kind], family), train).logits
    np.testing.assert_array_equal(got, predicted(weights, None, identity, train).logits)
    assert slicing.removed(values, KINDS[kind], family, CONFIG) == 0


def test_the_number_of_untied_gates_is_the_papers():
    class RobertaBase:
        def site_shapes(self):
            square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (768, 768))
            return square | {"up_proj": (768, 3072), "down_proj": (3072, 768)}

    assert 12 * sum(s.size for s in gates.untied(RobertaBase()).values()) == 165_888


def test_penalty_gradient_is_the_gaussian_density():
    mu = jnp.linspace(-0.9, 0.9, 7)
    grad = jax.vmap(jax.grad(lambda mu: gates.open_probability("stg", jnp.arctanh(mu))))(mu)
    density = jax.scipy.stats.norm.pdf((mu + 0.5) / gates.WIDTH) / gates.WIDTH
    np.testing.assert_allclose(grad, density, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_zero_exactly_where_clipped(family):
    numbers, key = jnp.linspace(-9, 9, 181), jax.random.key(0)
    omega, slope = jax.vmap(jax.value_and_grad(lambda l: gates.activation(family, l, key)))(numbers)
    assert omega[0] == 0 and omega[-1] == 1
    inside = (omega > 0) & (omega < 1)
    assert inside.sum() > 5 and (slope[inside] > 0).all()
    np.testing.assert_array_equal(slope[~inside], 0.0)


def expectation(family, l):
    """E[omega] by quadrature over the noise's quantiles."""
    u = (np.arange(200_000) + 0.5) / 200_000
    if family == "stg":
        raw = np.tanh(l) + 0.5 + gates.NOISE * jax.scipy.stats.norm.ppf(u)
    else:
        s = 1 / (1 + np.exp(-(np.log(u / (1 - u)) + l) / gates.STRETCH))
        raw = s * (gates.HIGH - gates.LOW) + gates.LOW
    return np.clip(raw, 0, 1).mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [-0.6, 0.1, 0.7])
def test_expected_gate_by_monte_carlo(family, number):
    draws = gates.activation(family, jnp.full(200_000, number), jax.random.key(1))
    sigma = max(float(draws.std()), 1e-9) / np.sqrt(draws.size)
    assert abs(draws.mean() - expectation(family, number)) < 5 * sigma


def test_open_probability_of_hard_concrete_is_that_of_a_positive_gate():
    draws = np.asarray(gates.activation("hard-concrete", jnp.full(200_000, -0.8), jax.random.key(1))) > 0
    p = float(gates.open_probability("hard-concrete", jnp.asarray(-0.8)))
    assert abs(draws.mean() - p) < 5 * np.sqrt(p * (1 - p) / draws.size)


def test_counted_weights():
    heads, size, d, f = CONFIG.num_heads, CONFIG.head_dim, CONFIG.hidden_size, CONFIG.intermediate_size
    total = LAYERS * sum(a * b for a, b in CONFIG.site_shapes().values())
    tied, opened = KINDS["tied"], lambda kind: {n: jnp.full((LAYERS, s.size), 2.0) for n, s in KINDS[kind].items()}
    one = opened("tied")
    one["ffn"] = one["ffn"].at[1, 3].set(-2.0)
    np.testing.assert_allclose(slicing.removed(one, tied, "stg", CONFIG), 3 * d / total)
    one = opened("tied")
    one["query_key"] = one["query_key"].at[2, 0].set(-2.0)  # a rotary pair of q and k
    np.testing.assert_allclose(slicing.removed(one, tied, "stg", CONFIG), 4 * d / total)
    one = opened("tied")
    one["value"] = one["value"].at[0, :size].set(-2.0)  # a whole head: its queries and keys go as well
    np.testing.assert_allclose(slicing.removed(one, tied, "stg", CONFIG), 4 * size * d / total)
    one = opened("untied")
    one["up_proj rows"] = one["up_proj rows"].at[0, : f // 2].set(-2.0)
    one["up_proj columns"] = one["up_proj columns"].at[0, : d // 4].set(-2.0)
    np.testing.assert_allclose(slicing.removed(one, KINDS["untied"], "stg", CONFIG), d * f * (1 - 0.5 * 0.75) / total)
    assert heads * size == d


def problem(**options):
    return finegates.problem(given(), KINDS["tied"], **options)


def estimate(estimator, of, **options):
    _, _, train, validation = setting()
    outer = of.start_outer(jax.random.key(1)) | options

    @jax.jit
    def run(outer):
        return estimator.estimate(of, None, outer, bilevel.FullBatch(train), validation, jax.random.key(0)).grad

    return outer, run(outer)


def test_single_level_training_closes_gates():
    _, _, train, _ = setting()
    single = problem(weight=50.0, target=0.5, with_lora=True)
    outer = single.start_outer(jax.random.key(1))
    optimizer = finegates.optimizer(optax.adam(1e-2), 0.2)
    result = bilevel.fit(single, outer, optimizer=optimizer, data=train, steps=30, progress=False)
    params = result.inner.params
    before = gates.penalty(single.start_inner(jax.random.key(0), outer)["gates"], "stg", 0.5)
    assert gates.penalty(params["gates"], "stg", 0.5) < before / 3
    assert slicing.removed(params["gates"], KINDS["tied"], "stg", CONFIG) > 0
    for name in ("adapter", "bias"):
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(params[name])) > 1e-3


def test_gates_on_the_validation_loss_see_it_at_first_order_and_through_training():
    for estimator in (bilevel.FirstOrder(optax.sgd(0.1), 2), bilevel.Unrolled(optax.sgd(0.1), 2)):
        of = problem(outer="gates")
        _, grad = estimate(estimator, of, gates=closed(KINDS["tied"], 0.0))
        assert all(jnp.abs(g).max() > 1e-6 for g in grad["gates"].values())
        assert grad["key"] is None


def test_sparsity_weight_and_shares_act_in_training_alone():
    optimizer = finegates.optimizer(optax.sgd(0.1), 0.3)
    of = problem(outer="sparsity", weight=2.0)
    with pytest.warns(bilevel.StructuralZeroWarning, match="kappa"):
        _, grad = estimate(bilevel.FirstOrder(optimizer, 6), of)
    assert grad["log_weight"] == 0 and (grad["kappa"] == 0).all()
    estimator = bilevel.Unrolled(optimizer, 6)
    outer, grad = estimate(estimator, of)
    assert jnp.abs(grad["kappa"]).max() > 1e-6

    @jax.jit
    def value(log_weight):
        _, _, train, validation = setting()
        at = outer | {"log_weight": log_weight}
        state = estimator.solve(of, None, at, bilevel.FullBatch(train), jax.random.key(0))
        return of.outer_value(state.params, at, validation, None)[0]

    central = (value(outer["log_weight"] + 1e-5) - value(outer["log_weight"] - 1e-5)) / 2e-5
    assert abs(central) > 1e-6
    np.testing.assert_allclose(grad["log_weight"], central, rtol=1e-5)


def test_shares_of_layers_keep_the_budget():
    np.testing.assert_allclose(gates.kept_shares(0.4, jnp.zeros(5)), 0.6)
    kappa = jax.random.normal(jax.random.key(0), (5,))
    np.testing.assert_allclose(gates.kept_shares(0.1, kappa).mean(), 0.9)
    assert (gates.kept_shares(0.9, 9 * kappa) >= 0).all()
