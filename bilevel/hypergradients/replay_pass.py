"""One estimate by replay: its actions one after the other, and what is kept between them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.differentiation.computation import Parts, parts
from bilevel.hypergradients.kept import InFolder, OnDevice, OnHost, Store, refuse_without_room
from bilevel.hypergradients.progress import Progress
from bilevel.hypergradients.query import Answer, Query
from bilevel.hypergradients.replay_actions import actions, bytes_kept
from bilevel.hypergradients.replay_programs import (
    Streamed,
    advanced,
    at_the_end,
    begun,
    begun_back,
    differentiated,
    loss_differentiated,
    reversed_segment,
    slot,
    slot_like,
    start,
)
from bilevel.hypergradients.training import InnerState
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.sharding.processes import digest, several
from bilevel.trees import Batch, PyTree, as_words, partition


class Pass:
    """One estimate: actions one after the other, and what they have come to.

    With `several` the outer batch is a stack of them: the value, its adjoint and the hypergradient lead with that axis.

    Attributes:
      here: the state at hand; None where the next action does not begin with it.
      adjoint: after the outer loss, the cotangent of the state and the sum of those of `outer`.
      marks: of each segment that was seen, a hash of its batches: those of a function must be the same each time.
    """

    def __init__(self, part: Unrolled, query: Query, *, keep: Any, store: str, show: bool, several: bool = False):
        self.part, self.query, self.show, self.several = part, query, show, several
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
                # The last segment may be shorter, which is a program of its own.
                shorter = (action.at + 1) * self.part.steps > self.query.steps
                progress.advance(number + 1, {}, program=(action.kind, shorter))
        _, trace, outer, _ = self._shapes
        value, aux = self.store.get("outer", outer)
        traces = [self.store.get(f"trace-{at}", like)[0] for at, like in enumerate(trace)]
        grad = self.query.moving
        if jax.tree.leaves(grad):
            by_start, direct = self.adjoint
            grad = jax.tree.map(jnp.add, direct, begun_back(self.part, self.query, by_start, self.several))
        answer = Answer(
            value,
            grad,
            self._state("end"),
            jax.tree.map(lambda *each: jnp.concatenate(each), *traces),
            aux,
            {"hvps": jnp.asarray(self.query.steps if jax.tree.leaves(grad) else 0, jnp.int32)},
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
        outcome, self.adjoint = differentiated(self.query, self.here, self.several)
        self.store.put("end", as_words(self.here)[0])
        self.store.put("outer", outcome)
        self.here = None

    def reverse(self, number: int, at: int) -> None:
        query = self.query
        before = self._state(f"start-{at}")
        arguments = query.problem, query.moving, query.fixed, before, *self._slot(at)
        # The device is one segment behind at most, as in `advance`; the adjoint is used up.
        jax.block_until_ready(self.adjoint)
        self.adjoint = reversed_segment(self.part, *arguments, self.adjoint, several=self.several)
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
        outcome, (stacked, direct) = jax.eval_shape(partial(differentiated, query, several=self.several), state)
        own = stacked if self.several else partition(self.state_like)[0]
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
        questions = len(jax.tree.leaves(query.outer_batch)[0]) if self.several else 1
        refuse_without_room(where, bytes_kept(self.actions, size, questions))
        settings = query.steps, part.steps, keep, part.mode, part.checkpoint, self.several, _version(), jax.__version__
        segment = slot_like(query, part.steps, 0)
        adjoint = jax.eval_shape(partial(differentiated, query, several=self.several), self.here)[1]
        back = query.problem, query.moving, query.fixed, self.here, *segment, adjoint
        # Backward too: what a loss with a derivative of its own does is seen there alone.
        made_of = [
            _parts(partial(advanced, part), query.problem, query.outer, self.here, *segment),
            _parts(partial(reversed_segment, part, several=self.several), *back),
            _parts(partial(loss_differentiated, several=self.several), *at_the_end(query, self.here)),
            _parts(partial(start, part), query.problem, query.inner_state, query.outer, query.keys),
        ]
        computation = "\n".join(line for each in made_of for line in (*each.operations, *each.numbers))
        problem = {
            "settings or versions": hashlib.sha256(repr(settings).encode()).hexdigest()[:16],
            "computation": hashlib.sha256(computation.encode()).hexdigest()[:16],
            "arrays that functions captured": _digest([each.arrays for each in made_of]),
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


def _placeholder(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _parts(function: Callable[..., Any], *arguments: Any) -> Parts:
    """A computation as it was traced, and what it captured."""
    # As shapes: whether a number was written as 2.0 or as an array is told by the point, and is no other computation.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), arguments)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return parts(jax.make_jaxpr(function)(*shapes))


def _version() -> str:
    try:
        return version("bilevel")
    except PackageNotFoundError:
        return "unknown"


def _digest(tree: PyTree) -> str:
    return digest(jax.tree.leaves(tree))
