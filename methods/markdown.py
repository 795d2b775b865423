"""The page of a run as HTML: what `methods.pages` writes of Markdown, and no more of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from methods import webpage

_FIGURE = re.compile(r"!\[(.*?)\]\((.*?)\)")
_BAR = re.compile(r"(`[^`]*`|\\.)|\|")
"""A bar between two cells, or what has none in it: code, and a character behind a backslash."""
_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")


def html(text: str) -> str:
    """Headings, paragraphs, lists, tables, code, bold words; a figure is named, by its caption and its file.

    Headings are below those of the page that it stands on.
    """
    return "\n".join(_parts(text.splitlines()))


def _parts(lines: list[str]) -> Iterator[str]:
    rest = list(lines)
    while rest:
        line = rest[0]
        if not line.strip():
            rest.pop(0)
        elif line.lstrip().startswith("```"):
            rest.pop(0)
            inside = _taken(rest, lambda each: not each.lstrip().startswith("```"))
            rest[:1] = []
            yield webpage.verbatim("\n".join(inside))
        elif line.startswith("#"):
            marks, _, title = rest.pop(0).partition(" ")
            yield webpage.heading(min(len(marks) + 3, 6), title or marks)
        elif line.startswith("|"):
            yield _table(_taken(rest, lambda each: each.startswith("|")))
        elif line.startswith("- "):
            lines = _taken(rest, lambda each: each.startswith("- "))
            yield f"<ul>{''.join(f'<li>{_inline(each[2:])}</li>' for each in lines)}</ul>"
        else:
            told = _taken(rest, lambda each: bool(each.strip()) and not each.startswith(("|", "#", "- ", "```")))
            yield f"<p>{_inline(' '.join(told))}</p>"


def _taken(rest: list[str], go_on) -> list[str]:
    """The lines up to the first that is of something else, which are taken away."""
    count = next((i for i, line in enumerate(rest) if not go_on(line)), len(rest))
    taken, rest[:count] = rest[:count], []
    return taken


def _table(lines: list[str]) -> str:
    parts = [_BAR.sub(_apart, line.strip()).split("\n")[1:] for line in lines]
    rows = [[cell.strip().replace("\\|", "|") for cell in each] for each in parts]
    rows = [row[:-1] if row and not row[-1] else row for row in rows]
    if len(lines) < 2 or not _RULE.fullmatch(lines[1].strip()):
        return webpage.verbatim("\n".join(lines))
    titles, rule, *body = rows
    count = len(titles)
    numbers = [i for i, mark in enumerate(rule[:count]) if mark.endswith(":")]
    whole = [[*row, *[""] * count][:count] for row in body]
    return webpage.table(titles, whole, numbers)


def _apart(found: re.Match[str]) -> str:
    return found[1] or "\n"  # which no line has


def _inline(text: str) -> str:
    """Words with code, bold and figures in them."""
    pieces = re.split(r"(`[^`]+`|\*\*[^*]+\*\*|!\[.*?\]\(.*?\))", text)
    return "".join(map(_piece, pieces))


def _piece(text: str) -> str:
    if len(text) > 2 and text[0] == text[-1] == "`":
        return f"<code>{webpage.escaped(text[1:-1])}</code>"
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):
        return f"<strong>{webpage.escaped(text[2:-2])}</strong>"
    if figure := _FIGURE.fullmatch(text):
        caption, file = figure.groups()
        named = f"Figure in the run's folder: {webpage.escaped(caption)} (<code>{webpage.escaped(file)}</code>)"
        return f'<span class="note">{named}</span>'
    return webpage.escaped(text)
