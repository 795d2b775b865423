"""Several processes of one run: arrays of which each holds a part, and what they agree on.

Every process runs the same program on the same settings. They differ in their clocks, their signals, the rows that
they read and the files that they write; what follows from these has to be agreed on before the next collective
operation, or some processes would wait for ever. In a run of one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bilevel.trees import PyTree, in_leaf, is_key

_TOGETHER: contextvars.ContextVar[bool] = contextvars.ContextVar("together", default=False)


@contextlib.contextmanager
def together(mesh: Mesh | None) -> Iterator[None]:
    """For a run on `mesh`: its processes are those whose devices it has; this one alone without a mesh."""
    token = _TOGETHER.set(mesh is not None and len(_processes(mesh)) > 1)
    try:
        yield
    finally:
        _TOGETHER.reset(token)


def several() -> bool:
    """Whether the run that goes on is that of several processes."""
    return _TOGETHER.get()


def count() -> int:
    """How many processes the run has."""
    return jax.process_count() if several() else 1


def is_first() -> bool:
    """Whether this process is the one that shows progress and writes files."""
    return not several() or jax.process_index() == 0


def everyone(value: Any) -> list[Any]:
    """What each process of the run calls this with, JSON, in their order: all of them have to call it."""
    return _gathered(value) if several() else [value]


def _gathered(value: Any) -> list[Any]:
    from jax.experimental import multihost_utils  # only where there are several

    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.asarray(len(said), np.int32))).ravel()
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(said)] = said
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def attempt(doing: str) -> Iterator[list[str]]:
    """A block that may fail in one process alone: then it fails in all of them.

    Yields:
      A list of texts that the block may add to; they have to be the same in all processes.

    Raises:
      RuntimeError: where another process failed; says which, and of what. The one that failed raises its own error.
      ValueError: where the texts differ.
    """
    alike: list[str] = []
    if not several():
        yield alike
        return
    error = None
    try:
        yield alike
    except Exception as own:
        error = own
    told = everyone([alike, None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise in_all(error)
    for process, (_, why) in enumerate(told):
        if why is not None:
            raise in_all(
                RuntimeError(f"Process {process} of {len(told)} failed while {doing}, and a run needs all: {why}")
            )
    for process, (texts, _) in enumerate(told):
        if texts != told[0][0]:
            raise in_all(
                ValueError(
                    f"While {doing}, process {process} came by {', '.join(texts)}, but process 0 by "
                    f"{', '.join(told[0][0])}: these must be of the same shapes in all."
                )
            )


def in_all(error: BaseException) -> BaseException:
    """`error`, which every process of the run raises at the same place, or another with the same effect."""
    error.__dict__["in_all_processes"] = True
    return error


def is_in_all(error: BaseException | None) -> bool:
    """Whether the processes of a run are still side by side after `error`, so that they can save together.

    What is not finite is so in all of them: they have the same numbers.
    """
    if error is None or isinstance(error, FloatingPointError) or not several():
        return True
    return "in_all_processes" in error.__dict__


def agree(doing: str, items: dict[str, str]) -> None:
    """Checks that every process was given the same `items`, texts by name.

    Raises:
      ValueError: names what differs, in every process.
    """
    told = everyone(items)
    for process, others in enumerate(told):
        unlike = [name for name in {**told[0], **others} if told[0].get(name) != others.get(name)]
        # What a function computes is known by several items, of which one name is enough.
        names = dict.fromkeys(re.sub(r" (is|computation(, .*)?)$", "", name) for name in unlike)
        if names:
            first = [told[0].get(unlike[0], "none"), others.get(unlike[0], "none")]
            values = "" if max(map(len, first)) > _SHORT or "computation" in unlike[0] else f" ({' and '.join(first)})"
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise ValueError(
                f"{doing}: process {process} was given another {', another '.join([*names][:_NAMED])}{more} than "
                f"process 0{values}: every process has to be given the same, but for the rows of an iterator."
            )


_NAMED, _SHORT = 4, 60
"""Most differences that a message names, and most characters of a value that it shows."""


def refuse_partial(mesh: Mesh) -> None:
    """Raises ValueError if `mesh` is neither of all processes nor of this one alone: nobody could agree."""
    there = _processes(mesh)
    missing = sorted(set(range(jax.process_count())) - there)
    if missing and there != {jax.process_index()}:
        raise ValueError(
            f"Sharding: no device of process {', '.join(map(str, missing))} is in the mesh: make it of jax.devices(), "
            "those of all processes, or of jax.local_devices() for a run of this process alone."
        )


def _processes(mesh: Mesh) -> set[int]:
    return {device.process_index for device in mesh.devices.flat}


def refuse_unlike(what: str, mesh: Mesh, names: list[str], leaves: list[Any]) -> None:
    """Refuses arrays that are to be the same in all processes of `mesh`, each of which takes a part, and are not.

    Arrays that lie on several processes already are not looked at.

    Raises:
      ValueError: names the first of them, in every process.
    """
    if len(_processes(mesh)) == 1:
        return
    own = [digest(x) if _is_here(x) else "" for x in leaves]
    told = _gathered(own)
    for process, others in enumerate(told):
        if len(others) != len(told[0]):
            raise in_all(ValueError(f"{what}: process {process} has {len(others)} arrays, process 0 {len(told[0])}."))
        if unlike := [name for name, one, other in zip(names, told[0], others, strict=True) if one != other]:
            raise in_all(
                ValueError(
                    f"{what}{in_leaf(unlike[0])} is another array in process {process} than in process 0: every "
                    "process has to be given the same, of which it holds a part."
                )
            )


def _is_here(x: Any) -> bool:
    return not isinstance(x, jax.ShapeDtypeStruct) and getattr(x, "is_fully_addressable", True)


def digest(tree: PyTree) -> str:
    """A hash of the structure, dtypes, shapes and bits of the arrays in `tree`."""
    found = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        array = on_host(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def put(x: Any, where: NamedSharding) -> Any:
    """`x`, which is the same in every process, on the devices of `where`: each process copies its own part."""
    if where.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, where)
    if getattr(x, "weak_type", isinstance(x, bool | int | float | complex)):
        # As a constant: an array made of parts has no weak type.
        return jax.jit(lambda: jnp.asarray(x), out_shardings=where)()
    if is_key(x):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), where), impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])


def put_rows(own: Any, where: NamedSharding) -> Any:
    """An array of which each process gives its own rows, in the order of the processes."""
    if where.is_fully_addressable:
        return jax.device_put(own, where)
    return jax.make_array_from_process_local_data(where, np.asarray(own))


def row_holders(mesh: Mesh, spec: PartitionSpec) -> list[list[int]]:
    """For each process, numbers of the parts of a batch's rows that its devices hold."""
    indices = NamedSharding(mesh, spec).devices_indices_map((mesh.size,))
    found: list[set[int]] = [set() for _ in range(jax.process_count())]
    for device, (rows,) in indices.items():
        found[device.process_index].add(rows.start or 0)
    return [sorted(each) for each in found]


def row_factor(mesh: Mesh, spec: PartitionSpec, axis: int) -> int:
    """How many times as many rows as this process gives there are in all, of a batch that lies as `spec` says."""
    if len(_processes(mesh)) == 1:
        return 1
    parts = mesh.size
    indices = NamedSharding(mesh, PartitionSpec(spec[axis])).addressable_devices_indices_map((parts,))
    rows = {(index[0].start, index[0].stop) for index in indices.values() if index is not None}
    own = sum((parts if stop is None else stop) - (start or 0) for start, stop in rows)
    return parts // own


def on_host(x: Any) -> np.ndarray:
    """The whole of `x`, of which other processes may hold parts: then all have to call this."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x))
