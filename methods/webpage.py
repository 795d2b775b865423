"""A page of HTML that is one file: its style, its tables and its figures are inside, and it asks for nothing else."""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from methods.figures import pyplot


class Palette(NamedTuple):
    """Colours of a light and of a dark page, by the same numbers."""

    light: tuple[str, ...]
    dark: tuple[str, ...]


NAMED = Palette(
    ("#1f5f8b", "#b8501f", "#2d7a3e", "#8b3a8b", "#6b6420", "#a02c3f", "#2f7f86", "#555555"),
    ("#7db8e0", "#f0a070", "#86c995", "#d99ad9", "#cfc46a", "#f0909c", "#7fd0d6", "#bbbbbb"),
)
"""Of lines and points that have names."""
ORDERED = Palette(
    ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#63b33f", "#98a80c"),
    ("#9a7bd0", "#8f93e0", "#7fa9e6", "#6fbbe0", "#62ccd0", "#62d9b5", "#7be293", "#a5e670", "#d2e650", "#fde725"),
)
"""Of lines in an order, the first of a stack of layers to the last."""

INK, LINE = "#010203", "#010204"
"""In the place of the colours of text and of axes, until a figure is part of a page."""

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1f23; --soft: #5d646c; --line: #c9ced4;
  --band: #f4f6f8; --accent: #1f5f8b; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e6e8ea; --soft: #a2a9b1; --line: #454c54; --band: #1d2125; --accent: #7db8e0; DARK }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 1180px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
h3 { margin-bottom: .3rem; } p, li { max-width: 75ch; }
.note { color: var(--soft); } .missing { border-left: 4px solid #c77700; padding-left: .7rem; }
.scroll { overflow-x: auto; max-width: 100%; margin: .6rem 0 1rem; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
th { background: var(--band); } thead th { white-space: normal; overflow-wrap: normal; vertical-align: bottom; }
td.value { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; max-width: 32rem; }
.figures { display: grid; gap: .5rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
.key { font-size: .88rem; margin-right: .8rem; } .key::before { content: "\\25cf\\a0"; }
figure { margin: .4rem 0; min-width: 0; } figcaption { color: var(--soft); font-size: .88rem; }
nav { margin: .5rem 0; } nav a { margin-right: 1rem; color: var(--accent); }
pre { white-space: pre-wrap; font-size: .88rem; background: var(--band); padding: .7rem; }
.maps { display: flex; flex-wrap: wrap; gap: .3rem 2rem; } .maps > figure { max-width: 100%; }
svg { display: block; width: 100%; max-width: 640px; height: auto; color: var(--ink); }
.map { border-spacing: 2px; border-collapse: separate; table-layout: fixed; width: 100%; }
.map th { background: none; font-weight: normal; border: 0; padding: 0 .4rem 0 0; white-space: normal; }
.map th:first-child { width: 10rem; } .map th.number { padding: 0; text-align: center; font-size: .75rem;
  white-space: nowrap; overflow: visible; }
.map td { padding: 0; border: 0; height: 1.15rem;
  background: color-mix(in srgb, var(--accent) calc(var(--on) * 100%), var(--band)); }
summary { cursor: pointer; }
"""


def escaped(text: Any) -> str:
    """Any value as text in HTML."""
    return html.escape(str(text))


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of parts of HTML."""
    style = _STYLE.replace("LIGHT", _variables("light")).replace("DARK", _variables("dark"))
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{escaped(title)}</h1>
{body}
</body>
</html>
"""


def _variables(kind: str) -> str:
    names = (("named", NAMED), ("ordered", ORDERED))
    return " ".join(f"--{name}{i}: {c};" for name, p in names for i, c in enumerate(getattr(p, kind)))


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph; `kind` is "note" or "missing"."""
    return f"<p{_of(kind)}>{escaped(text)}</p>"


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = (), kind: str = "") -> str:
    """A table that scrolls inside itself; `numbers` are columns set flush right, `kind` is that of other cells."""

    def cells(row, tag):
        classes = ["number" if i in numbers else kind if tag == "td" and i else "" for i in range(len(row))]
        return "".join(f"<{tag}{_of(c)}>{escaped(x)}</{tag}>" for c, x in zip(classes, row, strict=True))

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{cells(titles, 'th')}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table>{head}\n<tbody>\n{body}\n</tbody></table></div>'


def heading(level: int, text: str, name: str = "") -> str:
    """A heading; `name` is what `contents` links to."""
    return f"<h{level}{f' id={chr(34)}{name}{chr(34)}' if name else ''}>{escaped(text)}</h{level}>"


def contents(links: Sequence[tuple[str, str]]) -> str:
    """Links to headings, of `(name, text)` each."""
    return f"<nav>{''.join(f'<a href={chr(34)}#{name}{chr(34)}>{escaped(text)}</a>' for name, text in links)}</nav>"


def bullets(lines: Sequence[str]) -> str:
    """A list of texts."""
    return f"<ul>{''.join(f'<li>{escaped(line)}</li>' for line in lines)}</ul>" if lines else ""


def share_map(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], caption: str) -> str:
    """Shares between 0 and 1 as a map: a line for each name, a cell for each title, darker the larger the share.

    It is no wider than the page, however many titles there are; of many only some are written.
    """
    every = next(step for step in (1, 5, 10, 50, len(titles)) if len(titles) <= 36 * step)
    written = [title if i % every == 0 else "" for i, title in enumerate(titles)]
    head = "".join(f'<th class="number">{escaped(title)}</th>' for title in written)
    lines = []
    for name, shares in rows:
        cells = "".join(
            f'<td style="--on: {share:.3f}" title="{escaped(f"{name}, {title}: {share:.2f}")}"></td>'
            for title, share in zip(titles, shares, strict=False)
        )
        lines.append(f"<tr><th>{escaped(name)}</th>{cells}</tr>")
    body = "\n".join(lines)
    drawn = f'<div class="scroll" tabindex="0"><table class="map"><tr><th></th>{head}</tr>\n{body}</table></div>'
    width = f"width: calc(10rem + {len(titles)} * 1.3rem)"
    return f'<figure style="{width}"><figcaption>{escaped(caption)}</figcaption>{drawn}</figure>'


def details(summary: str, body: str) -> str:
    """A part of the page that is opened by a click."""
    return f"<details><summary>{escaped(summary)}</summary>\n{body}\n</details>"


def verbatim(text: str) -> str:
    """A text as it is, line by line."""
    return f"<pre>{escaped(text)}</pre>"


def figures(drawn: Sequence[str], kind: str = "figures") -> str:
    """Figures beside each other, as many as there is place for; `kind` is "maps" for maps, which are narrow."""
    return f'<div class="{kind}">{"".join(drawn)}</div>' if drawn else ""


def _of(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def colour(palette: Palette, number: int) -> str:
    """A colour of a palette, for matplotlib: the page has it as a variable of its style."""
    which = "a1" if palette is NAMED else "a2"
    return f"#{which}f1{number % len(palette.light):02x}"


@contextlib.contextmanager
def axes(width: float = 4.4, height: float = 2.7) -> Iterator[tuple[Any, Any]]:
    """`(figure, axes)` of matplotlib in inches, in the manner of the page, closed at the end."""
    plt = pyplot()
    manner = {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "axes.edgecolor": LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with plt.rc_context(manner):
        fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
        ax.xaxis.get_major_locator().set_params(integer=True)  # steps and parameters are counted
        try:
            yield fig, ax
        finally:
            plt.close(fig)


def figure(fig: Any, name: str, caption: str, lines: Sequence[str] = ()) -> str:
    """A figure of matplotlib as SVG within a page.

    Args:
      fig: the figure.
      name: another one for each figure of a page.
      caption: below it.
      lines: the names of what is drawn in the colours of `NAMED`, in their order.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    for part in (fig, *fig.axes):  # the page is what lies behind
        part.patch.set_alpha(0.0)
    with pyplot().rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        FigureCanvasSVG(fig).print_svg(out, metadata=nothing)
    drawn = out.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawn)
    # Names inside are of this figure alone; letters are those of the page, colours its variables.
    prefix = re.sub(r"\W", "-", name)
    drawn = re.sub(r'((?: id="|href="#|url\(#))', rf"\g<1>{prefix}-", drawn)
    drawn = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", drawn)
    drawn = drawn.replace(INK, "currentColor").replace(LINE, "var(--line)")
    for palette, kind in ((NAMED, "named"), (ORDERED, "ordered")):
        for i in range(len(palette.light)):
            drawn = drawn.replace(colour(palette, i), f"var(--{kind}{i})")
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{escaped(caption)}" ', 1)
    marks = [f'<span class="key" style="color: var(--named{i % len(NAMED.light)})">' for i in range(len(lines))]
    keys = " ".join(f"{mark}{escaped(line)}</span>" for mark, line in zip(marks, lines, strict=True))
    return f"<figure>{drawn.strip()}{keys}<figcaption>{escaped(caption)}</figcaption></figure>"
