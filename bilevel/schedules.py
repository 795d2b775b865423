r"""Rematerialisation schedules: which inner steps keep their state for the backward pass.

With K inner steps, a state of s bytes that moves, an inner gradient of g bytes, and residuals of r bytes a step (under
`mode="mixed"` r is little more than s):

| schedule | extra memory | inner gradients a step, before the backward pass |
|---|---|---|
| `"none"` | K (s + r) | 1 |
| `"step"` | K (s + g) + r | 1 (mixed: the inner gradient g is kept), 2 (reverse) |
| `"sqrt"` = `Levels(2)` | 2 sqrt(K) s + ... | 2, or 3 |
| `Levels(n)` | n K^(1/n) s + ... | n, or n + 1 |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

INNER_GRADIENT = "bilevel_inner_gradient"
"""Name (`jax.ad_checkpoint.checkpoint_name`) of the inner gradient in a step."""

Step = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Levels:
    """Nested checkpoints: chunks of chunks of steps, `n` deep, each about `K**(1/n)` long.

    Raises:
      ValueError: unless `n >= 1`.
    """

    n: int

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"Levels(n={self.n}): the number of levels must be at least 1.")


Checkpoint = str | Levels


def validate(checkpoint: Checkpoint) -> None:
    """Raises ValueError unless `checkpoint` is a known schedule."""
    if not isinstance(checkpoint, Levels) and checkpoint not in ("auto", "none", "step", "sqrt"):
        raise ValueError(
            f"checkpoint={checkpoint!r} is not a schedule: use 'auto', 'none', 'step', 'sqrt' or Levels(n)."
        )


def scan(checkpoint: Checkpoint, step: Step, carry: Any, xs: Any, length: int) -> tuple[Any, Any]:
    """`jax.lax.scan(step, carry, xs)` whose backward pass follows the schedule `checkpoint`.

    Values are the same for every schedule, bit for bit.
    """
    validate(checkpoint)
    if checkpoint == "none":
        return jax.lax.scan(step, carry, xs, length=length)
    policy = jax.checkpoint_policies.save_only_these_names(INNER_GRADIENT)
    step = jax.checkpoint(step, prevent_cse=False, policy=policy)
    levels = {"auto": 2, "step": 1, "sqrt": 2}[checkpoint] if isinstance(checkpoint, str) else checkpoint.n
    return _nested(step, carry, xs, length, levels)


def _nested(step: Step, carry, xs, length: int, levels: int):
    if levels == 1 or length < 4:
        return jax.lax.scan(step, carry, xs, length=length)
    size = chunk_size(length, levels)
    chunks = length // size
    chunk = jax.checkpoint(lambda c, x: _nested(step, c, x, size, levels - 1), prevent_cse=False)
    head = jax.tree.map(lambda x: x[: chunks * size].reshape(chunks, size, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(chunk, carry, head, length=chunks)
    ys = jax.tree.map(lambda y: y.reshape(chunks * size, *y.shape[2:]), ys)
    rest = length - chunks * size
    if rest:
        carry, tail = _nested(step, carry, jax.tree.map(lambda x: x[chunks * size :], xs), rest, levels - 1)
        ys = jax.tree.map(lambda a, b: jax.numpy.concatenate([a, b]), ys, tail)
    return carry, ys


def chunk_size(length: int, levels: int) -> int:
    """Length of a chunk at the top of `levels` nested levels: near `length**((levels-1)/levels)`.

    A divisor of `length` is preferred where one is near, since a remainder compiles the step a second time.
    """
    ideal = length ** ((levels - 1) / levels)
    divisors = [d for d in range(1, length + 1) if length % d == 0 and ideal / 1.5 <= d <= ideal * 1.5]
    return min(divisors, key=lambda d: abs(math.log(d / ideal))) if divisors else max(2, round(ideal))
