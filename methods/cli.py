"""The command line: `bilevel METHOD --help`."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A method: its module (with `main` and `PRESETS`), the name of its settings class, and a line of help."""

    module: str
    settings: str
    help: str


COMMANDS = {
    "lora": Command("methods.baselines.lora", "LoRASettings", "train LoRA, rsLoRA or DoRA on every layer"),
    "flexora": Command("methods.flexora", "FlexoraSettings", "select the layers that deserve LoRA"),
    "heterolora": Command("methods.heterolora", "HeteroLoRASettings", "spend a budget on modules"),
    "baseline": Command("methods.baselines.command", "BaselineSettings", "what methods are measured against"),
    "hiddenkey": Command("methods.hiddenkey", "HiddenKeySettings", "learn dropout rates and their KL weight"),
    "finegates": Command("methods.finegates", "FineGatesSettings", "close gates on frozen weights and cut them out"),
    "loratrf": Command("methods.loratrf", "LoRATRFSettings", "edit features by a task vector (reconstructed)"),
    "report": Command("methods.side_by_side", "ReportSettings", "put finished runs side by side"),
}

USAGE = """usage: bilevel METHOD [--preset NAME] [options]
       bilevel METHOD --help

Hyper-parameters found by differentiating through training.

methods:
{methods}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command. Exit code 0: done; 2: bad input, said in one sentence; 130: interrupted, and resumable."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: list[str]) -> int:
    """`main`, with the exit code returned."""
    if not arguments or arguments[0] in ("-h", "--help"):
        methods = "\n".join(f"  {name:<12} {command.help}" for name, command in COMMANDS.items())
        print(USAGE.format(methods=methods))
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        return _fail(f"Unknown method {name!r}: known are {', '.join(COMMANDS)}.")
    # A second run of the same command should not compile again.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bilevel" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    module = import_module(COMMANDS[name].module)
    try:
        settings = _parse(module, COMMANDS[name], name, rest)
        module.main(settings)
    except KeyboardInterrupt:
        print("\nInterrupted; what is done is kept, and the same command continues it.", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        return _fail(str(error))
    print(f"Done: {settings.out / 'report.md'}")
    return 0


def _parse(module: Any, command: Command, name: str, arguments: list[str]) -> Any:
    import tyro

    preset, rest = _take(arguments, "--preset", "demo")
    if preset not in module.PRESETS:
        raise ValueError(f"Unknown preset {preset!r}: {name} has {', '.join(module.PRESETS)}.")
    cls: Any = getattr(module, command.settings)
    named = any(word == "--model" or word.startswith("--model=") for word in rest)
    needed = {"model": "" if named else tyro.MISSING} if "model" in {f.name for f in dataclasses.fields(cls)} else {}
    default = cls(**needed, **module.PRESETS[preset])
    help_line = f"--preset {{{','.join(module.PRESETS)}}} sets other defaults (shown: {preset})."
    return tyro.cli(
        cls,
        args=rest,
        default=default,
        prog=f"bilevel {name}",
        description=f"{(cls.__doc__ or '').split(chr(10))[0]} {help_line}",
        config=(tyro.conf.AvoidSubcommands,),
    )


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
    print(f"bilevel: {sentence}", file=sys.stderr)
    return 2
