"""`--mesh data=4,fsdp=2`: the devices of a command, and what lies where on them."""

from __future__ import annotations

import math

import jax

import bilevel

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
      ValueError: if there are not so many devices.
    """
    if text is None:
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
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), devices=there[:wanted])
    return bilevel.Sharding(mesh, batch=tuple(axes))
