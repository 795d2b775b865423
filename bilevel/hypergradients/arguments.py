"""Arguments of the entry points: `estimate`, `init` and `solve` of estimators, and `run`. Refused in one sentence each.

What is checked here is what would otherwise be taken for something else, or end far from its cause: arguments in each
other's places, states of other estimators, sources of batches for batches, numbers for random keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.data import Batches, FullBatch, as_data, check_batch, refuse_sources
from bilevel.problem.arguments import check_outer
from bilevel.problem.problem import is_problem, unlike_start
from bilevel.settings.fields import Unfit, check_arguments, shown
from bilevel.settings.numeric import integer, real
from bilevel.settings.rules import (
    boolean,
    function,
    having,
    instance,
    is_folder,
    optional,
    pytree,
    random_key,
    random_keys,
)
from bilevel.sharding.sharding import is_sharding
from bilevel.trees import PyTree, in_leaf, is_inexact, leaf_names, unlike_array

ORDER = "the arguments are (problem, inner_state, outer, inner_batches, outer_batch, key)"


def _is_state(value: Any) -> Any:
    if value is None or (hasattr(value, "params") and hasattr(value, "opt_state")):
        return value
    raise Unfit("must be an InnerState, as init(problem, outer, key) returns, or None for a start of its own")


def check_call(method: str, **given: Any) -> None:
    """Checks `problem`, `inner_state`, `outer` and `key` of a method of an estimator, those that are given.

    Raises:
      ValueError: names the argument.
    """
    check_arguments(method, {"problem": is_problem, "inner_state": _is_state, "key": random_key}, **given)
    outer = given.get("outer")
    for name, x in zip(leaf_names(outer), jax.tree.leaves(outer), strict=True):
        if (reason := unlike_array(x)) is not None:
            raise ValueError(f"{method}(outer=...) holds {reason}{in_leaf(name)}.")


def check_estimate(
    estimator: Any, problem: Any, inner_state: Any, outer: Any, inner_batches: Any, outer_batch: Any, key: Any
) -> None:
    """Checks the arguments of `estimate`.

    Raises:
      ValueError: names the argument.
    """
    method = f"{type(estimator).__name__}.estimate"
    check_call(method, problem=problem, inner_state=inner_state, outer=outer, key=key)
    if not getattr(estimator, "takes_constants", False):
        check_outer(f"{method} was given", outer)
    _refuse_shapes(f"{method}(outer=...)", outer)
    for name, batches in (("the inner batches", inner_batches), ("the outer batch", outer_batch)):
        refuse_sources(f"{method}: {name}", batches)
        check_batch(f"{method}: {name[4:]}", batches)


def _refuse_shapes(what: str, tree: Any) -> None:
    for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(f"{what} holds a ShapeDtypeStruct{in_leaf(name)}, the shape of an array: give the array.")


def refuse_complex(who: str, what: str, tree: PyTree, remedy: str) -> None:
    """Raises ValueError, by name, if `tree` has a complex leaf."""
    for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if is_inexact(x) and jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
            raise ValueError(f"{who} does not take complex variables ({what} leaf {name}): {remedy}.")


def refuse_complex_variables(estimator: Any, params: PyTree, outer: PyTree) -> None:
    """Refuses complex variables for an estimator that does not say `takes_complex`."""
    if not getattr(estimator, "takes_complex", False):
        remedy = "use Unrolled, or write it in real and imaginary parts"
        for what, tree in (("inner", params), ("outer", outer)):
            refuse_complex(type(estimator).__name__, what, tree, remedy)


def _callbacks(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise Unfit("must be a sequence of functions (step, state, metrics), as [callback]")
    for callback in value:
        function("step", "state", "metrics")(callback)
    return value


_RUN = {
    "solver": pytree(
        having(
            "a solver, such as bilevel.Nested(...)",
            "problem",
            "init",
            "step",
            "inner_batches_per_step",
            "outer_batches_per_step",
        )
    ),
    "steps": integer(1),
    "key": optional(random_keys),
    "progress": boolean,
    "callbacks": _callbacks,
    "callback_every": integer(1),
    "checkpoint_dir": optional(is_folder),
    "checkpoint_every": real(low=0.0, infinite=True),
    "record": optional(function("state", result="{name: array}")),
    "title": instance(str, "a text"),
    "sharding": optional(is_sharding),
}


def check_run(what: str, *, inner_data: Any = None, outer_data: Any = None, **given: Any) -> None:
    """Checks the arguments of `run`, or of a function that hands its own on to it, before anything is done.

    Args:
      what: the function's name.
      given: arguments by their names in `run`; those without a rule are passed over.

    Raises:
      ValueError: names the argument.
    """
    check_arguments(what, _RUN, **given)
    check_data("inner_data", inner_data)
    check_data("outer_data", outer_data)


def check_start(what: str, problem: Any, outer: Any) -> None:
    """Checks an outer variable that is to stand in for what `init_outer` returns.

    Raises:
      ValueError: names the leaf, what was expected and what was found.
    """
    if (unlike := unlike_start(problem, outer)) is not None:
        raise ValueError(f"{what}(outer=...) is not like what init_outer of the problem returns: {unlike}.")


def check_data(what: str, data: Any, *, iterators: bool = True) -> None:
    """Checks data as `run` takes them: a source of batches, arrays, or (with `iterators`) an iterator.

    Raises:
      ValueError: in a sentence that `what` begins.
    """
    if data is None or isinstance(data, (Batches, FullBatch)) or hasattr(data, "with_format"):
        return
    if hasattr(data, "__next__"):
        if not iterators:
            raise ValueError(f"{what} is an iterator, which only run reads: give Batches(arrays, size), or arrays.")
        return
    if jax.tree_util.all_leaves([data]) and not hasattr(data, "shape"):
        raise ValueError(
            f"{what} is a {type(data).__name__} ({shown(data)}), but must be Batches(arrays, size), arrays, an "
            "iterator or None."
        )
    as_data(what, data)
