"""Layer gates, dropout rates and KL weight, stochastic gates and task vectors in one outer variable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import finegates, flexora, loratrf
from methods.adapters import filters, gates
from methods.adapters.dropout import DropoutConfig, logit
from methods.models.hooks import Chain
from methods.tasks.loss import bidirectional_kl, cross_entropy
from tests.methods import small
from tests.methods.small import CONFIG, LAYERS, PLACES, closed, given, setting, start, vectors

TIED = gates.tied(CONFIG)
DROPOUT = DropoutConfig(["attention_logits column kl", "ffn_hidden element kl"], 0.3)


def predict(weights, params, outer, batch, adapt):
    edit = loratrf.bind(params, outer["vectors"], LAYERS, "cosine", "vectors")
    gate = flexora.gate(outer["layers"])
    return small.predict(weights, given().bind(weights, params, gate=gate, before=edit, after=adapt), batch)


def train_loss(weights, params, outer, batch, key):
    *masks, noise = jax.random.split(outer["key"], 3)
    gated = finegates.hook(params, outer["gates"], TIED, "stg", noise)
    hooks = [Chain((gated, DROPOUT.bind(mask, outer["rates"], LAYERS))) for mask in masks]
    first, second = (predict(weights, params, outer, batch, hook) for hook in hooks)
    agreement = bidirectional_kl(first.logits, second.logits, first.mask)
    return cross_entropy(first) + jnp.exp(outer["log_beta"]) * agreement


def val_loss(weights, params, outer, batch, key):
    gated = finegates.hook(params, outer["gates"], TIED, "stg", None)
    value = cross_entropy(predict(weights, params, outer, batch, gated))
    return value + gates.penalty(outer["gates"], "stg", keep=0.6)


def init_inner(key, outer):
    biases = {site: jnp.zeros((LAYERS, out)) for site, (_, out) in CONFIG.site_shapes().items()}
    edit = filters.init(key, PLACES["linears"], LAYERS, 2, "cosine")
    return start(key) | {"edit": edit, "bias": biases}


def init_outer(key):
    rates = dict.fromkeys(DROPOUT.positions, logit(0.1))
    found = {"layers": jnp.zeros(LAYERS), "rates": rates, "log_beta": jnp.zeros(()), "vectors": vectors("linears")}
    return found | {"gates": closed(TIED, 0.2), "key": key}


def test_one_hypergradient_for_all_of_them_is_the_derivative_of_the_training():
    weights, _, train, validation = setting()
    losses = (jax.tree_util.Partial(loss, weights) for loss in (train_loss, val_loss))
    problem = bilevel.Problem(*losses, init_inner, init_outer)
    estimator = bilevel.Unrolled(optax.adam(3e-2), 2)
    at = problem.start_outer(jax.random.key(0))

    @jax.jit
    def gradient(at):
        return estimator.estimate(problem, None, at, bilevel.FullBatch(train), validation, jax.random.key(0)).grad

    grad = gradient(at)

    @jax.jit
    def value(moved):
        state = estimator.solve(problem, None, moved, bilevel.FullBatch(train), jax.random.key(0))
        return problem.outer_value(state.params, moved, validation, None)[0]

    for name in ("layers", "rates", "log_beta", "vectors", "gates"):
        keys = jax.random.split(jax.random.key(3), len(jax.tree.leaves(at[name])))
        leaves, structure = jax.tree.flatten(at[name])
        direction = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
        along = sum(jnp.vdot(g, v) for g, v in zip(jax.tree.leaves(grad[name]), direction, strict=True))
        assert abs(along) > 1e-6, name

        def moved(step, name=name, leaves=leaves, direction=direction, structure=structure):
            there = [leaf + step * v for leaf, v in zip(leaves, direction, strict=True)]
            return at | {name: jax.tree.unflatten(structure, there)}

        central = (value(moved(1e-6)) - value(moved(-1e-6))) / 2e-6
        np.testing.assert_allclose(along, central, rtol=1e-4, err_msg=name)
