r"""Zero-cost proxies: scores of on/off modules, each a `bilevel.Hypergradient` whose gradient is minus the score.

A score is a function `score(problem, params, gates, inner_batches, outer_batch, key)` that answers with a tree like the
gates, `{...: [L]}`, larger being better. `params` holds, under the keys of the gates, trees whose leaves lead with L;
what has no gate (a head) is trained and not scored.

GRAD-NORM, SNIP, SYNFLOW, ALPHA-TEST and CONSTANT as HeteroLoRA uses them: Zhang et al. 2024, arXiv 2406.14956.
SNIP: Lee et al. 2019, arXiv 1810.02340. SynFlow: Tanaka et al. 2020, arXiv 2006.05467.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel.extend import Answer, PyTree, Query, Trained, as_pytree

Gates = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proxy(Trained):
    r"""Trains K steps at the gates as they are, then scores every module with all gates at 1: `grad = -score`.

    An off module has hypergradient exactly 0 and would never return, hence the gates of 1. At B = 0 every score but
    `grad_norm` and those of `estimated` is 0 (as are all gradients with respect to A), so the K steps are a warm-up.

    Args:
      optimizer, steps: as for `bilevel.Unrolled`; see `methods.search_space.frozen_where_off`.
      score: see the module. The loss it looks at is the outer one: give training rows as outer batches to score as
        published.
    """

    score: Any = dataclasses.field(kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "score", as_pytree(self.score))

    def differentiate(self, query: Query) -> Answer:
        """Costs `steps` inner gradients, and the score."""
        state, trace = self.trajectory(query)
        value, aux = query.outer_loss(state.params, query.outer)
        everything = optax.tree.ones_like(query.outer)
        outer_key = jax.random.clone(query.keys.outer)
        batches = query.inner_batches, query.outer_batch
        score = self.score(query.problem, state.params, everything, *batches, outer_key)
        return Answer(value, jax.tree.map(jnp.negative, score), state, trace, aux)

    def reached(self, query: Query) -> list[bool]:
        """Every gate has a score; none of them is a derivative of the outer loss."""
        return [True] * len(jax.tree.leaves(query.moving))


def constant(problem, params, gates, inner_batches, outer_batch, key):
    """CONSTANT: 1. The ties are broken at random: the random-allocation baseline."""
    return gates


def grad_norm(problem, params, gates, inner_batches, outer_batch, key):
    r"""GRAD-NORM: $\|\partial L / \partial A\|_F + \|\partial L / \partial B\|_F$.

    At B = 0 its square is, up to $-2 \eta$, the hypergradient of the gate through one SGD step of size
    $\eta$ with validation = training.
    """
    gradient = jax.grad(lambda p: problem.outer_value(p, gates, outer_batch, key)[0])(params)
    return _modules(lambda g: jnp.sqrt(jnp.sum(g * g, axis=tuple(range(1, g.ndim)))), gates, gradient)


def snip(problem, params, gates, inner_batches, outer_batch, key):
    r"""SNIP: $\sum |A \cdot \partial L / \partial A| + \sum |B \cdot \partial L / \partial B|$; 0 at B = 0."""
    gradient = jax.grad(lambda p: problem.outer_value(p, gates, outer_batch, key)[0])(params)
    return _saliency(gates, params, gradient)


def synflow(flow: Any) -> Any:
    r"""SYNFLOW: $\sum |A \cdot \partial R / \partial A| + \sum |B \cdot \partial R / \partial B|$ at |A|, |B|.

    No data enters. 0 at B = 0. `flow(params, gates)` is R, the network of absolute values fed with ones
    (`decoder_flow`).
    """

    def score(flow, problem, params, gates, inner_batches, outer_batch, key):
        positive = jax.tree.map(jnp.abs, params)
        return _saliency(gates, positive, jax.grad(flow)(positive, gates))

    return jax.tree_util.Partial(score, as_pytree(flow))


def decoder_flow(model: Any, weights: Any, bind: Callable[[PyTree, Gates], Any]) -> Any:
    """R for `synflow`: the sum of a decoder's logits on two tokens, weights absolute, embeddings all ones.

    `bind(params, gates)` is the hook, `Space.bind` for one.

    The published code differentiates the task's loss there; a sum, as SynFlow has it, asks for no labels. All tokens
    being the same vector, attention has nothing to choose from: q and k score exactly 0 in a model whose positions
    are rotary. That is the proxy, not the code.
    """

    def flow(weights, params, gates):
        adapt = bind(params, gates)
        positive = jax.tree.map(jnp.abs, weights)
        ones = {**positive, "embed": jnp.ones_like(positive["embed"])}
        hidden = model.apply({"params": ones}, jnp.zeros((1, 2), jnp.int32), None, adapt, method="hidden")
        return model.apply({"params": positive}, hidden, method="head").sum()

    return jax.tree_util.Partial(flow, weights)


def alpha_test(tolerance: float = 0.005) -> Any:
    """ALPHA-TEST: the smallest factor in {0, .1, ..., 1} of a module at which the loss stays within `tolerance`.

    Found by bisection, hence under the assumption that less of a module is never better: four outer losses a module.
    The published form looks at the task's metric; the loss says the same without steps. Needs trained modules.
    """

    def score(tolerance, problem, params, gates, inner_batches, outer_batch, key):
        flat, tree = ravel_pytree(gates)

        def loss(flat):
            return problem.outer_value(params, tree(flat), outer_batch, key)[0]

        highest = loss(flat) + tolerance * jnp.abs(loss(flat))

        def smallest(module):
            def halve(_, bounds):
                low, high = bounds
                middle = (low + high) // 2
                enough = loss(flat.at[module].set(middle.astype(flat.dtype) / 10)) <= highest
                return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

            return jax.lax.fori_loop(0, 4, halve, (jnp.int32(0), jnp.int32(10)))[1]

        tenths = jax.lax.map(smallest, jnp.arange(len(flat)))
        return tree(tenths.astype(flat.dtype) / 10)

    return jax.tree_util.Partial(score, tolerance)


def estimated(estimator: bilevel.Hypergradient) -> Any:
    """The negative of a hypergradient of the gates: UD-K (`Unrolled`), implicit, first-order.

    The estimator trains its own K steps with every module on, from where the search is, on the same batches; that
    training is thrown away. Its `steps` are those of the `Proxy`.
    """

    def score(estimator, problem, params, gates, inner_batches, outer_batch, key):
        start = jax.tree_util.Partial(lambda params, key, outer: params, params)
        there = dataclasses.replace(problem, init_inner=start)
        grad = estimator.estimate(there, None, gates, inner_batches, outer_batch, key).grad
        return jax.tree.map(jnp.negative, grad)

    return jax.tree_util.Partial(score, estimator)


class Given(NamedTuple):
    """What a score may be made of.

    Attributes:
      model, weights: the frozen model.
      bind: `bind(params, gates)`, the hook.
      optimizer, steps: of the training that comes before a score.
    """

    model: Any
    weights: Any
    bind: Callable[[PyTree, Gates], Any]
    optimizer: Any
    steps: int


PROXIES: dict[str, Callable[[Given], Any]] = {
    "grad-norm": lambda given: grad_norm,
    "constant": lambda given: constant,
    "snip": lambda given: snip,
    "synflow": lambda given: synflow(decoder_flow(given.model, given.weights, given.bind)),
    "alpha-test": lambda given: alpha_test(),
    "unrolled": lambda given: estimated(bilevel.Unrolled(given.optimizer, given.steps, checkpoint="step")),
    "implicit": lambda given: estimated(
        bilevel.Implicit(given.optimizer, given.steps, linear_solver=bilevel.CG(max_steps=10), damping=0.1)
    ),
    "first-order": lambda given: estimated(bilevel.FirstOrder(given.optimizer, given.steps)),
}
"""By the name that the command line knows, what makes the score; a new one is a function and an entry here."""
BLIND = ("constant", "synflow")
"""Those that look at no rows."""


def gated(gates: Gates, tree: PyTree) -> PyTree:
    """What of the inner variable has gates; a head has none."""
    return {kind: tree[kind] for kind in gates}


def _modules(measure: Callable[[jax.Array], jax.Array], gates: Gates, tree: PyTree) -> Gates:
    """For every gate leaf `[L]`, the sum over the parameter leaves below it of `measure(leaf)`, `[L]`."""

    def total(gate, below):
        parts = [measure(leaf).astype(gate.dtype) for leaf in jax.tree.leaves(below)]
        return jnp.sum(jnp.stack(parts), axis=0)

    return jax.tree.map(total, gates, gated(gates, tree))


def _saliency(gates: Gates, params: PyTree, gradient: PyTree) -> Gates:
    product = jax.tree.map(lambda p, g: jnp.abs(p * g), params, gradient)
    return _modules(lambda s: jnp.sum(s, axis=tuple(range(1, s.ndim))), gates, product)
