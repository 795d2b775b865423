"""Which entries of the inner variable an optimizer never moves, decided from the trace of its update.

`optax.set_to_zero` in a `partition` or `multi_transform`, `optax.transforms.freeze`, a multiplication by a mask: what
is frozen so is no unknown of an implicit system. An entry counts as frozen if its update is 0 whatever the gradient and
the parameters are, and whatever the optimizer's state comes to be: what `init` sets to 0 and an update leaves at 0 (the
momentum of a gradient that was masked) is 0 for ever; a learning rate that is 0 only now (warm-up) freezes nothing.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bilevel.differentiation.tracing import bind, called, detached, is_literal, operation
from bilevel.trees import PyTree, leaf_names


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Division:
    """Which entries of the trained leaves of an inner variable are unknowns of a system, and which stay where they are.

    Attributes:
      kinds: for each trained leaf `"moving"`, `"held"`, or `"mixed"` if some of its entries move.
      masks: for each leaf that is mixed, in their order, which entries move.
    """

    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    masks: list[jax.Array]

    def split(self, trained: PyTree) -> tuple[PyTree, PyTree]:
        """`(z, held)`: leaves with entries that move, and all others, with None in each other's places."""
        leaves, structure = jax.tree.flatten(trained)
        z = [None if kind == "held" else x for kind, x in zip(self.kinds, leaves, strict=True)]
        held = [x if kind == "held" else None for kind, x in zip(self.kinds, leaves, strict=True)]
        return jax.tree.unflatten(structure, z), jax.tree.unflatten(structure, held)

    def pinned(self, z: PyTree) -> PyTree:
        """z, with entries that do not move held constant: a derivative sees the others only."""
        return self._where(lambda moves, x: jnp.where(moves, x, jax.lax.stop_gradient(x)), z)

    def rows(self, residual: PyTree, z: PyTree) -> PyTree:
        """`residual`, a tree like z, with `z - constant` in the rows of entries that do not move.

        These rows are 0 and their block of the derivative is the identity: the system is over what moves, and as
        regular and symmetric as it is there.
        """
        still = lambda moves, r, x: jnp.where(moves, r, (x - jax.lax.stop_gradient(x)).astype(r.dtype))  # noqa: E731
        return self._where(still, residual, z)

    def _where(self, function: Callable[..., Any], first: PyTree, *rest: PyTree) -> PyTree:
        """`first`, with `function(mask, leaf, ...)` in the place of leaves that are mixed."""
        leaves, structure = jax.tree.flatten(first)
        columns, masks = zip(leaves, *map(jax.tree.leaves, rest), strict=True), iter(self.masks)
        kinds = [kind for kind in self.kinds if kind != "held"]
        result = [
            function(next(masks), *row) if kind == "mixed" else row[0] for kind, row in zip(kinds, columns, strict=True)
        ]
        return jax.tree.unflatten(structure, result)


def whole(params: PyTree) -> Division:
    """Returns the division that says of every leaf that it moves."""
    return Division(("moving",) * len(jax.tree.leaves(params)), [])


def divide(estimator: str, transform: Any, params: PyTree, state: PyTree) -> Division:
    """What of the trained leaves `params` an optax transformation with extra arguments moves, whatever its `state` is.

    Raises:
      ValueError: if nothing is ever moved.
    """

    def update(state, grads, params, value):
        return transform.update(grads, state, params, value=value, grad=grads)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        closed = jax.make_jaxpr(update)(state, params, params, jnp.zeros(()))
        begun, start = jax.make_jaxpr(transform.init, return_shape=True)(params)
    count, size = len(jax.tree.leaves(params)), len(jax.tree.leaves(state))
    unknown = [None] * (len(closed.in_avals) - size)
    own = jax.tree.structure(start) == jax.tree.structure(state)
    assumed = _zeros(begun, [None] * len(begun.in_avals)) if own else [None] * size
    # What is 0 at the start and is left at 0: taken away from what is assumed until an update keeps all of the rest.
    while True:
        lost: set[str] = set()
        zeros = _zeros(closed, [*assumed, *unknown], lost)
        kept = [_either_unknown(a, z) for a, z in zip(assumed, zeros[count:], strict=True)]
        if all(_same(a, k) for a, k in zip(assumed, kept, strict=True)):
            break
        assumed = kept
    kinds, masks = [], []
    for leaf, zero in zip(jax.tree.leaves(params), zeros[:count], strict=True):
        if zero is None or not np.any(zero):
            kinds.append("moving")
        elif np.all(zero):
            kinds.append("held")
        else:
            kinds.append("mixed")
            masks.append(jnp.asarray(~np.broadcast_to(zero, np.shape(leaf))))
    if lost:
        _warn_if_still(estimator, transform, params, kinds, masks, lost)
    if kinds and set(kinds) == {"held"}:
        raise ValueError(
            f"{estimator}: the optimizer never moves any leaf of the inner variable ({', '.join(leaf_names(params))}), "
            "so there is no trained point to differentiate: leave out set_to_zero, or the mask, for what is trained."
        )
    return Division(tuple(kinds), masks)


def _warn_if_still(
    estimator: str, transform: Any, params: PyTree, kinds: list[str], masks: list[jax.Array], lost: set[str]
) -> None:
    """Warn of a leaf that counts as moving and does not, as far as three updates by random gradients can tell."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    draw = lambda: structure.unflatten([jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves])  # noqa: E731
    still = [np.ones(x.shape, bool) for x in leaves]
    try:
        with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            at = draw()
            state = transform.init(at)
            for _ in range(3):
                grads = draw()
                updates, state = transform.update(grads, state, at, value=jnp.ones(()), grad=grads)
                still = [s & (np.asarray(u) == 0) for s, u in zip(still, jax.tree.leaves(updates), strict=True)]
    except Exception:  # an optimizer that cannot be tried out stays what its trace says
        return
    moving, found = iter(masks), []
    for name, kind, entries in zip(leaf_names(params), kinds, still, strict=True):
        entries = entries & np.asarray(next(moving)) if kind == "mixed" else entries
        if kind != "held" and entries.any():
            found.append(name)
    if found:
        warnings.warn(
            f"{estimator}: the optimizer seems to leave {', '.join(found)} of the inner variable where it is (at least "
            f"in part), but this cannot be read from its update, which uses {', '.join(sorted(lost))}. The system is "
            "solved as if all of it moved, and the hypergradient is wrong if that is not so: freeze it by "
            "optax.transforms.freeze, or by a product with a mask of zeros and ones.",
            stacklevel=2,
        )


def _either_unknown(assumed: Any, found: Any) -> Any:
    """Where both analyses say that a value is 0; None where one of them knows nothing."""
    if assumed is None or found is None:
        return None
    both = np.logical_and(assumed, found)
    return both if np.any(both) else None


def _same(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or bool(np.all(a == b)))


# An abstract value is a NumPy array or scalar that is known (`_Known`), a boolean array or scalar that says where the
# value is known to be 0, or None.


class _Known:
    """A value that does not depend on the arguments."""

    def __init__(self, value: Any):
        self.value = value


def _zero_of(value: Any) -> Any:
    if isinstance(value, _Known):
        return np.asarray(value.value) == 0
    return value


def _zeros(closed: Any, inputs: list[Any], lost: set[str] | None = None) -> list[Any]:
    """Where the outputs of a closed jaxpr are known to be 0; None where nothing is known.

    The names of operations behind which a 0 may be lost, since nothing is known of them, are added to `lost`.
    """
    return [_zero_of(value) for value in _interpret(closed, inputs, set() if lost is None else lost)]


def _interpret(closed: Any, inputs: list[Any], lost: set[str]) -> list[Any]:
    jaxpr = detached(closed)
    known = [None if isinstance(c, Tracer) or not hasattr(c, "dtype") else _Known(c) for c in closed.consts]
    values: dict[Any, Any] = dict(zip(jaxpr.invars, [*known, *inputs], strict=True))

    def read(atom):
        return _Known(atom.val) if is_literal(atom) else values[atom]

    for eqn in jaxpr.eqns:
        outputs = _outputs(eqn, [read(atom) for atom in eqn.invars], lost)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(eqn: Any, inputs: list[Any], lost: set[str]) -> list[Any]:
    name, unknown = operation(eqn), [None] * len(eqn.outvars)
    if name == "broadcast_in_dim":  # by hand: a constant of the size of the parameters is not made
        return [_broadcast(eqn, inputs[0])]
    if all(isinstance(x, _Known) for x in inputs) and (inputs or name == "iota") and not _is_random(eqn):
        try:
            with jax.ensure_compile_time_eval():
                return [_Known(np.asarray(out)) for out in bind(eqn, *(jnp.asarray(x.value) for x in inputs))]
        except Exception:  # an operation that cannot be done now is an operation whose result is not known
            return unknown
    if name in _CALLS:
        return _interpret(called(eqn), inputs, lost)
    if name == "cond":
        branches = [_zeros(branch, inputs[1:], lost) for branch in eqn.params["branches"]]
        return [_both(list(zeros)) for zeros in zip(*branches, strict=True)]
    zeros = [_zero_of(x) for x in inputs]
    if name in _KEEPS_ZERO:
        return [zeros[0]]
    if name == "integer_pow":
        return [zeros[0] if eqn.params["y"] > 0 else None]
    if name == "sub" and eqn.invars[0] is eqn.invars[1]:
        return [np.bool_(True)]
    if name == "mul":
        return [_either(zeros)]
    if name in ("add", "sub", "add_any", "max", "min"):
        return [_both(zeros)]
    if name == "select_n":
        return [_selected(inputs[0], zeros[1:])]
    if name in _SPREADS and any(z is not None and np.any(z) for z in zeros):
        spread = _spread(eqn, inputs, zeros)
        if spread is None:
            lost.add(name)
        return [spread]
    if name not in _NEVER_ZERO and any(z is not None and np.any(z) for z in zeros):
        lost.add(name)
    return unknown


_CALLS = ("jit", "checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call")
"""Operations that only evaluate the jaxpr which they hold."""

_KEEPS_ZERO = ("neg", "convert_element_type", "copy", "real", "conj", "stop_gradient", "sign", "abs", "div")
_KEEPS_ZERO += ("sqrt", "square", "cbrt", "tanh", "sin", "tan", "asinh", "atan", "expm1", "log1p", "floor", "ceil")
_KEEPS_ZERO += ("round", "imag", "sinh", "asin", "atanh", "erf", "erf_inv", "reduce_precision", "optimization_barrier")
"""Functions of their first argument that are 0 where it is."""

_SPREADS = ("reshape", "squeeze", "transpose", "expand_dims", "slice", "rev", "concatenate", "pad", "reduce_sum")
_SPREADS += ("dot_general", "conv_general_dilated", "cumsum", "reduce_max", "cummax", "gather", "dynamic_slice")
_SPREADS += ("scatter", "scatter-add", "dynamic_update_slice", "cumlogsumexp")
"""Operations that move, choose or add up products of their floating-point inputs."""

_NEVER_ZERO = ("exp", "exp2", "cos", "cosh", "logistic", "rsqrt", "log", "acos", "acosh", "eq", "ne", "lt", "le", "gt")
_NEVER_ZERO += ("ge", "is_finite", "pow", "erfc", "lgamma", "digamma", "not", "and", "or")
"""Operations whose result is no 0 because an input is one; truth values are looked at by what chooses with them."""


def _spread(eqn: Any, inputs: list[Any], zeros: list[Any]) -> Any:
    """Where an operation of `_SPREADS` is 0, found by doing it to what may not be 0: 1 there, and 0 elsewhere.

    Nothing cancels in a sum of products of numbers that are 0 or 1, so that it is 0 only if each product is.
    """
    arguments = []
    for value, zero, atom in zip(inputs, zeros, eqn.invars, strict=True):
        if jnp.issubdtype(atom.aval.dtype, jnp.inexact):
            maybe = np.broadcast_to(True if zero is None else np.logical_not(zero), atom.aval.shape)
            arguments.append(maybe.astype(atom.aval.dtype))
        elif isinstance(value, _Known):
            arguments.append(value.value)
        else:  # a place that is not known
            return None
    try:
        with jax.ensure_compile_time_eval():
            return np.asarray(bind(eqn, *map(jnp.asarray, arguments))[0]) == 0
    except Exception:  # as for an operation on constants
        return None


def _is_random(eqn: Any) -> bool:
    return operation(eqn).startswith("random_")


def _broadcast(eqn: Any, value: Any) -> Any:
    def spread(x):
        if np.ndim(x) == 0:
            return x if isinstance(x, np.bool_ | bool) else np.broadcast_to(x, eqn.params["shape"])
        shape = [1] * len(eqn.params["shape"])
        for axis, size in zip(eqn.params["broadcast_dimensions"], np.shape(x), strict=True):
            shape[axis] = size
        return np.broadcast_to(np.reshape(x, shape), eqn.params["shape"])

    if value is None:
        return None
    return _Known(spread(np.asarray(value.value))) if isinstance(value, _Known) else spread(value)


def _either(zeros: list[Any]) -> Any:
    known = [z for z in zeros if z is not None]
    return np.logical_or.reduce(np.broadcast_arrays(*known)) if known else None


def _both(zeros: list[Any]) -> Any:
    return None if any(z is None for z in zeros) else np.logical_and.reduce(np.broadcast_arrays(*zeros))


def _selected(which: Any, zeros: list[Any]) -> Any:
    if isinstance(which, _Known):
        masks = [np.zeros((), bool) if z is None else z for z in zeros]
        choose = np.asarray(which.value).astype(int)
        *masks, choose = np.broadcast_arrays(*masks, choose)
        return np.choose(choose, masks)
    return _both(zeros)
