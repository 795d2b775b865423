"""What the site has beside its pages: KaTeX's files, tables of names, and links from each name to its description.

Hooks of mkdocs, named in mkdocs.yml. The packages are read, not imported.
"""

from __future__ import annotations

import importlib.metadata
import re
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
KATEX = "djangocms_katex/static/djangocms_katex/vendor/katex/"
SERVED = re.compile(r"katex\.min\.(js|css)|LICENSE|fonts/\w+-\w+\.woff2")

ENTRY = re.compile(r"^::: ([\w.]+)\n((?:    .*\n)*)", re.MULTILINE)
TABLE = re.compile(r"^<!-- names(?: of ([\w./-]+))? -->$", re.MULTILINE)
# Outside of links, headings and blocks of code.
SKIPPED = re.compile(r"<(a|pre|h[1-6]|autoref)\b.*?</\1>", re.DOTALL)
CODE = re.compile(r"<code>([A-Za-z][\w.]*)</code>")


def on_files(files: Any, config: Any) -> Any:
    """KaTeX, out of the wheel that `make docs` installs, to `assets/katex`."""
    try:
        shipped = importlib.metadata.files("djangocms-katex") or []
    except importlib.metadata.PackageNotFoundError:
        raise PluginError("KaTeX is not here: `make docs` builds the site, and installs what it takes.") from None
    for file in shipped:
        name = file.as_posix().removeprefix(KATEX)
        if file.as_posix().startswith(KATEX) and SERVED.fullmatch(name):
            files.append(File.generated(config, f"assets/katex/{name}", abs_src_path=str(file.locate())))
    return files


@cache
def package(name: str) -> Any:
    return griffe.load(name, search_paths=[str(ROOT)], resolve_aliases=True, allow_inspection=False)


def found(path: str) -> Any:
    """What a dotted path names, behind every import of it."""
    top, _, rest = path.partition(".")
    thing = package(top)[rest] if rest else package(top)
    return thing.final_target if thing.is_alias else thing


def sentence(path: str) -> str:
    """The first sentence of a docstring, in Markdown."""
    docstring = found(path).docstring
    first = " ".join(docstring.value.strip().split("\n\n")[0].split()) if docstring else ""
    # A full stop in a formula, a name or an abbreviation ends no sentence.
    whole = re.match(r"(?:\$[^$]*\$|`[^`]*`|\b(?:e\.g|i\.e|al|vs)\.|.)*?(?:\.(?= |$)|$)", first)
    return (whole[0] if whole else first).rstrip(" :,.") + ("." if first else "")


PIPES = re.compile(r"`[^`]*`|\$[^$]*\$|\|")


def without_pipes(match: re.Match[str]) -> str:
    """A bar that is no border of a cell; in code it needs no care."""
    text = match[0]
    if text.startswith("$"):
        return text.replace(r"\|", r"{\Vert}").replace("|", r"{\vert}")
    return "&#124;" if text == "|" else text


def entries(markdown: str) -> list[str]:
    """The names that a page describes, those of a module's members beside it."""
    names = []
    for path, options in ENTRY.findall(markdown):
        names.append(path)
        if found(path).is_module and (members := re.search(r"members:\s*\[(.*?)\]", options, re.DOTALL)):
            names.extend(f"{path}.{name.strip()}" for name in members[1].split(",") if name.strip())
    return names


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """`<!-- names -->` becomes a table of what the page describes; `<!-- names of PAGE -->` of what another does."""

    def table(match: re.Match[str]) -> str:
        folder = Path(page.file.abs_src_path).parent
        source = (folder / match[1]).read_text(encoding="utf-8") if match[1] else markdown
        rows, paths = [], entries(source)
        for path in paths:
            text = PIPES.sub(without_pipes, sentence(path))
            above, _, name = path.rpartition(".")
            if found(path).is_module:
                name = path
            elif above in paths and above.startswith("methods."):  # each method has a `problem` and a `solver`
                name = f"{above.rpartition('.')[2]}.{name}"
            rows.append(f"| [`{name}`][{path}] | {text} |")
        return "\n".join(["| name | what it is |", "|---|---|", *rows])

    return TABLE.sub(table, markdown)


@cache
def described(docs: str) -> dict[str, tuple[str, ...]]:
    """By how a text names it, what the reference describes: `Unrolled`, `bilevel.Unrolled`, `bilevel.run`.

    A short name may be that of several things, of `bilevel` and of `methods`.
    """
    names: dict[str, tuple[str, ...]] = {}
    for file in sorted((Path(docs) / "api").glob("*.md")):
        for path in entries(file.read_text(encoding="utf-8")):
            short = path.rpartition(".")[2]
            names[path] = (path,)
            # A word such as `run` or `load` may mean anything; a class is called like nothing else.
            if re.match(r"[A-Z]\w*[a-z]", short) or (short.isupper() and path.startswith("bilevel.")):
                others = names.get(short, ())
                if all(found(path) is not found(other) for other in others):
                    names[short] = (*others, path)
    return names


def meant(paths: tuple[str, ...], packages: set[str]) -> str | None:
    """The one that a page means whose entries are of these packages; None where that cannot be told."""
    of_page = [path for path in paths if path.partition(".")[0] in packages]
    chosen = of_page if len(packages) == 1 and of_page else paths
    return chosen[0] if len(chosen) == 1 else None


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """A name in the text that the reference describes leads there; search shows no formula as it was written."""
    html = html.replace('class="arithmatex"', 'class="arithmatex" data-search-exclude')
    names = described(config.docs_dir)
    packages = {path.partition(".")[0] for path in entries(page.markdown or "")}

    def link(match: re.Match[str]) -> str:
        path = meant(names.get(unescape(match[1]), ()), packages)
        return f'<autoref identifier="{path}" optional>{match[0]}</autoref>' if path else match[0]

    parts, last = [], 0
    for skipped in SKIPPED.finditer(html):
        parts += [CODE.sub(link, html[last : skipped.start()]), skipped[0]]
        last = skipped.end()
    return "".join([*parts, CODE.sub(link, html[last:])])
