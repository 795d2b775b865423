"""Differentiating optimizers where their formula is not differentiable.

`optax.adam` divides by `sqrt(nu)`. At a gradient entry that is exactly 0 the derivative of the root is infinite, the
derivative of `nu` is 0, and their product is NaN, although the update itself has a derivative there. In LoRA that
is the first step, since B = 0. `smooth(update)` computes the same values, bit for bit, with the convention
0 * inf = 0 in the derivative: it traces `update` and evaluates roots and divisions in the double-where form.

A `custom_jvp` root would be shorter, but gives NaN when a gradient through a scan is differentiated again;
evaluating at a nudged point changes values (and is wrong for trust-ratio optimizers such as LAMB).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.differentiation.custom_rules import CustomDerivativeWarning, has_slope, has_true_rule, source
from bilevel.differentiation.tracing import bind, is_literal, operation, scan_counts, while_counts


def smooth(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its true derivatives, finite at the zeros of its roots and denominators.

    Values are bit-equal to `function`'s. Derivatives are equal wherever those of `function` are finite; the
    derivative of `sqrt(x)`, `rsqrt(x)`, `cbrt(x)`, `x**p` with p < 1 and `n / d` with respect to x, and to n and d, is
    0 at x = 0 and d = 0. Where a factor is a root of a negative scalar (RAdam has one in the branch that it does not
    take), that of the product is 0.

    What hides a derivative is left out: a `stop_gradient` inside `function` (L-BFGS has one in its first step) is the
    identity here, and a function under `jax.custom_vjp` or `jax.custom_jvp` whose rule is not its derivative is taken
    without its rule. So the result is the derivative of the values, and not what somebody meant by it. Where the values
    have no derivative without the rule (an iteration in a while_loop), the rule is taken at its word, and this is said.
    """

    def wrapped(*args):
        # Transformations of optax mix dtypes and ranks; they run under the promotion rules they were written for.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        flat = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return wrapped


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    values: dict[Any, Any] = {}

    def read(atom):
        return atom.val if is_literal(atom) else values[atom]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    roots: set[Any] = set()  # products of the root of a scalar
    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        name = operation(eqn)
        from_root = [not is_literal(atom) and atom in roots for atom in eqn.invars]
        if name in ("mul", "div") and any(from_root[:1] if name == "div" else from_root):
            outputs = _product(eqn, from_root, *inputs)
            roots.update(eqn.outvars)
        else:
            rule = _RULES.get(name)
            outputs = rule(eqn, *inputs) if rule else bind(eqn, *inputs)
            if (name in ("sqrt", "rsqrt") and eqn.outvars[0].aval.size == 1) or (name in _SHAPES and any(from_root)):
                roots.update(eqn.outvars)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _closed(closed: Any) -> Callable[..., list[Any]]:
    return lambda *args: _evaluate(closed.jaxpr, closed.consts, args)


def _at_nonzero(eqn, x, others=()):
    """The primitive of `eqn` at `x`, differentiated only where `x` is not 0."""
    zero = x == jnp.zeros((), jnp.result_type(x))
    safe = jnp.where(zero, jnp.ones((), jnp.result_type(x)), x)
    frozen = [jax.lax.stop_gradient(value) for value in (*others, x)]
    return [jnp.where(zero, bind(eqn, *frozen)[0], bind(eqn, *others, safe)[0])]


def _sqrt(eqn, x):
    return _at_nonzero(eqn, x)


def _pow(eqn, x, exponent):
    """A power, differentiated only where its slope in x is finite: not at x = 0 with an exponent below 1."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return bind(eqn, x, exponent)
    # Its value is computed so anyway; JAX's rule for its slope at a count promotes, which strict promotion refuses.
    exponent = jnp.asarray(exponent, jnp.result_type(x))
    one = jnp.ones((), jnp.result_type(x))
    steep = (x == 0) & (exponent < 1)
    frozen = [jax.lax.stop_gradient(value) for value in (x, exponent)]
    safe = jnp.where(steep, one, x)
    return [jnp.where(steep, bind(eqn, *frozen)[0], bind(eqn, safe, exponent)[0])]


def _through(eqn, x):
    """Evaluates `stop_gradient` as the identity that its values are, so that a derivative goes through."""
    del eqn
    return [x]


def _ruled(eqn, *inputs):
    """A function with a derivative of its own: as it is where that is the true one, else without its rule."""
    if has_true_rule(eqn):
        return bind(eqn, *inputs)
    if not has_slope(eqn):
        warnings.warn(
            f"The optimizer calls a function with a derivative of its own (`{source(eqn)[0]}`, by jax.custom_vjp or "
            "custom_jvp) that has none in reverse mode without it, so it is taken at its word: a hypergradient is that "
            "of training if it is true.",
            CustomDerivativeWarning,
            stacklevel=2,
        )
        return bind(eqn, *inputs)
    return _closed(eqn.params["call_jaxpr"])(*inputs)


def _remat(eqn, *inputs):
    options = {name: eqn.params[name] for name in ("prevent_cse", "policy") if name in eqn.params}
    body = lambda *args: _evaluate(eqn.params["jaxpr"], (), args)  # noqa: E731
    return jax.checkpoint(body, **options)(*inputs)


def _div(eqn, numerator, denominator):
    if not jnp.issubdtype(jnp.result_type(denominator), jnp.inexact) or is_literal(eqn.invars[1]):
        return bind(eqn, numerator, denominator)
    return _at_nonzero(eqn, denominator, (numerator,))


def _product(eqn, from_root, *inputs):
    """A product or quotient, differentiated only where its factors with a root are finite."""
    finite = [jnp.isfinite(x) for x, root in zip(inputs, from_root, strict=True) if root]
    safe = [
        jnp.where(jnp.isfinite(x), x, jnp.ones((), jnp.result_type(x))) if root else x
        for x, root in zip(inputs, from_root, strict=True)
    ]
    frozen = [jax.lax.stop_gradient(x) for x in inputs]
    good = finite[0] if len(finite) == 1 else finite[0] & finite[1]
    rule = _RULES.get(operation(eqn))
    value = (rule(eqn, *safe) if rule else bind(eqn, *safe))[0]
    return [jnp.where(good, value, bind(eqn, *frozen)[0])]


def _call(eqn, *inputs):
    return _closed(eqn.params["jaxpr"])(*inputs)


def _cond(eqn, index, *inputs):
    branches = [_closed(branch) for branch in eqn.params["branches"]]
    return jax.lax.switch(index, branches, *inputs)


def _scan(eqn, *inputs):
    params, (n_const, n_carry) = eqn.params, scan_counts(eqn)
    consts, carry, xs = inputs[:n_const], inputs[n_const : n_const + n_carry], inputs[n_const + n_carry :]
    body = _closed(params["jaxpr"])

    def step(carry, x):
        out = body(*consts, *carry, *x)
        return out[:n_carry], out[n_carry:]

    carry, ys = jax.lax.scan(
        step, list(carry), list(xs), length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    return [*carry, *ys]


def _while(eqn, *inputs):
    params, (n_cond, n_body) = eqn.params, while_counts(eqn)
    cond_consts, body_consts, carry = inputs[:n_cond], inputs[n_cond : n_cond + n_body], inputs[n_cond + n_body :]
    cond, body = _closed(params["cond_jaxpr"]), _closed(params["body_jaxpr"])
    return jax.lax.while_loop(lambda c: cond(*cond_consts, *c)[0], lambda c: body(*body_consts, *c), list(carry))


_SHAPES = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze")
"""Operations through which a root is followed, beside products and numerators."""

_RULES: dict[str, Callable[..., list[Any]]] = {
    "sqrt": _sqrt,
    "rsqrt": _sqrt,
    "cbrt": _sqrt,
    "pow": _pow,
    "div": _div,
    "stop_gradient": _through,
    "custom_jvp_call": _ruled,
    "custom_vjp_call": _ruled,
    "checkpoint": _remat,
    "jit": _call,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
