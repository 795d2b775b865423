"""Losses with a derivative of their own: where second derivatives need not commute.

A function under `jax.custom_vjp` or `jax.custom_jvp` has the derivative that its author gave it: a straight-through
estimator passes gradients through a rounding, gradient reversal changes their sign, others clip them. What `jax.grad`
returns for a loss that holds such a function is a vector field g(w, lambda) which need not be the gradient of anything,
so that

    (dg/dw)^T v  =  d/de g(w + e v, lambda)        and        (dg/dlambda)^T v  =  d/de grad_lambda f(w + e v, lambda)

need not hold. Forward-over-reverse second derivatives rest on both; whoever uses them asks `custom_rule` first.

Most rules are what they seem to be: the derivative, in a form that is faster or more stable. A rule counts as true if
its function and itself are made of analytic operations alone and agree at random points, since they then agree
everywhere. What is not known to be true is not taken for it: what rounds, clips, compares, stops a gradient or chooses
by an integer is not decided by points, half precision hides what they would show, and what a function on the host does
nobody knows. All of it counts as a rule of its own: reverse mode is right either way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bilevel.differentiation.agreement import agree, pull_back
from bilevel.differentiation.tracing import (
    bind,
    detached,
    evaluate,
    evaluate_closed,
    is_literal,
    jaxprs,
    operation,
    silent,
)
from bilevel.trees import is_inexact

RULES = ("custom_vjp_call", "custom_jvp_call")
"""Operations that carry a derivative of their own."""

_CLOSED = "call_hi_primitive"
"""An operation of newer releases of JAX that is an object with derivatives of its own, which no jaxpr shows: what
`jax.lax.custom_root` gives there. It is not known to be true."""


class CustomDerivativeWarning(UserWarning):
    """A loss has a derivative of its own, so its second derivatives are taken in a way that costs more; or an optimizer
    has one that cannot be examined.

    Examples:
      >>> import warnings, bilevel, jax, optax
      >>> rounded = jax.custom_vjp(jax.numpy.rint)  # straight through: differentiated as if it did not round
      >>> rounded.defvjp(lambda x: (jax.numpy.rint(x), None), lambda _, cotangent: (cotangent,))
      >>> problem = bilevel.Problem(
      ...     lambda w, outer, batch, key: (w - rounded(outer)) ** 2 / 2, lambda w, outer, batch, key: w**2,
      ...     lambda key, outer: jax.numpy.zeros(()), lambda key: jax.numpy.ones(()),
      ... )
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=2)  # mode="reverse" would say nothing
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     grad = hypergradient.estimate(problem, None, jax.numpy.ones(()), None, None, jax.random.key(0)).grad
      >>> float(grad), [warning.category.__name__ for warning in caught]
      (1.125, ['CustomDerivativeWarning'])
    """


def custom_rule(jaxpr: Any, moving: Sequence[bool]) -> str | None:
    """The name of a function in `jaxpr` whose rule is not its derivative, applied to what depends on a moving argument.

    Args:
      jaxpr: of a loss.
      moving: for each of its arguments, whether it is differentiated.
    """
    reached = {var for var, moves in zip(jaxpr.invars, moving, strict=True) if moves}
    for eqn in jaxpr.eqns:
        if reached.isdisjoint(atom for atom in eqn.invars if not is_literal(atom)):
            continue
        reached.update(eqn.outvars)
        if operation(eqn) in RULES:
            if not has_true_rule(eqn):
                return source(eqn)[0]
            continue
        if operation(eqn) == _CLOSED:
            return type(eqn.params["_prim"]).__name__
        for inner in jaxprs(eqn.params):
            # Which of its arguments move is not followed any further: too many is safe.
            if name := custom_rule(inner, [True] * len(inner.invars)):
                return name
    return None


_OURS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
"""The rules of this package are exact, or say in their estimator's docstring what they leave out (a third level)."""

_LIBRARIES = tuple(os.path.join(os.path.dirname(str(module.__file__)), "") for module in (jax, optax))
"""Their own rules by `jax.custom_jvp` (relu, softmax, projections) are derivatives; not all by `jax.custom_vjp` are."""

_GIVEN = ("_custom_root", "stop_gradient_once")
"""But not those that call what a user gives: with a `tangent_solve` that only comes near, `jax.lax.custom_root` has a
derivative that is not the one of its root. Nor the one of `carried`, which cuts a loss off from its derivative."""


_ORDERS = 3
"""How many derivatives are taken of a loss, at most: two, and a third by an optimizer that uses second derivatives.
The rule of a function that is called inside a rule gives the next higher derivative. Beyond the last one nobody asks,
which is where the rule of a function that calls itself (f' = f (1 - f)) ends too."""


def has_true_rule(eqn: Any, order: int = 1) -> bool:
    """Whether the rule that the operation `eqn`, one of `RULES`, carries is the derivative of its function.

    Args:
      eqn: an operation of a jaxpr.
      order: 1 where `eqn` stands in a loss, 2 where it stands in the rule of a function of the loss, and so on.
    """
    return order > _ORDERS or _is_trusted(eqn) or _is_derivative(eqn, order)


def has_slope(eqn: Any) -> bool:
    """Whether the function that `eqn`, one of `RULES`, holds can be differentiated in reverse without its rule."""
    closed = eqn.params["call_jaxpr"]
    kinds = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
    moving = [i for i, kind in enumerate(kinds) if jnp.issubdtype(kind.dtype, jnp.inexact)]

    def total(leaves, args):
        args = list(args)
        for i, leaf in zip(moving, leaves, strict=True):
            args[i] = leaf
        return sum((jnp.sum(jnp.real(x)) for x in evaluate_closed(closed, *args) if is_inexact(x)), start=0.0)

    with jax.numpy_dtype_promotion("standard"):
        try:
            jax.make_jaxpr(jax.grad(total))([kinds[i] for i in moving], kinds)
        except Exception:  # JAX raises errors of several kinds
            return False
    return True


def _is_trusted(eqn: Any) -> bool:
    name, file = source(eqn)
    if name in _GIVEN:
        return False
    if file.startswith(_OURS):
        return True
    if operation(eqn) != "custom_jvp_call" or not file.startswith(_LIBRARIES):
        return False
    # A user may have given a function of the library a rule: only what carries one there is the library's.
    modules = [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == file]
    return any(isinstance(getattr(module, name, None), jax.custom_jvp) for module in modules)


def source(eqn: Any) -> tuple[str, str]:
    """Name and file of the function that an operation with its own derivative was made from."""
    info = getattr(eqn.params["call_jaxpr"].jaxpr, "debug_info", None)
    return getattr(info, "func_name", None) or "a function", getattr(info, "func_filename", None) or ""


_ANALYTIC = frozenset(
    "add add_any sub mul div neg exp exp2 log log1p expm1 sin cos tan tanh sinh cosh asinh atan logistic erf erfc "
    "lgamma digamma sqrt rsqrt pow integer_pow square real imag conj complex convert_element_type copy "
    "dot_general conv_general_dilated reduce_sum cumsum broadcast_in_dim reshape squeeze transpose expand_dims slice "
    "concatenate pad rev dynamic_slice dynamic_update_slice gather scatter scatter-add scan jit checkpoint "
    "closed_call custom_jvp_call custom_vjp_call cholesky triangular_solve lu eigh svd fft".split()
)
"""Operations that are analytic in their floating-point inputs. What is made of them and agrees at some points agrees
everywhere; what chooses, rounds or clips by its values may differ where nobody looked."""


def _is_derivative(eqn: Any, order: int) -> bool:
    """Whether the rule of `eqn` gives the derivative of its function; False too where that cannot be found out."""
    closed = eqn.params["call_jaxpr"]
    kinds = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
    if any(isinstance(const, Tracer) for const in closed.consts):
        return False
    if not all(jnp.issubdtype(kind.dtype, jnp.inexact) for kind in kinds):
        return False
    jaxpr = detached(closed)

    def plain(*args):
        return [x for x in evaluate(jaxpr, *closed.consts, *args) if is_inexact(x)]

    def ruled(*args):
        return [x for x in bind(eqn, *args) if is_inexact(x)]

    with jax.numpy_dtype_promotion("standard"), np.errstate(all="ignore"):
        try:
            traced = silent(jax.make_jaxpr(plain)(*kinds))
            slope = pull_back(ruled, kinds)
            if not (_is_analytic(traced.jaxpr, order) and _is_analytic(slope.jaxpr, order + 1)):
                return False
            wanted = pull_back(plain, kinds)
            # Arrays of the trace around do not take part, so all of this is computed at once; traced it is not so,
            # since a question to the host would be asked then.
            with jax.ensure_compile_time_eval():
                return agree(traced, wanted, slope)
        except Exception:  # whatever a function raises that is not made for such numbers
            return False


def _is_analytic(jaxpr: Any, order: int) -> bool:
    """Whether what `jaxpr` makes of its floating-point arguments is made by analytic operations alone.

    What acts on the world outside, or reads it, is nothing of the kind.
    """
    if jaxpr.effects:
        return False
    reached = {var for var in jaxpr.invars if jnp.issubdtype(var.aval.dtype, jnp.inexact)}
    for eqn in jaxpr.eqns:
        if reached.isdisjoint(atom for atom in eqn.invars if not is_literal(atom)):
            continue
        if operation(eqn) not in _ANALYTIC:
            return False
        if not all(jnp.issubdtype(out.aval.dtype, jnp.inexact) for out in eqn.outvars):
            return False  # a number made an integer, or a truth: something is chosen by it
        if operation(eqn) in RULES:
            if not has_true_rule(eqn, order):
                return False
        elif not all(_is_analytic(inner, order) for inner in jaxprs(eqn.params)):
            return False
        reached.update(eqn.outvars)
    return True
