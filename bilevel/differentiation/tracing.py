"""The one file that knows how JAX writes down a traced program (a jaxpr): the rest asks here.

A jaxpr is a list of equations, each an operation (`primitive`) with parameters, on variables and literals. JAX promises
little about their details, and they differ between the releases that are supported: from 0.12 on, the constants of a
jaxpr are a part of it, and a `scan` says through two trees, `ft_in` and `ft_out`, what `num_consts` and `num_carry`
said before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import CustomVJPPrimal
from jax.extend import core as jex
from jax.interpreters import partial_eval


def is_literal(atom: Any) -> bool:
    """Whether `atom`, an input of an operation, is a number that stands in the program itself."""
    return isinstance(atom, jex.Literal)


def is_dropped(var: Any) -> bool:
    """Whether `var` is an output of an operation that nothing reads."""
    return isinstance(var, jex.DropVar)


def fresh(var: Any) -> Any:
    """A new variable for what `var` stands for."""
    return jex.Var(var.aval)


_OTHER_NAMES = {"pjit": "jit", "remat2": "checkpoint", "copy_p": "copy"}


def operation(eqn: Any) -> str:
    """The name of an operation, the same for every release of JAX."""
    name: str = eqn.primitive.name
    return _OTHER_NAMES.get(name, name)


_SRC = os.path.join(os.path.dirname(jax.__file__), "_src", "")
_OF_FORMULAS = tuple(_SRC + part for part in ("nn/", "ops/", "numpy/", "scipy/", "lax/linalg.py"))


def is_cut(eqn: Any) -> bool:
    """Whether an operation is a `stop_gradient` that takes a part of a derivative away.

    Those in JAX's own formulas do not: `logsumexp` stops the gradient of a maximum that cancels, and `solve` that of a
    factorization whose derivative it knows otherwise. Which these are is told by where they were written.
    """
    if operation(eqn) != "stop_gradient":
        return False
    traceback = getattr(getattr(eqn, "source_info", None), "traceback", None)
    frames = getattr(traceback, "frames", None) or []
    names = [frame.function_name for frame in frames]
    at = names.index("stop_gradient") + 1 if "stop_gradient" in names else len(frames)
    return at >= len(frames) or not frames[at].file_name.startswith(_OF_FORMULAS)


def is_on_host(aval: Any) -> bool:
    """Whether an abstract array lies in the memory of the host, beside a device's own."""
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host


def is_jaxpr(value: Any) -> bool:
    """Whether `value` is a jaxpr, with or without the values of its constants."""
    return isinstance(value, jex.Jaxpr | jex.ClosedJaxpr)


def constants(closed: Any) -> Iterator[Any]:
    """All constants of a closed jaxpr, those of functions compiled inside it too."""
    yield from closed.consts
    for eqn in closed.jaxpr.eqns:
        for value in eqn.params.values():
            for inside in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inside, jex.ClosedJaxpr):
                    yield from constants(inside)


def read(jaxpr: Any) -> set[Any]:
    """The variables of `jaxpr` that an operation or an output of it reads; other outputs of operations are dropped."""
    atoms = [*jaxpr.outvars, *(atom for eqn in jaxpr.eqns for atom in eqn.invars)]
    return {atom for atom in atoms if not is_literal(atom)}


def is_marked(leaf: Any) -> bool:
    """Whether `leaf` is what the forward rule of a `custom_vjp` with `symbolic_zeros` is given: `.value`, and whether
    it is being differentiated, `.perturbed`.

    Examples:
      >>> import jax
      >>> from bilevel.extend import is_marked
      >>> f = jax.custom_vjp(lambda x: 2 * x)
      >>> def forward(x):
      ...     return 2 * x.value, print(is_marked(x), x.perturbed)
      >>> f.defvjp(forward, lambda _, cotangent: (2 * cotangent,), symbolic_zeros=True)
      >>> float(jax.grad(f)(1.0))
      True True
      2.0
    """
    return isinstance(leaf, CustomVJPPrimal)


def bind(eqn: Any, *inputs: Any) -> list[Any]:
    """The outputs of the operation `eqn` of a jaxpr."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # older releases return the functions apart
    result = eqn.primitive.bind(*functions, *inputs, **params)
    return result if eqn.primitive.multiple_results else [result]


_DEBUGGING = ("debug_callback", "debug_print")
_DEBUG_EFFECTS = ("DebugEffect", "OrderedDebugEffect")


def is_loud(eqn: Any) -> bool:
    """Whether an operation only tells somebody what is computed (`jax.debug.print`)."""
    return operation(eqn) in _DEBUGGING


def silent(closed: Any) -> Any:
    """A closed jaxpr without the operations that only tell somebody what is computed (`jax.debug.print`).

    To be evaluated, not differentiated: the derivative of a function with one of its own is made by what made it.
    """
    return closed.replace(jaxpr=_silent(closed.jaxpr))


def _silent(jaxpr: Any) -> Any:
    def inside(value):
        if isinstance(value, tuple | list) and any(map(is_jaxpr, value)):
            items = map(inside, value)
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, jex.ClosedJaxpr):
            return silent(value)
        return _silent(value) if isinstance(value, jex.Jaxpr) else value

    def heard(effects):
        return {effect for effect in effects if type(effect).__name__ not in _DEBUG_EFFECTS}

    eqns = [
        eqn.replace(params={name: inside(value) for name, value in eqn.params.items()}, effects=heard(eqn.effects))
        for eqn in jaxpr.eqns
        if not is_loud(eqn)
    ]
    return jaxpr.replace(eqns=eqns, effects=heard(jaxpr.effects))


def jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs inside the parameters of an operation."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def executed(eqn: Any) -> list[Any]:
    """The jaxprs inside an operation that are run where it is; others tell of its derivative alone."""
    if operation(eqn) == "custom_linear_solve":
        return [eqn.params["jaxprs"].solve.jaxpr]
    return list(jaxprs(eqn.params))


def times_run(eqn: Any) -> int:
    """How often an operation runs the jaxprs inside it, on all devices together; once where that is not known."""
    if operation(eqn) == "shard_map":  # the program of one device
        sizes = eqn.params["mesh"].shape
        return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])
    return eqn.params.get("length", 1)


def keys_inside(jaxpr: Any) -> Iterator[Any]:
    """The random keys, as abstract arrays, that a program is given, holds or makes."""
    for var in [*jaxpr.constvars, *jaxpr.invars, *(var for eqn in jaxpr.eqns for var in eqn.outvars)]:
        kind = getattr(var.aval, "dtype", None)
        if kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key):
            yield var.aval
    for eqn in jaxpr.eqns:
        for inner in jaxprs(eqn.params):
            yield from keys_inside(inner)


def called(eqn: Any) -> Any:
    """The closed jaxpr that an operation which only calls one (`jit`, `checkpoint`, `custom_jvp_call`) holds."""
    held = eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
    return held if hasattr(held, "consts") else jex.ClosedJaxpr(held, ())


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Of the operation `scan`: how many inputs are constants of its body, and how many, after these, are carried.

    The inputs after those are the slices' stacks; the first outputs are what was carried, the others stacks.
    """
    if "ft_in" in eqn.params:
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def while_counts(eqn: Any) -> tuple[int, int]:
    """Of the operation `while`: how many inputs are constants of its condition, and how many, after these, of its body.

    The inputs after those are carried.
    """
    return eqn.params["cond_nconsts"], eqn.params["body_nconsts"]


def detached(closed: Any) -> Any:
    """The jaxpr of `closed` without the values of its constants, which are its first inputs instead.

    A jaxpr that outlives its trace must not hold what was traced.
    """
    jaxpr = closed.jaxpr
    if hasattr(jaxpr, "with_consts"):
        return jaxpr.with_consts(())
    names = jaxpr.debug_info._replace(arg_names=None)  # there is one for each input, the constants left out
    return jaxpr.replace(constvars=(), invars=[*jaxpr.constvars, *jaxpr.invars], debug_info=names)


def evaluate(jaxpr: Any, *inputs: Any) -> list[Any]:
    """The outputs of a `detached` jaxpr."""
    return evaluate_closed(jex.ClosedJaxpr(jaxpr, ()), *inputs)


def evaluate_closed(closed: Any, *inputs: Any) -> list[Any]:
    """The outputs of a jaxpr that holds the values of its constants."""
    # An output that is a number of the program itself comes as an object of another class, without methods of arrays.
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in jex.jaxpr_as_fun(closed)(*inputs)]


def used(jaxpr: Any, outputs: Sequence[bool]) -> list[bool]:
    """Which inputs of `jaxpr` the `outputs` that are wanted are computed from."""
    return partial_eval.dce_jaxpr(jaxpr, outputs)[1]


def reading(jaxpr: Any, outputs: Sequence[int]) -> list[list[bool]]:
    """For each of the `outputs` of `jaxpr`, by number, which inputs it is computed from."""
    kept, inputs = partial_eval.dce_jaxpr(jaxpr, [i in outputs for i in range(len(jaxpr.outvars))])
    rows = []
    for i in range(len(outputs)):
        row = iter(used(kept, [j == i for j in range(len(outputs))]))
        rows.append([is_used and next(row) for is_used in inputs])
    return rows


def without_unused(jaxpr: Any) -> Any:
    """`jaxpr` without the operations from which no output is computed."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def kept_for(jaxpr: Any, outputs: Sequence[bool]) -> Any:
    """`jaxpr` with all of its inputs, only the `outputs` that are wanted, and what these are computed from."""
    return partial_eval.dce_jaxpr(jaxpr, outputs, True)[0]


class Unlike(Exception):
    """A program holds something of which it is not known whether two are the same."""


def identity(closed: Any) -> tuple[Any, ...]:
    """What is equal for two closed jaxprs only if they evaluate to the same: hashable.

    Functions in it are compared by themselves. A function with a derivative of its own counts as what it evaluates to.

    Raises:
      Unlike: if the jaxpr holds what cannot be compared.
    """
    return (*_identity(closed.jaxpr), *(_value(const) for const in closed.consts))


def _identity(jaxpr: Any) -> tuple[Any, ...]:
    numbers: dict[Any, int] = {}

    def atom(x):
        return _value(x.val) if is_literal(x) else numbers.setdefault(x, len(numbers))

    inputs = [(atom(x), str(x.aval)) for x in (*jaxpr.constvars, *jaxpr.invars)]
    eqns = []
    for eqn in jaxpr.eqns:
        params = ((k, _value(v)) for k, v in sorted(eqn.params.items()) if k not in _RULE_PARAMETERS)
        outs = [(atom(x), str(x.aval)) for x in eqn.outvars]
        eqns.append((operation(eqn), tuple(map(atom, eqn.invars)), tuple(params), tuple(outs)))
    return tuple(inputs), tuple(eqns), tuple(map(atom, jaxpr.outvars))


_RULE_PARAMETERS = ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd", "out_trees", "debug_info")


def _value(value: Any) -> Any:
    if isinstance(value, jex.ClosedJaxpr):
        return identity(value)
    if isinstance(value, jex.Jaxpr):
        return _identity(value)
    if isinstance(value, tuple | list):
        return tuple(map(_value, value))
    if isinstance(value, np.ndarray | np.generic | jax.Array) and not isinstance(value, Tracer):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or np.size(value) > 10_000:
            raise Unlike
        array = np.asarray(value)
        return type(value).__name__, array.shape, str(array.dtype), array.tobytes()
    if isinstance(value, Tracer):
        raise Unlike
    try:
        hash(value)
    except TypeError:
        raise Unlike from None
    return type(value), repr(value) if isinstance(value, float) else value
