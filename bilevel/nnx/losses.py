"""Losses and starts of a `Problem` that are made of a module of flax's nnx."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import numpy as np

from bilevel.differentiation.carried import beside, handed_on, hidden_in, read_by_cuts, undetached
from bilevel.differentiation.tracing import evaluate_closed
from bilevel.nnx.modules import (
    Arrays,
    Path,
    Structure,
    Variable,
    described,
    flat_state,
    listed,
    nested,
    nnx,
    raw,
    said,
    typed,
)
from bilevel.problem.arguments import telling
from bilevel.settings.fields import register, setting, shown
from bilevel.settings.rules import as_pytree
from bilevel.trees import Batch, Inner, Key, PyTree, is_inexact


@register
@dataclasses.dataclass(frozen=True)
class ModuleLoss:
    """A loss `f(inner, outer, batch, key)` from one of a module, `loss(model, batch, key)`.

    Attributes:
      loss: a pytree that is callable.
      frozen: the arrays that are no variables of the problem, as a nested dict.
      structure: the module but for its arrays.
      is_inner: whether it carries the mutable variables on.
      has_aux: as for `Problem`.
    """

    loss: Any
    frozen: PyTree
    structure: Structure = dataclasses.field(metadata=setting())
    is_inner: bool = dataclasses.field(metadata=setting())
    has_aux: bool = dataclasses.field(metadata=setting())

    @property
    def func(self) -> Any:
        """The user's function, by whose name sentences call this."""
        return getattr(self.loss, "func", self.loss)

    def __call__(self, inner: Inner, outer: PyTree, batch: Batch, key: Key) -> Any:
        """What the user's loss returns, with the new values of the mutable variables where these are carried."""
        key, values = self._values(inner, outer, key)
        if not self.is_inner:
            return self.loss(self.structure.merged(values), batch, key)
        others: list[Path] = []

        def whole(values):
            result, after = self._called(values, batch, key)
            others.extend(self._not_as_given(values, after))
            updates = [_as_before(after[path], values[path]) for path in self._mutable]
            return self._as_pair(result), updates, [after[path] for path in others]

        # A `stop_gradient`, such as that of flax in the statistics of a batch, says what the gradient of a loss does
        # not see. It takes nothing away from the derivative of the training, which follows that gradient.
        closed, shapes = jax.make_jaxpr(whole, return_shape=True)(values)
        of_result, of_updates, of_others = (len(jax.tree.leaves(part)) for part in shapes)
        self._refuse_writing(values, others, handed_on(closed)[of_result + of_updates :])
        read = read_by_cuts(closed)
        closed = undetached(closed, [True] + [False] * (of_result - 1 + of_updates + of_others))
        self._refuse_hidden(shapes[1], [hidden_in(closed, of_result + i) for i in range(of_updates)])
        found = evaluate_closed(closed, *self._reached(values, read))
        (value, aux), updates, _ = jax.tree.unflatten(jax.tree.structure(shapes), found)
        if not self._mutable:
            return (value, aux) if self.has_aux else value
        updates = {"mutable": nested(dict(zip(self._mutable, updates, strict=True)))}
        return value, ((updates, aux) if self.has_aux else updates)

    def _reached(self, values: Arrays, read: list[bool]) -> list[Any]:
        """The arrays of `values`, those that cuts read so that the gradient of this loss reaches the cut."""
        paths, rest = self.structure.paths, iter(read)
        trained = [x for path in paths["inner"] for x in jax.tree.leaves(values[path]) if is_inexact(x)]
        moving = {*paths["outer"], *paths["mutable"]} if trained else set()

        def reached(path: Path, x: Any) -> Any:
            return beside(x, trained) if next(rest) and path in moving and is_inexact(x) else x

        each = {path: jax.tree.map(lambda x, path=path: reached(path, x), values[path]) for path in sorted(values)}
        return jax.tree.leaves(each)

    def _called(self, values: Arrays, batch: Batch, key: Key) -> tuple[Any, Arrays]:
        """What the user's loss returns for these values, and the values that it left."""
        model = self.structure.merged(values)
        result = self.loss(model, batch, key)
        after = self.structure.values(model, "inner_loss left the module")
        self.structure.refuse_other_settings(model, "inner_loss left the module")
        return result, after

    def _as_pair(self, result: Any) -> tuple[Any, PyTree]:
        """`(value, aux)` of what an inner loss returned; aux is None without `has_aux`."""
        is_pair = isinstance(result, tuple)
        if is_pair != self.has_aux or (is_pair and len(result) != 2):
            wanted = "a pair (scalar, aux)" if self.has_aux else "a scalar"
            raise ValueError(
                f"inner_loss returned a {type(result).__name__}, but must return {wanted}; set has_aux=... to match."
            )
        value, aux = result if is_pair else (result, None)
        if not isinstance(value, (jax.Array, np.ndarray, np.generic, float)):
            kind = type(value).__name__
            raise ValueError(f"inner_loss returned a {kind}, but a loss is a real floating-point scalar.")
        return value, aux

    def _not_as_given(self, before: Arrays, after: Arrays) -> list[Path]:
        """Variables that are not mutable, and hold other arrays than before."""
        paths = [path for kind in ("outer", "inner", "frozen") for path in self.structure.paths[kind]]
        return [path for path in paths if _leaves(before[path]) != _leaves(after[path])]

    def _refuse_writing(self, values: Arrays, paths: list[Path], origins: list[int | None]) -> None:
        """Raises ValueError unless variables that are not mutable hold what they were given: else it would be lost.

        Transformations of nnx (`remat`, `scan`, `jit`) hand on all variables as arrays of theirs, most as they were.
        """
        own = jax.tree.unflatten(jax.tree.structure(values), range(len(jax.tree.leaves(values))))
        rest = iter(origins)
        after = {path: [next(rest) for _ in jax.tree.leaves(own[path])] for path in paths}
        if written := [path for path in paths if after[path] != jax.tree.leaves(own[path])]:
            is_trained = not {*written}.isdisjoint(self.structure.paths["inner"])
            remedy = (
                "or put the value that was trained back before the loss returns, as nnx.SpectralNorm and "
                "nnx.WeightNorm need it, which write the kernel of their layer: only the optimizer moves it"
                if is_trained
                else "or give their type as problem(mutable=...)"
            )
            raise ValueError(
                f"inner_loss wrote into variables that are not mutable, which would be lost: "
                f"{listed(written, self.structure.variables)}; compute with a new value, {remedy}."
            )

    def _refuse_hidden(self, updates: list[Any], operations: list[str | None]) -> None:
        """Raises ValueError if what is carried on is cut off from its derivative where the cut cannot be undone."""
        names = iter(operations)
        held = [[next(names) for _ in jax.tree.leaves(update)] for update in updates]
        first = (next(filter(None, found), None) for found in held)
        found = dict(zip(self._mutable, first, strict=True))
        if hidden := [path for path, name in found.items() if name]:
            raise ValueError(
                f"inner_loss computes mutable variables inside a {found[hidden[0]]} that has a stop_gradient: "
                f"{listed(hidden, self.structure.variables)} would be carried on without a part of their derivative; "
                "compute them outside of it, or without the stop_gradient."
            )

    def module(self, inner: Inner, outer: PyTree, key: Key) -> Any:
        """The module with these values.

        Raises:
          ValueError: if they are of other shapes or dtypes.
        """
        values = self._values(inner, outer, key)[1]
        found = {path: described(value) for path, value in values.items()}
        if others := [path for path, own in self.structure.variables.items() if found[path] != own.arrays]:
            path = others[0]
            raise ValueError(
                f"merge(found=...): {listed([path])} is {said(values[path])}, but {self.structure.variables[path]} in "
                "the module of this problem: give what was found for it, and of a stack of runs one, as "
                "jax.tree.map(lambda x: x[0], result)."
            )
        return self.structure.merged(values)

    @property
    def _mutable(self) -> tuple[Path, ...]:
        return self.structure.paths["mutable"]

    def _values(self, inner: Inner, outer: PyTree, key: Key) -> tuple[Key, Arrays]:
        """The key that is left for the loss, and the values of all variables."""
        flat = self.structure.flat
        values = flat("outer", outer) | flat("frozen", self.frozen) | flat("inner", inner["params"])
        if self._mutable:
            values |= flat("mutable", inner["mutable"])
        if self.structure.draws:
            key, of_streams = jax.random.split(typed(key))
            carried = {*self._mutable} if self.is_inner else set()
            seeded = self.structure.seeded(of_streams)
            values |= {path: value for path, value in seeded.items() if path not in carried}
        return key, values


@register
@dataclasses.dataclass(frozen=True)
class _Start:
    """How variables start: as a new module has them, or as they are given, nested dicts by kind."""

    make: Any
    given: dict[str, PyTree]
    structure: Structure = dataclasses.field(metadata=setting())

    def _values(self, key: Key, *kinds: str) -> dict[str, PyTree]:
        if self.make is None:
            return {kind: self.given[kind] for kind in kinds}
        structure = self.structure
        module = self.make(nnx.Rngs(typed(key)))
        leaves = flat_state(module)[2]
        found = {path: Variable(leaf) for path, leaf in leaves.items()}
        paths = [path for kind in kinds for path in structure.paths[kind]]
        others = [path for path in paths if found.get(path) != structure.variables[path]]
        if others:
            raise ValueError(
                f"problem(model={shown(getattr(self.make, 'func', self.make))}): made another module than before: "
                f"{listed(others)} of another type, shape or dtype."
            )
        return {kind: nested({path: raw(leaves[path]) for path in structure.paths[kind]}) for kind in kinds}


@register
@dataclasses.dataclass(frozen=True)
class InnerStart(_Start):
    """`init_inner` of a module."""

    def __call__(self, key: Key, outer: PyTree) -> Inner:
        """`{"params": ...}`, and `"mutable"` where there is any; a key of a carried random stream comes from `key`."""
        found = self._values(key, "inner", "mutable")
        inner = {"params": found["inner"]}
        if not self.structure.paths["mutable"]:
            return inner
        mutable = self.structure.flat("mutable", found["mutable"])
        if self.make is None and self.structure.draws:
            seeded = self.structure.seeded(typed(key))
            mutable = {path: seeded.get(path, value) for path, value in mutable.items()}
        return inner | {"mutable": nested(mutable)}


@register
@dataclasses.dataclass(frozen=True)
class OuterStart(_Start):
    """`init_outer` of a module."""

    def __call__(self, key: Key) -> PyTree:
        """The nested dict of the outer variables."""
        return self._values(key, "outer")["outer"]


@dataclasses.dataclass(frozen=True)
class _ByName:
    """A function that takes its random streams by their name alone."""

    function: Any

    def __call__(self, rngs: Any) -> Any:
        return self.function(rngs=rngs)


def source(model: Any) -> tuple[Any, Any]:
    """`(make, module)`: the function as a pytree, None for a module; and the module, or one that the function makes.

    Raises:
      ValueError: if it is neither.
    """
    if _is_module(model):
        return None, model
    if not callable(model) or isinstance(model, nnx.Variable):
        raise ValueError(f"problem(model={shown(model)}): must be a module of flax nnx, or a function rngs -> module.")
    named = "rngs" in inspect.signature(model).parameters
    try:
        inspect.signature(model).bind(**{"rngs": None}) if named else inspect.signature(model).bind(None)
    except TypeError:
        raise ValueError(
            f"problem(model={shown(model)}): must be a module, or a function rngs -> module, but takes "
            f"{inspect.signature(model)}: give the rest by functools.partial or in a lambda."
        ) from None
    make = as_pytree(_ByName(model) if named else model)
    with telling("making the module, model(nnx.Rngs(0))"):
        module = make(nnx.Rngs(0))
    if not _is_module(module):
        raise ValueError(
            f"problem(model={shown(model)}): must return a module of flax nnx, but returned a {type(module).__name__}."
        )
    return make, module


def _is_module(value: Any) -> bool:
    objects = nnx.Pytree, nnx.Variable
    if isinstance(value, nnx.Variable) or not isinstance(value, (nnx.Pytree, dict, list, tuple)):
        return False
    return any(isinstance(x, objects) for x in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, objects)))


def _leaves(value: Any) -> list[int]:
    return list(map(id, jax.tree.leaves(value)))


def _as_before(new: Any, old: Any) -> Any:
    """A carried value in the dtype of its variable: flax computes statistics in float64 where a batch is of float64."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if is_inexact(x) and is_inexact(y) else x, new, old)
