"""Layer gates, dropout rates and stochastic gates in one outer variable."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel
from methods import finegates, flexora
from methods.adapters import gates
from methods.adapters.dropout import DropoutConfig, logit
from methods.models.hooks import Chain
from methods.tasks.loss import cross_entropy
from tests.methods.test_finegates import closed
from tests.methods.test_flexora import CONFIG, LAYERS, setting, start
from tests.methods.test_hiddenkey import predict

TIED = gates.tied(CONFIG)
DROPOUT = DropoutConfig(["attention_logits column rescale", "ffn_hidden element rescale"], 0.3)


def train_loss(weights, params, outer, batch, key):
    masks, noise = jax.random.split(outer["key"])
    drop = DROPOUT.bind(masks, outer["rates"], LAYERS)
    adapt = Chain((finegates.hook(params, outer["gates"], TIED, "stg", noise), drop))
    return cross_entropy(predict(weights, params["lora"], adapt, batch, flexora.gate(outer["layers"])))


def val_loss(weights, params, outer, batch, key):
    adapt = finegates.hook(params, outer["gates"], TIED, "stg", None)
    value = cross_entropy(predict(weights, params["lora"], adapt, batch, flexora.gate(outer["layers"])))
    return value + gates.penalty(outer["gates"], "stg", keep=0.6)


def init_inner(key, outer):
    biases = {site: jnp.zeros((LAYERS, out)) for site, (_, out) in CONFIG.site_shapes().items()}
    return {"lora": start(key), "bias": biases}


def init_outer(key):
    rates = dict.fromkeys(DROPOUT.positions, logit(0.1))
    return {"layers": jnp.zeros(LAYERS), "rates": rates, "gates": closed(TIED, 0.2), "key": key}


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

    for name in ("layers", "rates", "gates"):
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
