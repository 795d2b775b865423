"""HeteroLoRA: its search space changes nothing until trained, its scores are what they say, its budget is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.problem.problem import as_pytree
from methods import heterolora, proxies, search_space
from methods.adapters.lora import LoRAConfig
from methods.models import identity
from methods.models.decoder import Decoder, DecoderConfig
from methods.objective import of_hook
from methods.search_space import SHORTCUTS, Space

LAYERS = 3
CONFIG = DecoderConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_layers=LAYERS,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=12,
)
MODEL = Decoder(CONFIG, remat=False, param_dtype=jnp.float64)
SPACE = Space(
    LoRAConfig(rank=2, alpha=4.0), LoRAConfig(rank=2, alpha=4.0, targets=SHORTCUTS), CONFIG.site_shapes(), 16, LAYERS
)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (12, 8)).astype(np.int32)


@functools.cache
def weights():
    drawn = MODEL.init(jax.random.key(2), TOKENS)["params"]
    return jax.tree.map(lambda w: 4.0 * w if w.ndim > 1 else w, drawn)


def loss(weights, adapt, batch):
    logits = MODEL.apply({"params": weights}, batch, None, adapt)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()


@jax.jit
def logits(weights, adapt):
    return MODEL.apply({"params": weights}, TOKENS, None, adapt)


def problem(space=SPACE):
    return heterolora.problem(of_hook(loss, weights(), space.lora, CONFIG), space, dtype=jnp.float64)


@functools.cache
def trained():
    """Parameters with B != 0 everywhere."""
    leaves, tree = jax.tree.flatten(SPACE.init(jax.random.key(3), jnp.float64))
    keys = jax.random.split(jax.random.key(4), len(leaves))
    drawn = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def start():
    return SPACE.init(jax.random.key(3), jnp.float64)


@functools.cache
def scores(name, params):
    """Scores at fresh or trained parameters, every gate on, on the first four rows."""
    score = proxies.PROXIES[name](proxies.Given(MODEL, weights(), SPACE.bind, optax.sgd(0.1), 1))
    at = (start() if params == "fresh" else trained()) | {"head": {}}
    run = jax.jit(lambda score, p, at: score(p, at, SPACE.gates(), None, TOKENS[:4], jax.random.key(0)))
    return run(as_pytree(score), problem(), at)


def some_gates():
    """Half of the modules off."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda g: jnp.asarray(rng.permutation([1.0, 0.0, 1.0])), SPACE.gates())


def test_the_space_leaves_the_pretrained_function_as_it_is():
    plain = logits(weights(), identity)
    np.testing.assert_array_equal(logits(weights(), SPACE.bind(start(), SPACE.gates())), plain)
    assert np.abs(logits(weights(), SPACE.bind(trained(), SPACE.gates())) - plain).max() > 0.1


def test_modules_that_are_off_change_no_bit_whatever_they_hold():
    gates = some_gates()

    def spoil(gate, leaf):
        return jnp.where((gate > 0)[:, None, None], leaf, jnp.nan)

    spoilt = jax.tree.map(lambda g, below: jax.tree.map(functools.partial(spoil, g), below), gates, trained())
    one, other = (logits(weights(), SPACE.bind(params, gates)) for params in (spoilt, trained()))
    np.testing.assert_array_equal(one, other)
    nothing = jax.tree.map(jnp.zeros_like, gates)
    np.testing.assert_array_equal(logits(weights(), SPACE.bind(spoilt, nothing)), logits(weights(), identity))


def test_merged_equals_unmerged():
    """LoRA into the kernels, shortcuts into the matrices W0 + s A B that they stand for."""
    gates, params = some_gates(), trained()
    off = {kind: {site: g > 0 for site, g in sites.items()} for kind, sites in gates.items()}
    merged = {**weights(), "blocks": dict(weights()["blocks"])}
    kernels = {site: merged["blocks"][site]["kernel"] for site in params["lora"]}
    for site, kernel in SPACE.lora.merge(kernels, params["lora"], mask=off["lora"]).items():
        merged["blocks"][site] = {**merged["blocks"][site], "kernel": kernel}
    assert SPACE.shortcut is not None
    update = SPACE.shortcut.delta(params["shortcut"], mask=off["shortcut"])
    identities = {site: jnp.broadcast_to(jnp.eye(16), (LAYERS, 16, 16)) for site in SHORTCUTS[:2]}

    def dense(tables, site, x, y):
        update, identities = tables
        if site in identities:  # the stream is added by the block: what is asked for is (I + s A B) x - x + branch
            return x @ (identities[site] + update[site]) - x + y
        return y + x @ update[site] if site in update else y

    by_matrix = logits(merged, jax.tree_util.Partial(dense, (update, identities)))
    np.testing.assert_allclose(by_matrix, logits(weights(), SPACE.bind(params, gates)), rtol=1e-9, atol=1e-11)


def test_scores_that_vanish_at_zero_b():
    for name in ("snip", "synflow"):
        for leaf in jax.tree.leaves(scores(name, "fresh")):
            np.testing.assert_array_equal(leaf, 0.0)
        assert sum(float(leaf.sum()) for leaf in jax.tree.leaves(scores(name, "trained"))) > 0
    for leaf in jax.tree.leaves(scores("grad-norm", "fresh")["lora"]):
        assert (leaf > 0).all()


def test_scores_are_their_formulas():
    gradient = jax.jit(jax.grad(lambda p: loss(weights(), SPACE.bind(p, SPACE.gates()), TOKENS[:4])))(trained())
    for kind, site, layer in (("lora", "v_proj", 1), ("shortcut", "ffn_input", 2)):
        both = gradient[kind][site], trained()[kind][site]
        grad, params = jax.tree.map(lambda leaf, i=layer: leaf[i], both)
        norm = np.sqrt((grad["a"] ** 2).sum()) + np.sqrt((grad["b"] ** 2).sum())
        np.testing.assert_allclose(scores("grad-norm", "trained")[kind][site][layer], norm, rtol=1e-8)
        saliency = np.abs(grad["a"] * params["a"]).sum() + np.abs(grad["b"] * params["b"]).sum()
        np.testing.assert_allclose(scores("snip", "trained")[kind][site][layer], saliency, rtol=1e-8)


def test_nothing_leads_into_the_first_block():
    assert np.isinf(SPACE.costs()["shortcut"]["ffn_input"][0])
    for name in ("grad-norm", "snip", "synflow"):
        assert scores(name, "trained")["shortcut"]["ffn_input"][0] == 0


def test_synflow_cannot_see_q_under_rotary_positions():
    found = scores("synflow", "trained")["lora"]
    np.testing.assert_allclose(found["q_proj"], 0.0, atol=1e-9 * float(found["v_proj"].max()))
    assert (found["v_proj"] > 0).all()


def test_squared_grad_norm_is_the_hypergradient_of_one_step_with_validation_equal_to_training():
    eta = 1e-6
    score = proxies.estimated(bilevel.Unrolled(optax.sgd(eta), 1))
    data = bilevel.FullBatch(TOKENS[:4])
    run = jax.jit(lambda score, p, at: score(p, at, SPACE.gates(), data, TOKENS[:4], jax.random.key(0)))
    found, norms = run(score, problem(), start() | {"head": {}}), scores("grad-norm", "fresh")
    for unrolled, norm in zip(jax.tree.leaves(found), jax.tree.leaves(norms), strict=True):
        np.testing.assert_allclose(unrolled / (2 * eta), norm**2, rtol=1e-4, atol=1e-12)


def test_alpha_test_finds_the_smallest_sufficient_factor():
    need = np.array([0.0, 0.01, 0.1, 3.0, 1000.0])

    def value(params, gates, batch, key):
        return 1.0 + jnp.sum(need * (1 - gates) ** 2)

    simple = bilevel.Problem(value, value, lambda key, gates: jnp.zeros(()), lambda key: jnp.ones(5))
    found = proxies.alpha_test(0.005)(simple, jnp.zeros(()), jnp.ones(5), None, None, None)
    wanted = [min(k for k in range(11) if n * (1 - k / 10) ** 2 <= 0.005) / 10 for n in need]
    np.testing.assert_allclose(found, wanted)
    assert wanted == [0.0, 0.3, 0.8, 1.0, 1.0]


@functools.cache
def reallocated(name, steps=5):
    """`(scores, gates)` of a dynamic search, a row each reallocation, and the final state. Modules start at B = 0."""
    score = getattr(proxies, name)
    proxy = proxies.Proxy(search_space.frozen_where_off(optax.adam(3e-2)), 2, score=score)
    budget = search_space.allocation(SPACE, 0.3, jax.random.key(0), normalised=True)
    solver = bilevel.Nested(problem(), proxy, budget)
    step = jax.jit(lambda solver, state, batches, outer: solver.step(state, batches, outer))
    see = jax.jit(lambda score, p, at, outer: score(p, at, SPACE.gates(), None, outer, jax.random.key(0)))
    state, rows = solver.init(jax.random.key(1)), []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batches = rng.choice(TOKENS, (2, 2))
        outer = rng.choice(TOKENS, 2)
        state, _ = step(solver, state, batches, outer)
        rows.append((see(as_pytree(score), problem(), state.inner.params, outer), state.outer))
    return rows


@pytest.mark.parametrize("name", ["snip", "grad_norm"])
def test_reallocations_differ_and_no_module_is_lost_for_ever(name):
    """Without a warm-up, whatever is drawn first is frozen: a module that is off keeps B = 0, and scores 0."""
    rows = reallocated(name)
    sets = [tuple(np.concatenate(jax.tree.leaves(gates)).tolist()) for _, gates in rows]
    assert len(set(sets)) > 1
    for on in sets:
        assert sum(on) == int(0.3 * (6 * LAYERS - 1))
    for found, _ in rows:
        flat = np.concatenate(jax.tree.leaves(found))
        assert (flat > 0).sum() == 6 * LAYERS - 1


def test_what_is_off_stays_where_it_is_though_adam_has_momentum():
    optimizer = search_space.frozen_where_off(optax.adam(0.1))
    params, gates = start(), SPACE.gates()
    state = optimizer(gates).init(params)
    ones = jax.tree.map(jnp.ones_like, params)
    off = some_gates()
    with jax.numpy_dtype_promotion("standard"):  # optax's own rules
        _, state = optimizer(gates).update(ones, state, params)
        updates, _ = optimizer(off).update(jax.tree.map(jnp.zeros_like, params), state, params)

    def check(gate, leaf):
        for on, of_layer in zip(gate, leaf, strict=True):
            assert (of_layer != 0).all() if on else (of_layer == 0).all()

    jax.tree.map(lambda gate, below: jax.tree.map(functools.partial(check, gate), below), off, updates)


@pytest.mark.parametrize("separated", [False, True])
def test_combined_and_separated_rankings_spend_the_same_budget(separated):
    # Combined, shortcuts with their higher scores take everything.
    gates = SPACE.gates()
    found = {kind: jax.tree.map(lambda g, k=kind: g * (1 + (k == "shortcut")), gates[kind]) for kind in gates}
    transform = search_space.allocation(SPACE, 0.5, jax.random.key(0), separated=separated)
    updates, _ = transform.update(jax.tree.map(jnp.negative, found), transform.init(gates), gates)
    on = optax.apply_updates(gates, updates)
    count = {kind: sum(float(leaf.sum()) for leaf in sites.values()) for kind, sites in on.items()}
    assert count == ({"lora": 3, "shortcut": 6} if separated else {"lora": 0, "shortcut": 8})
    assert on["shortcut"]["ffn_input"][0] == 0


def test_normalised_scores_compete_within_their_type():
    found = {"q": jnp.asarray([1.0, 3.0]), "v": jnp.asarray([100.0, 300.0]), "dead": jnp.zeros(2)}
    out, _ = search_space.by_type().update(found, search_space.by_type().init(found), None)
    np.testing.assert_allclose(out["q"], out["v"])
    np.testing.assert_array_equal(out["dead"], 0.0)


def test_bad_share_is_one_sentence():
    with pytest.raises(ValueError, match=r"The share 0 of modules that stay on must be above 0 and at most 1\."):
        search_space.allocation(SPACE, 0.0, jax.random.key(0))
    with pytest.raises(ValueError, match=r"The share 0\.01 of .* modules is less than one: raise it\."):
        search_space.allocation(SPACE, 0.01, jax.random.key(0))
