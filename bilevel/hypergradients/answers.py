"""What `differentiate` of an estimator has returned: understood, or refused in a sentence that names the estimator."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false
# pyright: reportUnnecessaryIsInstance=false
# (Every parameter and result has a type; what jax returns has not always one that is known. What a user's method
# returns is not always what its annotation says.)

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.hypergradients.query import Answer, Ledger, Query
from bilevel.hypergradients.training import InnerState, Trace
from bilevel.settings.fields import shown
from bilevel.trees import PyTree, leaf_names, shape, unlike_array


class Unmet(Exception):
    """What an estimator has to do, and has not done: a sentence.

    It is no ValueError, so that it is not taken for what JAX says of a loss that cannot be differentiated.
    """


def checked_answer(answer: Any, query: Query, params: PyTree) -> Answer:
    """`answer` with the numbers of `info` and of `grad` made arrays.

    Args:
      answer: what `differentiate` returned.
      query: what it was asked.
      params: the shapes and dtypes of the inner variable.

    Raises:
      Unmet: names what is not as `Answer` says.
    """
    if not isinstance(answer, Answer):
        raise Unmet(
            f"differentiate returned {_kind(answer)}, but must return an Answer(value, grad, state, trace, aux, info)"
        )
    if unlike_array(answer.value) is not None or jnp.shape(answer.value) != () or not _is_real(answer.value):
        raise Unmet(
            f"value is {_kind(answer.value)}, but must be the outer loss, a scalar: the first result of "
            "query.outer_loss(params, outer)"
        )
    grad = _like("grad", answer.grad, query.moving, "an estimate for every leaf of query.moving")
    if not isinstance(answer.state, InnerState):
        raise Unmet(
            f"state is {_kind(answer.state)}, but must be an InnerState: the one that self.trajectory(query) returned, "
            "or state._replace(...) of it"
        )
    _like("state.params", answer.state.params, params, "the inner variable after training")
    if not isinstance(answer.trace, Trace) or jnp.shape(answer.trace.value) != (query.steps,):
        what = f"Trace(value={_kind(answer.trace.value)})" if isinstance(answer.trace, Trace) else _kind(answer.trace)
        raise Unmet(
            f"trace is {what}, but must be a Trace whose value holds the {query.steps} inner losses of training: the "
            "one that self.trajectory(query) returned"
        )
    return answer._replace(value=jnp.asarray(answer.value), grad=grad, info=_arrays(answer.info))


def check_asked(ledger: Ledger, differentiates: bool) -> None:
    """Checks that the outer loss was taken from the query, where the trace can see it.

    Raises:
      Unmet: says how to call it.
    """
    why = "which holds the batch and the key, and shows which leaves of outer the hypergradient depends on"
    if not ledger.evaluated:
        raise Unmet(f"differentiate never called query.outer_loss(params, outer): take the outer loss from it, {why}")
    if differentiates and not ledger.differentiated:
        raise Unmet(
            "differentiate called query.outer_loss, but never differentiated it: take the derivatives of the outer "
            f"loss of it, {why}; an estimator that takes no derivative of the outer loss overrides `reached`"
        )


def _like(what: str, tree: Any, like: PyTree, meaning: str) -> PyTree:
    """`tree`, its numbers made arrays, if it has the structure, shapes and dtypes of `like`; else raises `Unmet`."""
    names, found = leaf_names(like), dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    must = f"{what} must hold {meaning}, of the same structure, shapes and dtypes"
    for name, leaf in zip(names, jax.tree.leaves(like), strict=True):
        if name not in found:
            raise Unmet(f"{what} has no array at leaf {_at(name)}, where {shape(leaf)} is expected: {must}")
        if (reason := unlike_array(found[name])) is not None:
            raise Unmet(f"{what} holds {reason} at leaf {_at(name)}: {must}")
        same = jnp.shape(found[name]) == jnp.shape(leaf) and jnp.result_type(found[name]) == jnp.result_type(leaf)
        if not same:
            raise Unmet(f"{what} is {shape(found[name])} at leaf {_at(name)}, where {shape(leaf)} is expected: {must}")
    if more := [name for name in found if name not in names]:
        raise Unmet(f"{what} has a leaf {_at(more[0])}, which there is not in what is expected: {must}")
    if jax.tree.structure(tree) != jax.tree.structure(like):
        raise Unmet(f"{what} is another kind of tree than is expected ({_kind(tree)}): {must}")
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), tree)


def _arrays(info: Any) -> dict[str, jax.Array]:
    """The numbers and arrays of `info`, as arrays."""
    if not isinstance(info, dict) or not all(isinstance(name, str) for name in info):
        raise Unmet(f"info is {_kind(info)}, but must be a dict, name -> number or array")
    for name, value in info.items():
        for leaf in jax.tree.leaves(value):
            if unlike_array(leaf) is not None:
                raise Unmet(f"info[{name!r}] holds {_kind(leaf)}, but must hold numbers and arrays alone")
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), info)


def _at(name: str) -> str:
    return "outermost" if name == "." else name


def _is_real(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.floating))


def _kind(value: Any) -> str:
    """What `value` is, in a few words."""
    if isinstance(value, tuple) and type(value) is tuple:
        return f"a tuple of {len(value)}"
    if hasattr(value, "dtype"):
        return shape(value)
    if value is None or isinstance(value, (str, bool)):
        return shown(value)
    return f"a {type(value).__name__}"
