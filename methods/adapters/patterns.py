"""Regular expressions out of a file, matched in time linear in the name, whoever wrote the file.

Python's `re` backtracks: `(a+)+$` takes 2^n steps on n letters. RE2 does not, and does without what needs it:
look-around, back-references. What both read means the same to both, but for `{,n}`, which RE2 takes for letters.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

_LONGEST = 4000


@functools.lru_cache(maxsize=4096)
def compiled(expression: str) -> Any:
    """The expression for `match`, `fullmatch` and `group`, as `re` has them.

    Raises:
      ValueError: if it is none to Python, or none to RE2; the message goes on after the expression: "is ...".
    """
    import re2

    if not isinstance(expression, str):
        raise ValueError("is no regular expression, but of another type")
    if len(expression) > _LONGEST:
        raise ValueError(f"is longer than {_LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python may read otherwise one day
            re.compile(expression)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise ValueError(f"is no regular expression ({error})") from None
    options = re2.Options()
    options.log_errors = False
    try:
        if "{," in expression:
            raise re2.error("write {0,n} for {,n}")
        return re2.compile(expression, options)
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else error.args[0]
        raise ValueError(
            f"cannot be matched in bounded time ({' '.join(reason.split())}): write it without look-around, "
            "back-references and large counts, or list the modules"
        ) from None


def ending(pattern: str) -> str:
    """The expression of PEFT's look-up of a pattern: all of a name, or what comes after one of its dots."""
    return rf"(.*\.)?({pattern})$"


def shortened(value: Any) -> str:
    """`repr(value)` in one line of at most 120 characters; what a stranger wrote may be of any length."""
    text = repr(value[:120] if isinstance(value, str) else value)
    return text if len(text) <= 120 else f"{text[:117]}..."
