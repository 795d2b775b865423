"""The contract of a hypergradient: what an estimator is asked for, and what whoever calls it relies on."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false
# (Every parameter and result has a type; what jax returns has not always one that is known.)

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax

from bilevel.hypergradients.training import InnerState
from bilevel.problem.problem import Problem
from bilevel.settings.rules import having
from bilevel.trees import Batch, Inner, Key, Outer, PyTree


def driven_from_host(hypergradient: Any) -> bool:
    """Whether an estimator runs compiled programs itself, from the host, so that it cannot be part of one."""
    return bool(getattr(hypergradient, "driven_from_host", False))


def traceable(hypergradient: Any) -> Any:
    """The estimator itself, or in place of one that is driven from the host what computes the same in one program."""
    return hypergradient.twin if driven_from_host(hypergradient) else hypergradient


class Aux(NamedTuple):
    """What came with an estimate.

    Attributes:
      inner: what `inner_loss` returned beside its value, stacked over the inner steps; None without `has_aux`.
      outer: what `outer_loss` returned beside its value; None without `has_aux`.
      info: the estimator's own numbers; always `inner_loss[steps]`.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Implicit(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> estimate.aux.info["inner_loss"].shape
      (20,)
      >>> bool(estimate.aux.info["linear_residual"] < 1e-3)
      True
    """

    inner: Inner
    outer: Outer
    info: dict[str, Any]


class Estimate(NamedTuple):
    """A hypergradient.

    Attributes:
      value: the outer loss at the trained point, a scalar.
      grad: estimate of d value / d outer, a tree like `outer` with None at leaves that are not inexact.
      inner_state: the inner problem after its `steps` steps.
      aux: an `Aux`.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.value), 4), round(float(estimate.grad), 4)
      (0.0556, 0.1429)
      >>> [round(float(w), 3) for w in estimate.inner_state.params]
      [0.75, 0.6]
    """

    value: jax.Array
    grad: PyTree
    inner_state: InnerState
    aux: Aux


class Hypergradient(Protocol):
    """A way to estimate d outer_loss / d outer. Every estimator in `bilevel` has these three methods and `steps`.

    What whoever calls them relies on, and the tests try on every estimator:

    - All three are pure functions of their arguments that can be jitted; the estimator itself is a pytree.
    - `estimate` computes with what the losses read from outside now; where the caller compiles it, with what they read
      when it was traced.
    - `inner_batches` leads with an axis of length `steps`, or is `Indexed(data, index)`, a `FullBatch`, or None.
    - With `inner_state=None`, `estimate` starts the inner problem itself, so that `init_inner`'s dependence on `outer`
      is a part of what is differentiated. An `inner_state` that is given is a constant.
    - Optimizer state that depends on `outer` is made anew at the `outer` given, or the state is refused.
    - Keys are those of `split_keys(key, steps)`. No key is consumed twice; recomputations clone them.
    - `grad` has an entry for every inexact leaf of `outer` and None for others, which are constants.
    - A leaf whose hypergradient is 0 by construction is warned of (`StructuralZeroWarning`). If no leaf acts on
      anything, that is a ValueError; where one acts in a way that the estimator does not see, it is warned of.
    - A loss that captured `outer`, or that cannot be differentiated as needed, is refused in a sentence.
    - Where the inner loss has a derivative of its own (`jax.custom_vjp`), or the optimizer freezes a part of the inner
      variable (`optax.set_to_zero`, masks), the estimate is what it is without, or it is refused.
    - `aux.info` has `inner_loss[steps]`, and whatever tells how exact the estimate is, as arrays.
    - `inner_state` comes back with the structure that `init` gave it, `extra` included, so that a loop can carry it.

    `Estimator` does most of this for one that is derived from it, and `bilevel.testing.check_estimator` says in
    sentences which of it an estimator does not do.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> outer, batches, key = jax.numpy.zeros(()), bilevel.FullBatch(train), jax.random.key(0)
      >>> def slope(hypergradient: bilevel.Hypergradient):
      ...     estimate = hypergradient.estimate(problem, None, outer, batches, val, key)
      ...     return round(float(estimate.grad), 3)
      >>> slope(bilevel.Unrolled(optax.sgd(0.5), steps=20)), slope(bilevel.OneStep(optax.sgd(0.5), steps=20))
      (0.143, 0.107)
    """

    @property
    def steps(self) -> int:
        """K, inner steps an outer iteration."""
        ...

    def init(self, problem: Problem, outer: Outer, key: Key) -> InnerState:
        """The inner state before any training."""
        ...

    def solve(
        self, problem: Problem, inner_state: InnerState | None, outer: Outer, inner_batches: Batch, key: Key
    ) -> InnerState:
        """Trains K steps from `inner_state` (None: from the start), as a function that may be differentiated again."""
        ...

    def estimate(
        self,
        problem: Problem,
        inner_state: InnerState | None,
        outer: Outer,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key,
    ) -> Estimate:
        """Trains as `solve` does, then the outer loss, its hypergradient and the state that training has reached."""
        ...


is_hypergradient = having("a hypergradient, such as bilevel.Unrolled(...)", "steps", "init", "solve", "estimate")
"""The rule of a setting that is a `Hypergradient`."""
