r"""Which training rows made a model answer as it does: the weight of each row as an outer variable.

Inner variable: whatever is trained. Outer variable: a weight $\lambda_i$ for each of N training rows (or for each
token of each). A step of training minimises, on a batch b of rows,

$$ f(w, \lambda; b) = \frac{\sum_{i \in b} \lambda_i \ell_i(w)}{\sum_{i \in b} c_i}, $$

$\ell_i$ being the loss of row i and $c_i$ what it counts (1, or its answer's tokens): plain training at
$\lambda = 1$, and training without the rows of weight 0, with the same steps and batches. A question q is a batch
whose loss is $F_q(w)$. After K steps

$$ s_{qi} = \left. \frac{d}{d\lambda_i} F_q(w_K(\lambda)) \right|_{\lambda = 1} $$

is the *influence* of row i on q: leaving out a set S of rows changes the question's loss by
$-\sum_{i \in S} s_{qi}$, to first order. A row with $s_{qi} < 0$ helps.

Whether it does is measured by `methods.datamodeling`.

Sources: Koh and Liang 2017, arXiv 1703.04730 (influence, by the implicit gradient); Pruthi et al. 2020, arXiv
2002.08484 (`tracin`); Ilyas and Engstrom 2025, arXiv 2504.16430 (through the training).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel

WEIGHTS = "rows"
"""The entry of the outer variable that holds the weights."""


class Numbered(NamedTuple):
    """Training rows and their numbers.

    Attributes:
      number: int32 `[B]`, from 0 to N - 1.
      rows: arrays `[B, ...]`.
    """

    number: jax.Array
    rows: Any


def numbered(rows: Any) -> Numbered:
    """All rows, numbered in their order."""
    return Numbered(jnp.arange(len(jax.tree.leaves(rows)[0]), dtype=jnp.int32), rows)


def problem(
    losses: Callable[[Any, Any, Any, Any], tuple[jax.Array, jax.Array]],
    question: Callable[[Any, Any, Any, Any], jax.Array],
    start: Callable[[jax.Array], Any],
    shape: int | tuple[int, ...],
    *,
    weights: Any = (),
    beside: Callable[[jax.Array], Mapping[str, Any]] = lambda key: {},
    domain: Mapping[str, Any] | None = None,
) -> bilevel.Problem:
    """The bilevel problem of the module: the outer variable is `{"rows": weights of rows, **beside(key)}`, at first 1.

    Args:
      losses: `losses(weights, params, outer, rows) -> (losses, counts)`: for each of B rows its loss, `[B]`, and what
        it counts, `[B]`. Of a weight for each token, `[B, T]` both.
      question: `question(weights, params, outer, batch) -> scalar`, the outer loss.
      start: `start(key) -> params`.
      shape: of the weights of rows: N, or `(N, T)` for one a token.
      weights: frozen arrays, which both losses are given: they are arguments of the compiled program.
      beside: `beside(key)`, further entries of the outer variable, which both losses may read: the gates of a layer
        selection, for one.
      domain: as of `bilevel.Problem`, where the weights of rows are to stay in an interval.

    Examples:
      >>> import bilevel, jax, jax.numpy as jnp, optax
      >>> from methods.attribution import numbered, problem
      >>> rows = jnp.array([0.0, 0.0, 3.0])  # w is trained to be their mean; the question wants it to be 0
      >>> each = lambda weights, w, outer, rows: (0.5 * (w - rows) ** 2, jnp.ones_like(rows))
      >>> of = problem(each, lambda weights, w, outer, batch: 0.5 * w**2, lambda key: jnp.zeros(()), 3)
      >>> training, key = bilevel.Unrolled(optax.sgd(0.5), steps=40), jax.random.key(0)
      >>> found = training.estimate(of, None, of.start_outer(key), bilevel.FullBatch(numbered(rows)), None, key)
      >>> found.grad["rows"].round(3).tolist()  # w (x_i - w) / 3 at w = 1: the third row harms
      [-0.333, -0.333, 0.667]
    """

    def outer_loss(weights: Any, params: Any, outer: Any, batch: Any, key: jax.Array) -> jax.Array:
        return question(weights, params, outer, batch)

    return bilevel.Problem(
        jax.tree_util.Partial(Weighted(losses), weights),
        jax.tree_util.Partial(outer_loss, weights),
        lambda key, outer: start(key),
        lambda key: {WEIGHTS: jnp.ones(shape), **beside(key)},
        domain=domain,
    )


class Weighted:
    """The inner loss of `problem`: `weighted(weights, params, outer, batch, key)`, of a `Numbered` batch.

    Attributes:
      losses: as of `problem`.
    """

    def __init__(self, losses: Callable[..., Any]):
        self.losses = losses

    def __call__(self, weights: Any, params: Any, outer: Any, batch: Numbered, key: jax.Array) -> jax.Array:
        each, counts = self.of_rows(weights, params, outer, batch)
        of = outer[WEIGHTS][batch.number]
        if not each.shape == counts.shape == of.shape:
            raise ValueError(
                f"losses(weights, params, outer, rows) gave losses {list(each.shape)} and counts {list(counts.shape)} "
                f"of a batch whose weights are {list(of.shape)}: all three must be of one shape, a number for each row "
                "(or for each of its tokens)."
            )
        return jnp.sum(of.astype(each.dtype) * each) / jnp.sum(counts).astype(each.dtype)

    def of_rows(self, weights: Any, params: Any, outer: Any, batch: Numbered) -> tuple[jax.Array, jax.Array]:
        """The losses and the counts of a batch. Raises ValueError if it is none, or for something else than a pair."""
        if not isinstance(batch, Numbered):
            raise ValueError(
                f"A batch of the inner loss is a {type(batch).__name__}, and not Numbered: give the data as "
                "numbered(rows)."
            )
        found = self.losses(weights, params, outer, batch.rows)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(f"losses must return (losses, counts), but returned a {type(found).__name__}.")
        return jnp.asarray(found[0]), jnp.asarray(found[1])


class Answers(NamedTuple):
    """A trained model and what it answers.

    Attributes:
      params: what was trained.
      losses: of the questions, float64 `[Q]`.
      inner: the loss of each step of the training, `[K]`.
    """

    params: Any
    losses: np.ndarray
    inner: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Training:
    """A training whose rows have weights, and questions to what it leads to; its start and batches are fixed by `key`.

    Args:
      problem: as from `problem`.
      optimizer: of the inner variable.
      steps: K.
      data: the training rows, `bilevel.Batches(numbered(rows), size)`.
      questions: batches of the outer loss, stacked: arrays `[Q, ...]`.
      key: of the start values and the batches.
      sharding: where things lie on a mesh; None on one device.

    Raises:
      ValueError: for data that is not numbered, numbers that have no weight, and questions of different lengths.
    """

    problem: bilevel.Problem
    optimizer: optax.GradientTransformation
    steps: int
    data: bilevel.Batches
    questions: Any
    key: jax.Array
    sharding: bilevel.Sharding | None = None

    def __post_init__(self):
        rows = self.data.arrays
        if not isinstance(rows, Numbered):
            raise ValueError("Training(data=): give bilevel.Batches(numbered(rows), size), rows with their numbers.")
        low, high = (int(jnp.asarray(rows.number).min()), int(jnp.asarray(rows.number).max()))
        if low < 0 or high >= (count := len(self.outer[WEIGHTS])):
            raise ValueError(
                f"Training(data=): rows are numbered from {low} to {high}, but there are weights from 0 to {count - 1}:"
                " give problem(shape=) the number of rows."
            )
        if len({jnp.shape(x)[:1] for x in jax.tree.leaves(self.questions)}) != 1:
            shapes = ", ".join(str(list(jnp.shape(x))) for x in jax.tree.leaves(self.questions))
            raise ValueError(f"Training(questions=): arrays {shapes} do not lead with one axis of Q questions.")
        if self.sharding is not None:
            object.__setattr__(self, "problem", self.sharding.problem(self.problem))

    @cached_property
    def outer(self) -> Any:
        """The outer variable at which rows are judged: every weight is 1."""
        return self.problem.start_outer(self.key)

    @cached_property
    def batches(self) -> Any:
        """The K batches of the training, in the form that an estimator takes."""
        return self.data.take(jax.random.fold_in(self.key, 1), 0, self.steps)

    @cached_property
    def start(self) -> bilevel.InnerState:
        """What every training starts from."""
        return bilevel.Unrolled(self.optimizer, self.steps).init(self.problem, self.outer, self.key)

    def through(self, hypergradient: bilevel.Hypergradient) -> np.ndarray:
        """The derivative of each question's loss by the weight of each row as `hypergradient` tells it, `[Q, N]`."""
        # A replay is driven from the host, and compiles its programs itself.
        ask = _jacobian if isinstance(hypergradient, bilevel.Replay) else _jacobian_at_once
        given = self.outer, self.start, self.batches, self.questions, self.key
        return np.asarray(ask(hypergradient, self.problem, *given)[WEIGHTS], np.float64)

    def answers(self, outer: Any) -> Answers:
        """What training at an outer variable ends with, and what it answers."""
        estimator = bilevel.Unrolled(self.optimizer, self.steps)
        given = estimator, self.problem, self.start, outer, self.batches, self.questions, self.key
        params, losses, inner = _answers(*given)
        return Answers(params, np.asarray(losses, np.float64), np.asarray(inner))

    def answers_without(self, left_out: np.ndarray) -> np.ndarray:
        """The loss of each question, `[Q]`, after the training in which some rows, bool `[N]`, have the weight 0."""
        outer, left_out = dict(self.outer), np.asarray(left_out)
        if left_out.dtype != bool or left_out.shape != outer[WEIGHTS].shape[:1]:
            raise ValueError(
                f"answers_without: {left_out.dtype}{list(left_out.shape)} is no mask of the rows: give "
                f"bool{list(outer[WEIGHTS].shape[:1])}, True for a row that is left out."
            )
        kept = jnp.asarray(~left_out, outer[WEIGHTS].dtype)
        outer[WEIGHTS] = outer[WEIGHTS] * kept.reshape(-1, *[1] * (outer[WEIGHTS].ndim - 1))
        return self.answers(outer).losses

    def points(self, count: int) -> list[Any]:
        """What is trained, at `count` >= 1 moments of the training, equally far apart; the last is its end."""
        state, found, first = self.start, [], 0
        for part in np.array_split(np.arange(self.steps), min(count, self.steps)):
            estimator = bilevel.Unrolled(self.optimizer, len(part))
            batches = self.data.take(jax.random.fold_in(self.key, 1), first, len(part))
            state, first = _advanced(estimator, self.problem, state, self.outer, batches, self.key), first + len(part)
            found.append(state.params)
        return found

    def products(self, params: Any, size: int = 256) -> np.ndarray:
        r"""The product of each question's gradient with each row's, $\nabla F_q \cdot \nabla \ell_i$, `[Q, N]`.

        Over the counts of all rows, as a training on all of them at once would have it. A row's is a directional
        derivative of its loss, so that no gradient of a single row is formed; `size` rows go at once.
        """
        slopes = _slopes(self.problem, params, self.outer, self.questions, self.key)
        rows, shape = self.data.arrays, self.outer[WEIGHTS].shape
        found, total = np.zeros((len(jax.tree.leaves(self.questions)[0]), *shape)), 0.0
        for first in range(0, len(rows.number), size):
            batch = jax.tree.map(lambda x, at=first: x[at : at + size], rows)
            products, counts = _products(self.problem, params, self.outer, batch, slopes)
            by_row = np.asarray(products, np.float64).swapaxes(0, 1)
            np.add.at(found.swapaxes(0, 1), np.asarray(batch.number), by_row)
            total += float(np.asarray(counts, np.float64).sum())
        return found / total


def _jacobian(hypergradient, problem, *given):
    return bilevel.value_and_hyperjacobian(problem, hypergradient)(*given)[1]


# With the problem as an argument: the weights of a model that it holds would be constants of the program otherwise.
_jacobian_at_once = jax.jit(_jacobian)


@jax.jit
def _answers(estimator, problem, state, outer, batches, questions, key):
    # Of an estimate the gradient, which nobody asks for, is not computed.
    first = jax.tree.map(lambda x: x[0], questions)
    estimate = estimator.estimate(problem, state, outer, batches, first, key)
    params = estimate.inner_state.params
    losses = jax.vmap(lambda batch: problem.outer_loss(params, outer, batch, key))(questions)
    return params, losses, estimate.aux.info["inner_loss"]


@jax.jit
def _advanced(estimator, problem, state, outer, batches, key):
    return estimator.solve(problem, state, outer, batches, key)


@jax.jit
def _slopes(problem, params, outer, questions, key):
    return jax.vmap(jax.grad(problem.outer_loss), (None, None, 0, None))(params, outer, questions, key)


@jax.jit
def _products(problem, params, outer, batch, slopes):
    weighted, weights = problem.inner_loss.func, problem.inner_loss.args[0]

    def losses(params):
        return weighted.of_rows(weights, params, outer, batch)

    along = lambda slope: jax.jvp(lambda p: losses(p)[0], (params,), (slope,))[1]  # noqa: E731
    return jax.vmap(along)(slopes), losses(params)[1]


def through_training(training: Training) -> np.ndarray:
    """The derivative through all steps of the training, `bilevel.Unrolled`."""
    return training.through(bilevel.Unrolled(training.optimizer, training.steps, checkpoint="auto"))


def replayed(training: Training) -> np.ndarray:
    """The same, segment by segment from the host: device memory and compilation do not depend on the steps."""
    return training.through(bilevel.Replay(training.optimizer, training.steps, progress=False))


def implicit(solver: Any, damping: float = 1e-3) -> Callable[[Training], np.ndarray]:
    """Influence functions: the stationary point is differentiated that training has approached, by a linear solver."""

    def scores(training: Training) -> np.ndarray:
        estimator = bilevel.Implicit(training.optimizer, training.steps, linear_solver=solver, damping=damping)
        return training.through(estimator)

    return scores


def gradient_products(training: Training) -> np.ndarray:
    """At the trained point, minus the product of the question's gradient with the row's: one step of descent."""
    return -training.products(training.answers(training.outer).params)


def tracin(training: Training, moments: int = 5) -> np.ndarray:
    """The sum of `gradient_products` over moments of the training, all weighing the same (Pruthi et al. 2020)."""
    return -np.sum([training.products(params) for params in training.points(moments)], axis=0)


def random(training: Training) -> np.ndarray:
    """Numbers that know nothing of the rows."""
    shape = len(jax.tree.leaves(training.questions)[0]), *training.outer[WEIGHTS].shape
    return np.random.default_rng(0).normal(size=shape)


SCORES: dict[str, Callable[[Training], np.ndarray]] = {
    "unrolled": through_training,
    "replay": replayed,
    "implicit-cg": implicit(bilevel.CG(max_steps=20)),
    "implicit-normal-cg": implicit(bilevel.NormalCG(max_steps=20)),
    "implicit-gmres": implicit(bilevel.GMRES(max_steps=20)),
    "implicit-bicgstab": implicit(bilevel.BiCGStab(max_steps=20)),
    "implicit-neumann": implicit(bilevel.Neumann(terms=20, scale=0.1)),
    "implicit-nystrom": implicit(bilevel.Nystrom(rank=20)),
    "gradient-product": gradient_products,
    "tracin": tracin,
    "random": random,
}
"""By name, functions `scores(training) -> [Q, N]`: how much a row's weight raises the loss of a question."""
