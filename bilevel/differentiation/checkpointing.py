"""A loop whose backward pass follows a schedule: which of its steps are kept, where, and which are computed anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bilevel.differentiation import binomial
from bilevel.differentiation.gradients import INNER_GRADIENT
from bilevel.differentiation.schedules import Binomial, Checkpoint, Offload, StepBytes, choose, chunks, levels
from bilevel.differentiation.tracing import is_literal, operation
from bilevel.trees import as_words, combine, is_inexact, nbytes, partition

Step = Callable[[Any, Any], tuple[Any, Any]]

_POLICIES = jax.checkpoint_policies
_STATE = "state before an inner step"


def scan(
    checkpoint: Checkpoint, step: Step, carry: Any, xs: Any, length: int, size: Callable[[Any], int] = nbytes
) -> tuple[Any, Any]:
    """`jax.lax.scan(step, carry, xs)` whose backward pass follows the schedule `checkpoint`.

    Values are the same for every schedule, bit for bit. The stacked outputs are reports: they carry no derivative.
    `size` is what an array takes on a device, by which a schedule is chosen where that is left open.
    """
    checkpoint = choose(checkpoint, lambda: step_bytes(step, carry, xs, size), length)
    if checkpoint != "none":
        # A step is done more than once, and reads its keys from a stack each time: as words, which may be read again.
        xs, as_keys = as_words(xs)
        once, step = step, lambda carry, x: once(carry, as_keys(x))
    if checkpoint == "none":
        carry, ys = jax.lax.scan(step, carry, xs, length=length)
    elif isinstance(checkpoint, Binomial):
        carry, ys = binomial.scan(step, carry, xs, length, checkpoint.c)
    else:
        carry, ys = _nested(step, carry, xs, length, levels(checkpoint), isinstance(checkpoint, Offload))
    if isinstance(checkpoint, Offload):
        carry = _once(carry)
    return carry, jax.tree.map(jax.lax.stop_gradient, ys)


def _nested(step: Step, carry, xs, length: int, depth: int, offload: bool = False):
    sizes = chunks(length, depth)
    total = math.prod(sizes)
    if total > length:
        # A shorter last chunk would compile the step again at every level; idle steps at the end do not.
        step = _idling(step, carry)

    def at(carry, t):
        # Each step reads its own input: a loop over chunks would hand every chunk a copy of all its inputs.
        active = t < length
        place = t if total == length else jnp.where(active, t, 0)
        options = {"keepdims": False, "allow_negative_indices": False}
        x = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, **options), xs)
        if offload:  # what a rematerialised step starts from is kept anyway, but only what has a name can be sent away
            carry = jax.tree.map(lambda c: checkpoint_name(c, _STATE) if is_inexact(c) else c, carry)
        return step(carry, x if total == length else (active, x))

    policy = _to_host() if offload else _POLICIES.save_only_these_names(INNER_GRADIENT)
    remat = jax.checkpoint(at, prevent_cse=False, policy=policy)

    def run(carry, times, sizes):
        if len(sizes) == 1:
            return jax.lax.scan(remat, carry, times, length=sizes[0])
        chunk = jax.checkpoint(lambda c, t: run(c, t, sizes[1:]), prevent_cse=False)
        return jax.lax.scan(chunk, carry, times, length=sizes[0])

    carry, ys = run(carry, jnp.arange(total, dtype=jnp.int32).reshape(sizes), sizes)
    return carry, jax.tree.map(lambda y: y.reshape(total, *y.shape[len(sizes) :])[:length], ys)


def _once(carry: Any) -> Any:
    """`carry`, which can be differentiated in reverse mode once: JAX cannot transpose a transfer from the host."""
    try:
        return jax.tree.map(lambda x: _differentiated_once(x) if is_inexact(x) else x, carry)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        raise ValueError(f"Offload() allows no forward-mode derivative: {binomial.REMEDY}") from None


@jax.custom_vjp
def _differentiated_once(x):
    return x


_final = binomial.not_differentiable("Offload() allows")
_differentiated_once.defvjp(lambda x: (_final(x), None), lambda _, cotangent: (_final(cotangent),))


def _to_host() -> Any:
    """The policy that keeps the state and the inner gradient of a step in the memory of the host.

    Raises:
      ValueError: where the device has none.
    """
    device = jax.local_devices()[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"checkpoint=Offload(): a device of the {device.platform} backend has no pinned memory of the host beside "
            "its own: use 'sqrt', Levels(n) or Binomial(c)."
        )
    return _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_STATE, INNER_GRADIENT],
        offload_src="device",
        offload_dst="pinned_host",
    )


def _idling(step: Step, first: Any) -> Step:
    """`step`, or nothing where the first of its two inputs is False."""
    # No `cond`: what its branches read would be stacked for the backward pass, frozen weights and all. An idle step
    # repeats the first one, whose derivative is known to be finite, so that zero times it is zero.
    first = jax.lax.stop_gradient(first)

    def either(carry, x):
        active, x = x
        new, y = step(jax.tree.map(lambda c, f: jnp.where(active, c, f), carry, first), x)
        return jax.tree.map(lambda n, c: jnp.where(active, n, c), new, carry), y

    return either


def step_bytes(step: Step, carry: Any, xs: Any, size: Callable[[Any], int] = nbytes) -> StepBytes:
    """The sizes of `step(carry, x)`, from shapes alone, for `x` a slice of `xs`; `size` is that of one array."""
    carry = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), carry)
    x = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), xs)

    def residuals(carry, x):
        moving, fixed = partition(carry)
        _, pullback = jax.vjp(lambda moving: partition(step(combine(moving, fixed), x)[0])[0], moving)
        return jax.tree.leaves(pullback)

    jaxpr = jax.make_jaxpr(residuals)(carry, x).jaxpr
    # Weights, data and slices of `xs` are there anyway; a loop hands them on without storing them.
    given = {*jaxpr.constvars, *jaxpr.invars[len(jax.tree.leaves(carry)) :]}
    left = {v for v in jaxpr.outvars if not is_literal(v)} - given
    plain = jax.make_jaxpr(step)(carry, x).jaxpr
    named = [e.outvars[0] for e in plain.eqns if operation(e) == "name" and e.params["name"] == INNER_GRADIENT]
    return StepBytes(
        state=sum(size(x) for x in jax.tree.leaves(carry)),
        gradient=sum(size(v.aval) for v in named),
        residual=sum(size(v.aval) for v in left),
    )
