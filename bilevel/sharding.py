"""Where things live on a mesh of devices: batches, weights, the inner and the outer variable.

The program is written for one device; `jax.jit` cuts it up by where its arguments lie and by what is pinned inside. So
`Sharding` does two things only: it *places* arrays on the mesh before a program runs, and it *pins* the batch a loss is
given, and the variables a training carries, where they belong. All numbers are those of one device, to rounding.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevel.settings import Unfit, check_fields, function, instance, register, setting
from bilevel.trees import PyTree, in_leaf, leaf_names

FSDP = "fsdp"
"""The mesh axis over which weights are split by default."""
SMALL = 2**16
"""Weights of fewer numbers are replicated by default: to gather them takes longer than to hold them."""

Rule = PartitionSpec | PyTree | Callable[[str, Any], PartitionSpec]
"""A `PartitionSpec` for all leaves, a tree of them, or a function `(path, array) -> PartitionSpec`; None: a default."""


def _mesh(value: Any) -> Mesh:
    if not isinstance(value, Mesh):
        raise Unfit("must be a jax.sharding.Mesh, such as jax.make_mesh((4, 2), ('data', 'fsdp'))")
    return _auto(value)


def _auto(mesh: Mesh) -> Mesh:
    # Explicit axes would ask for an annotation at every gather and reshape of a user's loss.
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _axes(value: Any) -> tuple[str, ...]:
    axes = (value,) if isinstance(value, str) else value
    if not isinstance(axes, tuple | list) or not axes or not all(isinstance(axis, str) for axis in axes):
        raise Unfit("must be a name of a mesh axis, or several: 'data' or ('data', 'fsdp')")
    return tuple(axes)


def _rule(value: Any) -> Any:
    if callable(value) and not _is_spec(value):
        return function("path", "array", result="PartitionSpec")(value)
    specs = jax.tree.leaves(value, is_leaf=_is_spec)
    if value is not None and not all(map(_is_spec, specs)):
        raise Unfit("must be a PartitionSpec, a tree of them, or a function (path, array) -> PartitionSpec")
    return value


_NO_ROWS = " (what has no rows is no part of a batch: bind it to the loss, jax.tree_util.Partial(loss, it))"


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)


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

    Numbers are those of one device, to rounding. Axes may be `Auto` or `Explicit`: they are taken as `Auto`.

    Args:
      mesh: a `jax.sharding.Mesh`.
      batch: the mesh axes that the leading axis of a batch is split over. With `"fsdp"` among them each device gathers
        the weights it needs, and frees them: fully sharded data parallelism.
      weights, inner, outer: a `PartitionSpec` for all leaves; a tree of them, like the variable or like what is bound
        to the losses; or a function `(path, array) -> PartitionSpec`. None is the default above.

    Raises:
      ValueError: for axes that the mesh has not, and in one of several processes: a run is one process. When arrays are
        placed: for an axis that the devices do not divide, with the numbers; nothing is replicated in silence.

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

    mesh: Mesh = dataclasses.field(metadata=setting(_mesh))
    batch: tuple[str, ...] | str = dataclasses.field(default="data", kw_only=True, metadata=setting(_axes))
    weights: Rule = dataclasses.field(default=None, kw_only=True, metadata=setting(_rule))
    inner: Rule = dataclasses.field(default=None, kw_only=True, metadata=setting(_rule))
    outer: Rule = dataclasses.field(default=None, kw_only=True, metadata=setting(_rule))

    def __post_init__(self):
        check_fields(self)
        if jax.process_count() > 1:
            raise ValueError(
                f"Sharding: this is one of {jax.process_count()} processes of jax.distributed, and a run is one "
                "process: use the devices of one host."
            )
        if missing := [axis for axis in self.batch if axis not in self.mesh.axis_names]:
            raise ValueError(
                f"Sharding(batch={self.batch!r}): the mesh has the axes {', '.join(self.mesh.axis_names)}, and no "
                f"{', '.join(missing)}: name the axes that the rows of a batch are split over."
            )
        if len(set(self.batch)) < len(self.batch):
            raise ValueError(f"Sharding(batch={self.batch!r}) names a mesh axis twice: name each once.")

    # What a user calls.

    def problem(self, problem: Any) -> Any:
        """`problem` with what is bound to its functions placed, and with its batches and variables pinned."""
        return dataclasses.replace(self._placed(problem), sharding=self)

    def rows(self, what: str, batch: PyTree, *, axis: int = 0) -> PyTree:
        """`batch`, with axis number `axis` of each leaf split over the axes `batch`; scalars are replicated."""
        return self.place(what, batch, None, lambda _, x: self._rows(jnp.ndim(x), axis), hint=_NO_ROWS)

    def replicated(self, tree: PyTree) -> PyTree:
        """`tree` on all devices; what is split over this mesh already stays as it is."""

        def put(x: Any) -> jax.Array:
            now = getattr(x, "sharding", None)
            if isinstance(now, NamedSharding) and isinstance(now.mesh, Mesh) and _auto(now.mesh) == self.mesh:
                return self._put(x, now.spec)
            return self._put(x, PartitionSpec())

        return jax.tree.map(put, tree)

    def frozen(self, weights: PyTree) -> PyTree:
        """`weights` as they lie when they are bound to a loss: split by the rule `weights`."""
        return self.place("A weight", weights, self.weights, self._split)

    @property
    def parts(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)

    def on(self, axes: Any) -> str:
        """Mesh axes with their sizes, in words."""
        return ", ".join(f"{axis}={self.mesh.shape[axis]}" for axis in ((axes,) if isinstance(axes, str) else axes))

    # What the engine calls.

    def solver(self, solver: Any) -> Any:
        """`solver` with its problem placed, and what else it holds on all devices; nothing is pinned."""
        return self.replicated(with_problem(solver, self._placed(solver.problem)))

    def _placed(self, problem: Any) -> Any:
        return self.place("What is bound to the problem", problem, self.weights, self._split)

    def place_state(self, state: PyTree) -> PyTree:
        """The state of a solver, placed: its variables, and what an optimizer holds for them, where these belong."""
        specs = self._of_state(state)
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(self.mesh, spec)), state, specs)

    def pin_state(self, state: PyTree) -> PyTree:
        """As `place_state`, inside a compiled program."""
        return jax.tree.map(self._pin, state, self._of_state(state))

    def pin_batch(self, batch: PyTree) -> PyTree:
        """The batch of a loss, inside a compiled program."""
        pinned = {}
        for name, x in zip(leaf_names(batch), jax.tree.leaves(batch), strict=True):
            spec = self._rows(jnp.ndim(x), 0)
            self._check("The batch", name, x, spec, _NO_ROWS)
            pinned[name] = self._pin(x, spec)
        return jax.tree.unflatten(jax.tree.structure(batch), pinned.values())

    def pin_training(self, inner: PyTree, carry: PyTree) -> PyTree:
        """What training carries, inside a compiled program: what is like a leaf of `inner` where that belongs."""
        names, leaves = leaf_names(carry), jax.tree.leaves(carry)
        specs = self._like("The inner variable", self.inner, inner, names, leaves)
        return jax.tree.unflatten(jax.tree.structure(carry), map(self._pin, leaves, specs))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """For the trace of a loss: `split_rows` and `gathered` find the mesh."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def place(
        self, what: str, tree: PyTree, rule: Rule, default: Callable[[str, Any], PartitionSpec], *, hint: str = ""
    ) -> PyTree:
        """`tree` on the mesh by `rule`.

        Raises:
          ValueError: for an axis that the devices do not divide; begins with `what`.
        """
        leaves, structure = jax.tree.flatten(tree)
        names = leaf_names(tree)
        placed = []
        for name, x, spec in zip(names, leaves, self._specs(rule, tree, names, leaves, default), strict=True):
            self._check(what, name, x, spec, hint)
            placed.append(self._put(x, spec))
        return jax.tree.unflatten(structure, placed)

    def _put(self, x: Any, spec: PartitionSpec) -> Any:
        where = NamedSharding(self.mesh, spec)
        if isinstance(x, jax.ShapeDtypeStruct):  # for a program that is compiled and never run
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return jax.device_put(x, where)

    def _specs(self, rule: Any, tree: PyTree, names: list[str], leaves: list[Any], default: Any) -> list[Any]:
        """A spec for each leaf of `tree`, as `rule` says; by `default` if it is None."""
        if isinstance(rule, PartitionSpec):
            return [_short(rule, x) for x in leaves]
        if rule is None or callable(rule):
            return [(rule or default)(name, x) for name, x in zip(names, leaves, strict=True)]
        wanted = jax.tree.structure(rule, is_leaf=_is_spec)
        specs = jax.tree.leaves(rule, is_leaf=_is_spec)
        found: list[PartitionSpec] = []

        def like(node: Any) -> bool:
            return jax.tree.structure(node) == wanted

        parts = jax.tree.leaves(tree, is_leaf=like)
        if not any(map(like, parts)):
            raise ValueError(f"Sharding: a tree of PartitionSpecs was given that is like nothing there is: {wanted}.")
        for part in parts:
            found += specs if like(part) else [PartitionSpec()]
        return found

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
        specs = self._specs(rule, variable, names, own, lambda _, x: PartitionSpec())
        for name, x, spec in zip(names, own, specs, strict=True):
            self._check(what, name, x, spec)
        known = [("" if n == "." else n, jnp.shape(x), spec) for n, x, spec in zip(names, own, specs, strict=True)]

        def find(path: str, x: Any) -> PartitionSpec:
            same = [(n, spec) for n, shape, spec in known if path.endswith(n) and shape == jnp.shape(x)]
            return max(same, key=lambda pair: len(pair[0]), default=("", PartitionSpec()))[1]

        return [find(path, x) for path, x in zip(paths, leaves, strict=True)]

    def _rows(self, ndim: int, axis: int) -> PartitionSpec:
        return PartitionSpec(*(None,) * axis, self.batch) if ndim > axis else PartitionSpec()

    def _split(self, name: str, x: Any) -> PartitionSpec:
        """The default of weights."""
        shape = jnp.shape(x)
        if FSDP not in self.mesh.axis_names or math.prod(shape) < SMALL:
            return PartitionSpec()
        parts, first = self.mesh.shape[FSDP], int(len(shape) > 2)
        able = [(size, axis) for axis, size in enumerate(shape) if axis >= first and size % parts == 0]
        if not able:
            raise ValueError(
                f"Sharding: a weight of shape {shape}{in_leaf(name)} has no axis that the {parts} devices of "
                f"{FSDP!r} divide: pad it, or say where it goes with weights=, a function (path, array) -> "
                "PartitionSpec (PartitionSpec() is on all devices)."
            )
        spec: list[Any] = [None] * len(shape)
        spec[max(able)[1]] = FSDP
        return PartitionSpec(*spec)

    def _check(self, what: str, name: str, x: Any, spec: PartitionSpec, hint: str = "") -> None:
        shape = jnp.shape(x)
        if not _is_spec(spec):
            raise ValueError(f"Sharding: a rule must return a PartitionSpec, but returned {spec!r}{in_leaf(name)}.")
        if len(spec) > len(shape):
            raise ValueError(f"{what} of shape {shape}{in_leaf(name)} has fewer axes than {spec} names.")
        used: list[str] = []
        for axis, names in enumerate(spec):
            if names is None:
                continue
            if names is PartitionSpec.UNCONSTRAINED:
                raise ValueError(f"Sharding: {spec}{in_leaf(name)} leaves an axis open: name mesh axes, or None.")
            names = (names,) if isinstance(names, str) else names
            used += names
            if len(set(used)) < len(used):
                raise ValueError(
                    f"Sharding: {spec}{in_leaf(name)} names a mesh axis twice: it can split one axis only."
                )
            if unknown := [n for n in names if n not in self.mesh.axis_names]:
                raise ValueError(
                    f"Sharding: {spec}{in_leaf(name)} names {', '.join(unknown)}, but the mesh has the axes "
                    f"{', '.join(self.mesh.axis_names)}."
                )
            parts = math.prod(self.mesh.shape[n] for n in names)
            if shape[axis] % parts:
                raise ValueError(
                    f"{what} of shape {shape}{in_leaf(name)} has {shape[axis]} along axis {axis}, which {parts} "
                    f"devices ({self.on(names)}) do not divide: choose a multiple of {parts}, or another mesh{hint}."
                )

    def _pin(self, x: Any, spec: PartitionSpec) -> Any:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def split_rows(x: jax.Array) -> jax.Array:
    """`x`, an activation whose leading axis is that of a batch, with its rows where the batch's are.

    The compiler is free to move activations to where the weights are. In a model whose weights are split, pin what a
    block is given. Outside a run with a `Sharding` it does nothing.

    Examples:
      >>> import jax
      >>> from bilevel.extend import split_rows
      >>> split_rows(jax.numpy.ones((8, 16))).shape
      (8, 16)
    """
    active = _ACTIVE.get()
    return x if active is None else active._pin(x, active._rows(jnp.ndim(x), 0))


def gathered(function: Callable[[Any, Any], Any], x: PyTree, weights: PyTree) -> PyTree:
    """`function(x, weights)`, for which the weights are gathered on every device, for as long as it takes.

    Without it the compiler may gather the activations of all devices instead, where these are smaller. A derivative
    gathers them anew: kept for it, the weights of all layers would lie on each device. Outside a run with a `Sharding`
    it is `function(x, weights)`.

    Examples:
      >>> import jax
      >>> from bilevel.extend import gathered
      >>> gathered(jax.numpy.matmul, jax.numpy.ones((8, 16)), jax.numpy.ones((16, 4))).shape
      (8, 4)
    """
    if (active := _ACTIVE.get()) is None:
        return function(x, weights)
    pin = lambda weights: jax.tree.map(lambda w: active._pin(w, PartitionSpec()), weights)  # noqa: E731
    return jax.checkpoint(lambda x, weights: function(x, pin(weights)), prevent_cse=False)(x, weights)


def across(table: jax.Array) -> jax.Array:
    """A table that is split over its rows, split over its columns instead: each device then finds its part of any row.

    Outside a run with a `Sharding`, and where the columns do not divide, it does nothing.

    Examples:
      >>> import jax
      >>> from bilevel.extend import across
      >>> across(jax.numpy.ones((100, 16))).shape
      (100, 16)
    """
    active = _ACTIVE.get()
    if active is None or FSDP not in active.mesh.axis_names or table.shape[-1] % active.mesh.shape[FSDP]:
        return table
    return active._pin(table, PartitionSpec(None, FSDP))


def no_mesh() -> Any:
    """A context without a mesh, whatever surrounds it: what a program does is said by its arguments and its pins."""
    return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))


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


def on_a_mesh() -> bool:
    """Whether the loss that is traced now is that of a run, or of a problem, with a `Sharding`.

    Examples:
      >>> from bilevel.extend import on_a_mesh
      >>> on_a_mesh()
      False
    """
    return _ACTIVE.get() is not None


_ACTIVE: contextvars.ContextVar[Sharding | None] = contextvars.ContextVar("sharding", default=None)


def _short(spec: PartitionSpec, x: Any) -> PartitionSpec:
    """One spec for all leaves cannot split what has fewer axes than it names."""
    return spec if len(spec) <= jnp.ndim(x) else PartitionSpec()


is_sharding = instance(Sharding, "a bilevel.Sharding(mesh)")
"""The rule of a setting that is a `Sharding`."""
