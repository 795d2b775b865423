"""One estimate by replay: its actions, the compiled programs that they call, and what is kept between them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.data import FullBatch, check_batch, narrow
from bilevel.differentiation.gradients import mixed_gradient, reverse_gradient
from bilevel.hypergradients.kept import InFolder, OnDevice, OnHost, Store, refuse_without_room
from bilevel.hypergradients.query import Answer, Keys, Query, outer_value
from bilevel.hypergradients.replay_actions import actions, most_kept
from bilevel.hypergradients.training import InnerState, Trace, train
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.problem.problem import Problem
from bilevel.progress import Progress
from bilevel.settings.fields import register, setting
from bilevel.sharding.processes import digest, several
from bilevel.trees import Batch, Outer, PyTree, as_words, combine, partition, replayed

_GRADIENTS = {"mixed": mixed_gradient, "reverse": reverse_gradient}


@register
@dataclasses.dataclass(frozen=True)
class Streamed(FullBatch):
    """The batches of a function of the step; where only shapes are looked at, its first batch stands for all."""

    batch: Any = dataclasses.field(default=None, metadata=setting(lambda value: value))


class Pass:
    """One estimate: actions one after the other, and what they have come to.

    Attributes:
      here: the state at hand; None where the next action does not begin with it.
      adjoint: after the outer loss, the cotangent of the state and the sum of those of `outer`.
      marks: of each segment that was seen, a hash of its batches: those of a function must be the same each time.
    """

    def __init__(self, part: Unrolled, query: Query, *, keep: Any, store: str, show: bool):
        self.part, self.query, self.show = part, query, show
        self.count = -(-query.steps // part.steps)
        self.actions = actions(self.count, keep)
        self.ending = next(i for i, action in enumerate(self.actions) if action.kind == "outer")
        if not jax.tree.leaves(query.moving):
            self.actions = self.actions[: self.ending + 1]
        self.here: Any = begun(self.part, query)
        words, self.as_state = as_words(self.here)
        self.state_like = jax.tree.map(_placeholder, words)
        self.adjoint: Any = None
        self.marks: dict[int, int] = {}
        self.store, self.done = self._opened(store, keep)
        if not self.done:
            self._keep(0)
        else:
            self.here = self._state("here") if self._goes_on(self.done) else None
            seen = range(min(self.done, self.ending))
            self.marks = {at: int(self.store.get(f"trace-{at}", self._shapes[1][at])[1]) for at in seen}
            if self.done > self.ending:
                self.adjoint = self.store.get("adjoint", self._shapes[3])

    def answer(self) -> Answer:
        with Progress("replay", len(self.actions), start=self.done, show=self.show) as progress:
            for number, action in enumerate(self.actions[self.done :], self.done):
                getattr(self, action.kind)(number, action.at)
                if action.keep:
                    self._keep(action.at + 1)
                self._commit(number + 1)
                progress.advance(number + 1, {})
        _, trace, outer, _ = self._shapes
        value, aux = self.store.get("outer", outer)
        traces = [self.store.get(f"trace-{at}", like)[0] for at, like in enumerate(trace)]
        grad = self.query.moving
        if jax.tree.leaves(grad):
            by_start, direct = self.adjoint
            grad = jax.tree.map(jnp.add, direct, begun_back(self.part, self.query, by_start))
        answer = Answer(
            value,
            grad,
            self._state("end"),
            jax.tree.map(lambda *each: jnp.concatenate(each), *traces),
            aux,
            {"hvps": jnp.asarray(self.query.steps if jax.tree.leaves(grad) else 0)},
        )
        self.store.clear()
        return answer

    # The actions, by their kinds.

    def load(self, number: int, at: int) -> None:
        self.here = self._state(f"start-{at}")

    def advance(self, number: int, at: int) -> None:
        query, before = self.query, self.here
        self.here, trace = advanced(self.part, query.problem, query.outer, before, *self._slot(at))
        # The device is one segment behind at most: batches of more would wait in its memory.
        jax.block_until_ready(before)
        if number < self.ending:
            self.store.put(f"trace-{at}", (trace, jnp.asarray(self.marks.get(at, 0), jnp.uint32)))

    def outer(self, number: int, at: int) -> None:
        outcome, self.adjoint = _differentiated(self.query, self.here)
        self.store.put("end", as_words(self.here)[0])
        self.store.put("outer", outcome)
        self.here = None

    def reverse(self, number: int, at: int) -> None:
        query = self.query
        start = self._state(f"start-{at}")
        arguments = query.problem, query.moving, query.fixed, start, *self._slot(at)
        before, self.adjoint = self.adjoint, _segment_reversed(self.part, *arguments, self.adjoint)
        jax.block_until_ready(before)
        self.store.drop(f"start-{at}")

    def _slot(self, at: int) -> tuple[Batch, jax.Array, jax.Array]:
        given = slot(self.query, self.part.steps, at)
        if isinstance(self.query.inner_batches, Streamed):
            mark = int(_digest(given[0])[:8], 16)
            if self.marks.setdefault(at, mark) != mark:
                first, last = at * self.part.steps, at * self.part.steps + len(given[1]) - 1
                raise ValueError(
                    f"Replay: batch(step) gave other inner batches for steps {first} to {last} than before: it must "
                    "give the same for a step each time, since training asks for it and its derivative does again."
                )
        return given

    # What is kept.

    def _keep(self, at: int) -> None:
        self.store.put(f"start-{at}", as_words(self.here)[0])

    def _state(self, name: str) -> InnerState:
        return self.as_state(self.store.get(name, self.state_like))

    def _goes_on(self, done: int) -> bool:
        """Whether the action after the first `done` begins with the state at hand."""
        return done < len(self.actions) and self.actions[done].kind in ("advance", "outer")

    def _commit(self, done: int) -> None:
        if not isinstance(self.store, InFolder):
            return
        if self._goes_on(done):
            self.store.put("here", as_words(self.here)[0])
        else:
            self.store.drop("here")
        if self.adjoint is not None:
            self.store.put("adjoint", self.adjoint)
        self.store.commit(done)

    @functools.cached_property
    def _shapes(self) -> tuple[Any, list[Any], Any, Any]:
        """Shapes, and places, of the state, of each segment's trace, of the outer loss and of the adjoint."""
        query = self.query
        state = jax.eval_shape(self.as_state, self.state_like)
        traces = []
        for at in sorted({0, self.count - 1}):
            given = slot_like(query, self.part.steps, at)
            trace = jax.eval_shape(partial(advanced, self.part), query.problem, query.outer, state, *given)[1]
            traces.append((trace, jax.ShapeDtypeStruct((), jnp.uint32)))
        traces = traces[:1] * (self.count - 1) + traces[-1:]
        outcome, (_, direct) = jax.eval_shape(partial(_differentiated, query), state)
        own = partition(self.state_like)[0]
        nowhere = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
        return self.state_like, nowhere(traces), nowhere(outcome), (own, nowhere(direct))

    def _opened(self, where: str, keep: Any) -> tuple[Store, int]:
        """The store, and how many actions are done in it."""
        query, part = self.query, self.part
        if where in ("device", "host"):
            return (OnDevice() if where == "device" else OnHost()), 0
        if several():
            raise ValueError(
                f"Replay(store={where!r}): a folder is for a training in one process, and this is one of several: keep "
                "the states with store='host'."
            )
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.state_like))
        refuse_without_room(where, (most_kept(self.actions) + 3) * size)
        settings = query.steps, part.steps, keep, part.mode, part.checkpoint, _version(), jax.__version__
        texts = [
            _text(partial(advanced, part), query.problem, query.outer, self.here, *slot_like(query, part.steps, 0)),
            _text(_loss_differentiated, *_at_the_end(query, self.here)),
            _text(partial(_start, part), query.problem, query.inner_state, query.outer, query.keys),
        ]
        problem = {
            "settings or versions": hashlib.sha256(repr(settings).encode()).hexdigest()[:16],
            "computation": hashlib.sha256("".join(texts).encode()).hexdigest()[:16],
            "what is bound to the losses": _digest(query.problem),
        }
        point = {
            "outer": _digest(query.outer),
            "inner_state": _digest(query.inner_state),
            "key": _digest(query.keys),
            "inner batches": _digest(query.inner_batches),
            "outer batch": _digest(query.outer_batch),
        }
        store = InFolder(where, problem, point)
        return store, store.done


# The compiled programs. None of them depends on K.


@jax.jit
def _start(part: Unrolled, problem: Problem, inner_state: InnerState | None, outer: Outer, keys: Keys) -> InnerState:
    return part.resume(Query(problem, part.steps, inner_state, outer, None, None, keys))


def begun(part: Unrolled, query: Query) -> InnerState:
    """The state before the first step."""
    return _start(part, query.problem, query.inner_state, query.outer, replayed(query.keys))


@jax.jit
def _start_reversed(
    part: Unrolled,
    problem: Problem,
    inner_state: InnerState | None,
    moving: Outer,
    fixed: PyTree,
    keys: Keys,
    by: PyTree,
) -> Outer:
    def start(moving: Outer) -> PyTree:
        return partition(_start(part, problem, inner_state, combine(moving, fixed), keys))[0]

    return jax.vjp(start, moving)[1](by)[0]


def begun_back(part: Unrolled, query: Query, by: PyTree) -> Outer:
    """What the cotangent of the state before the first step is for `outer`."""
    return _start_reversed(
        part, query.problem, query.inner_state, query.moving, query.fixed, replayed(query.keys), by
    )


@jax.jit
def advanced(
    part: Unrolled, problem: Problem, outer: Outer, state: InnerState, batches: Batch, keys: jax.Array, first: Any
) -> tuple[InnerState, Trace]:
    """A segment forward: the state after it, and what its steps reported."""
    options = {"first": first, "gradient": _GRADIENTS[part.mode]}
    return train(problem, part.optimizer, state, outer, batches, keys, **options)


@jax.jit
def _segment_reversed(
    part: Unrolled,
    problem: Problem,
    moving: Outer,
    fixed: PyTree,
    state: InnerState,
    batches: Batch,
    keys: jax.Array,
    first: Any,
    adjoint: tuple[PyTree, Outer],
) -> tuple[PyTree, Outer]:
    """A segment backward: the adjoint before it, of the adjoint after it."""
    own, rest = partition(state)
    options = {"first": first, "gradient": _GRADIENTS[part.mode], "checkpoint": part.checkpoint}

    def trained(own: PyTree, moving: Outer) -> PyTree:
        at = combine(own, rest), combine(moving, fixed)
        return partition(train(problem, part.optimizer, *at, batches, keys, **options)[0])[0]

    by_state, so_far = adjoint
    by_state, more = jax.vjp(trained, own, moving)[1](by_state)
    return by_state, jax.tree.map(jnp.add, so_far, more)


@jax.jit
def _loss_differentiated(
    problem: Problem, steps: Any, moving: Outer, fixed: PyTree, state: InnerState, batch: Batch, keys: Keys
) -> Any:
    own, rest = partition(state)

    def loss(own: PyTree, moving: Outer) -> Any:
        return outer_value(problem, steps, combine(own, rest).params, combine(moving, fixed), batch, keys)

    (value, aux), adjoint = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(own, moving)
    return (value, aux), adjoint


def _differentiated(query: Query, state: InnerState) -> Any:
    """`((value, aux), adjoint)` of the outer loss after the last step."""
    return _loss_differentiated(*_at_the_end(query, state))


def _at_the_end(query: Query, state: InnerState) -> tuple[Any, ...]:
    steps = jnp.asarray(query.steps, jnp.int32)
    return query.problem, steps, query.moving, query.fixed, state, query.outer_batch, replayed(query.keys)


def segment_bytes(part: Unrolled, query: Query) -> int:
    """Temporary bytes of the program that takes a segment backward, by its compiler."""
    state = jax.eval_shape(lambda: begun(part, query))
    _, adjoint = jax.eval_shape(partial(_differentiated, query), state)
    given = query.problem, query.moving, query.fixed, state, *slot_like(query, part.steps, 0), adjoint
    analysis: Any = _segment_reversed.lower(part, *given).compile().memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", 0)


def _placeholder(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _text(function: Callable[..., Any], *arguments: Any) -> str:
    """A computation as it was traced, and what it captured; without the addresses of functions."""
    # As shapes: whether a number was written as 2.0 or as an array is told by the point, and is no other computation.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), arguments)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        closed = jax.make_jaxpr(function)(*shapes)
    return re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr)) + _digest(closed.consts)


def _version() -> str:
    try:
        return version("bilevel")
    except PackageNotFoundError:
        return "unknown"


def _digest(tree: PyTree) -> str:
    return digest(jax.tree.leaves(tree))


def slot(query: Query, length: int, number: int) -> tuple[Batch, jax.Array, jax.Array]:
    """Batches, keys and the number of the first step of a segment; the last segment may be shorter than `length`."""
    start, stop = number * length, min((number + 1) * length, query.steps)
    batches = query.inner_batches
    if isinstance(batches, Streamed):
        each = [batch_of(batches.batch, step) for step in range(start, stop)]
        batches = jax.tree.map(lambda *rows: jnp.stack([jnp.asarray(row) for row in rows]), *each)
    else:
        batches = narrow(batches, start, stop)
    return batches, replayed(query.keys.inner)[start:stop], jnp.asarray(start, jnp.int32)


def slot_like(query: Query, length: int, number: int) -> tuple[Batch, jax.Array, jax.Array]:
    """The shapes of `slot`, for which no batch is asked."""
    if isinstance(batches := query.inner_batches, Streamed):
        stack = lambda x: jnp.broadcast_to(x, (query.steps, *jnp.shape(x)))  # noqa: E731
        query = dataclasses.replace(query, inner_batches=jax.eval_shape(partial(jax.tree.map, stack), batches.arrays))
        cut = lambda batches: slot(dataclasses.replace(query, inner_batches=batches), length, number)  # noqa: E731
        return jax.eval_shape(cut, query.inner_batches)
    return jax.eval_shape(lambda: slot(query, length, number))


def batch_of(batch: Callable[[int], Any], step: int) -> Any:
    """`batch(step)`, checked."""
    found = batch(step)
    check_batch(f"batch({step}) of the inner batches", found)
    return found
