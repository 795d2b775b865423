"""Pytrees whose leaves have kinds: differentiable arrays, typed random keys, and constants.

An `outer` (or `inner`) tree may mix all three. Everything that differentiates or updates works on
`moving(tree)`, the tree with `None` where a leaf is not of inexact dtype, and puts the leaves back with
`combine`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
"""Any nesting of containers that JAX knows, with arrays for leaves."""
Inner = PyTree
"""An inner variable, or a tree like it: its gradient, a direction."""
Outer = PyTree
"""An outer variable, or a tree like it."""
Batch = PyTree
"""What a loss is given as `batch`; of several, a tree that leads with an axis of them."""
Key = jax.Array
"""A random key."""


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is an array of typed random keys (`jax.random.key`)."""
    return jnp.issubdtype(getattr(leaf, "dtype", None) or jnp.result_type(leaf), jax.dtypes.prng_key)


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` is floating point or complex, that is, whether it can carry a derivative."""
    return not is_key(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def as_arrays(tree: PyTree, what: str = "The tree holds") -> PyTree:
    """`tree` with Python and NumPy numbers as strongly typed arrays, so that an update does not change a type.

    Raises:
      ValueError: in a sentence that `what` begins, for a leaf that is no number and no array, or whose numbers do not
        fit into the types that are enabled; with its name.
    """
    for name, x in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(f"{what} a ShapeDtypeStruct{in_leaf(name)}, which is the shape of an array and not one.")
        if (reason := unlike_array(x)) is not None:
            raise ValueError(f"{what} {reason}{in_leaf(name)}.")
    return jax.tree.map(lambda x: x if is_key(x) else jnp.asarray(x, jnp.result_type(x)), tree)


def in_leaf(name: str) -> str:
    """Where a leaf is, to end a sentence with; nothing for a tree that is one leaf."""
    return "" if name == "." else f" in leaf {name}"


def unlike_array(leaf: Any) -> str | None:
    """What is wrong with a leaf that should be a number or an array; None if nothing is."""
    kind = getattr(leaf, "dtype", None)
    if isinstance(leaf, (bool, int, float, complex)):
        leaf = np.asarray(leaf)
    elif not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        shown = getattr(leaf, "__name__", None) or " ".join(repr(leaf).split())
        return (
            f"a {type(leaf).__name__} ({shown[:40]}), which is neither a number nor an array (take it out of the tree, "
            "as equinox.partition does, and bind it to the losses)"
        )
    if kind is not None and jnp.issubdtype(kind, jax.dtypes.extended):
        return None
    if not (jnp.issubdtype(leaf.dtype, jnp.number) or jnp.issubdtype(leaf.dtype, jnp.bool_)):
        return f"values of type {leaf.dtype}, which are no numbers"
    return too_wide(leaf)


def too_wide(array: Any) -> str | None:
    """What JAX would lose of a NumPy array, for which it has a narrower type without `jax_enable_x64`; None if nothing.

    Integers would wrap around and large numbers become infinite, without a word.
    """
    if not isinstance(array, (np.ndarray, np.generic)):
        return None
    array = np.asarray(array)
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow == array.dtype or not array.size:
        return None
    if jnp.issubdtype(narrow, jnp.integer):
        limits, (low, high) = jnp.iinfo(narrow), (int(array.min()), int(array.max()))
        beyond = high if high > limits.max else low if low < limits.min else None
    else:
        with np.errstate(over="ignore"):
            lost = np.isfinite(array) & ~np.isfinite(array.astype(narrow))
        beyond = array[lost].ravel()[0] if lost.any() else None
    if beyond is None:
        return None
    return f"the number {beyond}, too large for {narrow} (set jax.config.update('jax_enable_x64', True), or rescale)"


def distinct(tree: PyTree) -> PyTree:
    """`tree` with an array of its own for every leaf: a compiled step may be given them all (`donate_argnums`)."""
    return jax.tree.map(jnp.copy, tree)


def partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """`(moving, fixed)`: the inexact leaves and all others, with `None` in each other's places."""
    moving = jax.tree.map(lambda x: x if is_inexact(x) else None, tree)
    fixed = jax.tree.map(lambda x: None if is_inexact(x) else x, tree)
    return moving, fixed


def moving(tree: PyTree) -> PyTree:
    """The inexact leaves of `tree`, `None` elsewhere."""
    return partition(tree)[0]


def combine(moving: PyTree, fixed: PyTree) -> PyTree:
    """The inverse of `partition`.

    Examples:
      >>> from bilevel.extend import combine
      >>> combine({"w": 0.5, "count": None}, {"w": None, "count": 3}) == {"w": 0.5, "count": 3}
      True
    """
    return jax.tree.map(lambda a, b: b if a is None else a, moving, fixed, is_leaf=lambda x: x is None)


def _map_keys(function, tree: PyTree) -> PyTree:
    def visit(leaf):
        if not is_key(leaf):
            return leaf
        flat = jax.vmap(function)(leaf.reshape(-1))
        return flat.reshape(leaf.shape)

    return jax.tree.map(visit, tree)


def is_steady(key: Any) -> bool:
    """Whether a random key draws the same numbers in company (`jax.vmap`) as alone: of JAX's kinds, threefry does."""
    return "fry" in str(key.dtype) if is_key(key) else jnp.shape(key)[-1] == 2  # key<fry>, or two words


def nbytes(array: Any) -> int:
    """Bytes of an array or abstract array; a random key counts as two words."""
    return math.prod(array.shape) * (8 if is_key(array) else array.dtype.itemsize)


def replayed(tree: PyTree) -> PyTree:
    """`tree` with clones of its random keys: for what is computed once more, with the noise it had.

    A key is consumed once, or `jax.debug_key_reuse` raises; a clone says that the repetition is meant.
    """
    return jax.tree.map(lambda leaf: jax.random.clone(leaf) if is_key(leaf) else leaf, tree)


def as_words(tree: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """`tree` with the words that its random keys are made of, and the function that makes keys of such words again."""
    impls = [jax.random.key_impl(leaf) if is_key(leaf) else None for leaf in jax.tree.leaves(tree)]

    def as_keys(words):
        leaves, structure = jax.tree.flatten(words)
        pairs = zip(leaves, impls, strict=True)
        return structure.unflatten([w if i is None else jax.random.wrap_key_data(w, impl=i) for w, i in pairs])

    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree), as_keys


def at_step(tree: PyTree, step: Any) -> PyTree:
    """`tree` as inner step `step` sees it: every random key `k` becomes `fold_in(k, step)`."""
    return _map_keys(lambda key: jax.random.fold_in(key, step), tree)


def advance_keys(tree: PyTree) -> PyTree:
    """`tree` for the next outer iteration: every random key is replaced by a child of itself."""
    # A child that no step has seen: `split(key)[1]` would be `fold_in(key, 1)`, the key of inner step 1.
    return _map_keys(lambda key: jax.random.fold_in(key, np.uint32(2**32 - 1)), tree)


def leaf_names(tree: PyTree, root: str = "") -> list[str]:
    """A readable path for every leaf of `tree`, in flattening order, from `root` on; without one the root is `.`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [root + jax.tree_util.keystr(path) or "." for path, _ in paths]


def shape(leaf: Any) -> str:
    """Dtype and shape of a leaf."""
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def shapes(tree: PyTree, most: int | None = None) -> str:
    """Names, dtypes and shapes of the leaves of `tree`, of no more than `most`."""
    leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    told = [shape(x) if name == "." else f"{name} {shape(x)}" for name, x in leaves]
    if most is not None and len(told) > most:
        told = [*told[:most], f"and {len(told) - most} more leaves"]
    return ", ".join(told) or "None"


def unlike(wanted: PyTree, found: PyTree, *, whole: bool = False) -> str | None:
    """How `found` differs from `wanted`, in words; None if it does not.

    A leaf differs in its shape, or in being real, complex, an integer, a boolean or a key. Numbers may be of other
    widths, containers of other kinds, and leaves may be missing, unless `whole`, or more.
    """
    own, other = (dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)) for tree in (wanted, found))
    for name, leaf in own.items():
        if name in other:
            alike = jnp.shape(leaf) == jnp.shape(other[name]) or np.size(leaf) == np.size(other[name]) == 1
            if not alike or _kind(leaf) != _kind(other[name]):
                return f"{shape(leaf)} is expected{in_leaf(name)}, and found is {shape(other[name])}"
        elif whole:
            return f"{shape(leaf)} is expected{in_leaf(name)}, and found is {shapes(found, 12)}"
    return None


def _kind(leaf: Any) -> Any:
    """The kind of numbers in a leaf: real, complex, integer, boolean or random key."""
    kinds = jnp.floating, jnp.complexfloating, jnp.integer, jnp.bool_
    return next((kind for kind in kinds if jnp.issubdtype(jnp.result_type(leaf), kind)), jnp.result_type(leaf))


def named(what: str, *names: str) -> str:
    """Leaves of the tree `what` in a sentence: "outer leaf ['a'], ['b']", or "outer" where it is an array itself.

    `names` are some of `leaf_names`.
    """
    return what if names == (".",) else f"{what} leaf {', '.join(names)}"


def global_norm(tree: PyTree) -> jax.Array:
    """Euclidean norm of all leaves together, in the widest of their dtypes.

    It is right to rounding wherever the norm itself can be written: the squares of entries of 1e-25 would vanish in
    float32, those of 1e25 overflow.
    """
    leaves = jax.tree.leaves(widened(tree))
    if not leaves:
        return jnp.zeros(())
    unit = power_of_two(leaves)
    scaled = [x / unit for x in leaves]
    return jnp.sqrt(sum(jnp.sum(jnp.real(x * jnp.conj(x))) for x in scaled)) * unit


def power_of_two(tree: PyTree) -> jax.Array:
    """A power of two near the largest entry of `tree`, a unit to measure it in; 1 where that is 0 or not finite.

    To divide by it and to multiply by it again rounds nothing. Its derivative is 0.
    """
    largest = [jnp.max(jnp.abs(jax.lax.stop_gradient(x))) for x in jax.tree.leaves(widened(tree)) if x.size]
    if not largest:
        return jnp.ones(())
    size = functools.reduce(jnp.maximum, largest)
    _, exponent = jnp.frexp(jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size)))
    # Within the powers whose reciprocals are normal numbers too: the compiler multiplies by the reciprocal.
    limits = jnp.finfo(size.dtype)
    return jnp.ldexp(jnp.ones_like(size), jnp.clip(exponent - 1, limits.minexp, -limits.minexp - 1))


def times(tree: PyTree, factor: jax.Array) -> PyTree:
    """`factor` times each leaf, in the leaf's dtype."""
    return jax.tree.map(lambda x: (x.astype(np.promote_types(x.dtype, factor.dtype)) * factor).astype(x.dtype), tree)


def widened(tree: PyTree) -> PyTree:
    """The inexact leaves of `tree` in one dtype: the widest among them, at least float32; others unchanged.

    Sums over leaves and over batches are taken in it.
    """
    wide = functools.reduce(np.promote_types, [x.dtype for x in jax.tree.leaves(tree) if is_inexact(x)], np.float32)
    return jax.tree.map(lambda x: x.astype(wide) if is_inexact(x) else x, tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` with every leaf in the dtype of `like`'s."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
