"""A module of flax's nnx as a structure and arrays by path, and losses and starts of a `Problem` made of it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.differentiation.carried import handed_on, hidden_in, undetached
from bilevel.differentiation.tracing import evaluate_closed
from bilevel.problem.arguments import telling
from bilevel.settings.fields import register, setting, shown
from bilevel.settings.rules import as_pytree
from bilevel.trees import Batch, Inner, Key, PyTree, is_inexact, is_key, leaf_names

try:
    from flax import nnx
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ModuleNotFoundError("flax is not installed, which bilevel.nnx needs: pip install 'bilevel[nnx]'.") from None

Path = tuple[Any, ...]
"""Where a variable is in a module: names of attributes, and keys of containers."""
Arrays = dict[Path, Any]
"""What variables hold, by path."""

_LISTED = 5
"""Most variables that a sentence lists."""

_IN_DOUBLE = {"float64": "float32", "complex128": "complex64", "int64": "int32", "uint64": "uint32"}


class Variable:
    """What a variable is, but for its numbers: its type, and the shapes and dtypes of its arrays.

    float32 and float64 count as one dtype, and so on: the same module has one or the other as `jax_enable_x64` says,
    and what is checked in float64 was made in float32.
    """

    def __init__(self, leaf: Any):
        self.type = type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "array"
        self.arrays = _described(raw(leaf))

    def __str__(self) -> str:
        return _said(self.arrays)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Variable) and (self.type, self.arrays) == (other.type, other.arrays)


def _described(value: Any) -> PyTree:
    def one(x):
        dtype = str(jnp.result_type(x))
        return jnp.shape(x), _IN_DOUBLE.get(dtype, dtype)

    return jax.tree.map(one, value)


def _said(described: PyTree) -> str:
    leaves = jax.tree.leaves(described, is_leaf=lambda x: isinstance(x, tuple))
    return " and ".join(f"{dtype}[{','.join(map(str, shape))}]" for shape, dtype in leaves)


class Structure:
    """All of a module but its numbers, and which variable is of which kind. Equal for equal modules, and hashable.

    Attributes:
      variables: by path.
      paths: of the variables of each kind: "mutable", "streams", "outer", "inner", "frozen".
      settings: attributes of the module's parts that are no variables, by path.
    """

    def __init__(self, graphdef: Any, state: Any, kinds: dict[str, dict[Path, Any]]):
        leaves = {path: leaf for found in kinds.values() for path, leaf in found.items()}
        self.variables = {path: Variable(leaf) for path, leaf in leaves.items()}
        self.paths = {name: tuple(found) for name, found in kinds.items()}
        self._graphdef, self._state = graphdef, jax.tree.structure(state)
        self._trees = {name: jax.tree.structure(nested(_raws(found))) for name, found in kinds.items()}
        self._keys = {path: raw(leaf).shape for path, leaf in leaves.items() if isinstance(leaf, nnx.RngKey)}
        self._counts = {path: raw(leaf).shape for path, leaf in leaves.items() if isinstance(leaf, nnx.RngCount)}
        try:
            self._identity = graphdef, self._state, tuple(self.paths.items())
            self._hash = hash(self._identity)
        except TypeError as error:
            raise ValueError(
                f"problem(model=...): an attribute of the module is no variable and cannot be hashed ({error}), so "
                "compiled programs cannot be told apart by it: make it a tuple, or a variable."
            ) from None
        module = self.merged(_raws(leaves))
        self.settings, self._at_rest = settings(module), _at_rest(module)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, Structure) and self._identity == other._identity)

    def __repr__(self) -> str:
        return f"a module of {len(self.variables)} variables"

    def _read_by_functions(self) -> list[Any]:
        # Classes and settings, each once, of however many layers they are.
        return list({id(value): value for value in self.settings.values()}.values())

    @property
    def draws(self) -> bool:
        """Whether there are random streams."""
        return bool(self._keys)

    def merged(self, values: Arrays) -> Any:
        """A new module with the values of all variables."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._state, jax.tree.leaves(nested(values))))

    def flat(self, kind: str, tree: PyTree) -> Arrays:
        """What is in a nested dict of the variables of this kind.

        Raises:
          ValueError: if these are others.
        """
        if jax.tree.structure(tree) != self._trees[kind]:
            raise ValueError(
                f"The {kind} variables of the module are {listed(self.paths[kind])}; given was a tree of "
                f"{', '.join(leaf_names(tree)[:_LISTED]) or 'nothing'}."
            )
        return {path: _at(tree, path) for path in self.paths[kind]}

    def seeded(self, key: Key) -> Arrays:
        """The keys and counters of all random streams, begun anew from `key`."""
        found = {path: jnp.zeros(shape, jnp.uint32) for path, shape in self._counts.items()}
        for number, (path, shape) in enumerate(self._keys.items()):
            own = jax.random.fold_in(key, np.uint32(number))
            found[path] = jax.random.split(own, shape) if shape else own
        return found

    def values(self, module: Any, what: str) -> Arrays:
        """The values of a module that should be of this structure.

        Raises:
          ValueError: if it has more variables, less, or others; in a sentence that `what` begins.
        """
        leaves = flat_state(module)[2]
        found = {path: Variable(leaf) for path, leaf in leaves.items()}
        if more := [path for path in found if path not in self.variables]:
            raise ValueError(f"{what} with new variables: {listed(more, found)}.")
        if less := [path for path in self.variables if path not in found]:
            raise ValueError(f"{what} without variables: {listed(less, self.variables)}.")
        if others := [path for path in found if found[path].type != self.variables[path].type]:
            raise ValueError(f"{what} with variables of another type: {listed(others, found)}.")
        return _raws(leaves)

    def refuse_other_settings(self, module: Any, what: str) -> None:
        """Raises ValueError, in a sentence that `what` begins, if the module is another in what is no variable.

        The module is put into another mode.
        """
        own = settings(module)
        if _at_rest(module) != self._at_rest:
            apart = [path for path in {**self.settings, **own} if self.settings.get(path) is not own.get(path)]
            raise ValueError(
                f"{what} with other attributes ({listed(apart) if apart else 'parts are shared otherwise'}), which "
                "would be lost: what changes must be a variable of a type in problem(mutable=...)."
            )


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
        if not self._mutable:
            result, after = self._called(values, batch, key)
            if others := self._not_as_given(values, after):
                follow = lambda values: [self._called(values, batch, key)[1][path] for path in others]  # noqa: E731
                self._refuse_writing(values, others, handed_on(jax.make_jaxpr(follow)(values)))
            return result
        others: list[Path] = []

        def whole(values):
            result, after = self._called(values, batch, key)
            others.extend(self._not_as_given(values, after))
            updates = [_as_before(after[path], values[path]) for path in self._mutable]
            return self._as_pair(result), updates, [after[path] for path in others]

        # flax cuts the statistics of a batch off from their derivative, which is a part of that of the training.
        closed, shapes = jax.make_jaxpr(whole, return_shape=True)(values)
        of_result, of_updates, of_others = (len(jax.tree.leaves(part)) for part in shapes)
        self._refuse_writing(values, others, handed_on(closed)[of_result + of_updates :])
        closed = undetached(closed, [True] + [False] * (of_result - 1 + of_updates + of_others))
        self._refuse_hidden(shapes[1], [hidden_in(closed, of_result + i) for i in range(of_updates)])
        found = evaluate_closed(closed, *jax.tree.leaves(values))
        (value, aux), updates, _ = jax.tree.unflatten(jax.tree.structure(shapes), found)
        updates = {"mutable": nested(dict(zip(self._mutable, updates, strict=True)))}
        return value, ((updates, aux) if self.has_aux else updates)

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
        found = {path: _described(value) for path, value in values.items()}
        if others := [path for path, own in self.structure.variables.items() if found[path] != own.arrays]:
            path = others[0]
            raise ValueError(
                f"merge(found=...): {listed([path])} is {_said(found[path])}, but {self.structure.variables[path]} in "
                "the module of this problem: give what was found for it, and of a stack of runs one, as "
                "jax.tree.map(lambda x: x[0], state)."
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


def predicate(name: str, kind: Any) -> Callable[[Path, Any], bool]:
    """A filter of nnx as a function of a path and a variable.

    Raises:
      ValueError: if it is none.
    """
    try:
        return nnx.Any(kind)
    except (TypeError, ValueError):
        raise ValueError(
            f"problem({name}={shown(kind)}): must be a filter of flax nnx: a type of variables, nnx.PathContains(...), "
            "a function of a path and a variable, a tuple of such, ..., or None."
        ) from None


def divided(module: Any, filters: dict[str, Any]) -> tuple[Structure, dict[str, PyTree]]:
    """The structure of a module, and nested dicts of the arrays of each kind.

    A variable that several paths lead to is of the kind that any of them gives it.

    Raises:
      ValueError: for a variable that no filter takes, or that is of two kinds by two paths.
    """
    takes = {name: predicate(name, kind) for name, kind in filters.items()}
    graphdef, state, leaves = flat_state(module)
    kinds: dict[str, dict[Path, Any]] = {name: {} for name in ("mutable", "streams", "outer", "inner", "frozen")}
    left: dict[Path, Variable] = {}
    shared = nnx.find_duplicates(module)

    def kind_at(path, leaf):
        if takes["mutable"](path, leaf):
            return "mutable"
        if isinstance(leaf, nnx.RngState):
            return "streams"
        return next((name for name in ("outer", "inner", "frozen") if takes[name](path, leaf)), "")

    for path, leaf in leaves.items():
        found: dict[str, Path] = {}
        for at in _paths(path, shared):
            if kind := kind_at(at, leaf):
                found.setdefault(kind, at)
        if len(found) > 1 and not isinstance(leaf, nnx.RngState):
            one, other = list(found)[:2]
            raise ValueError(
                f"problem(...): {listed([found[one]])} and {listed([found[other]])} are one variable, which is {one} "
                f"by the first path and {other} by the second: give filters that take it alike, such as "
                "nnx.All(..., nnx.Not(...))."
            )
        if found:
            kinds[next(iter(found))][path] = leaf
        elif isinstance(leaf, nnx.Variable):
            left[path] = Variable(leaf)
        else:
            kinds["frozen"][path] = leaf
    if left:
        raise ValueError(
            f"problem(...): no kind takes {listed(left, left)}: give the type, or another filter, as one of inner=, "
            "outer=, mutable= and frozen= (frozen=... is all that is left)."
        )
    return Structure(graphdef, state, kinds), {name: nested(_raws(found)) for name, found in kinds.items()}


def _paths(path: Path, shared: list[list[Path]]) -> list[Path]:
    """All paths to what is at `path`, this one first; `shared` are those of each part that several paths lead to."""
    found: dict[Path, None] = {}
    ahead: list[tuple[Path, frozenset[int]]] = [(path, frozenset())]
    while ahead:
        at, through = ahead.pop(0)
        if at in found:
            continue
        found[at] = None
        for number, group in enumerate(shared):
            if number not in through:  # a part may hold itself
                begun = next((start for start in group if at[: len(start)] == start), None)
                others = [] if begun is None else [start + at[len(begun) :] for start in group if start != begun]
                ahead += [(other, through | {number}) for other in others]
    return list(found)


def flat_state(module: Any) -> tuple[Any, Any, dict[Path, Any]]:
    """`(graphdef, state, variables by path)` of a module."""
    graphdef, state = nnx.split(module, graph=True)
    return graphdef, state, dict(nnx.to_flat_state(state))


def settings(module: Any) -> dict[Path, Any]:
    """The classes of a module's parts, and their attributes that are neither parts nor variables, by path."""
    found: dict[Path, Any] = {}
    for path, part in nnx.iter_graph(module, graph=True):
        if not isinstance(part, nnx.Pytree) or isinstance(part, nnx.Variable):
            continue
        found[(*path, "__class__")] = type(part)
        for name, value in vars(part).items():
            is_state = isinstance(value, (nnx.Pytree, nnx.Variable, jax.Array, np.ndarray))
            if not is_state and not name.startswith("_pytree__"):
                found[(*path, name)] = value
    return found


def _at_rest(module: Any) -> Any:
    """The definition of a module in the mode of `eval()`, into which it is put: a loss may choose its mode."""
    for part in jax.tree.leaves(module, is_leaf=lambda x: isinstance(x, nnx.Module)):
        if isinstance(part, nnx.Module):
            part.eval()
    return nnx.graphdef(module, graph=True)


def typed(key: Any) -> Any:
    """A random key as JAX types it; of the two words of `jax.random.PRNGKey` such a key.

    Raises:
      ValueError: for None, where random streams need one.
    """
    if key is None:
        raise ValueError("The module has random streams, which are seeded from the key of a loss: give one, not None.")
    return key if is_key(key) else jax.random.wrap_key_data(key)


def raw(leaf: Any) -> Any:
    """What a variable holds, as it is."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def _raws(leaves: dict[Path, Any]) -> Arrays:
    return {path: raw(leaf) for path, leaf in leaves.items()}


def nested(found: Arrays) -> dict[Any, Any]:
    """Values by path as a nested dict."""
    tree: dict[Any, Any] = {}
    for path, value in found.items():
        at = tree
        for part in path[:-1]:
            at = at.setdefault(part, {})
        at[path[-1]] = value
    return tree


def _at(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _leaves(value: Any) -> list[int]:
    return list(map(id, jax.tree.leaves(value)))


def _as_before(new: Any, old: Any) -> Any:
    """A carried value in the dtype of its variable: flax computes statistics in float64 where a batch is of float64."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype) if is_inexact(x) and is_inexact(y) else x, new, old)


def listed(paths: Iterable[Path], variables: dict[Path, Variable] | None = None) -> str:
    """Some variables in a sentence, with their types where these are given."""
    paths = list(paths)
    names = ["".join(f".{part}" if isinstance(part, str) else f"[{part!r}]" for part in path)[1:] for path in paths]
    if variables is not None:
        names = [f"{name} ({variables[path].type})" for name, path in zip(names, paths, strict=True)]
    more = [f"and {len(names) - _LISTED} more"] * (len(names) > _LISTED)
    return ", ".join(names[:_LISTED] + more) or "none"
