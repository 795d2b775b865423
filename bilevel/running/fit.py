"""The final training: the inner problem alone, at the outer variable that was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bilevel.differentiation.loss_checks import TRAINING, explained, traced_losses
from bilevel.differentiation.optimizers import Optimizer, is_optimizer
from bilevel.hypergradients.arguments import check_call, check_data, check_start
from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.query import Query, split_keys
from bilevel.hypergradients.training import InnerState
from bilevel.problem.problem import Problem
from bilevel.running.loop import Callback
from bilevel.running.run import Result, run
from bilevel.settings.fields import checked
from bilevel.sharding.sharding import Sharding
from bilevel.trees import Batch, Outer, advance_keys, as_arrays, distinct


class TrainingState(NamedTuple):
    """State of a training: `outer` (constant but for its random keys), the inner problem, the step and its key."""

    outer: Outer
    inner: InnerState
    step: jax.Array
    key: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Training:
    """A solver whose iteration is one inner training step, so that `run` can train."""

    problem: Problem
    trained: Trained
    outer: Outer

    inner_batches_per_step = outer_batches_per_step = 1
    data_title = "data"
    learns_outer = False

    def init(self, key: jax.Array) -> TrainingState:
        inner_key, key = jax.random.split(key)
        state = self.trained.init(self.problem, self.outer, inner_key)
        return distinct(TrainingState(as_arrays(self.outer), state, state.step, key))

    def step(self, state: TrainingState, inner_batches: Batch, outer_batch: Batch):
        next_key, key = jax.random.split(state.key)
        # No hypergradient, so no second derivative: only what has no gradient at all is refused.
        losses = traced_losses(self.problem, state.inner.params, state.outer, inner_batches, None, key, 1)
        with explained(losses, TRAINING):
            query = Query(self.problem, 1, state.inner, state.outer, inner_batches, None, split_keys(key, 1))
            inner, trace = self.trained.trajectory(query)
        new = TrainingState(advance_keys(state.outer), inner, state.step + 1, next_key)
        return new, {"inner_loss": trace.value[0]}


def fit(
    problem: Problem,
    outer: Outer,
    *,
    optimizer: Optimizer,
    data: Any = None,
    steps: int,
    key: jax.Array | None = None,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    callback_every: int = 1,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: float = 60.0,
    title: str = "training",
    sharding: Sharding | None = None,
) -> Result:
    """Trains the inner problem from `init_inner` for `steps` steps at a fixed `outer`.

    Args:
      problem, outer: the problem, and the outer variable to train at.
      optimizer: as for `Unrolled`.
      data: as `inner_data` of `run`.
      steps, key, progress, callbacks, callback_every, checkpoint_dir, checkpoint_every, title, sharding: as for
        `run`.

    Returns:
      A `Result`; `result.inner.params` is the trained inner variable.

    Raises:
      As `run`; ValueError if `inner_loss` holds an operation without a gradient, by its name. One without a second
      derivative is fine.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> result = bilevel.fit(
      ...     problem, jax.numpy.zeros(()), optimizer=optax.sgd(0.5), data=train, steps=20, progress=False
      ... )
      >>> [round(float(w), 3) for w in result.inner.params]
      [0.75, 0.6]
    """
    if isinstance(outer, Result):
        raise ValueError("fit(outer=...): was given a Result, of which outer is one part: give result.outer.")
    check_call("fit", problem=problem, outer=outer)
    check_start("fit", problem, outer)
    checked("fit", "optimizer", optimizer, is_optimizer)
    check_data("data", data)
    training = _Training(problem, Trained(optimizer, 1), outer)
    return run(
        training,
        inner_data=data,
        steps=steps,
        key=key,
        progress=progress,
        callbacks=callbacks,
        callback_every=callback_every,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        title=title,
        sharding=sharding,
    )
