"""Rules of where arrays lie on a mesh: what a user may write, and one `PartitionSpec` for each leaf of a tree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevel.settings.fields import Unfit
from bilevel.settings.rules import function
from bilevel.trees import PyTree, in_leaf

FSDP = "fsdp"
"""The mesh axis over which weights are split by default."""
SMALL = 2**16
"""Weights of fewer numbers are replicated by default: to gather them takes longer than to hold them."""

LIKE_WEIGHTS = "weights"
"""The rule of an inner variable that is a whole model's weights: these lie as frozen ones would."""

Rule = PartitionSpec | PyTree | Callable[[str, Any], PartitionSpec]
"""A `PartitionSpec` for all leaves, a tree of them, or a function `(path, array) -> PartitionSpec`; None: a default."""


def is_mesh(value: Any) -> Mesh:
    """The rule of a setting that is a mesh; its axes become `Auto`."""
    if not isinstance(value, Mesh):
        raise Unfit("must be a jax.sharding.Mesh, such as jax.make_mesh((4, 2), ('data', 'fsdp'))")
    return auto(value)


def auto(mesh: Mesh) -> Mesh:
    """`mesh` with `Auto` axes: explicit ones would ask for an annotation at every gather and reshape of a loss."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def are_axes(value: Any) -> tuple[str, ...]:
    """The rule of a setting that names one mesh axis, several or none."""
    axes = (value,) if isinstance(value, str) else value
    if not isinstance(axes, tuple | list) or not all(isinstance(axis, str) for axis in axes):
        raise Unfit("must be a name of a mesh axis, or several: 'data' or ('data', 'fsdp')")
    return tuple(axes)


def is_rule(value: Any) -> Any:
    """The rule of a setting that is a `Rule`."""
    if callable(value) and not is_spec(value):
        return function("path", "array", result="PartitionSpec")(value)
    specs = jax.tree.leaves(value, is_leaf=is_spec)
    if value is not None and not all(map(is_spec, specs)):
        raise Unfit("must be a PartitionSpec, a tree of them, or a function (path, array) -> PartitionSpec")
    return value


def is_inner_rule(value: Any) -> Any:
    """The rule of a setting that is a `Rule`, or "weights"."""
    if isinstance(value, str):
        if value != LIKE_WEIGHTS:
            raise Unfit(f"must be {LIKE_WEIGHTS!r} where it is a text: the inner variable lies as weights do")
        return value
    return is_rule(value)


def is_spec(value: Any) -> bool:
    """Whether `value` is a `PartitionSpec`."""
    return isinstance(value, PartitionSpec)


def specs_of(rule: Any, tree: PyTree, names: list[str], leaves: list[Any], default: Any) -> list[Any]:
    """A spec for each leaf of `tree`, as `rule` says; by `default` if it is None."""
    if isinstance(rule, PartitionSpec):
        return [short(rule, x) for x in leaves]
    if rule is None or callable(rule):
        return [(rule or default)(name, x) for name, x in zip(names, leaves, strict=True)]
    wanted = jax.tree.structure(rule, is_leaf=is_spec)
    specs = jax.tree.leaves(rule, is_leaf=is_spec)
    found: list[PartitionSpec] = []

    def like(node: Any) -> bool:
        return jax.tree.structure(node) == wanted

    parts = jax.tree.leaves(tree, is_leaf=like)
    if not any(map(like, parts)):
        raise ValueError(f"Sharding: a tree of PartitionSpecs was given that is like nothing there is: {wanted}.")
    for part in parts:
        found += specs if like(part) else [PartitionSpec()]
    return found


def split(mesh: Mesh, name: str, x: Any) -> PartitionSpec:
    """The default of weights: a large leaf along its largest axis that the devices of the axis `FSDP` divide.

    Raises:
      ValueError: if there is no such axis.
    """
    shape = jnp.shape(x)
    if FSDP not in mesh.axis_names or math.prod(shape) < SMALL:
        return PartitionSpec()
    parts, first = mesh.shape[FSDP], int(len(shape) > 2)
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


def check(mesh: Mesh, what: str, name: str, x: Any, spec: PartitionSpec, hint: str = "") -> None:
    """Raises ValueError, in a sentence that `what` begins, if `spec` does not fit the array `x` or the mesh."""
    shape = jnp.shape(x)
    if not is_spec(spec):
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
            raise ValueError(f"Sharding: {spec}{in_leaf(name)} names a mesh axis twice: it can split one axis only.")
        if unknown := [n for n in names if n not in mesh.axis_names]:
            raise ValueError(
                f"Sharding: {spec}{in_leaf(name)} names {', '.join(unknown)}, but the mesh has the axes "
                f"{', '.join(mesh.axis_names)}."
            )
        parts = math.prod(mesh.shape[n] for n in names)
        if shape[axis] % parts:
            raise ValueError(
                f"{what} of shape {shape}{in_leaf(name)} has {shape[axis]} along axis {axis}, which {parts} "
                f"devices ({on(mesh, names)}) do not divide: choose a multiple of {parts}, or another mesh{hint}."
            )


def rows(batch: tuple[str, ...], ndim: int, axis: int = 0) -> PartitionSpec:
    """Of an array whose axis number `axis` is that of a batch, which is split over the mesh axes `batch`."""
    return PartitionSpec(*(None,) * axis, batch) if ndim > axis else PartitionSpec()


def on(mesh: Mesh, axes: Any) -> str:
    """Mesh axes with their sizes, in words."""
    return ", ".join(f"{axis}={mesh.shape[axis]}" for axis in ((axes,) if isinstance(axes, str) else axes))


def pin(mesh: Mesh, x: Any, spec: PartitionSpec) -> Any:
    """`x`, inside a compiled program, which must lie on the mesh as `spec` says."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def short(spec: PartitionSpec, x: Any) -> PartitionSpec:
    """One spec for all leaves cannot split what has fewer axes than it names."""
    return spec if len(spec) <= jnp.ndim(x) else PartitionSpec()
