"""`--mesh data=4,fsdp=2`: the devices of a command, and what lies where on them."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import bilevel
from methods import processes

AXES = {
    "data": "each device has all weights, and its own rows of a batch",
    "fsdp": "the weights are split too: each device gathers those of one layer while it computes it",
}
"""Mesh axes, and what they do."""


def sizes(text: str) -> dict[str, int]:
    """The size of each axis that `text` names.

    Raises:
      ValueError: if it is not a list such as "data=4,fsdp=2".
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES or name in found or not (size.isascii() and size.isdigit()) or not 0 < int(size[:9]):
            raise ValueError(
                f"--mesh {text[:100]!r}: give each of the axes {' and '.join(AXES)} once at most, with a number of "
                "devices: data=8, fsdp=8, or data=4,fsdp=2."
            )
        found[name] = int(size[:9])
    return found


def rows_divide(option: str, rows: int, axes: dict[str, int]) -> None:
    """Raises ValueError if a batch of so many rows, by that option, cannot be split over the devices of the axes."""
    if rows % (devices := math.prod(axes.values())):
        raise ValueError(
            f"{option} {rows} cannot be split over the {devices} devices of --mesh: take a multiple of {devices}."
        )


def sharding(text: str | None) -> bilevel.Sharding | None:
    """Rows split over all devices of the mesh, frozen weights over those of its axis fsdp; None without a mesh.

    Raises:
      ValueError: if there are not so many devices, or some that no process of the command would use.
    """
    if text is None:
        if processes.count() > 1:
            raise ValueError(
                f"--coordinator is of {processes.count()} processes with {jax.device_count()} devices together: say "
                f"how they share the work, by --mesh data={jax.device_count()} for instance."
            )
        return None
    axes = sizes(text)
    wanted, there = math.prod(axes.values()), jax.devices()
    if wanted > len(there):
        kind = there[0].platform
        hint = f" (XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes one processor so many)"
        raise ValueError(
            f"--mesh {text} wants {wanted} devices, but JAX finds {len(there)} ({kind}): name fewer"
            f"{hint * (kind == 'cpu')}."
        )
    if processes.count() > 1 and wanted != len(there):
        raise ValueError(
            f"--mesh {text} is of {wanted} devices, but the {processes.count()} processes have {len(there)} together: "
            "name all of them."
        )
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=there[:wanted])
    return bilevel.Sharding(mesh, batch=tuple(axes))


def shared(data: Any, sharding: bilevel.Sharding | None) -> Any:
    """`data` of `bilevel.run` as each process of the command gives it: of an iterator's batches, its own rows."""
    if sharding is None or processes.count() == 1 or not hasattr(data, "__next__"):
        return data
    return OwnRows(data, sharding)


class OwnRows:
    """Of the batches of an iterator, the rows that the devices of this process hold.

    Every process reads the whole batch, so that all cut it to the same length, and knows its place by one number.

    Args:
      batches: an iterator with `get_state` and `set_state`; each batch a pytree of arrays that lead with its rows.
      sharding: where the rows lie.
    """

    def __init__(self, batches: Any, sharding: bilevel.Sharding):
        self.batches, self._rows = batches, NamedSharding(sharding.mesh, PartitionSpec(sharding.batch))

    def __iter__(self) -> OwnRows:
        return self

    def __next__(self) -> Any:
        batch = next(self.batches)
        count = len(jax.tree.leaves(batch)[0])
        held = self._rows.addressable_devices_indices_map((count,)).values()
        slices = {index[0].indices(count) for index in held if index is not None}
        own = np.concatenate([np.arange(*each) for each in sorted(slices)])
        return jax.tree.map(lambda x: x[own], batch)

    def get_state(self) -> Any:
        """That of the iterator."""
        return self.batches.get_state()

    def set_state(self, state: Any) -> None:
        """Goes on from that state."""
        self.batches.set_state(state)
