"""Markdown to HTML: what is between bars is a cell, and nothing of it is lost."""

import re

import pytest

from methods import markdown


@pytest.mark.parametrize(
    ("line", "cells"),
    [
        ("| a | b |", ["a", "b"]),
        (r"| a \| b | c |", ["a | b", "c"]),
        ("| `x | y` | c |", ["`x | y`", "c"]),
        (r"| `x \| y` | c |", ["`x | y`", "c"]),
        ("| ` | c |", ["`", "c"]),
        ("| `a` | `b` |", ["`a`", "`b`"]),
        ("| a | |", ["a", ""]),
    ],
)
def test_bars_part_cells_but_not_behind_a_backslash_or_in_code(line, cells):
    told = markdown.html(f"| one | two |\n|---|---:|\n{line}\n")
    assert re.findall("<td.*?>(.*?)</td>", told) == cells
