"""The front of the repository: what strangers read first says what is so."""

import re
from pathlib import Path

import pytest
import yaml

import bilevel

ROOT = Path(__file__).parents[1]


class _Loader(yaml.SafeLoader):
    """Of mkdocs.yml: what its own tags stand for is not asked."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pages(nav) -> list[str]:
    """The files of a navigation, in its order."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in pages(entry)]


def test_every_page_has_one_place_in_the_navigation():
    found = pages(yaml.load(read("mkdocs.yml"), _Loader)["nav"])
    assert len(found) == len(set(found))
    docs = ROOT / "docs"
    assert set(found) == {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}


def test_links_of_the_front_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)|^\[\w+\]: ([^#\s]+)", read(name), re.MULTILINE)
        assert links, name
        assert not [link for pair in links for link in pair if link and not (ROOT / link).exists()], name


def test_pages_that_are_files_of_the_root_say_all_their_links():
    for page, file in (("contributing", "CONTRIBUTING"), ("security", "SECURITY")):
        site = read(f"{file}.md").partition("[start:site] -->")[2].partition("<!-- --8<-- [end:site]")[0]
        used = set(re.findall(r"\]\[(\w+)\]", site))
        defined = dict(re.findall(r"^\[(\w+)\]: (\S+)$", read(f"docs/{page}.md"), re.MULTILINE))
        assert used and used <= set(defined)
        assert all((ROOT / "docs" / link.partition("#")[0]).exists() for link in defined.values())


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert cited["version"] == bilevel.__version__ and cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    page = read("docs/citing.md")
    assert f"version = {{{bilevel.__version__}}}" in page and cited["authors"][0]["name"] in page
    title = " ".join(re.search(r"title   = \{(.*?)\},", page, re.DOTALL)[1].replace("{JAX}", "JAX").split())
    assert title == cited["title"]


def test_hooks_before_a_commit_are_the_linters_of_make():
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    targets = [hook["entry"].split()[-1] for hook in repo["hooks"]]
    assert repo["repo"] == "local" and targets == ["lint", "types"]
    assert "\ntest: lint types unit\n" in read("Makefile")


def said() -> str:
    """All that pages show as printed, which test_docs.py holds them to."""
    texts = []
    for page in (ROOT / "docs").glob("*.md"):
        texts += re.findall(r"^```text\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return " ".join(" ".join(texts).split())


@pytest.mark.parametrize("row", re.findall(r"^\| (\*.*?) \|", read("docs/faq.md"), re.MULTILINE))
def test_messages_of_the_faq_are_printed(row):
    """Each is a part of what another page shows as printed, or of a message in the sources."""
    (message,) = re.findall(r"^\*(.*?)\*(?: \(|$)", row)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bilevel").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings over several lines
    assert message in said() or message in joined
