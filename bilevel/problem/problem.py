"""A bilevel problem: two losses, how to start, and what is feasible."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel import bijectors
from bilevel.data import resolve
from bilevel.problem.arguments import Contents, refuse_modules, telling
from bilevel.problem.micro_batches import MicroBatches
from bilevel.settings.fields import Unfit, check_fields, child, register, setting
from bilevel.settings.rules import as_pytree as as_pytree
from bilevel.settings.rules import boolean, function, instance, optional
from bilevel.sharding.sharding import Sharding, is_sharding
from bilevel.trees import (
    Batch,
    Inner,
    Key,
    Outer,
    PyTree,
    as_arrays,
    in_leaf,
    leaf_names,
    partition,
    shapes,
    unlike,
)

_MISFITS = (TypeError, ValueError, AttributeError, LookupError)
"""What a function raises for arguments of another structure or shape."""
_LEAF = jax.tree.structure(0)

Loss = Callable[[Inner, Outer, Batch, Key], Any]
"""`loss(inner, outer, batch, key)`: a scalar, or a pair as `Problem` says."""

_LOSS = function("inner", "outer", "batch", "key", result="scalar")


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(name, str) for name in value):
        raise Unfit("must be a sequence of names of entries of inner")
    return tuple(value)


@register
@dataclasses.dataclass(frozen=True)
class Problem:
    r"""The bilevel problem

    $$
    \min_{\lambda} F(w^*(\lambda), \lambda) \quad\text{with}\quad
      w^*(\lambda) \approx \arg\min_w f(w, \lambda),
    $$

    where $w$ is `inner`, $\lambda$ is `outer`, $f$ is `inner_loss`, $F$ is `outer_loss`.

    Args:
      inner_loss: `f(inner, outer, batch, key) -> scalar`, or `(scalar, aux)` with `has_aux`.
      outer_loss: `F(inner, outer, batch, key)`, likewise; None where there is nothing to find, for `fit` alone.
      init_inner: `init_inner(key, outer) -> inner`, any pytree. What it takes from `outer` is part of the
        hypergradient whenever an estimator is given `inner_state=None`.
      init_outer: `init_outer(key) -> outer`, any pytree. Inexact leaves get a hypergradient; typed random keys
        are constant within an outer iteration and advanced after it; all other leaves are constants.
      has_aux: whether both losses return `(scalar, aux)`. Nothing is computed from aux: it is handed on as it is
        (`Estimate.aux`), numbers that are not finite included, and `run`, which reads none of it, leaves it out.
      project: `project(outer) -> outer`, applied after each outer update.
      domain: bijectors (`Positive`, `Interval`, `Simplex`, ...) in a tree like the top of `outer`, None where a leaf is
        free. Solvers take their steps in free coordinates; everything else, `Result.outer` included, is natural.
      mutable: names of the entries of `inner` that are not trained but carried: see below.
      sharding: where its batches and variables belong on a mesh: set by `run(sharding=)`, `fit` and
        `Sharding.problem`, which place the arrays too.

    Large constants (frozen weights) belong into `jax.tree_util.Partial(loss, weights)`: they are then arguments of
    the compiled step, and their cotangent is never formed.

    `mutable` is for what training updates without a gradient: batch statistics, counters, random keys. `inner` is then
    a dict with these entries, and `inner_loss` returns their new values as a dict, as flax's `apply(..., mutable=...)`
    does: `(scalar, updates)`, or `(scalar, (updates, aux))` with `has_aux`. They are carried from step to step beside
    the optimizer's state, and `Unrolled` differentiates them too; estimators at the trained point hold them where
    training left them, `Reversible` and the stochastic solvers refuse them. An entry that comes back as it was is a
    constant, of whatever type.

    Examples:
      >>> import bilevel, jax, optax
      >>> problem = bilevel.Problem(
      ...     inner_loss=lambda w, outer, batch, key: 0.5 * (w - outer) ** 2,
      ...     outer_loss=lambda w, outer, batch, key: 0.5 * (w - 3.0) ** 2,
      ...     init_inner=lambda key, outer: jax.numpy.zeros(()),
      ...     init_outer=lambda key: jax.numpy.zeros(()),
      ... )
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), optax.sgd(0.5))
      >>> result = bilevel.run(solver, steps=30, progress=False)
      >>> round(float(result.outer), 3)
      3.0
    """

    inner_loss: Loss = dataclasses.field(metadata=child(_LOSS))
    outer_loss: Loss | None = dataclasses.field(metadata=child(optional(_LOSS)))
    init_inner: Callable[[Key, Outer], Inner] = dataclasses.field(
        metadata=child(function("key", "outer", result="inner"))
    )
    init_outer: Callable[[Key], Outer] = dataclasses.field(metadata=child(function("key", result="outer")))
    has_aux: bool = dataclasses.field(default=False, kw_only=True, metadata=setting(boolean))
    project: Callable[[Outer], Outer] | None = dataclasses.field(
        default=None, kw_only=True, metadata=child(optional(function("outer", result="outer")))
    )
    domain: PyTree = dataclasses.field(default=None, kw_only=True, metadata=child(bijectors.is_domain))
    mutable: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, metadata=setting(_names))
    sharding: Sharding | None = dataclasses.field(default=None, kw_only=True, metadata=setting(optional(is_sharding)))

    def __post_init__(self):
        check_fields(self)
        if self.mutable and isinstance(self.inner_loss, MicroBatches):
            raise ValueError(
                f"Problem(mutable={self.mutable}) with an inner loss of MicroBatches: what a part of a batch makes of "
                "these entries is not what the whole makes; divide the batch inside the loss, as they need it."
            )

    def start_outer(self, key: Key) -> PyTree:
        """`init_outer(key)`, its numbers made arrays.

        Warns:
          UserWarning: if a leaf looks like the words of a random key, which would stay as they are.

        Raises:
          ValueError: if a leaf is no array, or one is outside its domain.
        """
        with telling(_tracing("init_outer(key)", self.init_outer)):
            outer = self.init_outer(key)
        refuse_modules("init_outer returned", outer)
        outer = as_arrays(outer, "init_outer returned")
        _warn_if_words(outer)
        bijectors.check(self.domain, outer)
        return outer

    def start_inner(self, key: Key, outer: Outer) -> PyTree:
        """`init_inner(key, outer)`, its numbers made arrays.

        Raises:
          ValueError: if it is not a dict with the `mutable` entries, holds nothing to train, or a leaf is no array.
        """
        with telling(_tracing("init_inner(key, outer)", self.init_inner), outer=outer):
            try:
                inner = self.init_inner(key, outer)
            except _MISFITS as error:
                _refuse_unlike(self, "init_inner", outer, error)
                _refuse_list("init_inner", error, outer=outer)
                raise
        refuse_modules("init_inner returned", inner, self.mutable)
        inner = as_arrays(inner, "init_inner returned")
        if self.mutable and not (isinstance(inner, dict) and inner.keys() >= set(self.mutable)):
            found = (
                f"a dict of {', '.join(map(str, inner))}" if isinstance(inner, dict) else f"a {type(inner).__name__}"
            )
            raise ValueError(
                f"Problem(mutable={self.mutable}): init_inner must return a dict with these entries, not {found}."
            )
        if not any(np.size(x) for x in jax.tree.leaves(split_inner(self, inner)[0])):
            raise ValueError(
                f"init_inner returned nothing that can be trained ({shapes(inner)}): inner needs a floating-point "
                "leaf with at least one number, since integers, booleans and random keys are constants."
            )
        return inner

    def inner_value(self, inner: Inner, outer: Outer, batch: Batch, key: Any) -> tuple[jax.Array, PyTree]:
        """`(inner_loss, aux)`, `aux` being None without `has_aux`.

        Raises:
          ValueError: if the loss is not a real scalar, or is not a pair where `has_aux` or `mutable` says so.
        """
        value, _, aux = inner_outcome(self, inner, outer, batch, key)
        return value, aux

    def outer_value(self, inner: Inner, outer: Outer, batch: Batch, key: Any) -> tuple[jax.Array, PyTree]:
        """`(outer_loss, aux)`; as `inner_value`."""
        return _value(self, "outer_loss", self.has_aux, inner, outer, batch, key)


is_problem = instance(Problem, "a bilevel.Problem(...)")
"""The rule of a setting that is a `Problem`."""


def split_inner(problem: Problem, inner: Inner) -> tuple[PyTree, PyTree]:
    """`(trained, rest)`: inexact leaves that are not `mutable`, and all others; None in each other's places.

    `bilevel.extend.combine(trained, rest)` is `inner` again.

    Examples:
      >>> import dataclasses, bilevel
      >>> from bilevel.extend import split_inner
      >>> from bilevel.testing import ridge
      >>> problem = dataclasses.replace(ridge()[0], mutable=("mean",))
      >>> split_inner(problem, {"w": 0.5, "layers": 3, "mean": 2.0})
      ({'layers': None, 'mean': None, 'w': 0.5}, {'layers': 3, 'mean': 2.0, 'w': None})
    """
    trained, rest = partition(inner)
    if not problem.mutable:
        return trained, rest
    nothing = {name: jax.tree.map(lambda _: None, inner[name]) for name in problem.mutable}
    return trained | nothing, rest | mutable_entries(problem, inner)


def mutable_entries(problem: Problem, inner: Inner) -> dict[str, PyTree]:
    """The `mutable` entries of `inner`."""
    return {name: inner[name] for name in problem.mutable}


def inner_outcome(
    problem: Problem, inner: Inner, outer: Outer, batch: Batch, key: Any
) -> tuple[jax.Array, dict[str, PyTree], PyTree]:
    """`(inner_loss, updates, aux)`: `inner_value` with the new values of the `mutable` entries."""
    rest: Any
    value, rest = _value(problem, "inner_loss", bool(problem.mutable) or problem.has_aux, inner, outer, batch, key)
    if not problem.mutable:
        return value, {}, rest
    if problem.has_aux and not (isinstance(rest, tuple) and len(rest) == 2):
        raise ValueError(
            f"inner_loss returned {_describe(rest)} beside its value, but must return a pair (updates, aux), as "
            "mutable and has_aux=True say."
        )
    updates, aux = rest if problem.has_aux else (rest, None)
    before = mutable_entries(problem, inner)
    if not isinstance(updates, dict) or shapes(updates) != shapes(before):
        found = shapes(updates) if isinstance(updates, dict) else f"a {type(updates).__name__}"
        raise ValueError(
            f"inner_loss returned {found} for the mutable entries, which are {shapes(before)}: it must return all "
            "of them, in a dict, of the same shapes and dtypes."
        )
    return value, updates, aux


def projected(problem: Problem, outer: Outer) -> PyTree:
    """`project(outer)`; `outer` itself where there is none.

    Raises:
      ValueError: if it returns another kind of tree.
    """
    if problem.project is None:
        return outer
    with telling(_tracing("project(outer)", problem.project), outer=outer):
        found = problem.project(outer)
    if jax.tree.structure(found) != jax.tree.structure(outer) or shapes(found) != shapes(outer):
        raise ValueError(
            f"project returned {shapes(found)} for an outer variable that is {shapes(outer)}: it must be a tree "
            "like its argument, of the same shapes and dtypes."
        )
    return found


def unlike_start(problem: Problem, outer: Outer, *, whole: bool = False) -> str | None:
    """How `outer` differs from what `init_outer` returns, of which nothing is computed; None if it does not.

    As `trees.unlike`.
    """
    try:
        own = jax.eval_shape(problem.init_outer, jax.random.key(0))
    except Exception:  # it needs its values, or is there in vain, where only `fit` is wanted
        return None
    return unlike(own, outer, whole=whole)


def _refuse_unlike(problem: Problem, name: str, outer: Outer, error: Exception) -> None:
    """Raises ValueError if a function has failed and lacks a leaf of `outer`."""
    if (unlike := unlike_start(problem, outer, whole=True)) is not None:
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"{name} failed ({type(error).__name__}: {said}), and outer is not like what init_outer returns: {unlike}."
        ) from error


def _refuse_list(name: str, error: Exception, **variables: PyTree) -> None:
    """Raises TypeError if a function has failed on a list of numbers, which was meant to be an array."""
    if not isinstance(error, TypeError) or not any(word in str(error) for word in ("list", "tuple", "sequence")):
        return
    for what, tree in variables.items():
        for path, part in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_row)[0]:
            if _is_row(part):
                raise TypeError(
                    f"{name} failed ({error}), and {what}{jax.tree_util.keystr(path)} is a {type(part).__name__} of "
                    f"{len(part)} numbers, each a leaf of its own: let init_{what} return an array, "
                    "jnp.array([...]), where one is meant."
                ) from error


def _is_row(tree: PyTree) -> bool:
    """Whether `tree` is a list of nothing but numbers."""
    return (
        type(tree) in (list, tuple)
        and len(tree) > 0
        and all(jax.tree.structure(x) == _LEAF and np.ndim(x) == 0 for x in tree)
    )


def _value(problem, name, is_pair, inner, outer, batch, key):
    batch, loss, sharding = resolve(batch), getattr(problem, name), problem.sharding
    batch = batch if sharding is None else sharding.pin_batch(batch)
    if loss is None:
        raise ValueError(f"Problem({name}=None): there is nothing to differentiate: give the loss.")
    arguments = {"what is bound to it": loss, "inner": inner, "outer": outer, "batch": batch}
    before = {what: Contents.of(tree) for what, tree in arguments.items()}
    entered = contextlib.nullcontext() if sharding is None else sharding.entered()
    with entered, telling(_tracing(f"{name}(inner, outer, batch, key)", loss), inner=inner, outer=outer, batch=batch):
        try:
            result = loss(inner, outer, batch, key)
        except _MISFITS as error:
            if batch is None and "NoneType" in str(error):
                side = name.partition("_")[0]
                raise ValueError(
                    f"{name} was called with batch=None, and failed ({error}): give it batches ({side}_data= of "
                    f"run{', data= of fit' * (side == 'inner')}; the {side} batches of estimate), or let it read "
                    "none."
                ) from error
            _refuse_unlike(problem, name, outer, error)
            _refuse_list(name, error, inner=inner, outer=outer)
            raise
    for what, tree in arguments.items():
        if (leaf := before[what].changed(tree)) is not None:
            raise ValueError(
                f"{name} changed {what} in place ({leaf}), which would be lost: a loss is a function of its "
                "arguments, so build a new value, and return what training has to carry as Problem(mutable=...) "
                "says."
            )
    if isinstance(result, tuple) != is_pair or (is_pair and len(result) != 2):
        wanted = "a pair (scalar, aux), as has_aux=True says" if is_pair else "a scalar"
        if is_pair and not problem.has_aux:
            wanted = "a pair (scalar, updates), as mutable says"
        raise ValueError(
            f"{name} returned {_describe(result)}, but must return {wanted}; set Problem(has_aux=...) to match."
        )
    value, aux = result if is_pair else (result, None)
    if not _is_loss(value):
        raise ValueError(
            f"{name} returned {_describe(value)}, but a loss is a real floating-point scalar: "
            "reduce it with a mean or a sum."
        )
    return value, aux


def _is_loss(value: Any) -> bool:
    array = isinstance(value, (jax.Array, np.ndarray, np.generic, float))
    return array and jnp.shape(value) == () and jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _tracing(call: str, function: Any) -> str:
    """Words for the call of a user's function, with the name that it has."""
    own = getattr(getattr(function, "func", function), "__name__", "<lambda>")
    return f"tracing {call}" + f" (the function {own})" * (own not in ("<lambda>", call.partition("(")[0]))


def _warn_if_words(outer: PyTree) -> None:
    for name, x in zip(leaf_names(outer), jax.tree.leaves(outer), strict=True):
        if jnp.result_type(x) == jnp.uint32 and jnp.shape(x) == (2,):
            warnings.warn(
                f"init_outer returned uint32[2]{in_leaf(name)}, a constant: if it is a random key of "
                "jax.random.PRNGKey, its noise is the same at every outer step; make it with jax.random.key.",
                UserWarning,
                stacklevel=4,
            )


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return f"an array of shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
    return f"a {type(value).__name__}"
