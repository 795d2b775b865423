"""Whose fault an error is: the input's, the machine's, a user's own code's, or ours.

The first two are one sentence; code has a traceback, whose ever it is.

What decides is the cause, not the class of the exception:

- while something from outside is read (`reading`), whatever happens is the input's: a file that is damaged makes code
  fail in ways that nobody lists;
- elsewhere, what our own code raised by a `raise` statement is a sentence written for the user; the same class out of a
  library, or out of an expression of ours, is a fault that nobody foresaw;
- files, memory and missing packages are the machine's;
- what is left began in the innermost code that is no library's: a file of the user's (a task, a method), or ours.
"""

from __future__ import annotations

import contextlib
import dis
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import bilevel
from methods.interrupts import interrupted

LONGEST = 600
"""Characters of a sentence: what is quoted in it may be a line of any size."""
_RAISE = dis.opmap["RAISE_VARARGS"]
_OURS = (Path(__file__).parent, Path(bilevel.__file__).parent)
_LIBRARIES = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class BadInput(ValueError):
    """One sentence about something that was read."""


@contextlib.contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Whatever the block raises that is no sentence yet becomes one: `what` cannot be read, why, and `remedy`.

    Raises:
      BadInput: in place of it.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' library is no `Exception`
        if is_interrupt(error):
            raise
        # A file that asks for more memory than there is may lie in its header: no option would help.
        if sentence(error) is not None and not isinstance(error, MemoryError):
            raise
        raise BadInput(f"{what} cannot be read ({_reason(error)}): {remedy}.") from error


def is_interrupt(error: BaseException) -> bool:
    """Whether it was a Ctrl-C that ended something: one, or what was made of one.

    What comes while one is handled is that too, but for what there is a sentence for: a disk that is full when a run is
    to be saved has to be told.
    """
    return interrupted(error) or (interrupted(error, meanwhile=True) and sentence(error) is None)


def sentence(error: BaseException, command: str = "this") -> str | None:
    """What to tell the user of `command`; None where the fault is ours."""
    if isinstance(error, OSError):
        named = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
        return _one_line(named)
    if isinstance(error, ModuleNotFoundError) and not _deliberate(error):
        # The extra has all that our own code imports. What a library asks for besides, none of our extras may have.
        remedy = "pip install 'bilevel[lora]'" if _is_ours(_origin(error)) else "pip install it"
        return f"{command} needs {error.name}, which is not installed: {remedy}."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)[:200]:
        return "There is not enough memory: lower --batch-size, --length, --inner-steps or --rank."
    written = (ValueError, TypeError, FloatingPointError, ModuleNotFoundError, NotImplementedError)
    if isinstance(error, BadInput) or (isinstance(error, written) and _deliberate(error)):
        return _one_line(str(error))
    return None


def place(error: BaseException) -> str | None:
    """The file and line of the user's own code where an error began, as "FILE line N"; None where it was not there."""
    if isinstance(error, SyntaxError) and error.filename and not _is_of(error.filename, _OURS):
        return f"{error.filename} line {error.lineno}"
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        file = frame.f_code.co_filename
        if _is_of(file, _OURS):
            return None
        installed = {"site-packages", "dist-packages"}.intersection(Path(file).parts) or _is_of(file, _LIBRARIES)
        if not (installed or file.startswith("<")):
            return f"{file} line {line}"
    return None


def _deliberate(error: BaseException) -> bool:
    """Whether a `raise` statement of ours is where the error began."""
    at = _origin(error)
    return at is not None and _is_ours(at) and at.tb_frame.f_code.co_code[at.tb_lasti] == _RAISE


def _origin(error: BaseException) -> TracebackType | None:
    """Where the error began; Python leaves its own import system out of the traceback of a failed import."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at


def _is_ours(at: TracebackType | None) -> bool:
    """Whether it was code of ours, and not of a library, that ran there."""
    return at is not None and _is_of(at.tb_frame.f_code.co_filename, _OURS)


def _is_of(file: str, folders: tuple[Path, ...]) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in folders)


def _reason(error: BaseException) -> str:
    text, at = _one_line(str(error))[:200], place(error)
    return f"{type(error).__name__}{': ' if text else ''}{text}{f' in {at}' if at else ''}"


def _one_line(text: str) -> str:
    line = " ".join(text[: 100 * LONGEST].split() + (text[-LONGEST:].split() if len(text) > 100 * LONGEST else []))
    if len(line) <= LONGEST:
        return line
    return f"{line[: 2 * LONGEST // 3]} [...] {line[-LONGEST // 3 :]}"
