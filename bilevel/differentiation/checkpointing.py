r"""Rematerialisation schedules: which inner steps keep their state for the backward pass.

With K inner steps, s bytes of state that moves, an inner gradient of g bytes (kept in `mode="mixed"` only, where it
spares a recomputation) and r bytes that a step leaves to its backward pass (a few s in mixed mode, a whole linearised
gradient in reverse mode), at most this is kept, and so many times the inner gradients are evaluated:

| schedule | kept bytes | evaluations in mixed mode, besides those inside Hessian-vector products | in reverse mode |
|---|---|---|---|
| `"none"` | K r | 1 | 1 |
| `"step"` = `Levels(1)` | K (s + g) + r | 1 | 2 |
| `"sqrt"` = `Levels(2)` | sqrt(K) (2 s + g) + r | 2 | 3 |
| `Levels(n)` | K^(1/n) (n s + g) + r | n | n + 1 |
| `Binomial(c)` | (c + 1) s + r | 2 + p, where K <= (c + p)! / (c! p!) | 2 + p |
| `Offload()` | r, and K (s + g) in the host's memory | 1 | 2 |
| `Auto(bytes)` | the fastest of "none", "step", "sqrt", `Levels(3 ...)` that keeps no more than `bytes` | | |
| `"auto"` | `Auto` with an eighth of the device's memory (of the host's, on a CPU) | | |

Limits. `Binomial` and `Offload` allow neither forward mode nor a third level. A derivative by the inputs of the loop
(batches that depend on what is differentiated) is summed over all of them once a chunk. `Auto` does not see the batch
axis of a surrounding `vmap`. On a mesh it counts the bytes of one device, as `bilevel.sharding.held` tells them from
shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bilevel.differentiation import binomial
from bilevel.differentiation.gradients import INNER_GRADIENT
from bilevel.differentiation.tracing import is_literal, operation
from bilevel.settings.fields import Unfit, check_fields, setting
from bilevel.settings.numeric import integer, real
from bilevel.trees import as_words, combine, is_inexact, nbytes, partition

Step = Callable[[Any, Any], tuple[Any, Any]]

SHARE = 1 / 8
"""What part of a device's memory `checkpoint="auto"` may keep: training, data and a second derivative need the rest."""

MOST_LEVELS = 8
"""The deepest nesting `Auto` considers: beyond, the chunks of any practical K are two or three steps long."""


@dataclasses.dataclass(frozen=True)
class Levels:
    """Nested checkpoints: chunks of chunks of steps, `n` deep, each about `K**(1/n)` long.

    Raises:
      ValueError: unless `n >= 1`.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20, checkpoint=bilevel.Levels(2))
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)  # the same for every schedule
      0.143
    """

    n: int = dataclasses.field(metadata=setting(integer(1)))

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Binomial:
    """Binomial checkpoints (binomial.py): the fewest recomputations possible with `c` kept states.

    Raises:
      ValueError: unless `c >= 1`.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20, checkpoint=bilevel.Binomial(3))
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)  # the same for every schedule
      0.143
    """

    c: int = dataclasses.field(metadata=setting(integer(1)))

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Offload:
    """As `"step"`, with what each step keeps in the memory of the host: the device holds that of one step at a time.

    States, and in mixed mode inner gradients, go to the host as training computes them, and come back one by one; the
    transfers run beside the computation where the device can do both. On a processor, whose memory is the host's, it
    gains nothing. Memory kinds are those of JAX (`jax.memory.Space.Host`). As `Binomial`, it allows neither forward
    mode nor a third level.

    Raises:
      ValueError: when a training is traced, where the device has no pinned memory of the host beside its own.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20, checkpoint=bilevel.Offload())
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)  # the same for every schedule
      0.143
    """


@dataclasses.dataclass(frozen=True)
class Auto:
    """The fastest schedule that keeps at most `bytes` from the forward to the backward pass.

    One step's own working memory is the same for all schedules and not counted. The choice is made from shapes, when
    the training is traced, and costs no compilation.

    Raises:
      ValueError: unless `bytes > 0`.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20, checkpoint=bilevel.Auto(bytes=1e6))
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)  # the same for every schedule
      0.143
    """

    bytes: float = dataclasses.field(metadata=setting(real(above=0.0)))

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """No schedule, but a report: tracing a training with it appends the `StepBytes` of its step to `found`."""

    found: list[StepBytes]


Checkpoint = Literal["auto", "none", "step", "sqrt"] | Levels | Binomial | Offload | Auto | Probe

_LEVELS = {"step": 1, "sqrt": 2}
_POLICIES = jax.checkpoint_policies
_STATE = "state before an inner step"


def is_schedule(value: Any) -> Any:
    """The rule of a setting that is a `Checkpoint`."""
    named = isinstance(value, str) and value in ("auto", "none", *_LEVELS)
    if not named and not isinstance(value, Levels | Binomial | Offload | Auto | Probe):
        raise Unfit(
            "is not a schedule: use 'auto', 'none', 'step', 'sqrt', Levels(n), Binomial(c), Offload() or Auto(bytes)"
        )
    return value


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


def levels(checkpoint: Checkpoint) -> int:
    """How many loops, one inside another, a nested schedule has."""
    if isinstance(checkpoint, Offload):
        return 1
    return checkpoint.n if isinstance(checkpoint, Levels) else _LEVELS[str(checkpoint)]


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


@jax.custom_jvp
def _final(x):
    return x


@_final.defjvp
def _refuse(primals, tangents):
    raise ValueError(f"Offload() allows no derivative of the hypergradient (no third level): {binomial.REMEDY}")


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


def chunks(length: int, depth: int) -> tuple[int, ...]:
    """How long the loops of a nested schedule are, outermost first; their product is `length` or a little more."""
    depth = min(depth, max(1, int(math.log2(length))))  # a loop of one step keeps its state for nothing
    return next(found for total in itertools.count(length) if (found := _factors(total, depth)))


def _factors(total: int, depth: int) -> tuple[int, ...] | None:
    if depth == 1:
        return (total,)
    ideal = total ** (1 / depth)
    near = [d for d in range(math.ceil(ideal / 1.5), math.floor(ideal * 1.5) + 1) if d > 1 and total % d == 0]
    found = [(d, *rest) for d in near if (rest := _factors(total // d, depth - 1))]
    # The innermost loop keeps the most a step, so it is the shortest.
    return tuple(sorted(min(found, key=sum), reverse=True)) if found else None


class StepBytes(NamedTuple):
    """What one step of a loop is made of, in bytes.

    Attributes:
      state: the carry.
      gradient: the inner gradient, where a rematerialised step keeps it; else 0.
      residual: what a step that is not rematerialised leaves to its backward pass.
    """

    state: int
    gradient: int
    residual: int

    def kept(self, checkpoint: Checkpoint, length: int) -> int:
        """Bytes that a resolved schedule keeps of `length` steps when most is kept, at the end of the forward pass or
        in its first recomputation."""
        if checkpoint == "none":
            return length * self.residual
        if isinstance(checkpoint, Binomial):
            return (min(checkpoint.c, length) + 1) * self.state + self.residual
        if isinstance(checkpoint, Offload):
            return self.residual
        sizes = chunks(length, levels(checkpoint))
        return sum(sizes) * self.state + sizes[-1] * self.gradient + self.residual


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


def choose(checkpoint: Checkpoint, sizes: Callable[[], StepBytes], length: int) -> Checkpoint:
    """`checkpoint`, or the schedule that `"auto"` or `Auto` stands for, for `length` steps of `sizes()`.

    Warns:
      UserWarning: if no schedule keeps as little as the budget; the one that keeps least is taken.
    """
    if isinstance(checkpoint, Probe):
        checkpoint.found.append(sizes())
        return "none"
    if checkpoint == "auto":
        checkpoint = Auto(SHARE * device_memory())
    if not isinstance(checkpoint, Auto):
        return checkpoint
    measured = sizes()
    kept: dict[Checkpoint, int] = {candidate: measured.kept(candidate, length) for candidate in _candidates(length)}
    for candidate, size in kept.items():
        if size <= checkpoint.bytes:
            return candidate
    least = min(kept, key=lambda candidate: kept[candidate])
    warnings.warn(
        f"Auto(bytes={checkpoint.bytes:.3g}): the schedule that keeps least, {least}, keeps {kept[least]:.3g} bytes; "
        "Binomial(c) may keep fewer.",
        stacklevel=2,
    )
    return least


def _candidates(length: int) -> Iterator[Checkpoint]:
    """Schedules for `length` steps, in the order of their time."""
    yield from ("none", "step")
    yield from (Levels(n) for n in range(2, MOST_LEVELS + 1) if len(chunks(length, n)) == n)


def device_memory() -> int:
    """Bytes of the default device's memory; of the host's where the device does not say (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this platform: the memory of a small laptop
        return 8 * 2**30
