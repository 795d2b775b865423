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

from bilevel.settings.fields import Unfit, check_fields, setting
from bilevel.settings.numeric import integer, real

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


def is_schedule(value: Any) -> Any:
    """The rule of a setting that is a `Checkpoint`."""
    named = isinstance(value, str) and value in ("auto", "none", *_LEVELS)
    if not named and not isinstance(value, Levels | Binomial | Offload | Auto | Probe):
        raise Unfit(
            "is not a schedule: use 'auto', 'none', 'step', 'sqrt', Levels(n), Binomial(c), Offload() or Auto(bytes)"
        )
    return value


def levels(checkpoint: Checkpoint) -> int:
    """How many loops, one inside another, a nested schedule has."""
    if isinstance(checkpoint, Offload):
        return 1
    return checkpoint.n if isinstance(checkpoint, Levels) else _LEVELS[str(checkpoint)]


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
