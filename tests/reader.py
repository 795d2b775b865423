"""A reader of the pages: a process that runs their blocks, page by page, and tells what they print.

It is started by the Python of an environment that has the wheel, and first says which packages it finds where. Each
line of its input is a page, `{"folder": ..., "blocks": [...]}`; each line of its output a list with `{"printed",
"warned", "error"}` of each block that was run, the last of them the one that failed, if one did.
"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import traceback
import warnings


def read(block: str, names: dict[str, object]) -> dict[str, str | None]:
    """Runs a block as a script would, with the names of the blocks before it."""
    printed, error = io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                exec(compile(block, "<page>", "exec"), names)
            except BaseException:  # a block may also call sys.exit
                error = traceback.format_exc()
    told = [f"{each.category.__name__}: {each.message}" for each in warned]
    return {"printed": printed.getvalue(), "warned": " ".join(told), "error": error}


def main() -> None:
    """Reads until its input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    packages = ("bilevel", "methods", "benchmarks", "tests")
    print(
        json.dumps({name: getattr(importlib.util.find_spec(name), "origin", None) for name in packages}),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        page = json.loads(line)
        os.chdir(page["folder"])
        names: dict[str, object] = {"__name__": "__main__"}
        done = []
        for block in page["blocks"]:
            done.append(read(block, names))
            if done[-1]["error"]:
                break
        print(json.dumps(done), file=answers, flush=True)


if __name__ == "__main__":
    main()
