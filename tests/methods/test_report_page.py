"""`report.html`: one file that asks for nothing, with what a run folder tells, and a sentence for what it does not."""

import html
import itertools
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from methods import cli, histories, seconds, side_by_side_page
from tests.methods.commands import TABLE
from tests.methods.run_folders import make_run, result

VOID = {"meta", "br", "link", "img", "input"}


class Page(HTMLParser):
    """A page in parts; what is not well formed, or asks for something outside, is an error.

    Attributes:
      figures: captions of figures that are drawn as SVG.
      maps: captions of those that are tables of shares.
      cells: the rows of all tables.
      missing: sentences that are marked as such.
      text: all that is shown.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.figures, self.maps, self.cells, self.missing, self.text = [], [], [], [], [], [], ""
        self.links, self.svg, self.titles = [], 0, []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        assert len(self.ids) == len(set(self.ids))
        assert all(link[1:] in self.ids for link in self.links), self.links

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        self.svg += tag == "svg"
        for name, value in attrs:
            self.ids += [value] if name == "id" else []
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert value.startswith("#"), (tag, name, value)
                self.links.append(value)
            assert not name.startswith("on"), (tag, name)
        assert tag not in ("script", "iframe", "link", "object", "img", "image")
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (self.open[-3:], tag)
        self.open.pop()

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "style" in tags:
            assert "@import" not in data and "url(" not in data
            return
        self.text += data
        if tags[-1:] in (["td"], ["th"]):
            self.cells[-1][-1] += data
        if tags[-1:] == ["figcaption"]:
            (self.figures if self.svg else self.maps).append(data)
            self.svg = 0
        if tags[-1:] in (["h2"], ["h3"], ["h4"]):
            self.titles.append(data)
        if tags and self.open[-1][1].get("class") == "missing":
            self.missing.append(data)


def report(out, *runs, code=0):
    assert cli.run(["report", *map(str, runs), "--out", str(out)]) == code
    text = (out / "report.html").read_text()
    assert "://" not in html.unescape(re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL))
    return Page(text)


def logged(run):
    """`{stage: rows}` of a run."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["stage"], []).append(row)
    return found


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("name", TABLE)
def test_every_command_has_its_figures(name, finished, tmp_path, capsys):
    run = finished(name)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    page = report(tmp_path / "page", run)
    assert capsys.readouterr().out.endswith(f"Done: {tmp_path / 'page' / 'report.md'} and report.html\n")
    assert {file: file.read_bytes() for file in before} == before
    stages = logged(run)
    searches = {stage: rows for stage, rows in stages.items() if "outer_loss" in rows[0]}
    assert len([f for f in page.figures if f.startswith("Norm of the hypergradient")]) == len(searches)
    assert len([f for f in page.figures if f.startswith("Losses at each outer step")]) == len(searches)
    for rows in searches.values():
        for variable in rows[0]:
            if variable not in ("stage", "step", *histories.TOLD):
                assert any(figure.startswith(variable) for figure in page.figures), variable
    assert len([f for f in page.figures if f.startswith("Trainings: ")]) == bool(stages.keys() - searches.keys())
    assert len([f for f in page.figures if "no smaller model is as good" in f]) == 1
    for arm in TABLE[name].arms:
        assert any(row[:3] == [name, name, arm] for row in page.cells), arm
    config = json.loads((run / "config.json").read_text())
    assert ["seed", str(config["seed"])] in page.cells and ["task", config["task"]] in page.cells
    assert not page.missing
    # The cost: steps times the inner steps of each, products as they were counted, seconds as they passed.
    spent = seconds.read(run / "seconds.csv")
    assert spent.keys() == (stages.keys() if name != "attribute" else set())  # whose training is its own
    for stage, rows in stages.items():
        (cells,) = [row for row in page.cells if row[:2] == [name, stage]]
        inner = config.get("inner_steps", config.get("interval")) if stage in searches else 1
        assert cells[2:4] == [str(len(rows)), str(inner * len(rows))], cells
        products = str(sum(r["hvps"] for r in rows)) if "hvps" in rows[0] else "–"
        assert cells[4] == (products if stage in searches else "0")
        assert cells[5] == (f"{spent[stage]:,.1f}" if spent else "–") and spent.get(stage, 1.0) > 0


@pytest.mark.usefixtures("float32_by_default")
def test_runs_of_all_commands_share_a_page(finished, tmp_path):
    runs = [finished(name) for name in ("flexora", "heterolora", "attribute")]
    page = report(tmp_path / "page", *runs)
    assert len([f for f in page.figures if "no smaller model is as good" in f]) == 2  # one for each task
    (front,) = [f for f in page.figures if f.startswith("rte")]
    assert "random-0 of heterolora" in front
    assert any("largest of alpha (Jaccard)" in f for f in [page.text])
    assert any(row[0] == "setting" and row[1:] == ["flexora", "heterolora", "attribute"] for row in page.cells)
    assert any("Modules in use by heterolora" in title for title in page.maps)
    assert "Every module is in use by all-layers." in page.text


def steps(stage="search", count=4, **values):
    return [
        {"stage": stage, "step": i + 1, "outer_loss": 1.0, "hypergradient_norm": 0.5 / (i + 1)}
        | {name: np.asarray(of(i), float).tolist() for name, of in values.items()}
        for i in range(count)
    ]


NASTY = "<script>alert('x')</script> & \"$x_1$\" ünï"


def test_names_are_text_and_nothing_else(tmp_path):
    odd = "a<b>&\"c' $x_{$"
    rows = steps(**{"<i>gate</i> $\\frac$": lambda i: [i, 1 - i, 0.5]}) + [
        {"stage": "finetune <b>", "step": 1, "inner_loss": 1.0}
    ]
    arm = NASTY.replace("/", "|")
    run = make_run(tmp_path / odd, {arm: result(7, 5, {"<q>": [1, 0]})}, rows, model="m<o>del", text=NASTY)
    (run / "selection.json").write_text(json.dumps({"<u>": NASTY}))
    (run / "config.yaml").write_text("command: <em>\n")
    (run / "report.md").write_text(NASTY)
    page = report(tmp_path / "page", run)
    for word in (odd, arm, NASTY, "m<o>del", "<em>", "<i>gate</i> $\\frac$", "finetune <b>", "<q>", "<u>"):
        assert word in page.text, word
    assert {tag for tag in re.findall(r"<(\w+)", (tmp_path / "page" / "report.html").read_text())}.isdisjoint(
        {"script", "b", "i", "em", "u", "q", "o"}
    )


def test_what_is_missing_or_damaged_is_said_and_the_rest_is_there(tmp_path):
    good = steps(alpha=lambda i: [i, -i, 0.0])
    run = make_run(tmp_path / "run", {"chosen": result(7, 12)}, good)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "search", "step"\n[1, 2]\n{"stage": "search", "step": 9, "alpha": "no"}\n')
        file.write('{"stage": "search", "step": 1e400, "alpha": 1}\n{"stage": "search", "step": 0}\n')
        file.write(f'{{"stage": "a", "step": {10**30}}}\n{{"stage": "a", "step": 1, "alpha": {10**400}}}\n')
        file.write('{"stage": "finetune chosen", "step": 1, "inner_loss": 2.0}\n{"torn')
    (run / "selection.json").write_text("{")
    (run / "seconds.csv").write_text("stage,seconds\nsearch,nan\n")
    bare = make_run(tmp_path / "bare", {"chosen": result(6, 12)}, ())
    (bare / "metrics.jsonl").unlink()
    (bare / "report.md").unlink()
    (bare / "fingerprint.json").unlink()
    uneven = make_run(tmp_path / "uneven", {}, [*good, steps(count=5, alpha=lambda i: [i])[-1]], seed=3)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    page = report(tmp_path / "page", run, bare, uneven, tmp_path / "nowhere", code=2)
    assert {file: file.read_bytes() for file in before} == before
    said = "\n".join(page.missing)
    for words in (
        "8 of 13 lines of metrics.jsonl are damaged and left out.",
        "selection.json is damaged",
        "seconds.csv is damaged: it tells no seconds of any stage.",
        "metrics.jsonl is not there, so that nothing is known of the steps.",
        "no page of its own yet",
        "fingerprint.json is not there, so that the run is in no mean over seeds.",
        "Stage 'search' of metrics.jsonl has 'alpha' at some steps only, or of several shapes.",
        "uneven has no finished model yet",
        "nowhere is no run",
        f"Not finished yet, so that models may be missing: {bare}.",
    ):
        assert words in said, words
    assert len([f for f in page.figures if f.startswith("Norm of the hypergradient")]) == 2
    assert [f for f in page.figures if f.startswith("alpha: 3 entries")]
    assert ["run", "search", "4", "–", "–", "–"] in page.cells
    assert ["seed", "–", "–", "3"] in page.cells


def test_half_a_character_is_shown_as_its_escape_and_holds_nothing_up(tmp_path):
    half = "\ud800"  # which JSON can have, and UTF-8 can not
    rows = [row | {"stage": f"search{half}", f"alpha{half}": [1.0, 2.0]} for row in steps(count=4)]
    odd = result(5, 8, {f"q{half}": [1, 0]}) | {"metrics": {f"metric{half}": 0.5}}
    settings = {"model": f"m{half}", "task": f"t{half}", f"option{half}": half}
    run = make_run(tmp_path / "run", {"chosen": odd, os.fsdecode(b"\xff"): odd}, rows, **settings)
    (run / "selection.json").write_text(json.dumps({half: [half, {half: 1}]}))
    page = report(tmp_path / "page", run, make_run(tmp_path / "other", {"all": result(6, 9)}, steps(count=4)))
    for words in ("search", "m", "t", "q", "metric", "option"):
        assert f"{words}\\ud800" in page.text, words
    told = (tmp_path / "page" / "report.md").read_text()
    assert "| run |  | \\udcff | m\\ud800 | t\\ud800 | 8 |" in told and "| other |  | all | tiny | piqa | 9 |" in told


def test_selections_over_seeds_are_compared(tmp_path):
    on = [[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]]
    found = [{"chosen": result(5 + i, 8, {"q": each})} for i, each in enumerate(on)]
    runs = [make_run(tmp_path / f"s{i}", each, (), seed=i) for i, each in enumerate(found)]
    page = report(tmp_path / "page", *runs)
    # Pairs: 1/3, 1 and 1/3; of two of four drawn twice one pair in six is the same, and four share one of three.
    assert ["", "chosen", "piqa", "3", "0.56", "0.33", "0.39"] in page.cells
    assert ["", "chosen", "piqa", "3", "accuracy", "60.0 %", "10.0 %"] in page.cells
    assert "No two runs differ" not in page.text
    assert "What the runs differ in:" in page.text and ["seed", "0", "1", "2"] in page.cells


def test_the_front_is_of_models_that_no_smaller_one_equals():
    assert side_by_side_page.on_front([0, 5, 5, 9, 12], [0.5, 0.4, 0.7, 0.7, 0.9]) == [0, 2, 4]
    assert side_by_side_page.on_front([3, 3], [1.0, 1.0]) == [0]
    assert side_by_side_page.on_front([], []) == []


def test_losses_are_better_the_smaller_they_are(tmp_path):
    sizes = (("a", 10, 2.0), ("b", 900, 1.0), ("c", 20_000, 1.5))  # on a logarithmic axis, as is this norm
    texts = {name: {"parameters": size, "metrics": {"loss": loss}} for name, size, loss in sizes}
    page = report(tmp_path / "page", make_run(tmp_path / "run", texts, steps(count=60)))
    assert [f for f in page.figures if f.endswith("(a of run, b of run).")]
    assert "10" in page.text and "mathdefault" not in page.text
    assert ["run", "", "b", "tiny", "piqa", "900", "1.000"] in page.cells


def history(selection, rows):
    return histories.History(None, "x", {}, selection, [], {}, "", []), histories._stage("search", rows, [])


def test_steadiness_by_hand():
    rows = {
        1: {"alpha": np.array([3.0, 2.0, 1.0]), "gate": np.array([1.0, 0.0]), "one": np.array([1.0])},
        2: {"alpha": np.array([1.0, 3.0, 2.0]), "gate": np.array([1.0, 1.0]), "one": np.array([2.0])},
        3: {"alpha": np.array([1.0, 2.0, 3.0]), "gate": np.array([0.0, 1.0]), "one": np.array([3.0])},
    }
    rows = {step: row | {"outer_loss": np.array(1.0)} for step, row in rows.items()}
    steady = histories.steadiness(*history({"layers": [2, 1]}, rows))
    assert steady.keys() == {
        "what is on (Jaccard)", "the 2 largest of alpha (Jaccard)", "the order of alpha (rank correlation)"
    }  # fmt: skip
    np.testing.assert_allclose(steady["what is on (Jaccard)"], [0, 0.5, 1])
    np.testing.assert_allclose(steady["the 2 largest of alpha (Jaccard)"], [1 / 3, 1, 1])
    np.testing.assert_allclose(steady["the order of alpha (rank correlation)"], [-1, 0.5, 1])
    assert histories.by_chance(0, 0, 4) == 1
    pairs = itertools.product(itertools.combinations(range(5), 2), itertools.combinations(range(5), 4))
    every = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs]
    np.testing.assert_allclose(histories.by_chance(2, 4, 5), np.mean(every), rtol=1e-12)
    assert histories.jaccard(np.zeros(2, bool), np.zeros(2, bool)) == 1
    assert np.isnan(histories.rank_correlation(np.ones(3), np.arange(3.0)))


def test_searches_of_one_run_are_compared(tmp_path):
    rows = steps(alpha=lambda i: [1, 2, 3, 4]) + steps("search-1", alpha=lambda i: [1, 2, 4, 3])
    page = report(tmp_path / "page", make_run(tmp_path / "run", {"a": result(1, 1)}, rows))
    assert ["search", "search-1", "alpha", "0.80"] in page.cells
    assert {"search", "search-1"} <= {*page.titles}


def test_long_searches_of_many_variables_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    many = {f"site{i}": lambda _: rng.normal(size=300) for i in range(30)}
    run = make_run(tmp_path / "run", {"a": result(1, 1)}, steps(count=250, **many))
    page = report(tmp_path / "page", run)
    assert "6 further variables are in metrics.jsonl and not drawn." in page.text
    words = "300 entries, from the first (violet) to the last (yellow); 40 of them are drawn"
    assert len([figure for figure in page.figures if words in figure]) == 24
    assert (tmp_path / "page" / "report.html").stat().st_size < 10e6


def test_what_stages_took_is_counted_in_batches(tmp_path):
    search = [row | {"hvps": 3} for row in steps(count=4)]
    training = [{"stage": "finetune a", "step": i + 1, "inner_loss": 1.0} for i in range(10)]  # a row for each batch
    rows = [*search, *training, {"stage": "warm-up of search", "step": 1, "inner_loss": 1.0}]  # a row for each step
    run = make_run(tmp_path / "run", {"a": result(1, 1)}, rows, inner_steps=5, accumulate=2)
    page = report(tmp_path / "page", run)
    titles = ["run", "stage", "steps", "gradients of a batch", "Hessian-vector products of a batch", "seconds"]
    assert titles in page.cells
    assert ["run", "search", "4", "40", "24", "–"] in page.cells
    assert ["run", "finetune a", "5", "10", "0", "–"] in page.cells
    assert ["run", "warm-up of search", "1", "2", "0", "–"] in page.cells


def test_a_metric_and_its_interval_on_the_page(tmp_path):
    cola = result(7, 5) | {"metrics": {"matthews": 0.05}}
    page = report(tmp_path / "page", make_run(tmp_path / "cola", {"x": cola, "y": result(7, 9)}, ()))
    (titles,) = [row for row in page.cells if row[:2] == ["run", "method"]]
    rows = {row[2]: dict(zip(titles, row, strict=True)) for row in page.cells if row[0] == "cola"}
    assert rows["x"]["matthews"] == "5.0" and rows["x"]["95 % interval of accuracy"] == "60.0 to 80.0 %"
    assert rows["x"]["accuracy"] == "" and rows["y"]["accuracy"] == "70.0 %" and rows["y"]["matthews"] == ""
    assert "metric" not in titles and "95 % interval" not in titles


def test_the_axis_of_parameters_begins_at_0(tmp_path, monkeypatch):
    seen = []
    drawn = side_by_side_page.figure
    kept = lambda fig, *more: (seen.append(fig.axes[0].get_xlim() if fig else None), drawn(fig, *more))[1]  # noqa: E731
    monkeypatch.setattr(side_by_side_page, "figure", kept)
    for name, sizes in (("near", (0, 90_000)), ("far", (0, 10, 90_000))):  # the second on a logarithmic axis
        arms = {f"m{size}": result(5, size) for size in sizes}
        seen.clear()
        report(tmp_path / f"page-{name}", make_run(tmp_path / name, arms, ()))
        assert [low for low, _ in seen] == [0], name


def test_the_page_of_the_run_is_shown_as_a_page(tmp_path):
    own = """# A method on rte, tiny

What was found with `alpha`,
and **how**: 2 < 3.

![layer logits](figures/alpha.png)

| model | loss |
|---|---:|
| a \\| b | 1.0 |
| short |

- against b: +1
- against c: `x`

```
| not | a table |
```
"""
    run = make_run(tmp_path / "run", {"a": result(1, 1)}, ())
    (run / "report.md").write_text(own)
    page = report(tmp_path / "page", run)
    assert "A method on rte, tiny" in page.titles
    assert ["a | b", "1.0"] in page.cells and ["short", ""] in page.cells
    assert "What was found with alpha, and how: 2 < 3." in page.text
    assert "Figure in the run's folder: layer logits (figures/alpha.png)" in page.text
    assert "against c: x" in page.text and "| not | a table |" in page.text
    for raw in ("![", "|---", "**", "# A method"):
        assert raw not in page.text, raw
    text = (tmp_path / "page" / "report.html").read_text()
    assert "<strong>how</strong>" in text and "<li>against b: +1</li>" in text


def test_a_map_of_many_layers_is_no_wider_than_the_page(tmp_path):
    many = result(1, 1, {"q_proj": [i % 2 for i in range(80)]})
    page = report(tmp_path / "page", make_run(tmp_path / "run", {"a": many}, ()))
    (numbers,) = [row for row in page.cells if row[1:2] == ["0"] and len(row) == 81]
    assert [each for each in numbers if each] == [str(i) for i in range(0, 80, 5)]
    text = (tmp_path / "page" / "report.html").read_text()
    assert "table-layout: fixed; width: 100%" in text and 'style="width: calc(10rem + 80 * 1.3rem)"' in text


def test_numbers_that_no_axis_can_show_are_told_and_not_drawn(tmp_path):
    rows = [row | {"hvps": 1e300, "outer_loss": 1e200, "hypergradient_norm": 1e-320} for row in steps(count=3)]
    rows += [{"stage": "a", "step": 2**53, "inner_loss": 1e200}, {"stage": "b", "step": 1, "inner_loss": []}]
    arms = {"huge": {"parameters": 2**53, "metrics": {"loss": 1e308}}, "no": {"parameters": 1, "metrics": {}}}
    run = make_run(tmp_path / "run", arms, rows, accumulate=10**40, inner_steps=1, seed=[1])
    page = report(tmp_path / "page", run)
    (cells,) = [row for row in page.cells if row[:2] == ["run", "search"]]
    assert cells[2:] == ["3", f"{3 * 10**40:,}", "–", "–"]
    assert "No model has a number that could be drawn." in page.missing
    assert next(row for row in page.cells if row[2:3] == ["huge"])[6] == "1e+308"
