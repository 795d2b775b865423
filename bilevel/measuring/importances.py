"""How much the outer loss depends on each outer variable, by the hypergradients that a run has come by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.settings.fields import shown
from bilevel.trees import PyTree, leaf_names


class GradientSizes(NamedTuple):
    """State of `gradient_sizes`: how many gradients it has seen, and the sum of their absolute values."""

    count: jax.Array
    total: PyTree


def gradient_sizes() -> optax.GradientTransformation:
    r"""Changes nothing, and keeps the mean of $|g|$ of what passes through it, for `importances`.

    Put it first in a chain, before what rescales gradients: `optax.chain(bilevel.gradient_sizes(), optax.adam(0.1))`.
    As a part of the outer optimizer it is in checkpoints, and goes on with a resumed run. Where `Problem.domain` bounds
    a leaf it sees the gradient in free coordinates.

    Returns:
      An `optax.GradientTransformation`; its state holds arrays of the shapes of `outer`.

    Examples:
      >>> import bilevel, jax.numpy as jnp
      >>> sizes = bilevel.gradient_sizes()
      >>> outer = {"decay": jnp.asarray(0.0)}
      >>> state = sizes.init(outer)
      >>> for g in (1.0, -3.0):
      ...     updates, state = sizes.update({"decay": jnp.asarray(g)}, state, outer)
      >>> float(updates["decay"]), float(state.total["decay"]) / int(state.count)
      (-3.0, 2.0)
    """

    def init(params: PyTree) -> GradientSizes:
        return GradientSizes(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: jnp.zeros_like(jnp.abs(x)), params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, GradientSizes]:
        del params
        total = jax.tree.map(lambda t, g: t + jnp.abs(g), state.total, updates)
        return updates, GradientSizes(state.count + 1, total)

    return optax.GradientTransformation(init, update)


def importances(of: Any, scale: PyTree = 1.0) -> dict[str, float]:
    r"""The share of each outer leaf in the size of the hypergradients of a run.

    With $g_t$ the hypergradient at outer step t = 1, ..., T, and s the scale of each entry i of leaf l,

    $$ I_l = \frac{1}{T} \sum_t \sum_i |s_{li}\, g_{t, li}|, \qquad \text{importance}_l = I_l / \sum_m I_m. $$

    $s g$ is, to first order, by how much the outer loss changes when the variable moves by s. So s is how far one
    would think of moving it: the width of the interval that a search would draw it from, in the unit in which it is
    differentiated. With s = 1 the leaves must be in like units, such as all logarithms, whose derivative is by factors
    of e. Leaves in unlike units and no scale are not comparable.

    It is a mean over the path of this run, so it says which variables the search was driven by. It is local: no
    interaction, no curvature; a variable that began where it should be has none, however much it matters elsewhere.
    Noise has a size too: with small outer batches no leaf comes to 0. Optuna's fANOVA importances, to lay beside it,
    are shares of the variance of the final loss over a whole search space; the two are of different variables and need
    not agree in size.

    Args:
      of: a `Result` of `run` whose outer optimizer has `gradient_sizes` in its chain; its `state`; or a mapping
        name -> gradients, one row a step, of arrays `[T, ...]` that a loop of your own has kept.
      scale: a number, or a tree of numbers or arrays like `outer` (or a prefix of it); for a mapping, a dict by its
        names.

    Returns:
      name of the leaf -> its share, in the order of `outer`; they sum to 1, and are 0 if all hypergradients were 0. Of
      a stack of runs each is the share in all of them.

    Raises:
      ValueError: if there is no `gradient_sizes` in the state, no step was taken, a scale is negative or not finite, or
        there is no leaf for it.

    Examples:
      >>> import bilevel, numpy as np
      >>> history = {"decay": np.array([1.0, -3.0]), "rates": np.array([[0.0, 1.0], [0.0, 3.0]])}
      >>> bilevel.importances(history)
      {'decay': 0.5, 'rates': 0.5}
      >>> bilevel.importances(history, {"decay": 3.0, "rates": 1.0})
      {'decay': 0.75, 'rates': 0.25}

      Of a run:

      >>> import optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> outer_optimizer = optax.chain(bilevel.gradient_sizes(), optax.sgd(1.0))
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), outer_optimizer)
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=5, progress=False)
      >>> bilevel.importances(result)  # it has one leaf, which has no name
      {'.': 1.0}
    """
    means = _means(of)
    try:
        scales = jax.tree.map(lambda s, tree: jax.tree.map(lambda _: s, tree), scale, means)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"importances(scale={shown(scale)}): must be a number, or a tree like the outer variable ({error})."
        ) from None
    sizes = {}
    leaves = zip(leaf_names(means), jax.tree.leaves(means), jax.tree.leaves(scales), strict=True)
    for name, mean, s in leaves:
        s = np.asarray(s, np.float64)
        if not (np.isfinite(s).all() and (s >= 0).all()):
            raise ValueError(f"importances(scale=...): the scale of {name} is {s}, but must be a number from 0 on.")
        sizes[_plain(name)] = float(np.sum(np.asarray(mean, np.float64) * s))
    total = sum(sizes.values())
    return {name: size / total if total else 0.0 for name, size in sizes.items()}


def _means(of: Any) -> PyTree:
    """The mean of |g| over the steps, as a tree like outer."""
    if isinstance(of, Mapping):
        rows = {name: np.asarray(g, np.float64) for name, g in of.items()}
        if not rows or any(g.ndim < 1 or len(g) < 1 for g in rows.values()):
            raise ValueError("importances(of=...): a mapping must hold gradients by name, one row a step: [T, ...].")
        return {name: np.abs(g).mean(axis=0) for name, g in rows.items()}
    state = getattr(getattr(of, "state", of), "opt_state", None)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, GradientSizes))
    found = [node for node in nodes if isinstance(node, GradientSizes)]
    if len(found) != 1:
        raise ValueError(
            f"importances(of=...): the run's outer optimizer has {len(found)} bilevel.gradient_sizes() in its chain, "
            "and must have one: bilevel.Nested(..., optax.chain(bilevel.gradient_sizes(), optimizer))."
        )
    count = np.asarray(found[0].count)
    if not count.all():
        raise ValueError("importances(of=...): no outer step was taken, so that there is no hypergradient.")
    # Runs of a stack have taken the same number of steps.
    return jax.tree.map(lambda total: np.asarray(total, np.float64) / count.flat[0], found[0].total)


def _plain(name: str) -> str:
    """The key of an outer variable that is a dict of leaves; of another tree the path."""
    inside = name.removeprefix("['").removesuffix("']")
    return inside if name == f"['{inside}']" and "'" not in inside else name
