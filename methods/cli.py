"""The command line: `bilevel METHOD --help`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from methods.logs import listening


class Row(NamedTuple):
    """A command: the module that has it as `COMMAND`, such as a `methods.driver.Method`, and a line of help."""

    module: str
    help: str


COMMANDS = {
    "lora": Row("methods.lora", "train LoRA, rsLoRA or DoRA on every layer"),
    "flexora": Row("methods.flexora", "select the layers that deserve LoRA"),
    "heterolora": Row("methods.heterolora", "spend a budget on modules"),
    "baseline": Row("methods.baselines.command", "what methods are measured against"),
    "hiddenkey": Row("methods.hiddenkey", "learn dropout rates and their KL weight"),
    "finegates": Row("methods.finegates", "close gates on frozen weights and cut them out"),
    "loratrf": Row("methods.loratrf", "edit features by a task vector (reconstructed)"),
    "attribute": Row("methods.attribute", "find the training rows that made the model answer as it does"),
    "select-data": Row("methods.select_data", "keep the training rows that serve the validation loss"),
    "report": Row("methods.side_by_side", "put finished runs side by side"),
}

USAGE = """usage: bilevel METHOD [--preset NAME] [options]
       bilevel METHOD --help

Hyper-parameters found by differentiating through training.

methods:
{methods}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command.

    Exit code 0: done; 1: a fault of ours, with its traceback; 2: bad input, or a machine that does not give what is
    needed, said in one sentence; 130: interrupted, and resumable; 141: nobody reads what is printed.
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
def run(arguments: list[str]) -> int:
    """`main`, with the exit code returned."""
    settings = None
    try:
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
        settings = _parse(command, name, rest)
        if settings is None:  # help was asked for
            return 0
        from methods import processes

        processes.start(settings)
        left_out = command.main(settings)
        if processes.is_first():
            _say(f"Done: {settings.out / 'report.md'}", sys.stdout)
        return _fail(left_out) if left_out else 0
    except KeyboardInterrupt:
        kept = settings is not None and (settings.out / "config.json").is_file()
        remark = "what is done is kept, and the same command continues it" if kept else "nothing was written yet"
        _say(f"\nInterrupted; {remark}.")
        return 130
    except (BrokenPipeError, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers' library is no `Exception`
        return _failed(error, *arguments[:1])


def _failed(error: BaseException, command: str = "this") -> int:
    """Says what went wrong: in one sentence where it is not our fault."""
    from methods import processes
    from methods.causes import sentence

    if (gone := processes.lost(error)) is not None:
        processes.leave(_fail(gone))
    said = sentence(error, command)
    if said is None or os.environ.get("BILEVEL_TRACEBACK"):
        _say("".join(traceback.format_exception(error)).rstrip())
    if said is not None:
        return _fail(said)
    _say(
        f"bilevel: this {type(error).__name__} is a fault of bilevel's, and not of what it was given: please report it "
        "with the lines above."
    )
    return 1


def _parse(command: Any, name: str, arguments: list[str]) -> Any:
    """Settings that are checked, or None where help was asked for.

    Raises:
      ValueError: for an option that is unknown, out of range, or without effect in this command.
    """
    import tyro

    from methods import ranges
    from methods.causes import BadInput, reading

    preset, rest = _take(arguments, "--preset", "demo")
    if preset not in command.presets:
        raise BadInput(f"Unknown preset {preset!r}: {name} has {', '.join(command.presets)}.")
    cls: Any = command.settings
    named = any(word == "--model" or word.startswith("--model=") for word in rest)
    needed = {"model": "" if named else tyro.MISSING} if "model" in {f.name for f in dataclasses.fields(cls)} else {}
    default = cls(**needed, **command.presets[preset])
    help_line = f"--preset {{{','.join(command.presets)}}} sets other defaults (shown: {preset})."
    said = io.StringIO()
    try:
        outside = reading("The command line", f"bilevel {name} --help lists what it takes")
        with outside, contextlib.redirect_stderr(said):
            settings = tyro.cli(
                cls,
                args=rest,
                default=default,
                prog=f"bilevel {name}",
                description=f"{(cls.__doc__ or '').split(chr(10))[0]} {help_line}",
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as exit:
        if not exit.code:
            return None
        told = _unknown(rest, cls) or _unboxed(said.getvalue())
        raise BadInput(f"{told} (bilevel {name} --help lists the options)") from None
    ranges.check(settings)
    for field, reason in command.unused(settings).items():
        if getattr(settings, field) != getattr(default, field):
            raise BadInput(f"--{field.replace('_', '-')} has no effect here, since {reason}: leave it out.")
    return settings


def _unknown(arguments: list[str], cls: type) -> str | None:
    """A sentence on the first option that `cls` does not have, with the one it looks like most; None if it has all."""
    names = [field.name.replace("_", "-") for field in dataclasses.fields(cls)]
    known = [*(f"--{name}" for name in names), *(f"--no-{name}" for name in names), "--preset", "--help"]
    for word in arguments:
        option = word.partition("=")[0].replace("_", "-")
        if option.startswith("--") and len(option) > 2 and option not in known:
            near = difflib.get_close_matches(option, known, 1, 0.5)
            return f"Unrecognized options: {option[:100]!a}{f': did you mean {near[0]}?' if near else '.'}"
    return None


def _unboxed(text: str) -> str:
    """A message out of the box that is drawn around it, without the help that follows."""
    # The first line is the box's, with a title that says no more than what follows. Terminals without its characters
    # get others.
    lines = [re.sub(r"[\u2500-\u257f]+|^[|+]|[|+]$|-{4,}", " ", line) for line in text.strip().splitlines()[1:]]
    return " ".join(re.split("For full helptext|Argument helptext", " ".join(lines))[0].split())


def _take(arguments: list[str], option: str, default: str) -> tuple[str, list[str]]:
    """The value of `option` and the other arguments."""
    rest, value, words = [], default, iter(arguments)
    for word in words:
        if word == option:
            value = next(words, "")
        elif word.startswith(option + "="):
            value = word.removeprefix(option + "=")
        else:
            rest.append(word)
    return value, rest


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
