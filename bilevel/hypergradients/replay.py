"""Unrolled differentiation driven from the host: trainings of any length, batches that stream, states kept anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import jax
from jax.core import Tracer

from bilevel.data import FullBatch
from bilevel.differentiation.schedules import Binomial, Checkpoint, Levels, is_schedule
from bilevel.hypergradients.answers import checked_answer
from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.contract import Estimate
from bilevel.hypergradients.jacobian import question
from bilevel.hypergradients.query import Answer, Query, split_keys
from bilevel.hypergradients.replay_actions import actions, bytes_kept
from bilevel.hypergradients.replay_pass import Pass
from bilevel.hypergradients.replay_programs import Streamed, advanced, batch_of, begun, segment_bytes, slot
from bilevel.hypergradients.seeking import Seeking, is_seekable
from bilevel.hypergradients.training import InnerState
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.problem.problem import Problem
from bilevel.settings.fields import Unfit, register, setting
from bilevel.settings.numeric import integer
from bilevel.settings.rules import boolean, misfit, one_of, optional
from bilevel.trees import Batch, Key, Outer, PyTree, as_words, nbytes

Mode = Literal["mixed", "reverse"]
STORES = ("device", "host")


def _is_store(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, str) or not value or (value not in STORES and value.lower() in STORES):
        raise Unfit("must be 'device', 'host' or the name of a folder")
    return value


def _is_kept(value: Any) -> Any:
    if value not in ("all", "sqrt") and not isinstance(value, Levels | Binomial):
        raise Unfit("must be 'all', 'sqrt', Levels(n) or Binomial(c)")
    return value


@register
@dataclasses.dataclass(frozen=True)
class Replay(Trained):
    r"""The hypergradient of `Unrolled`, computed segment by segment from the host:

    $$
    \bar w_t = \Big(\partial_w U_t\Big)^{\!\top} \bar w_{t+1}, \qquad
      \frac{dF}{d\lambda} = \partial_\lambda F + \sum_{t=0}^{K-1} \Big(\partial_\lambda U_t\Big)^{\!\top}
      \bar w_{t+1}, \qquad \bar w_K = \partial_w F .
    $$

    Training and its derivative are two compiled programs, one of a segment forward and one of its vector-Jacobian
    product, which are called one after the other. So neither compilation nor the memory of the device depends on K:
    states at the starts of segments are kept where `store` says, and batches come a segment at a time. Training
    and hypergradient are those of `Unrolled`, to rounding (two programs of the same steps may differ in a last bit).

    With `keep="all"` each step is evaluated once forward, once more before its derivative is taken, and once in its
    Hessian-vector product (2.07 gradients in a LoRA transformer): 4.07 gradients a step. "sqrt" and `Levels(n)` keep
    the starts of fewer segments, and recompute from the nearest that is kept, n - 1 times more; `Binomial(c)` keeps c.

    With a folder as `store` an estimate that was killed goes on from its last segment when it is called again with the
    same arguments, and ends in the same bits. The folder is emptied at the end; it is for one estimate at a time. An
    unfinished one of another problem (losses, optimizer, settings, arrays that these hold or captured) is refused; one
    of the same problem at another `outer`, start, key or batch, as after an interrupted `run`, is begun anew with a
    warning.

    It cannot be traced: call `estimate` outside of `jax.jit`, `vmap` and `grad`. `run` does so.

    Args:
      optimizer, steps: as for `Unrolled`.
      segment: steps of a segment; None: the square root of `steps`, rounded up.
      store: `"device"`, `"host"` (the host's memory) or a folder.
      keep: which starts of segments are kept at once: `"all"`, `"sqrt"`, `Levels(n)` or `Binomial(c)`.
      mode: `"mixed"` or `"reverse"`, as for `Unrolled`.
      checkpoint: the schedule inside a segment, as for `Unrolled`.
      progress: whether a bar with the time left is shown, forward and backward.

    `inner_batches` may also be a function `batch(step)` of the inner step, 0 to `steps` - 1, that gives its batch, the
    same at each call; or an iterator with `get_state` and `set_state`, which is set back to what is needed again, and
    in the end stands behind `steps` batches. Either is asked for a segment at a time, never for all of them at once.

    Warns:
      CustomDerivativeWarning: where mixed mode is replaced by reverse mode.

    Raises:
      ValueError: where it is traced; for a folder that holds something else, or a damaged file: names it.
      OSError: if a folder has no room; what was done before is kept.

    References:
      Griewank & Walther 2000 (checkpoints); Engstrom et al. 2025, arXiv 2503.13751 (replay of model trainings).

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Replay(optax.sgd(0.5), steps=20, segment=5, store="host")
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), lambda step: train, val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)  # as `Unrolled`
      0.143
    """

    segment: int | None = dataclasses.field(default=None, kw_only=True, metadata=setting(optional(integer(1))))
    store: str = dataclasses.field(default="device", kw_only=True, metadata=setting(_is_store))
    keep: Any = dataclasses.field(default="all", kw_only=True, metadata=setting(_is_kept))
    mode: Mode = dataclasses.field(default="mixed", kw_only=True, metadata=setting(one_of(*get_args(Mode))))
    checkpoint: Checkpoint = dataclasses.field(default="step", kw_only=True, metadata=setting(is_schedule))
    progress: bool = dataclasses.field(default=False, kw_only=True, metadata=setting(boolean))

    takes_complex: ClassVar[bool] = True
    takes_constants: ClassVar[bool] = True
    takes_frozen: ClassVar[bool] = True
    driven_from_host: ClassVar[bool] = True
    """See `contract.driven_from_host`."""

    def estimate(
        self,
        problem: Problem,
        inner_state: InnerState | None,
        outer: Outer,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key,
    ) -> Estimate:
        """See `Hypergradient`; `inner_batches` may be a function of the step, or an iterator that can go back."""
        _refuse_traced("estimate", (problem, inner_state, outer, inner_batches, outer_batch, key))
        with self._streamed("estimate", inner_batches) as batches:
            return super().estimate(problem, inner_state, outer, batches, outer_batch, key)

    def estimates(
        self,
        problem: Problem,
        inner_state: InnerState | None,
        outer: Outer,
        inner_batches: Batch,
        outer_batches: Batch,
        key: Key,
    ) -> Estimate:
        """`estimate` of several outer batches after one training, which is also recomputed once for all of them.

        Args:
          outer_batches: arrays that lead with an axis of Q batches.
          problem, inner_state, outer, inner_batches, key: as for `estimate`.

        Returns:
          An `Estimate` whose `value`, `grad` and `aux.outer` lead with that axis: row q is `estimate` of batch q, to
          rounding.
        """
        _refuse_traced("estimates", (problem, inner_state, outer, inner_batches, outer_batches, key))
        first = question(outer_batches)
        with self._streamed("estimates", inner_batches) as batches:
            query, params, losses = self.looked_over(problem, inner_state, outer, batches, first, key)

            def answer() -> Answer:
                stacked = dataclasses.replace(query, outer_batch=outer_batches)
                settings = {"keep": self.keep, "store": self.store, "show": self.progress}
                found = Pass(self.part, stacked, **settings, several=True).answer()
                if not all(reached := self.twin.looked_at(query, params)[2]):
                    self._report(query, found, reached)
                return found

            return self.answered(query, key, losses, answer)

    def solve(
        self, problem: Problem, inner_state: InnerState | None, outer: Outer, inner_batches: Batch, key: Key
    ) -> InnerState:
        """The training map, not to be differentiated: `Unrolled.solve` can be."""
        _refuse_traced("solve", (problem, inner_state, outer, inner_batches, key))
        with self._streamed("solve", inner_batches) as batches:
            query = self.asked(problem, inner_state, outer, batches, key)
            state = begun(self.part, query)
            for number in range(self.count):
                state, _ = advanced(self.part, query.problem, query.outer, state, *slot(query, self.length, number))
            return state

    @property
    def length(self) -> int:
        """Steps of a segment; the last may have fewer."""
        return min(self.segment or math.isqrt(self.steps - 1) + 1, self.steps)

    @property
    def count(self) -> int:
        """Segments."""
        return -(-self.steps // self.length)

    @property
    def twin(self) -> Unrolled:
        """What computes the same in one program."""
        return Unrolled(self.optimizer, self.steps, mode=self.mode, checkpoint=self.checkpoint)

    @property
    def advanced_steps(self) -> int:
        """Steps that are evaluated outside of derivatives: all of them once, and some again."""
        lengths = [min(self.length, self.steps - at * self.length) for at in range(self.count)]
        return sum(lengths[action.at] for action in actions(self.count, self.keep) if action.kind == "advance")

    def temporary_bytes(
        self,
        problem: Problem,
        inner_state: InnerState | None,
        outer: Outer,
        inner_batches: Batch,
        outer_batch: Batch,
        key: Key,
    ) -> int:
        """Temporary memory on a device of the largest of its programs, a segment backward; nothing is computed."""
        with self._streamed("temporary_bytes", inner_batches) as batches:
            query = Query(problem, self.steps, inner_state, outer, batches, outer_batch, split_keys(key, self.steps))
            return segment_bytes(self.part, query)

    def kept_bytes(self, problem: Problem, inner_state: InnerState | None, outer: Outer, key: Key) -> int:
        """The most bytes that lie in its store at once; nothing is computed."""
        query = Query(problem, self.steps, inner_state, outer, None, None, split_keys(key, self.steps))
        state = jax.eval_shape(lambda: as_words(begun(self.part, query))[0])
        return bytes_kept(actions(self.count, self.keep), sum(map(nbytes, jax.tree.leaves(state))))

    @property
    def part(self) -> Unrolled:
        """What computes a segment."""
        return dataclasses.replace(self.twin, steps=self.length)

    def meet_custom_rule(self, name: str) -> None:
        self.twin.meet_custom_rule(name)

    def trained(self, query: Query, moving: Outer) -> PyTree:
        return self.twin.trained(query, moving)

    def lost(self, query: Query) -> list[str | None]:
        return self.twin.lost(query)

    def _answer(self, query: Query, params: PyTree) -> Answer:
        # Whether every leaf of outer is reached is read in the trace of the twin, which is not evaluated.
        _, _, reached = self.twin.looked_at(query, params)
        answer = checked_answer(self.differentiate(query), query, params)
        if not all(reached):
            self._report(query, answer, reached)
        return answer

    def differentiate(self, query: Query) -> Answer:
        """Costs `steps` inner gradients forward, as many and as many Hessian-vector products backward, and those of
        segments that are advanced once more."""
        return Pass(self.part, query, keep=self.keep, store=self.store, show=self.progress).answer()

    @contextlib.contextmanager
    def _streamed(self, method: str, batches: Any) -> Iterator[Any]:
        """The batches as a `Query` holds them; an iterator is left behind those that it gave, or where it was."""
        if not is_seekable(batches):
            yield self._source(method, batches)
            return
        seeking, done = Seeking(batches), 0
        try:
            yield self._source(method, seeking)
            done = 0 if method == "temporary_bytes" else self.steps
        finally:  # what did not come to its end is called again with the same batches
            seeking.leave(done)

    def _source(self, method: str, batches: Any) -> Any:
        if not callable(batches) or isinstance(batches, FullBatch):
            return batches
        if (taken := misfit(batches, 1)) is not None:
            raise ValueError(
                f"Replay.{method}: the inner batches are a function of {taken}, but must be batch(step): the batch of "
                "an inner step, from 0 on."
            )
        return Streamed(batch_of(batches, 0), batches)


def _refuse_traced(method: str, arguments: Any) -> None:
    leaves = jax.tree.leaves(arguments, is_leaf=lambda x: hasattr(x, "__next__"))
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise ValueError(
            f"Replay.{method} runs compiled programs from the host, and cannot be traced (by jax.jit, vmap, grad or a "
            "scan): call it outside, or use Unrolled."
        )
