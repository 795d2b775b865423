"""`bilevel report RUN...`: one table and one figure of runs of any method."""

import json

import pytest

from methods import cli, results, side_by_side
from tests.methods.run_folders import FINGERPRINT, make_run, result


@pytest.fixture
def runs(tmp_path):
    on = {"q_proj": [1, 0.5, 0], "v_proj": [0, 0, 1]}
    more = {"q_proj": [1, 1, 1], "ffn_input": [0, 1, 0]}
    one = make_run(tmp_path / "one", {"chosen": result(7, 1200, on), "pretrained": result(5, 0)})
    other = make_run(tmp_path / "other", {"allocated": result(8, 2400, more)}, task="rte")
    regression = {"parameters": 10, "metrics": {"pearson": 0.5}, "on": on}
    return [one, other, make_run(tmp_path / "third", {"scored": regression})]


def test_runs_are_put_side_by_side(runs, tmp_path):
    out = tmp_path / "page"
    assert cli.run(["report", *map(str, runs), "--out", str(out)]) == 0
    page = (out / "report.md").read_text()
    assert "| task | adapter parameters | accuracy | pearson | 95 % interval of accuracy | right |" in page
    assert "| one |  | chosen | tiny | piqa | 1,200 | 70.0 % |  | 60.0 to 80.0 % | 7/10 |" in page
    assert "| other |  | allocated | tiny | rte | 2,400 | 80.0 % |" in page
    assert "| third |  | scored | tiny | piqa | 10 |  | 50.0 |  |  |" in page
    assert "pearson: a correlation, times 100; accuracy: in per cent." in page
    assert "Means over seeds" not in page
    assert (out / "figures" / "side_by_side.png").stat().st_size > 0


def test_modules_of_different_runs_share_one_axis(runs):
    rows = side_by_side.read(runs[:2]).rows
    names, shares = side_by_side.modules(rows)
    assert [row.arm for row in rows] == ["chosen", "pretrained", "allocated"]
    assert names == [f"{layer}.{site}" for site in ("q_proj", "v_proj", "ffn_input") for layer in range(3)]
    assert shares[0].tolist() == [1, 0.5, 0, 0, 0, 1, 0, 0, 0]
    assert shares[2].tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 0]
    assert all(share != share for share in shares[1])  # it does not say


def test_what_is_unfinished_damaged_or_no_run_is_named_beside_the_others(runs, tmp_path, capsys):
    empty, foreign, half = make_run(tmp_path / "empty", {}), tmp_path / "foreign", make_run(tmp_path / "half", {})
    foreign.mkdir()
    (foreign / "config.json").write_text("[1, 2]")
    (foreign / "results").mkdir()
    (foreign / "results" / "a.json").write_text("{}")
    odd = {"list": [], "nan": result(1, 1) | {"accuracy": {"value": float("nan")}}, "on": result(1, 1, {"q": "yes"})}
    for name, content in odd.items():
        (half / "results" / f"{name}.json").write_text(json.dumps(content))
    (half / "results" / "whole.json").write_text(json.dumps(result(9, 77)))
    (runs[0] / "report.md").write_text("finished")
    out, given = tmp_path / "page", [empty, runs[0], foreign, half, tmp_path / "nowhere"]
    assert cli.run(["report", *map(str, given), "--out", str(out)]) == 2
    page, said = (out / "report.md").read_text(), capsys.readouterr().err
    assert "| one |  | chosen |" in page and "| half |  | whole | tiny | piqa | 77 | 90.0 %" in page
    assert said.count("\n") == 1
    for place in ("empty has no finished model", "foreign/config.json is of no run", "nowhere is no run"):
        assert place in said and place in page, place
    for name in odd:
        assert f"{name}.json is no result of this program" in page, name
    assert f"Not finished yet, so that models may be missing: {half}." in page


def test_runs_of_one_name_are_told_apart_and_no_run_is_written_over(runs, tmp_path, capsys):
    twin = make_run(tmp_path / "deeper" / "one", {"chosen": result(3, 5)})
    assert {row.run for row in side_by_side.read([runs[0], twin]).rows} == {str(runs[0]), str(twin)}
    assert cli.run(["report", str(runs[0]), "--out", str(runs[0])]) == 2
    assert "whose own report.md this would replace" in capsys.readouterr().err
    assert not (runs[0] / "report.md").exists()


def test_bad_runs_are_one_sentence(runs, tmp_path, capsys):
    empty = make_run(tmp_path / "empty", {})
    damaged = make_run(tmp_path / "damaged", {"a": result(1, 1)})
    (damaged / "results" / "a.json").write_text("{")
    cases = {
        "Nothing to put side by side": [],
        "is no run: it has no config.json": [str(tmp_path / "nowhere")],
        "has no finished model yet": [str(empty)],
        "is damaged": [str(damaged)],
    }
    for sentence, words in cases.items():
        assert cli.run(["report", *words, "--out", str(tmp_path / "page")]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_the_method_the_order_and_the_means_over_seeds(tmp_path):
    made = []
    for seed, (best, worst) in enumerate([(9, 4), (7, 6)]):
        folder = make_run(tmp_path / f"seed{seed}", {"worse": result(worst, 5), "better": result(best, 5)}, seed=seed)
        (folder / "config.yaml").write_text("# made by\ncommand: flexora\nsettings: {}\n")
        made.append(folder)
    losses = {"a": {"loss": 1.5, "exact": 0.0}, "b": {"loss": 0.5, "exact": 0.0}}
    texts = {name: result(0, 3) | {"metrics": values} for name, values in losses.items()}
    made.append(make_run(tmp_path / "texts", texts, task="chat"))
    rows = side_by_side.read(made).rows
    assert [row.arm for row in rows] == ["b", "a", "better", "better", "worse", "worse"]  # by task; of losses the least
    assert [row.method for row in rows] == ["", "", *["flexora"] * 4]
    page = side_by_side.over_seeds(rows)
    assert "| flexora | better | piqa | 2 | accuracy | 80.0 % | 14.1 % |" in page
    assert "| flexora | worse | piqa | 2 | accuracy | 50.0 % | 14.1 % |" in page and "chat" not in page
    assert "| texts |  | b | tiny | chat | 3 | 0.500 | 0.0 % |" in side_by_side.markdown(results.table(rows))


def losses(first, parameters):
    """A model by its losses of three rows of two tokens."""
    mean = sum(first) / 6
    return {"parameters": parameters, "metrics": {"loss": mean}, "losses": first, "tokens": [2, 2, 2]}


def test_models_that_are_measured_by_loss_are_told_by_loss_and_its_paired_intervals(tmp_path):
    made = {"pretrained": losses([3, 6, 3], 0), "b": losses([2, 4, 2], 10), "a": losses([3, 4, 4], 10)}
    run = make_run(tmp_path / "run", made, task="chat")
    (run / "finished.json").write_text(json.dumps({"arms": ["pretrained", "b", "a"], "selection": True}))
    assert cli.run(["report", str(run), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.md").read_text()
    assert "| adapter parameters | loss | difference in loss |" in page
    for absent in ("accuracy", "Wilson", "right", "share test rows"):
        assert absent not in page
    # a - b: 1, 0, 2 over 6 tokens; the gaps from 0.5 a token are 0, -1, 1: 1.96 sqrt(3/2 * 2) / 6 = 0.5658.
    assert "| run |  | a | tiny | chat | 10 | 1.833 | +0.5000 (-0.0658 to +1.0658) |" in page
    assert "| run |  | b | tiny | chat | 10 | 1.333 |  |" in page
    assert "| run |  | pretrained | tiny | chat | 0 | 2.000 | +0.6667 (" in page
    assert "below 0 the model is better than that one." in page
    assert "![loss, parameters](figures/side_by_side.png)" in page


def test_an_interval_stands_beside_what_it_is_of(tmp_path):
    """CoLA is measured by Matthews' correlation, and counts right answers all the same."""
    cola = result(7, 5) | {"metrics": {"matthews": 0.05}}
    negative = {"parameters": 5, "metrics": {"pearson": -0.2}}
    runs = [make_run(tmp_path / "cola", {"x": cola}, task="cola"), make_run(tmp_path / "s", {"x": negative}, task="s")]
    rows = side_by_side.read(runs).rows
    shown = results.table(rows)
    first, second = (dict(zip(shown.titles, row, strict=True)) for row in shown.rows)
    assert first["matthews"] == "5.0" and first["95 % interval of accuracy"] == "60.0 to 80.0 %"
    assert first["right"] == "7/10" and first["pearson"] == "" and "95 % interval" not in first
    assert second["pearson"] == "-20.0" and second["95 % interval of accuracy"] == ""


def test_means_are_over_what_is_the_same_but_for_the_seed(tmp_path):
    def made(name, correct, fingerprint=FINGERPRINT, **config):
        return make_run(tmp_path / name, {"x": result(correct, 5)}, fingerprint=fingerprint, **config)

    def told(*runs):
        return [row[3:] for row in side_by_side.means(side_by_side.groups_over_seeds(side_by_side.read(runs).rows))]

    first, second = made("first", 3, seed=0), made("second", 9, seed=1)
    assert told(first, second) == [["2", "accuracy", "60.0 %", "42.4 %"]]
    # A seed counts once, by the run that was named first, not by the best.
    again = made("again", 9, seed=0)
    assert told(first, again, second) == told(first, second) and told(first, again) == []
    # Rows, model files, versions and settings that decide a result part runs; what decides none does not.
    others = {
        "rows": FINGERPRINT | {"inputs": {"piqa training rows": {"rows": 9, "sha256": "other"}}},
        "files": FINGERPRINT | {"model files": {"config.json": {"sha256": "other"}}},
        "versions": FINGERPRINT | {"versions": {"bilevel": "2", "float": "32"}},
        "unknown": None,
        "damaged": [],
    }
    for name, fingerprint in others.items():
        assert told(first, made(name, 9, fingerprint, seed=1)) == [], name
    assert told(first, made("lr", 9, seed=1, finetune_lr=0.1)) == []
    touched = {"config.json": {"sha256": "c", "size": 2, "times": [7, 7], "inode": 8}}
    inputs = FINGERPRINT["inputs"] | {"encoded training rows": {"shapes": [[1]], "sha256": "of this seed"}}
    same = FINGERPRINT | {"model files": touched, "inputs": inputs, "found": ["train_rows"]}
    free = made("free", 9, same, seed=1, quiet=True, mesh="data=2", track="wandb", train_rows=72)
    assert told(made("found", 3, same, seed=0, train_rows=66), free) == [["2", "accuracy", "60.0 %", "42.4 %"]]
    repeated = made("repeated", 3, seed=0, train_rows=72)  # as with the config.yaml of the other
    assert told(free, repeated) == told(repeated, free) == [["2", "accuracy", "60.0 %", "42.4 %"]]
    assert told(made("asked", 3, seed=0, train_rows=66), made("other", 9, seed=1, train_rows=72)) == []


def test_a_mean_is_of_one_metric_in_whatever_order_files_name_them_and_a_seed_is_a_number(tmp_path):
    def made(name, metrics, **config):
        return make_run(tmp_path / name, {"x": {"parameters": 1, "metrics": metrics}}, task="chat", **config)

    def told(*runs):
        return [row[3:] for row in side_by_side.means(side_by_side.groups_over_seeds(side_by_side.read(runs).rows))]

    first, second = made("a", {"loss": 1.0, "exact": 0.5}, seed=0), made("b", {"exact": 0.1, "loss": 2.0}, seed=1)
    assert told(first, second) == [["2", "loss", "1.500", "0.707"]]
    assert told(first, made("c", {"exact": 0.1}, seed=1)) == [["2", "exact", "30.0 %", "28.3 %"]]
    assert told(first, made("d", {"f1": 0.1}, seed=1)) == []
    assert side_by_side.over_seeds(side_by_side.read([first, tmp_path / "d"]).rows) == ""
    zeros = [made(f"zero{number}", {"loss": 9.0}, seed=seed) for number, seed in enumerate((0.0, "0", "0.0"))]
    assert told(first, *zeros) == [] and told(first, *zeros, second) == told(first, second)


def test_a_folder_that_is_named_twice_is_one_run(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "run", {"x": result(3, 5)}, seed=0)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", str(run), "run", f"{run}/../run", "--out", "page"]) == 0
    assert (tmp_path / "page" / "report.md").read_text().count("| run |") == 2  # a title and a line


def test_numbers_that_no_page_can_show_are_one_sentence(tmp_path, capsys):
    odd = {
        "it counts no parameters": {"parameters": 10**30},
        "it counts no parameters.": {"parameters": -4},
        "counts no parameters": {"parameters": True},
        "its metrics are no numbers": result(1, 1) | {"metrics": {"loss": 10**400}},
        "metrics are no numbers": result(1, 1) | {"metrics": {"loss": True}},
        "its modules are no lists of numbers": result(1, 1, {"q": [10**400]}),
        "what it got right is no list": result(1, 1) | {"right": "x"},
        "its accuracy is not that of what it got right": result(1, 1) | {"right": [0] * 10},
        "not a number for each row": result(1, 1) | {"losses": [1.0], "tokens": [1, 1]},
    }
    run = make_run(tmp_path / "run", dict(zip("abcdefghi", odd.values(), strict=True)) | {"good": result(1, 1)})
    assert cli.run(["report", str(run), "--out", str(tmp_path / "page")]) == 2
    said = capsys.readouterr().err
    for name, words in zip("abcdefghi", odd, strict=True):
        assert f"{name}.json is no result of this program: " in said and words in said
