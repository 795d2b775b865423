"""Transformations of optax's kind that optax does not have.

For outer variables, in an `optax.chain`: the best set within a budget, the feasible set, and centring. For inner
problems with a penalty that is not smooth: proximal gradient descent.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bilevel.settings.fields import checked
from bilevel.settings.numeric import real, scalar
from bilevel.settings.rules import function, random_key
from bilevel.trees import PyTree, in_leaf, leaf_names


class AllocateState(NamedTuple):
    """State of `allocate`: the random key that breaks the next ties."""

    key: jax.Array


def allocate(budget: float, costs: PyTree = 1, *, key: jax.Array) -> optax.GradientTransformation:
    r"""Moves on/off gates to the best set within a budget.

    With scores $s = -$ (incoming updates: hypergradients, or what a proxy puts in their place) and costs c,

    $$ \max_{m \in \{0, 1\}^M} \sum_i s_i m_i \quad\text{with}\quad \sum_i c_i m_i \le C, $$

    and the update is `m - params`. The set is filled by falling $s_i / c_i$, each module that still fits being
    taken, once from the empty set and once from the single best module; the better of the two is kept. That is the
    optimum where all costs are equal, and for scores $\ge 0$ at least half of it, since the two sets have at
    least the value of the optimum between them. The budget is there to be spent: a module of negative score is taken
    where it fits, after all others. It is never exceeded: whole costs are compared as integers; others are rounded up
    to $2^{-30}$ of their sum. Equal ratios are put in an order drawn anew at each update.

    Args:
      budget: C, in the unit of the costs.
      costs: what a module costs when on: one number, or a tree of numbers and arrays like the gates (or a prefix of
        it, an entry serving all gates below it). `inf` marks a module that may never be on.
      key: PRNG key of the ties.

    Returns:
      A transformation; its `params` are trees of gates, floating point, 0 or 1. Leaves that are None or
      `optax.MaskedNode` are passed over, so that `optax.partition` gives every group of modules a budget of its own.

    Raises:
      ValueError: for a cost that is not positive, costs of another structure than the gates, a budget that no module
        fits into, or gates that are not floating point; at the update, without `params` or for a score that is NaN.

    References:
      Dantzig, "Discrete-variable extremum problems", 1957 (the ratio rule); Zhang et al. 2024, arXiv 2406.14956 (a
      budget of LoRA modules).

    Examples:
      >>> import bilevel, jax, optax
      >>> gates = dict.fromkeys("abc", jax.numpy.zeros(()))
      >>> scores = {"a": 3.0, "b": 1.0, "c": 2.0}
      >>> rule = bilevel.allocate(2, key=jax.random.key(0))
      >>> updates = jax.tree.map(lambda score: jax.numpy.array(-score), scores)
      >>> updates, _ = rule.update(updates, rule.init(gates), gates)
      >>> {name: float(gate) for name, gate in optax.apply_updates(gates, updates).items()}
      {'a': 1.0, 'b': 0.0, 'c': 1.0}
    """

    checked("allocate", "budget", budget, real(infinite=True))
    checked("allocate", "key", key, random_key)

    def init(params: PyTree) -> AllocateState:
        _check_gates("gates", params)
        _whole(costs, budget, params)
        return AllocateState(key)

    def update(updates: PyTree, state: Any, params: PyTree = None):
        if params is None:
            raise ValueError("allocate moves gates to a set, so it needs them: call update(updates, state, params).")
        _check_gates("gates", params)
        _check_gates("scores", updates)
        whole, limit = _whole(costs, budget, params)
        leaves, structure = jax.tree.flatten(updates)
        gates = jax.tree.leaves(params)
        score = -jnp.concatenate([leaf.ravel() for leaf in leaves])
        next_key, key = jax.random.split(state.key)
        chosen = _best_set(score, jnp.asarray(whole), jnp.int32(limit), key)
        split = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = zip(jnp.split(chosen, split), gates, strict=True)
        # Of traced scores nothing is known here: a NaN among them becomes one of every gate, which a run tells of.
        doubt = jnp.where(jnp.any(jnp.isnan(score)), jnp.nan, 0.0)
        moved = [part.reshape(gate.shape).astype(gate.dtype) - gate + doubt.astype(gate.dtype) for part, gate in parts]
        return jax.tree.unflatten(structure, moved), AllocateState(next_key)

    return optax.GradientTransformation(init, update)


def project(projection: str, **options: Any) -> optax.GradientTransformation:
    r"""Ends an update inside a set: the update u becomes $\Pi(\theta + u) - \theta$. Last in a chain.

    Args:
      projection: the set, by the name of optax's projection onto it, `optax.projections.projection_<name>`: "simplex",
        "box", "hypercube", "non_negative", "l1_ball", "l2_ball", "linf_ball", "l1_sphere", "l2_sphere", "hyperplane",
        "halfspace". The set is one for all leaves together, as optax has it.
      options: of that projection: `scale=1.0` for "simplex" and the balls; `lower=`, `upper=` for "box".

    Raises:
      ValueError: for an unknown set; at the update, without `params`.

    Examples:
      >>> import bilevel, jax
      >>> rule, params = bilevel.project("box", lower=0.0, upper=1.0), jax.numpy.array([0.5, 0.5])
      >>> updates, _ = rule.update(jax.numpy.array([2.0, 0.25]), rule.init(params), params)
      >>> (params + updates).tolist()
      [1.0, 0.75]
    """
    function = getattr(optax.projections, f"projection_{projection}", None)
    if not isinstance(projection, str):
        function = None
    if function is None:
        known = sorted(name.removeprefix("projection_") for name in dir(optax.projections) if "projection_" in name)
        raise ValueError(f"project({projection!r}): there is no such projection; optax has {', '.join(known)}.")

    try:
        inspect.signature(function).bind(None, **options)
    except TypeError as error:
        raise ValueError(f"project({projection!r}, ...): {error}; see optax.projections.{function.__name__}.") from None
    for name, option in options.items():
        for x in jax.tree.leaves(option):
            checked(f"project({projection!r})", name, x, scalar(infinite=True))

    def update(updates: PyTree, params: PyTree = None) -> PyTree:
        if params is None:
            raise ValueError("project needs to know where it starts: call update(updates, state, params).")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's own rules
            reached = function(jax.tree.map(jnp.add, params, updates), **options)
        return jax.tree.map(lambda new, old: (new - old).astype(old.dtype), reached, params)

    return optax.stateless(update)


def center() -> optax.GradientTransformation:
    r"""Takes its mean off every leaf of the update, so that the sum of a leaf's entries stays what it was.

    Logits under a softmax do not feel a common shift, and their gradient sums to 0; an element-wise optimizer (Adam)
    loses that, and "above 0" is then no longer "above the mean". `optax.chain(optax.adam(1e-2), center())` restores it.

    Examples:
      >>> import bilevel, jax
      >>> rule = bilevel.center()
      >>> updates, _ = rule.update(jax.numpy.array([1.0, 2.0, 6.0]), rule.init(None))
      >>> updates.tolist()
      [-2.0, -1.0, 3.0]
    """
    return optax.stateless(lambda updates, params=None: jax.tree.map(lambda u: u - jnp.mean(u), updates))


def _check_gates(what: str, tree: PyTree) -> None:
    """Raises ValueError, by name, for a leaf that is no real floating-point array, or holds a NaN."""
    for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            kind = jnp.result_type(x)
            raise ValueError(f"allocate: the {what}{in_leaf(name)} are {kind}, but must be floating point (0.0, 1.0).")
        if not isinstance(x, Tracer) and np.isnan(np.asarray(x, np.float64)).any():
            raise ValueError(f"allocate: the {what}{in_leaf(name)} hold a NaN, which has no place in an order.")


def _whole(costs: PyTree, budget: float, params: PyTree) -> tuple[np.ndarray, int]:
    """Costs `[M]` and budget as integers below 2^31, in a common unit; no cost smaller than it is."""

    def spread(cost: Any, gates: PyTree) -> PyTree:
        return jax.tree.map(lambda gate: np.broadcast_to(np.asarray(cost, np.float64), gate.shape).ravel(), gates)

    try:
        cost = np.concatenate(jax.tree.leaves(jax.tree.map(spread, costs, params)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"The costs of allocate do not fit its gates, module for module: {error}") from None
    if not (cost > 0).all():
        raise ValueError(f"allocate has a module of cost {cost[~(cost > 0)][0]:g}: costs must be positive.")
    usable = cost[cost <= budget]
    if not len(usable):
        raise ValueError(f"The budget {budget:g} is less than the cheapest module, which costs {cost.min():g}.")
    total = usable.sum()
    unit = math.gcd(*(int(c) for c in usable)) if (usable % 1 == 0).all() else 0
    if not 0 < total < unit * 2**31:
        unit = total / 2**30
    limit = math.floor(min(budget, 2 * total) / unit)
    whole = np.ceil(cost / unit)
    limit = min(limit, int(whole[cost <= budget].sum()))
    return np.minimum(whole, limit + 1).astype(np.int32), limit


@jax.jit
def _best_set(score: jax.Array, cost: jax.Array, limit: jax.Array, key: jax.Array) -> jax.Array:
    """Returns for each of the M modules whether it is kept, bool `[M]`."""
    shuffled = jax.random.permutation(key, len(score))
    ratio = (score / cost.astype(score.dtype))[shuffled]
    order = shuffled[jnp.argsort(-ratio, stable=True)]
    affordable = jnp.where(cost <= limit, score, -jnp.inf)[order]
    after_the_best = jnp.arange(len(score)) != jnp.argmax(affordable)

    def fill(order: jax.Array) -> jax.Array:
        def take(left: jax.Array, module: jax.Array):
            on = cost[module] <= left
            return left - jnp.where(on, cost[module], 0), on

        taken = jax.lax.scan(take, limit, order)[1]
        return jnp.zeros(len(score), bool).at[order].set(taken)

    sets = jax.vmap(fill)(jnp.stack([order, order[jnp.argsort(after_the_best, stable=True)]]))
    return sets[jnp.argmax(jnp.where(sets, score[None, :], 0).sum(1))]


def proximal_gradient(learning_rate: Any, prox: Callable[[PyTree, Any], PyTree]) -> optax.GradientTransformation:
    r"""The proximal gradient step, $w \leftarrow \mathrm{prox}_{\eta g}(w - \eta \nabla f(w))$.

    It minimises `inner_loss` + g, and goes with `Unrolled` and `FixedPoint`.

    Args:
      learning_rate: $\eta$, a number or an array; below 2 / (largest eigenvalue of the Hessian) it converges.
      prox: `prox(w, eta)`, the proximal operator of $\eta g$ on trees like the inner variable. With
        `lambda outer: proximal_gradient(eta, lambda w, eta: soft_threshold(w, eta * outer))` as the optimizer, the
        strength of the penalty is an outer variable.

    References:
      Daubechies et al. 2004 (ISTA), arXiv math/0307152.

    Examples:
      >>> import bilevel, jax
      >>> rule = bilevel.proximal_gradient(0.5, bilevel.soft_threshold)  # of the lasso |w - target|^2 / 2 + |w|_1
      >>> w, target = jax.numpy.zeros(2), jax.numpy.array([3.0, 0.5])
      >>> state = rule.init(w)
      >>> for _ in range(30):
      ...     updates, state = rule.update(w - target, state, w)
      ...     w = w + updates
      >>> [round(float(entry), 3) for entry in w]
      [2.0, 0.0]
    """

    checked("proximal_gradient", "learning_rate", learning_rate, scalar(low=0.0))
    checked("proximal_gradient", "prox", prox, function("w", "eta"))

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("proximal_gradient needs the parameters: call update(grads, state, params).")
        moved = prox(jax.tree.map(lambda w, g: w - learning_rate * g, params, updates), learning_rate)
        return jax.tree.map(jnp.subtract, moved, params), state

    return optax.GradientTransformation(init, update)


def soft_threshold(tree: PyTree, threshold: Any) -> PyTree:
    """The proximal operator of `threshold * |w|_1`: every entry moves `threshold` towards 0, and stops there.

    Examples:
      >>> import bilevel, jax
      >>> bilevel.soft_threshold(jax.numpy.array([3.0, -2.0, 1.0]), 1.0).tolist()
      [2.0, -1.0, 0.0]
    """
    return jax.tree.map(lambda w: jnp.sign(w) * jnp.maximum(jnp.abs(w) - threshold, 0), tree)
