"""One outer variable under many inner problems."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.data import FullBatch, resolve, slots
from bilevel.differentiation.influence import EXACTNESS
from bilevel.hypergradients.base import Estimate, Hypergradient, is_hypergradient
from bilevel.hypergradients.training import InnerState
from bilevel.problem.problem import Problem
from bilevel.settings.fields import check_fields, child, register
from bilevel.trees import PyTree


@register
@dataclasses.dataclass(frozen=True)
class PerTask:
    r"""The mean hypergradient over a batch of tasks, each trained by itself (MAML, learned regularisers):

    $$
    \widehat{\frac{dF}{d\lambda}} = \frac1n \sum_{i=1}^{n}
      \widehat{\frac{d}{d\lambda}} F\big(w_i(\lambda), \lambda; q_i\big), \qquad
      w_i(\lambda) \text{ trained on } s_i .
    $$

    A task is a pair `(support, query)`. `inner_loss` sees the whole support $s_i$ at each of its steps,
    `outer_loss` the query $q_i$; random keys are a task's own. Tasks train at once, by `jax.vmap`, and always
    anew: `inner_state` stays that of the start.

    A row of the inner data is a task, so `run` draws n of them an outer step, inside the compiled step, with

        inner_data=Batches((support, query), n)        # arrays that lead with an axis of all tasks

    and without outer data.

    Args:
      hypergradient: what estimates a task's; it may be any estimator.

    `aux` is stacked along the tasks; in `info`, `inner_loss[steps]` is the mean and measures of exactness the largest.

    Raises:
      ValueError: for an inner batch that is no pair, or with outer data.

    References:
      Finn et al. 2017 (MAML), arXiv 1703.03400; Rajeswaran et al. 2019 (iMAML), arXiv 1909.04630.

    Examples:
      >>> import math, bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> tasks = jax.tree.map(lambda x: jax.numpy.stack([x, x]), (train, val))  # two tasks, here the same
      >>> each = bilevel.PerTask(bilevel.Unrolled(optax.sgd(0.5), steps=20))
      >>> solver = bilevel.Nested(problem, each, optax.sgd(1.0))
      >>> result = bilevel.run(solver, inner_data=bilevel.Batches(tasks, 2), steps=30, progress=False)
      >>> round(math.exp(result.outer), 3)
      0.5
    """

    hypergradient: Hypergradient = dataclasses.field(metadata=child(is_hypergradient))

    steps = 1  # inner batches an estimate takes: one, of tasks

    def __post_init__(self):
        check_fields(self)

    def init(self, problem: Problem, outer: PyTree, key: jax.Array) -> InnerState:
        """The inner problem of a task before its first step."""
        return self.hypergradient.init(problem, outer, key)

    def solve(self, problem, inner_state, outer, inner_batches, key) -> InnerState:
        """The training maps of all tasks: states along a leading axis of tasks."""
        (support, _), keys, _ = self._tasks(inner_batches, key)
        problem, support = _of_a_task(problem, support)
        one = lambda support, key: self.hypergradient.solve(problem, None, outer, self._repeated(support), key)  # noqa: E731
        return jax.vmap(one)(support, keys)

    def estimate(self, problem, inner_state, outer, inner_batches, outer_batch, key) -> Estimate:
        """See `Hypergradient`. Costs an estimate for each task."""
        if outer_batch is not None:
            raise ValueError(
                "PerTask: a task's query is its outer batch, so give no outer data beside (support, query)."
            )
        tasks, keys, start_key = self._tasks(inner_batches, key)
        problem, tasks = _of_a_task(problem, tasks)

        def one(task, key):
            support, query = task
            return self.hypergradient.estimate(problem, None, outer, self._repeated(support), query, key)

        each = jax.vmap(one)(tasks, keys)
        mean = lambda tree: jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)  # noqa: E731
        info = each.aux.info | {"inner_loss": mean(each.aux.info["inner_loss"])}
        info |= {name: jnp.max(info[name], axis=0) for name in EXACTNESS if name in info}
        state = self.init(problem, outer, start_key) if inner_state is None else inner_state
        return Estimate(mean(each.value), mean(each.grad), state, each.aux._replace(info=info))

    def first_task(self, inner_batches: PyTree, key: jax.Array) -> tuple[Hypergradient, Any, Any, jax.Array]:
        """Of the first task: its estimator, inner batches, outer batch and key."""
        (support, query), keys, _ = self._tasks(inner_batches, key)
        support, query = jax.tree.map(lambda x: x[0], (support, query))
        return self.hypergradient, self._repeated(support), query, keys[0]

    def _repeated(self, support: PyTree) -> Any:
        return None if support is None else FullBatch(support)

    def _tasks(self, batches: PyTree, key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        xs, bind = slots(batches, 1)
        tasks = resolve(bind(jax.tree.map(lambda x: x[0], xs)))
        if not isinstance(tasks, tuple) or len(tasks) != 2:
            raise ValueError(
                f"PerTask: the inner batch is a {type(tasks).__name__}, but must be a pair (support, query) of trees "
                "whose arrays lead with the tasks: give inner_data=Batches((support, query), tasks)."
            )
        lengths = {jnp.shape(x)[0] for x in jax.tree.leaves(tasks)}
        if len(lengths) != 1:
            raise ValueError(f"PerTask: support and query lead with different numbers of tasks, {sorted(lengths)}.")
        keys = jax.random.split(key, lengths.pop() + 1)
        return tasks, keys[:-1], keys[-1]


def _of_a_task(problem: Problem, tasks: PyTree) -> tuple[Problem, PyTree]:
    """`problem` for one of `tasks`: on a mesh the tasks are split, and the rows of a task are not."""
    if problem.sharding is None:
        return problem, tasks
    return dataclasses.replace(problem, sharding=None), problem.sharding.pin_batch(tasks)
