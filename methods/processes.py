"""`--coordinator`: several processes, on one host or on many, that compute one command together.

All of them run the same program: a device computation that spans them starts when each has called it. The first process
alone writes files and speaks; what it finds in the run folder decides for all. In a command of one process nothing here
does anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from bilevel.extend import Progress
from methods.causes import sentence
from methods.logs import LOGGER

LAUNCHER = "auto"
"""What `--coordinator` is where a launcher (SLURM, GKE, MPI) tells each process who it is."""
_OPTIONS = ("coordinator", "processes", "process")
_HEARTBEAT = 30
"""Seconds after which the others end that a process was last heard of."""
_index, _count = 0, 1
_TAKEN = "Failed to start RPC server", "Address already in use"
_GONE = r"gloo|connection (reset|closed|refused)|socket closed|heartbeat|coordination|unavailable|deadline|peer|nccl"
"""What a collective operation says, in any case of letters, of a process that does not answer."""


T = TypeVar("T")


def tell(text: str) -> None:
    """A line of news, said by the first process alone: what begins and takes a while without a bar of its own."""
    if is_first():
        LOGGER.info(text)


def watched(title: str, batches: Sequence[T], program: Callable[[T], Hashable] = lambda batch: None) -> Iterator[T]:
    """The batches, one after another, with a bar of how far it is where news are shown; `tell` says what it is.

    Args:
      title: of the bar.
      batches: to go through.
      program: what computes a batch; the first batch of each is no measure of the time, since it was compiled before.
    """
    with Progress(title, len(batches), show=is_first() and LOGGER.isEnabledFor(logging.INFO)) as bar:
        for done, batch in enumerate(batches, 1):
            yield batch
            bar.advance(done, {}, program(batch))


def start(settings: Any) -> None:
    """Joins the processes that `settings` name, before JAX is used for anything else.

    Raises:
      ValueError: for options that do not name a process, or a coordinator that does not answer.
    """
    global _index, _count
    where, count, index = (getattr(settings, name, None) for name in _OPTIONS)
    if where is None:
        if given := [name for name in _OPTIONS[1:] if getattr(settings, name, None) is not None]:
            raise ValueError(f"--{given[0]} is of several processes: give --coordinator HOST:PORT too.")
        return
    if where == LAUNCHER:
        if count is not None or index is not None:
            raise ValueError("--coordinator auto asks the launcher: leave --processes and --process out.")
        named: dict[str, Any] = {}
    else:
        if not re.fullmatch(r"\S+:[0-9]{1,5}", where):
            raise ValueError(
                f"--coordinator {where[:100]!r}: give HOST:PORT, an address of the first process that all of them "
                'reach, or "auto" under SLURM, GKE or MPI.'
            )
        if count is None or index is None:
            missing = [f"--{n}" for n, value in (("processes", count), ("process", index)) if value is None]
            raise ValueError(
                f"--coordinator HOST:PORT needs {' and '.join(missing)} too: how many processes there are, the same in "
                "all, and which of them this one is, from 0."
            )
        if not 0 <= index < count:
            raise ValueError(f"--process {index} of --processes {count}: they are numbered from 0 to {count - 1}.")
        if count == 1:
            raise ValueError("--processes 1: a command of one process has no --coordinator; leave all three out.")
        named = {"coordinator_address": where, "num_processes": count, "process_id": index}
    if _count > 1:  # a second command in one program
        return
    who = f"Process {index} of {count}" if named else "A process of the launcher's"
    LOGGER.warning("%s: waiting for the others at %s, for five minutes at most.", who, where)
    if (error := _joined(named)) is not None:
        raise ValueError(f"--coordinator {where}: {_why(where, error)}") from error
    _index, _count = jax.process_index(), jax.process_count()
    if count is not None:
        agree("The options", {"processes": count})


def _joined(named: dict[str, Any]) -> Exception | None:
    """Waits for all processes, in a thread of its own, so that Ctrl-C is heard; what went wrong, if anything."""
    failed: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(**named, heartbeat_timeout_seconds=_HEARTBEAT)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    return failed[0] if failed else None


def _why(where: str, error: Exception) -> str:
    """Why processes did not come together, and what to do."""
    told = " ".join(str(error).split())[:200]
    if any(words in told for words in _TAKEN):
        return f"the port is taken on this host ({told}): choose another, the same in all processes."
    if where == LAUNCHER and "should be defined" in told:
        return (
            "there is no SLURM, GKE or MPI around this process: start it by srun or mpirun, or give HOST:PORT, "
            "--processes and --process."
        )
    if where == LAUNCHER:
        return f"what the launcher tells of the processes cannot be read ({told}): give HOST:PORT instead."
    return (
        f"the processes did not come together ({told}): start all of them within five minutes, with the same address, "
        "which is one of the first process's host, and each with a number of its own."
    )


def lost(error: BaseException) -> str | None:
    """What to tell of an error that another process caused by being gone; None if it is none."""
    if _count == 1 or type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError"):
        return None
    if not re.search(_GONE, str(error), re.IGNORECASE):
        return None
    return (
        f"Another of the {_count} processes is gone, or cannot be reached any more: start the same command in all of "
        "them again; it goes on from what was last saved."
    )


def leave(code: int) -> None:
    """Ends a process whose others are gone, which JAX would end with pages of its own. A single process goes on."""
    if _count > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count() -> int:
    """How many processes compute the command."""
    return _count


def is_first() -> bool:
    """Whether this process writes files and speaks."""
    return _index == 0


def whole(x: Any) -> np.ndarray:
    """All of an array on the host, of which other processes may hold parts: then all of them call this."""
    if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@contextlib.contextmanager
def attempt() -> Iterator[None]:
    """A block that every process goes through, and that may fail in one of them: then it fails in all.

    Raises:
      ValueError: in the processes where it did not fail, with what another said. That one raises its own error.
    """
    error = None
    try:
        yield
    except Exception as own:
        error = own
    if _count == 1:
        if error is not None:
            raise error
        return
    said = None if error is None else sentence(error) or f"{type(error).__name__}: {error}"
    everyone = [_told(process, said) for process in range(_count)]
    if error is not None:
        raise error
    for process, told in enumerate(everyone):
        if told is not None:
            raise ValueError(f"Process {process} of {_count} said: {told}")


def decided(make: Callable[[], Any]) -> Any:
    """What `make()` gives in the first process, a value of JSON; the others do not call it.

    Raises:
      ValueError: as `attempt`.
    """
    value = None
    with attempt():
        if is_first():
            value = make()
    return value if _count == 1 else _told(0, value)


def agree(what: str, value: Any) -> None:
    """Raises ValueError, in all processes, if one has another value, of JSON, than the first."""
    with attempt():
        if (first := decided(lambda: value)) != value:
            raise ValueError(f"{what} differ from those of process 0 ({_difference(first, value)}): give all the same.")


def _difference(first: Any, own: Any) -> str:
    if isinstance(first, dict) and isinstance(own, dict):
        for name in {**first, **own}:
            if first.get(name) != own.get(name):
                given = own.get(name), first.get(name)
                if any(isinstance(each, dict) for each in given):
                    return f"{name} are others"
                return f"{name} is {given[0]!r} and not {given[1]!r}"
    return f"{own!r} and not {first!r}"


def _told(process: int, value: Any) -> Any:
    """What one process has as `value`, of JSON, in all of them."""
    from jax.experimental import multihost_utils

    here = process == _index
    text = np.frombuffer(json.dumps(value).encode() if here else b"", np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text)), is_source=here))
    bytes_ = text if here else np.zeros(length, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(bytes_, is_source=here)).tobytes())
