"""The command line: `bilevel METHOD --help`."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from methods.interrupts import acknowledged, interrupted
from methods.logs import LOGGER, listening


class Row(NamedTuple):
    """A command: the module that has it as `COMMAND`, such as a `methods.driver.Method`, and a line of help."""

    module: str
    help: str


COMMANDS = {
    "lora": Row("methods.lora", "train LoRA, rsLoRA or DoRA on every layer"),
    "flexora": Row("methods.flexora", "select the layers that deserve LoRA"),
    "allocate": Row("methods.allocate", "spend a budget of parameters, modules or layers"),
    "heterolora": Row("methods.heterolora", "spend a budget on modules"),
    "baseline": Row("methods.baselines.command", "what methods are measured against"),
    "hiddenkey": Row("methods.hiddenkey", "learn dropout rates and their KL weight"),
    "finegates": Row("methods.finegates", "close gates on frozen weights and cut them out"),
    "loratrf": Row("methods.loratrf", "edit features by a task vector (reconstructed)"),
    "attribute": Row("methods.attribute", "find the training rows that made the model answer as it does"),
    "select-data": Row("methods.select_data", "keep the training rows that serve the validation loss"),
    "report": Row("methods.side_by_side", "put finished runs side by side"),
}
"""The commands that `bilevel --help` lists."""

USAGE = """usage: bilevel METHOD [--preset NAME] [options]
       bilevel METHOD --config FILE [options]
       bilevel METHOD --help
       bilevel --version

Hyper-parameters found by differentiating through training.

methods:
{methods}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Exit code 0: done; 1: a fault of ours, with its traceback; 2: bad input, or a machine that does not give what is
    needed, said in one sentence, or a fault in the user's own code, with its traceback; 130: interrupted, and
    resumable; 141: nobody reads what is printed.
    """
    try:
        code = run(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
        # Python flushes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


@listening()
@acknowledged()
def run(arguments: list[str]) -> int:
    """`main`, with the exit code returned."""
    settings = None
    try:
        if arguments[:1] == ["--version"]:
            from bilevel import __version__

            print(f"bilevel {__version__}")
            return 0
        if not arguments or arguments[0] in ("-h", "--help"):
            methods = "\n".join(f"  {name:<12} {command.help}" for name, command in COMMANDS.items())
            print(USAGE.format(methods=methods))
            return 0 if arguments else 2
        name, *rest = arguments
        if name not in COMMANDS:
            return _fail(f"Unknown method {name[:100]!r}: known are {', '.join(COMMANDS)}.")
        # A second run of the same command should not compile again.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bilevel" / "compiled"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        command = import_module(COMMANDS[name].module).COMMAND
        from methods.options import parse

        settings = parse(command, name, rest)
        if settings is None:  # help was asked for
            return 0
        from methods import processes

        if getattr(settings, "quiet", False):
            os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
            os.environ.setdefault("WANDB_SILENT", "true")
            LOGGER.setLevel(logging.WARNING)
        processes.start(settings)
        found = command.main(settings)
        if processes.is_first():
            page, run_ = getattr(found, "page", None), getattr(found, "run", None)
            if page is not None and page.said:
                _say(f"\n{page.said}", sys.stdout)
            if run_ is not None:
                from methods import closing

                _say(f"\n{closing.text(run_.folder.path, run_.results)}\n", sys.stdout)
            beside = " and report.html" * (settings.out / "report.html").is_file()
            _say(f"Done: {settings.out / 'report.md'}{beside}", sys.stdout)
        left_out = getattr(found, "left_out", None)
        return _fail(left_out) if left_out else 0
    except (BrokenPipeError, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' library is no `Exception`
        if interrupted(error):
            return _interrupted(settings)
        from methods.causes import is_interrupt  # half a second, in which a Ctrl-C may come too

        return _interrupted(settings) if is_interrupt(error) else _failed(error, *arguments[:1])


def _interrupted(settings: Any) -> int:
    kept = settings is not None and (settings.out / "config.json").is_file()
    remark = "what is done is kept, and the same command continues it" if kept else "nothing was written yet"
    _say(f"\nInterrupted; {remark}.")
    return 130


def _failed(error: BaseException, command: str = "this") -> int:
    """Says what went wrong: in one sentence where it is not our fault."""
    from methods import processes
    from methods.causes import place, sentence

    if (gone := processes.lost(error)) is not None:
        processes.leave(_fail(gone))
    said = sentence(error, command)
    if said is None or os.environ.get("BILEVEL_TRACEBACK"):
        _say("".join(traceback.format_exception(error)).rstrip())
    if said is not None:
        return _fail(said)
    if (at := place(error)) is not None:
        return _fail(f"this {type(error).__name__} began in {at}, which is no file of bilevel's: mend it there.")
    _say(
        f"bilevel: this {type(error).__name__} is a fault of bilevel's, and not of what it was given: please report it "
        "with the lines above."
    )
    return 1


def _fail(sentence: str) -> int:
    _say(f"bilevel: {sentence}")
    return 2


def _say(text: str, stream: Any = None) -> None:
    """Prints to stderr or another stream, if it is open, whatever characters it can show."""
    stream = sys.stderr if stream is None else stream
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # nobody listens
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


if __name__ == "__main__":
    main()
