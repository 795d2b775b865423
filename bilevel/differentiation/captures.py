"""What functions read from outside, looked at again at every call: JAX knows a function by its identity alone.

JAX traces a function once and repeats the program: a global name with another value since then, an entry that was
written or an attribute that was set are not seen, and neither `jax.jit` nor `jax.lax.scan` would say so. Here what a
function holds is turned into a number, which costs about a microsecond a value. Where the number is another one than
before, `jax.clear_caches()` makes JAX trace anew.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
import sys
import sysconfig
import types
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from bilevel.trees import is_key

VALUES = 20_000
"""Most values that are looked at in one call; of what is beyond them nothing is known."""
BYTES = 2**20
"""Most bytes of a NumPy array that a checksum is taken of; of a larger one, sums and entries spread evenly over it."""
_PARTS = 64
"""Parts of a larger array, of which a sum is taken each: no single entry changes without its sum."""
_SMALL = 256
"""Most numbers of an array of JAX that is known by its values; a larger one, which nobody can change, is itself."""


class Reads(NamedTuple):
    """What functions read.

    Attributes:
      number: the same for the same functions with the same values, in one process.
      whole: whether every value could be looked at; not so for objects that show none of theirs, or too many.
    """

    number: int
    whole: bool


def forget_outdated(*settings: Any) -> Reads:
    """Makes JAX trace everything anew if a function in `settings`, or one that it calls, reads another value than
    when it was last looked at.

    Followed are global names, attributes of modules, what a function closed over, defaults, bound arguments, and the
    entries and attributes of all these; of code that is installed, only what it closed over. The arrays of `settings`
    are arguments of what is compiled, and are not looked at. Nothing is done inside a trace.
    """
    reads, changed = _look(settings)
    if changed:
        jax.clear_caches()
    return reads


def look_again(*settings: Any) -> Reads:
    """Takes note of what the functions in `settings` have changed themselves while they were traced (a list that they
    append to), which is no reason to trace them anew."""
    return _look(settings)[0]


def _look(settings: Any) -> tuple[Reads, bool]:
    """What is read, and whether any of it has changed."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(settings)):
        return Reads(0, False), False
    walk = _Walk()
    changed, found = False, []
    for node in walk.nodes(settings):
        serial, before = _known(node)
        number = walk.number(node)
        changed |= before is not None and before != number
        _KNOWN[id(node)][2] = number
        found.append((serial, number))
    return Reads(hash(tuple(found)), walk.whole), changed


_KNOWN: dict[int, list[Any]] = {}
"""By `id`: a weak reference, a serial number and the number of what was read last; gone with the object itself."""
_SERIALS = itertools.count()


def _known(node: Any) -> tuple[int, int | None]:
    """The serial number of an object that a weak reference can be had of, and what it read last."""
    at = id(node)
    entry = _KNOWN.get(at)
    if entry is None:
        entry = _KNOWN[at] = [weakref.ref(node, lambda _: _KNOWN.pop(at, None)), next(_SERIALS), None]
    return entry[1], entry[2]


_NUMBERS = bool, int, float, complex, str, bytes, np.generic, type(None), type(Ellipsis)
_FIXED = (*_NUMBERS, np.dtype, np.ufunc, re.Pattern, range, slice, Path, types.ModuleType, weakref.ref)
"""Values that do not change: the same object reads the same."""


class _Walk:
    """One look at everything that some settings hold."""

    def __init__(self) -> None:
        self.whole, self._left = True, VALUES
        self._queue: collections.deque[Any] = collections.deque()
        self._queued: set[int] = set()
        self._tokens: list[Any] = []
        self._open: set[int] = set()

    def nodes(self, settings: Any) -> Iterator[Any]:
        """Functions and objects that can be reached, each once; those that `number` finds on the way too."""
        self._roots(settings)
        self._open.clear()
        while self._queue:
            yield self._queue.popleft()

    def number(self, node: Any) -> int:
        """A number for what a node itself holds; other nodes in it have numbers of their own."""
        self._tokens = tokens = []
        try:
            for value in _held(node):
                self._add(value)
        except Exception:  # an attribute that cannot be had
            self.whole = False
        return hash(tuple(tokens))

    def _roots(self, value: Any) -> None:
        """Queues what of the settings are functions and objects: JAX looks at numbers and arrays itself."""
        if isinstance(value, (*_NUMBERS, np.ndarray, jax.Array)) or id(value) in self._open:
            return
        self._open.add(id(value))
        if isinstance(value, tuple | list):
            inside: Any = value
        elif isinstance(value, dict):
            inside = value.values()
        elif isinstance(value, jax.tree_util.Partial):
            inside = value.func, value.args, value.keywords
        elif dataclasses.is_dataclass(value) and not jax.tree_util.all_leaves([value]):
            inside = type(value), *(getattr(value, field.name, None) for field in dataclasses.fields(value))
        else:
            self._add(value)
            return
        for item in inside:
            self._roots(item)

    def _add(self, value: Any) -> None:
        """Adds what `value` is to the tokens; queues it where it is a node."""
        self._left -= 1
        if self._left < 0:
            self.whole = False
            return
        if isinstance(value, _NUMBERS):
            self._tokens.append((type(value).__name__, repr(value)))
        elif isinstance(value, types.CodeType):
            self._tokens.append(_of_code(value))
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, jax.Array):
            self._tokens.append("traced" if isinstance(value, Tracer) else _jax_array(value))
        elif isinstance(value, _FIXED) or _is_builtin(value):
            self._tokens.append(id(value))
        elif _is_node(value):
            if id(value) not in self._queued:
                self._queued.add(id(value))
                self._queue.append(value)
            self._tokens.append(_known(value)[0])
        elif id(value) in self._open:
            self._tokens.append("again")
        else:
            self._open.add(id(value))
            self._tokens.append(type(value).__name__)
            inside = _entries(value)
            if inside is None:  # an object that shows nothing of itself
                self.whole = False
                self._tokens.append(id(value))
            for item in inside or ():
                self._add(item)
                if self._left < 0:
                    break
            self._open.discard(id(value))

    def _array(self, value: np.ndarray) -> None:
        self._tokens.append((value.dtype.str, value.shape))
        if value.dtype.hasobject:
            for item in value.flat:
                self._add(item)
            return
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        if len(data) > BYTES:  # as fast as memory is read
            end = len(data) // (8 * _PARTS) * 8 * _PARTS
            words, data = data[:end].view(np.uint64).reshape(_PARTS, -1), data[end:]
            self._tokens += [words.sum(1).tobytes(), words[:, :: max(1, words.size // 2**14)].tobytes()]
        self._tokens.append(zlib.crc32(data.data))


def _jax_array(value: jax.Array) -> Any:
    """A number for an array: nobody can change it, so that it is looked at once."""
    _, token = _known(value)
    if token is None:
        token = _KNOWN[id(value)][1]
        if not is_key(value) and value.size <= _SMALL and value.is_fully_addressable and not value.is_deleted():
            array = np.asarray(value)
            token = hash((str(array.dtype), array.shape, array.tobytes()))
        _KNOWN[id(value)][2] = token
    return token


def _is_builtin(value: Any) -> bool:
    """Whether `value` is a function written in C, of a module and not of an object."""
    return isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | type(None))


def _is_node(value: Any) -> bool:
    """Whether `value` is a function, a class or an object with attributes, of which a weak reference can be had."""
    if isinstance(value, types.MethodType | types.BuiltinFunctionType) or type(value).__weakrefoffset__ == 0:
        return False
    shows = isinstance(value, types.FunctionType | type) or hasattr(value, "__wrapped__")
    return shows or _attributes(value) is not None


def _entries(value: Any) -> Any:
    """What a container holds, or an object that is no node; None if nobody knows."""
    if isinstance(value, tuple | list | collections.deque):
        return itertools.chain((len(value),), value)
    if isinstance(value, dict | types.MappingProxyType):
        return itertools.chain.from_iterable(value.items())
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr) if len(value) <= VALUES else None
    if isinstance(value, types.MethodType | types.BuiltinFunctionType):
        return getattr(value, "__func__", value.__name__), value.__self__
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, property):
        return value.fget, value.fset
    return _attributes(value)


def _attributes(value: Any) -> list[Any] | None:
    """The attributes of an object and the settings of a partial function; None if it has no place for any."""
    if (read := getattr(type(value), "_read_by_functions", None)) is not None:  # of this package: it knows itself
        return read(value)
    slots = [name for base in type(value).__mro__ for name in _slots(base) if name != "__dict__"]
    if not slots and not hasattr(value, "__dict__"):
        return None
    named = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    found = list(itertools.chain.from_iterable(list(named.items())))
    if isinstance(value, functools.partial):
        found += [value.func, value.args, value.keywords]
    return found


def _slots(cls: type) -> tuple[str, ...]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _held(node: Any) -> Iterator[Any]:
    """What a node itself holds."""
    if isinstance(node, types.FunctionType):
        yield from _of_function(node)
    elif isinstance(node, type):
        if not _is_installed(node.__module__):
            own = vars(node).items()
            yield from (x for at, x in own if isinstance(x, types.FunctionType) or not at.startswith("__"))
            yield from node.__bases__
    else:
        yield type(node)
        yield from _attributes(node) or ()
        if (wrapped := getattr(node, "__wrapped__", None)) is not None:  # jax.jit, functools.lru_cache
            yield wrapped


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    yield function.__code__
    yield function.__defaults__
    yield function.__kwdefaults__
    yield function.__dict__
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not given a value yet
            yield None
    if _is_installed(function.__module__):
        return
    names = _names(function.__code__)
    yield from _of_module(function.__globals__, names, set())
    for name in names - function.__globals__.keys():  # imported inside
        if name in sys.modules and not _is_installed(name):
            yield from _of_module(vars(sys.modules[name]), names, set())


def _of_module(found: dict[str, Any], names: frozenset[str], seen: set[int]) -> Iterator[Any]:
    """The values of `names` in a module, and in modules of the user's among them."""
    seen.add(id(found))
    for name in sorted(names & found.keys()):
        value = found[name]
        yield value
        if isinstance(value, types.ModuleType) and id(vars(value)) not in seen and not _is_installed(value.__name__):
            yield from _of_module(vars(value), names, seen)


@functools.lru_cache(4096)
def _of_code(code: types.CodeType) -> int:
    consts = [_of_code(x) if isinstance(x, types.CodeType) else (type(x).__name__, repr(x)) for x in code.co_consts]
    return hash((code.co_code, code.co_names, code.co_varnames, code.co_freevars, *consts))


@functools.lru_cache(4096)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(code.co_names).union(*inner)


_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _is_installed(module: str | None) -> bool:
    """Whether a module is of Python, of this package or of an installed one, whose own values nobody writes."""
    return module is not None and _is_of_package(module.partition(".")[0])


@functools.lru_cache(4096)
def _is_of_package(root: str) -> bool:
    if root in sys.stdlib_module_names or root == __name__.partition(".")[0]:
        return True
    spec = getattr(sys.modules.get(root), "__spec__", None)
    return str(getattr(spec, "origin", None) or "").startswith(_INSTALLED)
