"""`bilevel report RUN...`: one table and one figure of runs of any method."""

import json

import pytest

from methods import cli, side_by_side


def make_run(folder, arms, **config):
    (folder / "results").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": "models/tiny", "task": "piqa"} | config))
    for name, result in arms.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(result))
    return folder


def result(correct, parameters, on=None):
    accuracy = {"value": correct / 10, "low": correct / 10 - 0.1, "high": correct / 10 + 0.1}
    row = {"parameters": parameters, "accuracy": accuracy | {"correct": correct, "total": 10}}
    return row if on is None else row | {"on": on}


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
    assert "| one |  | chosen | tiny | piqa | 1,200 | 70.0 % | 60.0 to 80.0 % | 7/10 |" in page
    assert "| other |  | allocated | tiny | rte | 2,400 | 80.0 %" in page and "pearson 0.500" in page
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
    assert "| texts |  | b | tiny | chat | 3 | loss 0.500; exact 0.000 |  |  |" in side_by_side.table(rows)
