"""Meshes of eight devices, and how far two results are apart."""

import jax
import numpy as np
from jax.sharding import AxisType

from bilevel import Sharding

SHAPES = {"data": {"data": 8}, "fsdp": {"fsdp": 8}, "both": {"data": 4, "fsdp": 2}}


def on(name="both", kind=AxisType.Auto, count=8, **rules):
    """A sharding over so many devices; rows are split over all axes."""
    shape = SHAPES[name] if count == 8 else {"data": 2, "fsdp": count // 2}
    mesh = jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(kind,) * len(shape), devices=jax.devices()[:count]
    )
    return Sharding(mesh, batch=tuple(shape), **rules)


def apart(found, wanted):
    """The largest relative difference of a leaf."""
    sizes = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / max(np.max(np.abs(b)), 1e-300)),
        found,
        wanted,
    )
    return max(jax.tree.leaves(sizes))
