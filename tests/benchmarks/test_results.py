"""Every table and figure of the site is that of its record: `make results` changes nothing."""

import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from benchmarks import headlines, results

ROOT = Path(__file__).parents[2]


def software(file: Path) -> bytes:
    """Which matplotlib has drawn it."""
    return file.read_bytes()[:200].partition(b"Software\x00")[2].partition(b", ")[0]


@pytest.mark.slow
def test_everything_generated_is_that_of_its_record(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    written = results.write(tmp_path)
    assert len(written) == len(set(written)) > 30
    different = []
    for file in written:
        old = ROOT / file.relative_to(tmp_path)
        if file.suffix == ".md":
            same = file.read_text(encoding="utf-8") == old.read_text(encoding="utf-8")
        else:
            drawn, there = (matplotlib.image.imread(path) for path in (file, old))
            same = drawn.shape == there.shape
            if same and software(file) == software(old):  # another release may set letters otherwise
                same = bool(np.abs(drawn - there).mean() < 1e-3)
        if not same:
            different.append(str(old.relative_to(ROOT)))
    assert not different, f"run `make results`: {', '.join(different)} would change"


def test_every_place_has_its_part():
    page = "a\n<!-- generated: x -->\nold\n<!-- end -->\nb\n<!-- generated: y -->\n<!-- end -->\n"
    filled = results.filled(page, {"x": lambda: "new\n", "y": lambda: "also"})
    assert filled == "a\n<!-- generated: x -->\nnew\n<!-- end -->\nb\n<!-- generated: y -->\nalso\n<!-- end -->\n"
    assert results.filled(filled, {"x": lambda: "old", "y": lambda: ""}).count("old") == 1
    for parts in ({"x": str}, {"x": str, "y": str, "z": str}):
        with pytest.raises(ValueError, match="must have one of the other"):
            results.filled(page, parts)


def test_no_generated_part_is_forgotten():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    places = {str(page.relative_to(ROOT)) for page in pages if "\n<!-- generated: " in page.read_text(encoding="utf-8")}
    assert places == set(results.SECTIONS)


def test_goals_met_and_missed_are_told_apart():
    found = headlines.verdicts()
    assert all(0 <= each.met <= each.count for each in found)
    page = headlines.page()
    missed = page.partition("### Missed, or met in part")[2].partition("### Met")[0]
    assert missed.count("| hypergradients |") == sum(v.benchmark == "hypergradients" and v.met < v.count for v in found)
    assert "| training rows |" not in missed and "| bergson |" in missed
    assert f"{sum(v.met == v.count for v in found)} of {len(found)} goals are met" in page
