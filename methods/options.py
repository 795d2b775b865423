"""A command's options: out of words and a configuration file, checked, and shown in groups by its help.

The groups are the classes that `methods.settings` makes `Settings` of; what a command adds is a group of its own. The
parser is tyro's; here it is told the groups, and its words about mistakes become one sentence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import docstring_parser
import tyro

from methods import configuration, ranges
from methods.causes import BadInput, reading
from methods.settings import GROUPS, Settings, unused

_ESCAPE = "\0"
"""In front of a text of a configuration that would be read as an option; no word of a command line has it."""
_NULL = "is null, or left empty, which is no value of it: give one, or leave the option out"


def parse(command: Any, name: str, arguments: Sequence[str]) -> Any:
    """The settings of a command, checked; None where help was asked for, and shown.

    Args:
      command: with `settings`, a dataclass, `presets`, and `unused(settings)`, as `methods.driver.Method` has them.
      name: of the command.
      arguments: its words. `--preset NAME` replaces defaults, and the file that `--config` names is read as if its
        options stood before the words.

    Raises:
      ValueError: for an option that is unknown, out of range, or without effect in this command, and for a
        configuration that is not of this command.
    """
    cls: Any = command.settings
    file, rest = _take(list(arguments), "--config", None)
    preset, rest = _take(rest, "--preset", None)
    configured, noted = configuration.read(file, name) if file is not None else ({}, None)
    whole = noted is not None
    if whole and preset is not None:
        raise BadInput(f"--preset has no effect here, since {file} says every option: leave one of the two out.")
    named_preset = configured.pop("preset", "demo")
    if named_preset is None:
        raise BadInput(f"{file}: preset {_NULL}.")
    preset = str(named_preset) if preset is None else preset
    if preset not in command.presets:
        raise BadInput(f"Unknown preset {preset!r}: {name} has {', '.join(command.presets)}.")
    words = [*_words(configured, cls, file, rest), *rest]
    named = any(word == "--model" or word.startswith("--model=") for word in words)
    needed = {"model": "" if named else tyro.MISSING} if "model" in {f.name for f in dataclasses.fields(cls)} else {}
    default = cls(**needed, **_no_demand(command.presets[preset]))
    before = default
    if file is not None:  # by itself, so that a mistake in it is not taken for one of the words
        try:
            alone = dataclasses.replace(default, model="MODEL") if needed else default
            before = _parsed(command, name, cls, alone, preset, words[: len(words) - len(rest)])
            ranges.check(before)
        except ValueError as error:
            raise BadInput(f"{file}: {error}") from error
    settings = _parsed(command, name, cls, default, preset, words)
    if settings is None:
        return None
    ranges.check(settings)
    if file is not None and noted is not None:
        configuration.check_place(file, settings, configured, noted)
    # What a run wrote are all of its options, those without effect too.
    before = before if whole else default
    for field, reason in (command.unused(settings) | unused(settings)).items():
        if getattr(settings, field) != getattr(before, field):
            raise BadInput(f"--{field.replace('_', '-')} has no effect here, since {reason}: leave it out.")
    return settings


def _no_demand(preset: Mapping[str, Any]) -> dict[str, Any]:
    """A preset in which numbers of rows are the most that are taken."""
    rows = ("train_rows", "outer_rows")
    return {name: ranges.AtMost(value) if name in rows else value for name, value in preset.items()}


def _parsed(command: Any, name: str, cls: type, default: Any, preset: str, words: list[str]) -> Any:
    """What tyro makes of the words, as an object of `cls`; None where help was asked for."""
    said = io.StringIO()
    try:
        outside = reading("The command line", f"bilevel {name} --help lists what it takes")
        with outside, contextlib.redirect_stderr(said):
            found = tyro.cli(
                _grouped(cls, default, command.presets, preset, name),
                args=words,
                prog=f"bilevel {name}",
                description=(cls.__doc__ or "").split("\n")[0],
                config=(tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as exit:
        if not exit.code:
            return None
        told = _unknown(words, cls) or _unboxed(said.getvalue())
        told = told.replace(_ESCAPE, "").replace(repr(_ESCAPE)[1:-1], "")
        raise BadInput(f"{told} (bilevel {name} --help lists the options)") from None
    values: dict[str, Any] = {}
    for group in dataclasses.fields(found):
        values |= {name: _unescaped(value) for name, value in vars(getattr(found, group.name)).items()}
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


def _grouped(cls: type, default: Any, presets: Mapping[str, Mapping[str, Any]], preset: str, command: str) -> type:
    """A dataclass of one dataclass a group, each with the fields, defaults and words of help of its group.

    What stands in no group is the command's own, and its group is called like the command.
    """
    hints, helped = ranges.hints(cls), _helps(cls)
    titles = {title: [name for name in hints if name in _names(group)] for title, group in GROUPS.items()}
    shared = [name for names in titles.values() for name in names]
    own = {command.replace("-", "_"): [name for name in hints if name not in shared]}
    order = [*list(titles.items())[:2], *own.items(), *list(titles.items())[2:]]
    parts, filled = [], [(title, names) for title, names in order if names]
    for title, names in filled:
        fields = [
            (name, _unshown(hints[name], getattr(default, name)), dataclasses.field(default=getattr(default, name)))
            for name in names
        ]
        about = {name: _agreeing(helped[name], getattr(default, name)) for name in names}
        if title == filled[-1][0] and issubclass(cls, Settings):
            named = Annotated[str, ranges.one_of(presets)]
            fields += [("config", _unshown(str | None, None), None), ("preset", named, preset)]
            about |= _about_all(presets, preset)
        group: Any = dataclasses.make_dataclass(title, fields)
        group.__doc__ = "\n".join(
            ["", "", "Attributes:", *(f"  {name}: {' '.join(text.split())}" for name, text in about.items())]
        )
        parts.append((title, group, dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass(cls.__name__, parts)


def _about_all(presets: Mapping[str, Mapping[str, Any]], preset: str) -> dict[str, str]:
    """What the help says of the two options that are read before the others."""
    changes = "; ".join(
        f"{name}: {', '.join(map(_shown, values.items())) or 'no other'}" for name, values in presets.items()
    )
    return {
        "config": "a YAML, TOML or JSON file of options, such as the config.yaml of a run, which it repeats; options "
        "beside it count more.",
        "preset": f"other defaults for what is not given; shown here are those of {preset}. {changes}.",
    }


def _agreeing(text: str, default: Any) -> str:
    """Words of help that agree with the default shown behind them: "by default" tells what None means, and where a
    preset gives another default, the two would contradict each other."""
    return text if default in (None, ()) else text.replace("by default", "with None")


def _unshown(hint: Any, default: Any) -> Any:
    """A type whose default the help does not show where it is none: the words of help say what that means."""
    told = any(hasattr(leaf, "constructor_factory") for leaf in typing.get_args(hint))
    if default not in (None, ()) or told:
        return hint
    return Annotated[hint, tyro.conf.arg(help_behavior_hint="")]


def _shown(item: tuple[str, Any]) -> str:
    """An option and its value, as one would write them."""
    option, value = item
    return f"{option.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def _names(group: type) -> set[str]:
    return {field.name for field in dataclasses.fields(group)}


def _helps(cls: type) -> dict[str, str]:
    """The words of help of every field, out of the docstrings of the class and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for param in docstring_parser.parse(base.__doc__ or "").params:
            found[param.arg_name] = param.description or ""
    for name, hint in ranges.hints(cls).items():
        found.setdefault(name, "")
        if (known := ranges.listed(hint)) is not None:
            found[name] += f" Known: {known}."
    return found


def _words(configured: Mapping[str, Any], cls: type, file: str | None, rest: Sequence[str]) -> list[str]:
    """Options out of a configuration as the words that would say them.

    Raises:
      ValueError: for one that the command does not have, and for a value that no option has.
    """
    hints, words, first = ranges.hints(cls), [], []
    spelled = [str(name).replace("-", "_") for name in configured]
    if twice := [name for name in spelled if spelled.count(name) > 1]:
        raise BadInput(f"{file} has the option {twice[0]!r} twice: give it once.")
    for name, value in configured.items():
        field = str(name).replace("-", "_")
        if field not in hints:
            near = difflib.get_close_matches(field, hints, 1, 0.5)
            raise BadInput(f"{file} has the option {name!r}, which is unknown{f': is it {near[0]}?' if near else '.'}")
        option = f"--{field.replace('_', '-')}"
        if value is None and not ranges.optional(hints[field]):
            raise BadInput(f"{file}: {name} {_NULL}.")
        if isinstance(value, bool) != (hints[field] is bool):
            what = "true or false" if hints[field] is bool else f"no {value!r}"
            raise BadInput(f"{file}: {name} is {value!r}, but it takes {what}.")
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        elif isinstance(value, (list, tuple)):
            if not all(isinstance(each, (str, int, float)) and not isinstance(each, bool) for each in value):
                raise BadInput(f"{file}: {name} is {value!r}, which is no list of texts or numbers.")
            words += [option, *(_escaped(each, hints[field]) for each in value)]
        elif value is None or isinstance(value, (str, int, float)):
            if _is_positional(hints[field]):
                # A word of the command line stands for it.
                known = ranges.names(hints[field])
                given = known is not None and any(word in known for word in rest)
                first = [] if given else [_escaped(value, hints[field])]
            else:
                words.append(f"{option}={_escaped(value, hints[field])}")
        else:
            raise BadInput(f"{file}: {name} is {type(value).__name__}, which no option is.")
    return [*first, *words]


def _escaped(value: Any, hint: Any) -> str:
    """A value of a configuration as a word, which is no option however it begins."""
    text = str(value)
    number = ranges.numeric(hint) is not None and _is_number(text)
    return _ESCAPE + text if text.startswith(("-", _ESCAPE)) and not number else text


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def _unescaped(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_unescaped, value))
    if isinstance(value, (str, Path)):
        return type(value)(str(value).removeprefix(_ESCAPE))
    return value


def _is_positional(hint: Any) -> bool:
    return tyro.conf._markers.Positional in typing.get_args(hint)  # pyright: ignore


def _unknown(arguments: list[str], cls: type) -> str | None:
    """A sentence on the first option that `cls` does not have, with the one it looks like most; None if it has all."""
    names = [field.name.replace("_", "-") for field in dataclasses.fields(cls)]
    known = [*(f"--{name}" for name in names), *(f"--no-{name}" for name in names), "--preset", "--config", "--help"]
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


def _take(arguments: list[str], option: str, default: str | None) -> tuple[str | None, list[str]]:
    """The value of `option` and the other arguments."""
    rest, value, words = [], default, iter(arguments)
    for word in words:
        if word != option and not word.startswith(option + "="):
            rest.append(word)
            continue
        if value is not default:
            raise BadInput(f"{option} is given twice: give it once.")
        value = next(words, "") if word == option else word.removeprefix(option + "=")
    return value, rest
