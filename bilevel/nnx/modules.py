"""A module of flax's nnx as a structure and arrays by path, and which variable is of which kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.settings.fields import shown
from bilevel.trees import Key, PyTree, is_key, leaf_names

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
        self.arrays, self._said = described(raw(leaf)), said(raw(leaf))

    def __str__(self) -> str:
        return self._said

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Variable) and (self.type, self.arrays) == (other.type, other.arrays)


def described(value: Any) -> PyTree:
    """Shape and dtype of each array, in double precision as in single."""

    def one(x):
        dtype = str(jnp.result_type(x))
        return jnp.shape(x), _IN_DOUBLE.get(dtype, dtype)

    return jax.tree.map(one, value)


def said(value: Any) -> str:
    """Dtype and shape of each array, in a sentence."""
    leaves = jax.tree.leaves(value)
    return " and ".join(f"{jnp.result_type(x)}[{','.join(map(str, jnp.shape(x)))}]" for x in leaves)


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


def listed(paths: Iterable[Path], variables: dict[Path, Variable] | None = None) -> str:
    """Some variables in a sentence, with their types where these are given."""
    paths = list(paths)
    names = ["".join(f".{part}" if isinstance(part, str) else f"[{part!r}]" for part in path)[1:] for path in paths]
    if variables is not None:
        names = [f"{name} ({variables[path].type})" for name, path in zip(names, paths, strict=True)]
    more = [f"and {len(names) - _LISTED} more"] * (len(names) > _LISTED)
    return ", ".join(names[:_LISTED] + more) or "none"
