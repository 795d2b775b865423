"""What a solver calls beside the losses, as functions that can be traced: starts, projection, domain, optimizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel import bijectors
from bilevel.differentiation import optimizers
from bilevel.problem.problem import Problem
from bilevel.trees import partition


class Program(NamedTuple):
    """A function of a user's in a form that JAX traces.

    Attributes:
      name: what it is called in messages and fingerprints.
      function, arguments: what is traced, on which arguments.
      source: what the user wrote.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    source: Any

    def traced(self) -> Any:
        """Its jaxpr, of which JAX remembers nothing; None if it cannot be traced."""
        # Their shapes: where arrays lie on a mesh would be said in the jaxpr.
        shapes = jax.tree.map(lambda x: shape_alone(x) if isinstance(x, jax.Array) else x, self.arguments)
        try:
            return jax.make_jaxpr(lambda *arguments: self.function(*arguments))(*shapes)
        except Exception:  # whatever a function of the user's may raise where it is traced; the run will say so, or not
            return None


def shape_alone(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape of an array, without where it lies."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, "weak_type", False))


def programs(solver: Any, state: Any, record: Any = None) -> Iterator[Program]:
    """The functions of a solver and of its problem, and `record`, on arguments like those of the run."""
    problem, outer, key = solver.problem, state.outer, state.key
    if getattr(solver, "learns_outer", True):
        yield Program("init_outer", lambda p, key: p.init_outer(key), (problem, key), problem.init_outer)
    start = Program("init_inner", lambda p, key, outer: p.init_inner(key, outer), (problem, key, outer), None)
    yield start._replace(source=problem.init_inner)
    if problem.project:
        yield Program("project", lambda p, outer: p.project(outer), (problem, outer), problem.project)
    if problem.domain is not None:
        yield Program("domain", _there_and_back, (problem, outer), problem.domain)
    yield from _of_settings("solver", solver, state)
    if record:
        yield Program("record", record, (state,), record)


def _there_and_back(problem: Problem, outer: Any) -> Any:
    free = bijectors.free(problem.domain, outer)
    return free, bijectors.natural(problem.domain, free)


def _of_settings(name: str, settings: Any, state: Any) -> Iterator[Program]:
    """The optimizers and schedules among the fields of a dataclass, and of those in it."""
    if isinstance(settings, Problem) or not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        return
    for field in dataclasses.fields(settings):
        inside, path = getattr(settings, field.name), f"{name}.{field.name}"
        if field.name.endswith("optimizer"):
            yield _optimizer(path, inside, state)
        elif callable(inside) and getattr(field.metadata.get("check"), "number", None):
            yield Program(path, inside, (jax.ShapeDtypeStruct((), jnp.int32),), inside)
        else:
            yield from _of_settings(path, inside, state)


def _optimizer(name: str, optimizer: Any, state: Any) -> Program:
    """The first update of an optimizer."""
    params = partition(state.outer if "outer" in name.rpartition(".")[2] else getattr(state.inner, "params", ()))[0]

    def program(outer, params):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            transform = optimizers.transformation(optimizer, outer)
            value = jnp.zeros(())
            return transform.update(params, transform.init(params), params, value=value, grad=params)

    return Program(name, program, (state.outer, params), optimizer)
