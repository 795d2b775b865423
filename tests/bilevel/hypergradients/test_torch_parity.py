"""The same hypergradient from another automatic differentiation: TorchOpt's Adam, differentiated by torch."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Problem, Unrolled
from tests.bilevel.helpers import KEY, assert_close, estimate
from tests.conftest import require

torch = require("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch's own, while it is imported
    torchopt = require("torchopt")

STEPS, RATE = 12, 0.02
_RNG = np.random.default_rng(0)
DATA = {"x": _RNG.normal(size=(20, 5)), "y": _RNG.normal(size=(20, 2))}
HELD_OUT = {"x": _RNG.normal(size=(15, 5)), "y": _RNG.normal(size=(15, 2))}
START = {
    "w": _RNG.normal(size=(5, 8)) / 2,
    "b": _RNG.normal(size=(8,)) / 2,
    "v": _RNG.normal(size=(8, 8)) / 2,
    "u": _RNG.normal(size=(8, 2)) / 2,
}
OUTER = {"weight": _RNG.uniform(0.5, 1.5, size=20), "log_l2": np.array(-3.0)}


def miss(np_like, inner, data):
    """Squared error of a network of three layers, a row; with the functions of `np_like`, jax's or torch's."""
    hidden = np_like.tanh(data["x"] @ inner["w"] + inner["b"][None])
    return ((np_like.tanh(hidden @ inner["v"]) @ inner["u"] - data["y"]) ** 2).sum(1)


def inner_loss(np_like, inner, outer, data):
    penalty = np_like.exp(outer["log_l2"]) * sum((x**2).sum() for x in inner.values())
    return (outer["weight"] * miss(np_like, inner, data)).mean() + penalty


def outer_loss(np_like, inner, outer, data):
    return np_like.log1p(miss(np_like, inner, data)).mean() + 1e-3 * np_like.exp(outer["log_l2"])


@pytest.fixture(scope="module")
def by_torch():
    """The outer loss, and its gradient, with the graph of all steps kept."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # TorchOpt corrects Adam's bias in the default precision
    yield unrolled_by_torch()
    torch.set_default_dtype(default)


def unrolled_by_torch():

    def tensors(tree, requires_grad=False):
        return {name: torch.tensor(x, requires_grad=requires_grad) for name, x in tree.items()}

    inner, outer = tensors(START, True), tensors(OUTER, True)
    optimizer = torchopt.adam(lr=RATE)
    names, state = sorted(inner), optimizer.init(tuple(inner[name] for name in sorted(inner)))
    for _ in range(STEPS):
        params = tuple(inner[name] for name in names)
        grads = torch.autograd.grad(inner_loss(torch, inner, outer, tensors(DATA)), params, create_graph=True)
        updates, state = optimizer.update(grads, state, inplace=False)
        inner = dict(zip(names, torchopt.apply_updates(params, updates, inplace=False), strict=True))
    value = outer_loss(torch, inner, outer, tensors(HELD_OUT))
    value.backward()
    return value.item(), {name: x.grad.numpy() for name, x in outer.items()}


@pytest.mark.parametrize(
    "hypergradient",
    [
        Unrolled(optax.adam(RATE), STEPS),
        Unrolled(optax.adam(RATE), STEPS, mode="reverse", checkpoint="none"),
        Unrolled(optax.adam(RATE), STEPS, mode="forward"),
    ],
    ids=lambda h: h.mode,
)
def test_two_automatic_differentiations_agree(hypergradient, by_torch):
    problem = Problem(
        lambda inner, outer, batch, key: inner_loss(jnp, inner, outer, batch),
        lambda inner, outer, batch, key: outer_loss(jnp, inner, outer, batch),
        lambda key, outer: jax.tree.map(jnp.asarray, START),
        lambda key: OUTER,
    )
    data, held_out = (bilevel.FullBatch(jax.tree.map(jnp.asarray, d)) for d in (DATA, HELD_OUT))
    result = estimate(problem, hypergradient, None, problem.start_outer(KEY), data, held_out, KEY)
    value, grad = by_torch
    np.testing.assert_allclose(result.value, value, rtol=1e-10)
    assert_close(result.grad, grad, 1e-6)
