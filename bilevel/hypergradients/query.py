"""What an estimator is asked and what it answers, and the random keys of an estimate."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownLambdaType=false
# (Every parameter and result has a type; what jax returns has not always one that is known.)

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.data import narrow, slots
from bilevel.hypergradients.optimality import same_terms
from bilevel.hypergradients.training import InnerState, Trace
from bilevel.problem.problem import Problem
from bilevel.trees import Batch, Inner, Key, Outer, PyTree, at_step, combine, is_inexact, partition, replayed


class Keys(NamedTuple):
    """The random keys of one estimate: no two things that are drawn share one.

    A key is consumed once. Where the same noise is wanted again (a Hessian on the batches that training saw, a member
    of a population beside another), the replay takes a `jax.random.clone` of it.

    Attributes:
      start: of `init_inner`, where the estimate itself starts the inner problem.
      inner: `[steps]`, of the inner steps.
      outer: of the outer loss.
      own: of the estimator's own randomness (sketches, perturbations).

    Examples:
      >>> import jax
      >>> from bilevel.extend import Keys
      >>> start, *inner, outer, own = jax.random.split(jax.random.key(0), 5)
      >>> keys = Keys(start, jax.numpy.stack(inner), outer, own)
      >>> keys.inner.shape  # one key for each of two inner steps
      (2,)
    """

    start: jax.Array
    inner: jax.Array
    outer: jax.Array
    own: jax.Array


def split_keys(key: Key, steps: int) -> Keys:
    """The `Keys` of one estimate, the same for every estimator: `split(key, steps + 2)`, its own noise apart."""
    # Not one of the keys below, though `fold_in(key, i)` equals `split(key, n)[i]` for jax's default generator.
    own = jax.random.fold_in(key, steps + 2)
    keys = jax.random.split(key, steps + 2)
    return Keys(keys[0], keys[1:-1], keys[-1], own)


def outer_value(problem: Problem, steps: int, params: Inner, outer: Outer, batch: Batch, keys: Keys):
    """`(value, aux)` of the outer loss after `steps` inner steps, with its key."""
    return problem.outer_value(params, at_step(outer, steps), batch, keys.outer)


@dataclasses.dataclass(eq=False)
class Ledger:
    """What an estimator did with its `Query`, noted while `differentiate` is traced.

    Attributes:
      evaluated, differentiated: whether `Query.outer_loss` was.
      divided: whether it asked which part of the inner variable moves, `Trained.trainable`.
    """

    evaluated: bool = False
    differentiated: bool = False
    divided: bool = False


@dataclasses.dataclass(frozen=True)
class Query:
    """One question to an estimator: the hypergradient of this problem, at this `outer`, with these batches and keys.

    Attributes:
      moving, fixed: `outer` cut into its inexact leaves, which have a hypergradient, and the others.
      weight: what every derivative of the outer loss is multiplied by: 1, as an argument of the trace, so that one
        sees in the trace which leaves of the hypergradient the outer loss reaches.
      ledger: notes what is done with it.

    Examples:
      >>> import bilevel, jax
      >>> from bilevel.extend import Keys, Query
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> keys = Keys(*jax.random.split(jax.random.key(0), 4))
      >>> outer = {"log_decay": jax.numpy.zeros(()), "layers": 2}
      >>> query = Query(problem, 1, None, outer, bilevel.FullBatch(train), val, keys)
      >>> query.moving["layers"] is None  # an integer has no derivative
      True
      >>> query.at({"log_decay": 1.0, "layers": None}) == {"log_decay": 1.0, "layers": 2}
      True
    """

    problem: Problem
    steps: int
    inner_state: InnerState | None
    outer: Outer
    inner_batches: Batch
    outer_batch: Batch
    keys: Keys
    weight: jax.Array | None = None
    ledger: Ledger = dataclasses.field(default_factory=Ledger)

    @functools.cached_property
    def moving(self) -> PyTree:
        return partition(self.outer)[0]

    @functools.cached_property
    def fixed(self) -> PyTree:
        return partition(self.outer)[1]

    def at(self, moving: Outer) -> PyTree:
        """`outer` with other numbers in its inexact leaves."""
        return combine(moving, self.fixed)

    def inner_loss(self, params: Inner, outer: Outer, step: int) -> jax.Array:
        """The inner loss once more as step number `step` of training saw it: with its batch, and its key replayed.

        Step `steps - 1` is the last. Where a derivative stands for that of the whole training, as in an implicit
        estimator, `mean_inner_loss` is the loss to take: with mini-batches, the last batch is one of many.
        """
        xs, bind = slots(narrow(self.inner_batches, step, step + 1), 1)
        batch, key = bind(jax.tree.map(lambda x: x[0], xs)), replayed(replayed(self.keys.inner)[step])
        return self.problem.inner_value(params, at_step(outer, step), batch, key)[0]

    def mean_inner_loss(self, params: Inner, outer: Outer) -> jax.Array:
        """The mean of the inner loss over the batches and keys that the K steps of training saw.

        Batches are visited one after the other, in derivatives too: activations of one batch are alive at a time.
        """
        if same_terms(self.problem, params, outer, self.inner_batches, self.keys.inner):
            return self.inner_loss(params, outer, 0)
        xs, bind = slots(self.inner_batches, self.steps)

        @jax.checkpoint
        def term(params: Inner, outer: Outer, x: Any) -> jax.Array:
            step, slot, key = x
            return self.problem.inner_value(params, at_step(outer, step), bind(slot), replayed(key))[0]

        visit = lambda _, x: (None, term(params, outer, x))  # noqa: E731
        times = jnp.arange(self.steps, dtype=jnp.int32)
        return jnp.mean(jax.lax.scan(visit, None, (times, xs, replayed(self.keys.inner)))[1])

    def outer_loss(self, params: Inner, outer: Outer) -> tuple[jax.Array, PyTree]:
        """`(value, aux)` of the outer loss after training, with its batch and key."""
        if self.weight is not None:
            self.ledger.evaluated = True
            note = lambda x: _noted(self.ledger, x) if is_inexact(x) else x  # noqa: E731
            params, outer = jax.tree.map(note, (params, outer))
        value, aux = outer_value(self.problem, self.steps, params, outer, self.outer_batch, self.keys)
        return value if self.weight is None else _weighted(self.weight, value), aux


@jax.custom_jvp
def _weighted(weight: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, whose derivative is multiplied by `weight`."""
    del weight
    return value


@_weighted.defjvp
def _weighted_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    weight, value = primals
    return _weighted(weight, value), weight.astype(value.dtype) * tangents[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _noted(ledger: Ledger, x: jax.Array) -> jax.Array:
    """x itself. Where something is differentiated by it, `ledger` learns that, whether or not the loss reads it."""
    del ledger
    return x


@_noted.defjvp
def _noted_jvp(ledger: Ledger, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    ledger.differentiated = True
    return primals[0], tangents[0]


class Answer(NamedTuple):
    """What `Estimator.differentiate` returns.

    Attributes:
      value: the outer loss at the trained point.
      grad: its hypergradient, a tree like `Query.moving`.
      state: the inner problem after training; `extra` may hold what the next estimate is to start from.
      trace: the inner losses of training, and what they returned beside their values.
      aux: what the outer loss returned beside its value.
      info: the estimator's own numbers and arrays, by name. `hvps`, Hessian-vector products taken, is shown by
        `compare` and by the metrics of `Nested`; `stationarity_relative` and `linear_residual` are metrics, of which
        `run` warns where they are not small.

    Examples:
      >>> import bilevel, jax
      >>> from bilevel.extend import Answer, Trace
      >>> state = bilevel.InnerState(jax.numpy.zeros(2), (), jax.numpy.array(1))
      >>> trace = Trace(jax.numpy.array([4.0]), None)  # the loss of the only inner step
      >>> value, grad = jax.numpy.array(0.5), jax.numpy.array(0.1)
      >>> answer = Answer(value=value, grad=grad, state=state, trace=trace, aux=None)
      >>> answer.info  # no numbers of its own
      {}
    """

    value: jax.Array
    grad: PyTree
    state: InnerState
    trace: Trace
    aux: PyTree
    info: dict[str, Any] = {}  # noqa: RUF012  (read only)
