"""LoRATRF, reconstructed: filters, task vectors from data, and what may be outer."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from methods import flexora, loratrf
from methods.adapters import filters
from methods.models.hooks import identity
from methods.tasks.classify import LabelledBatch
from tests.methods.small import CONFIG, LAYERS, PLACES, SMALL, given, setting, vectors


def apply(weights, adapt, batch):
    return SMALL.apply({"params": weights}, batch, None, adapt)


def edit(kind, place="linears", seed=1):
    """An edit whose D is not 0."""
    params = filters.init(jax.random.key(seed), PLACES[place], LAYERS, 3, kind)
    params = jax.tree.map(lambda x: x + 0.1, params)
    scalars = filters.scalars(LAYERS) | {"gate": jnp.ones(LAYERS)}
    return filters.Edit(params, vectors(place), scalars, kind)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", filters.FILTERS)
def test_it_starts_as_the_pretrained_model_and_then_changes_it(kind, place):
    weights, _, train, _ = setting()
    run = jax.jit(apply)
    params = filters.init(jax.random.key(0), PLACES[place], LAYERS, 3, kind)
    scalars = filters.scalars(LAYERS) | {"gate": jnp.ones(LAYERS)}
    fresh = filters.Edit(params, vectors(place), scalars, kind)
    plain = run(weights, identity, train)
    np.testing.assert_array_equal(run(weights, fresh, train), plain)
    assert np.abs(run(weights, edit(kind, place), train) - plain).max() > 1e-3


@pytest.mark.parametrize("kind", filters.FILTERS)
def test_filters_lie_between_0_and_1_and_only_a_constant_one_merges(kind):
    layer = jax.tree.map(lambda leaf: leaf[0], edit(kind))
    h = 3.0 * jax.random.normal(jax.random.key(2), (4, 5, 16)).at[0, 0].set(0.0)
    c = layer.relevance("q_proj", h)
    assert c.shape == ((4, 5, 16) if kind == "channel" else (4, 5, 1))
    assert (c >= 0).all() and (c <= 1).all()
    out = layer("q_proj", h, h)
    p = layer.params["q_proj"]
    merged = h @ (jnp.eye(16) + p["c"] @ p["d"])
    assert np.allclose(out, merged, atol=1e-12) == (kind == "none")
    grads = jax.grad(lambda h: layer("q_proj", h, h).sum())(h)
    assert jnp.isfinite(grads).all()


def test_cosine_is_the_cosine():
    layer = jax.tree.map(lambda leaf: leaf[1], edit("cosine"))
    t = layer.vectors["v_proj"]
    h = jnp.stack([2.0 * t, -t, jnp.ones(16)])[None]
    expected = [1.0, 0.0, max(float(t.sum() / (4 * jnp.linalg.norm(t))), 0.0)]
    np.testing.assert_allclose(layer.relevance("v_proj", h)[0, :, 0], expected, atol=1e-10)


def test_task_vectors_are_differences_of_means():
    weights, _, train, _ = setting()
    marked = jnp.full(train.shape, 1 / 20).at[2:].set(-1 / 20)
    got = filters.task_vectors(lambda adapt: apply(weights, adapt, train), marked, PLACES["linears"], LAYERS)
    # Layer 0 reads the normalised embedding.
    x = weights["embed"][train]
    x = x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + CONFIG.norm_eps)
    x = x * weights["blocks"]["attention_norm"]["scale"][0][None, None]
    queries = x @ weights["blocks"]["q_proj"]["kernel"][0]
    difference = queries[:2].mean(axis=(0, 1)) - queries[2:].mean(axis=(0, 1))
    np.testing.assert_allclose(got["q_proj"][0], difference / jnp.linalg.norm(difference), rtol=1e-9)
    lengths = jnp.linalg.norm(jnp.stack(list(got.values())), axis=-1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-12)


def problem(outer, kind="sigmoid", place="linears"):
    return loratrf.problem(given(), vectors(place), PLACES[place], rank=2, kind=kind, outer=outer)


@pytest.mark.parametrize(
    "outer, kind, place",
    [("vectors", "sigmoid", "linears"), ("vectors", "cosine", "linears"), ("vectors", "cosine", "stream")]
    + [("thresholds", "sigmoid", "linears"), ("layers", "sigmoid", "linears")],
)
def test_hypergradient_is_the_derivative_of_the_training(outer, kind, place):
    _, _, train, validation = setting()
    of, estimator = problem(outer, kind, place), bilevel.Unrolled(optax.adam(3e-2), 2)
    at = of.start_outer(jax.random.key(0))
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), at)

    @jax.jit
    def value(step):
        moved = jax.tree.map(lambda x, v: x + step * v, at, direction)
        state = estimator.solve(of, None, moved, bilevel.FullBatch(train), jax.random.key(0))
        return of.outer_value(state.params, moved, validation, None)[0]

    @jax.jit
    def gradient(at):
        return estimator.estimate(of, None, at, bilevel.FullBatch(train), validation, jax.random.key(0)).grad

    grad = gradient(at)
    along = sum(jnp.vdot(g, v) for g, v in zip(jax.tree.leaves(grad), jax.tree.leaves(direction), strict=True))
    step = 1e-6  # a clipped cosine has kinks, and Adam's first steps curvature, which a longer step crosses
    central = (value(step) - value(-step)) / (2 * step)
    assert abs(central) > 1e-7
    np.testing.assert_allclose(along, central, rtol=1e-4)


def test_all_on_the_training_rows():
    _, _, train, _ = setting()
    single = problem("none", "cosine", "stream")
    result = bilevel.fit(single, (), optimizer=optax.adam(1e-2), data=train, steps=3, progress=False)
    losses = result.history["inner_loss"]
    assert losses[-1] < losses[0]
    moved = result.inner.params["vectors"]["block_hidden"] - vectors("stream")["block_hidden"]
    assert jnp.abs(moved).max() > 1e-4


def test_layer_gates_start_at_one():
    np.testing.assert_array_equal(flexora.gate(problem("layers").start_outer(jax.random.key(0))), 1.0)


def test_task_vectors_of_one_class_are_refused():
    tokens = jnp.ones((4, 6), jnp.int32)
    rows = LabelledBatch(tokens, tokens > 0, tokens, tokens[:, 0])
    model = SimpleNamespace(model=SMALL, config=CONFIG, weights={})
    bench: Any = SimpleNamespace(train=rows, head=object(), num_layers=LAYERS, pretrained=model)
    with pytest.raises(ValueError, match="4 training rows that task vectors start from are all of one class"):
        loratrf.start_vectors(loratrf.LoRATRFSettings(model="none", place="stream"), bench)


def test_an_outer_variable_that_the_filter_has_not_is_refused():
    with pytest.raises(ValueError, match="needs a filter that has them, sigmoid, not 'cosine'"):
        problem("thresholds", "cosine")
    with pytest.raises(ValueError, match="rank 0"):
        filters.init(jax.random.key(0), {"q_proj": 4}, 2, 0, "cosine")
