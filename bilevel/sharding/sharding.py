"""`Sharding`: where the batches, the weights and the variables of a run lie on a mesh of devices."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bilevel.settings.fields import check_fields, register, setting
from bilevel.settings.rules import instance
from bilevel.sharding.inside import Active, entered
from bilevel.sharding.processes import (
    put,
    put_rows,
    refuse_partial,
    refuse_unlike,
    row_factor,
    row_holders,
)
from bilevel.sharding.specs import (
    LIKE_WEIGHTS,
    Rule,
    are_axes,
    auto,
    check,
    is_inner_rule,
    is_mesh,
    is_rule,
    is_spec,
    pin,
    rows,
    specs_of,
    split,
)
from bilevel.trees import PyTree, leaf_names

_NO_ROWS = " (what has no rows is no part of a batch: bind it to the loss, jax.tree_util.Partial(loss, it))"


@register
@dataclasses.dataclass(frozen=True, eq=False)
class Sharding:
    """Says where the arrays of a run lie on a mesh.

    `run(solver, ..., sharding=sharding)` and `fit` place everything by it. For an estimate of one's own,
    `sharding.problem(problem)` places what is bound to the losses and pins what they are given:

    - the rows of every batch are split over the axes `batch`: each device computes its own rows;
    - frozen weights, that is arrays bound to a loss (`jax.tree_util.Partial(loss, weights)`), are split over the axis
      `"fsdp"`, if the mesh has one: a leaf of 65,536 numbers or more along its largest axis that divides, but for the
      first of three or more (the layers of a scan); smaller ones are replicated;
    - the inner variable, and what an optimizer holds for it, are replicated, and so is the outer variable.

    Numbers are those of one device, to rounding. Axes may be `Auto` or `Explicit`: they are taken as `Auto`. The mesh
    is of the devices of one process, or of those of all processes of `jax.distributed`.

    Args:
      mesh: a `jax.sharding.Mesh`.
      batch: the mesh axes that the leading axis of a batch is split over. With `"fsdp"` among them each device gathers
        the weights it needs, and frees them: fully sharded data parallelism.
      keys: the mesh axes that the runs of a stack of keys are split over, `run(key=jax.random.split(key, 8))`: other
        ones than those of `batch`, as in `Sharding(mesh, batch=(), keys="data")`, where each device has runs of its own
        on whole batches, and no device waits for another. With none, every device has a part of every run.
      weights, inner, outer: a `PartitionSpec` for all leaves; a tree of them, like the variable or like what is bound
        to the losses; or a function `(path, array) -> PartitionSpec`. None is the default above. `inner="weights"`
        splits the inner variable, and what an optimizer holds for it, as frozen weights are: where whole models are
        trained.

    Raises:
      ValueError: for axes that the mesh has not, and for a mesh of some processes that are neither all nor this one.
        When arrays are placed: for an axis that the devices do not divide, with the numbers; nothing is replicated in
        silence.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> sharding = bilevel.Sharding(jax.make_mesh((1,), ("data",)))
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), optax.sgd(1.0))
      >>> result = bilevel.run(
      ...     solver, inner_data=train, outer_data=val, steps=60, progress=False, sharding=sharding
      ... )
      >>> round(float(jax.numpy.exp(result.outer)), 3)
      0.5
    """

    mesh: Mesh = dataclasses.field(metadata=setting(is_mesh))
    batch: tuple[str, ...] | str = dataclasses.field(default="data", kw_only=True, metadata=setting(are_axes))
    keys: tuple[str, ...] | str = dataclasses.field(default=(), kw_only=True, metadata=setting(are_axes))
    weights: Rule = dataclasses.field(default=None, kw_only=True, metadata=setting(is_rule))
    inner: Rule = dataclasses.field(default=None, kw_only=True, metadata=setting(is_inner_rule))
    outer: Rule = dataclasses.field(default=None, kw_only=True, metadata=setting(is_rule))

    def __post_init__(self):
        check_fields(self)
        refuse_partial(self.mesh)
        used = (*self.batch, *self.keys)
        given = f"batch={self.batch!r}" + (f", keys={self.keys!r}" if self.keys else "")
        if not used:
            raise ValueError("Sharding(batch=()) splits nothing: name the mesh axes of batch, or of keys.")
        if missing := [axis for axis in used if axis not in self.mesh.axis_names]:
            raise ValueError(
                f"Sharding({given}): the mesh has the axes {', '.join(self.mesh.axis_names)}, and no "
                f"{', '.join(missing)}: name the axes that the rows of a batch are split over, or the keys."
            )
        if len(set(used)) < len(used):
            raise ValueError(f"Sharding({given}) names a mesh axis twice: name each once.")

    # What a user calls.

    def problem(self, problem: Any) -> Any:
        """`problem` with what is bound to its functions placed, and with its batches and variables pinned."""
        return dataclasses.replace(self._placed(problem), sharding=self)

    def rows(self, what: str, batch: PyTree, *, axis: int = 0) -> PyTree:
        """`batch`, with axis number `axis` of each leaf split over the axes `batch`; scalars are replicated."""
        return self.place(what, batch, None, lambda _, x: self._rows(jnp.ndim(x), axis), hint=_NO_ROWS)

    def own_rows(self, what: str, batch: PyTree, *, axis: int = 0) -> PyTree:
        """As `rows`, of a batch of which each process gives the rows of its own devices."""

        def put(name: str, x: Any) -> Any:
            spec, shape = self._rows(jnp.ndim(x), axis), list(jnp.shape(x))
            if len(shape) <= axis:
                return self._put(x, spec)
            times = row_factor(self.mesh, spec, axis)
            shape[axis] *= times
            of = f"{what}, {times} times the rows of this process," if times > 1 else what
            check(self.mesh, of, name, jax.ShapeDtypeStruct(tuple(shape), x.dtype), spec, _NO_ROWS)
            return put_rows(x, NamedSharding(self.mesh, spec))

        leaves = map(put, leaf_names(batch), jax.tree.leaves(batch))
        return jax.tree.unflatten(jax.tree.structure(batch), leaves)

    def replicated(self, tree: PyTree, *, what: str = "What is on all devices") -> PyTree:
        """`tree`, called `what`, on all devices; what is split over this mesh already stays as it is."""

        def put(x: Any) -> jax.Array:
            now = getattr(x, "sharding", None)
            if isinstance(now, NamedSharding) and isinstance(now.mesh, Mesh) and auto(now.mesh) == self.mesh:
                return self._put(x, now.spec)
            return self._put(x, PartitionSpec())

        refuse_unlike(what, self.mesh, leaf_names(tree), jax.tree.leaves(tree))
        return jax.tree.map(put, tree)

    def frozen(self, weights: PyTree) -> PyTree:
        """`weights` as they lie when they are bound to a loss: split by the rule `weights`."""
        return self.place("A weight", weights, self.weights, self._split)

    def row_holders(self) -> list[list[int]]:
        """For each process, numbers of the parts of a batch's rows that its devices hold."""
        return row_holders(self.mesh, self._rows(1, 0))

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)

    # What the engine calls.

    def solver(self, solver: Any) -> Any:
        """`solver` with its problem placed, and what else it holds on all devices; nothing is pinned."""
        return self.replicated(with_problem(solver, self._placed(solver.problem)), what="The solver")

    def _placed(self, problem: Any) -> Any:
        return self.place("What is bound to the problem", problem, self.weights, self._split)

    def place_state(self, state: PyTree) -> PyTree:
        """The state of a solver, placed: its variables, and what an optimizer holds for them, where these belong.

        Of a stack of states the runs are split over the axes `keys`.

        Raises:
          ValueError: for so many runs that the devices do not divide them, and for one alone where there are such axes.
        """
        if not jnp.ndim(state.step):
            if self.keys:
                raise ValueError(
                    f"Sharding(keys={self.keys!r}) splits runs over devices, but run was given one key: give a stack "
                    "of some, as jax.random.split(key, 8), or no keys=."
                )
            return jax.tree.map(self._put, state, self._of_state(state))
        one = jax.eval_shape(lambda state: jax.tree.map(lambda x: x[0], state), state)
        over = self.keys or None
        specs = jax.tree.map(lambda spec: PartitionSpec(over, *spec), self._of_state(one), is_leaf=is_spec)
        check(self.mesh, "A stack of keys", ".", state.step, PartitionSpec(over))
        placed = [leaf for leaf in jax.tree.leaves(specs, is_leaf=is_spec)]
        for name, x, spec in zip(leaf_names(state), jax.tree.leaves(state), placed, strict=True):
            check(self.mesh, f"With keys={self.keys!r}, an array of the state", name, x, spec)
        return jax.tree.map(self._put, state, specs)

    def pin_state(self, state: PyTree) -> PyTree:
        """As `place_state`, inside a compiled program."""
        return jax.tree.map(self._pin, state, self._of_state(state))

    def pin_batch(self, batch: PyTree) -> PyTree:
        """The batch of a loss, inside a compiled program."""
        pinned = {}
        for name, x in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True):
            spec = self._rows(jnp.ndim(x), 0)
            check(self.mesh, "The batch", name, x, spec, _NO_ROWS)
            pinned[name] = self._pin(x, spec)
        return jax.tree.unflatten(jax.tree.structure(batch), pinned.values())

    def pin_results(self, results: PyTree) -> PyTree:
        """What the host reads, inside a compiled program: whole on every device."""
        return jax.tree.map(lambda x: self._pin(x, PartitionSpec()), results)

    def pin_training(self, inner: PyTree, carry: PyTree) -> PyTree:
        """What training carries, inside a compiled program: what is like a leaf of `inner` where that belongs."""
        names, leaves = leaf_names(carry), jax.tree.leaves(carry)
        return jax.tree.unflatten(
            jax.tree.structure(carry), map(self._pin, leaves, self.of_inner(inner, names, leaves))
        )

    def of_inner(self, inner: PyTree, names: list[str], leaves: list[Any]) -> list[PartitionSpec]:
        """A spec for each of `leaves`, by its name: that of the leaf of `inner` that it is like; else none."""
        return self._like("The inner variable", self.inner, inner, names, leaves)

    def entered(self) -> contextlib.AbstractContextManager[None]:
        """For the trace of a loss: what a model calls finds the mesh."""
        return entered(Active(self.mesh, tuple(self.batch)))

    def place(
        self, what: str, tree: PyTree, rule: Rule, default: Callable[[str, Any], PartitionSpec], *, hint: str = ""
    ) -> PyTree:
        """`tree` on the mesh by `rule`.

        Raises:
          ValueError: for an axis that the devices do not divide; begins with `what`.
        """
        leaves, structure = jax.tree.flatten(tree)
        names = leaf_names(tree)
        refuse_unlike(what, self.mesh, names, leaves)
        placed = []
        for name, x, spec in zip(names, leaves, specs_of(rule, tree, names, leaves, default), strict=True):
            check(self.mesh, what, name, x, spec, hint)
            placed.append(self._put(x, spec))
        return jax.tree.unflatten(structure, placed)

    def _put(self, x: Any, spec: PartitionSpec) -> Any:
        where = NamedSharding(self.mesh, spec)
        if isinstance(x, jax.ShapeDtypeStruct):  # for a program that is compiled and never run
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return put(x, where)

    def _rows(self, ndim: int, axis: int) -> PartitionSpec:
        return rows(tuple(self.batch), ndim, axis)

    def _split(self, name: str, x: Any) -> PartitionSpec:
        return split(self.mesh, name, x)

    def _pin(self, x: Any, spec: PartitionSpec) -> Any:
        return pin(self.mesh, x, spec)

    def _of_state(self, state: PyTree) -> PyTree:
        """A spec for each leaf of a solver's state: by the rule of inner what is like it, else by that of outer."""
        names, leaves = leaf_names(state), jax.tree.leaves(state)
        params = getattr(state.inner, "params", state.inner)
        inside = self._like("The inner variable", self.inner, params, names, leaves)
        outside = self._like("The outer variable", self.outer, state.outer, names, leaves)
        of_outer = (".outer", ".opt_state")  # and what the outer optimizer holds for it
        none = PartitionSpec()
        specs = [
            o if name.startswith(of_outer) or (i == none and not name.startswith(".inner")) else i
            for name, i, o in zip(names, inside, outside, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(state), specs)

    def _like(
        self, what: str, rule: Rule, variable: PyTree, paths: list[str], leaves: list[Any]
    ) -> list[PartitionSpec]:
        """A spec for each leaf: that of the leaf of `variable` whose path its own ends with, of the same shape."""
        names, own = leaf_names(variable), jax.tree.leaves(variable)
        default: Callable[[str, Any], PartitionSpec] = lambda _, x: PartitionSpec()  # noqa: E731
        if isinstance(rule, str) and rule == LIKE_WEIGHTS:
            rule, default = self.weights, self._split
        specs = specs_of(rule, variable, names, own, default)
        for name, x, spec in zip(names, own, specs, strict=True):
            check(self.mesh, what, name, x, spec)
        known = [("" if n == "." else n, jnp.shape(x), spec) for n, x, spec in zip(names, own, specs, strict=True)]

        def find(path: str, x: Any) -> PartitionSpec:
            same = [(n, spec) for n, shape, spec in known if path.endswith(n) and shape == jnp.shape(x)]
            return max(same, key=lambda pair: len(pair[0]), default=("", PartitionSpec()))[1]

        return [find(path, x) for path, x in zip(paths, leaves, strict=True)]


def with_problem(solver: Any, problem: Any) -> Any:
    """`solver` with another problem.

    Raises:
      ValueError: if it is no dataclass, so that nobody knows how to make it.
    """
    if not dataclasses.is_dataclass(solver) or isinstance(solver, type):
        raise ValueError(
            f"run(sharding=...): {type(solver).__name__} is no dataclass with a field problem, whose arrays could be "
            "placed: make it one (bilevel.extend.register)."
        )
    return dataclasses.replace(solver, problem=problem)  # pyright: ignore[reportCallIssue]


is_sharding = instance(Sharding, "a bilevel.Sharding(mesh)")
"""The rule of a setting that is a `Sharding`."""
