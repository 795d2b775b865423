"""The benchmark of influences: its page is that of its record, a setting can be measured, and goes on where it was."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.attribution import __main__ as command
from benchmarks.attribution import bergson_report, beside_bergson, cases, our_side, report
from benchmarks.attribution.cases import Setting
from benchmarks.record import Record, short

pytestmark = pytest.mark.usefixtures("float32_by_default")

SMALL = beside_bergson.Sizes(layers=1, width=8, heads=2, vocabulary=12, batch=2, tokens=6)


def test_the_page_is_that_of_the_record():
    page = (report.DOCS / report.PAGE).read_text(encoding="utf-8")
    record = Record(report.RECORD)
    assert report.page(record) == page
    rank, count = report.correlation(record)
    assert count >= 12 and f"is {rank:.2f}" in page


def test_a_setting_is_measured_once(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SUBSETS", 4)
    monkeypatch.setattr(cases, "MNIST_ROWS", 40)
    monkeypatch.setattr(cases, "MNIST_BATCH", 20)
    record, setting = Record(tmp_path / "record.jsonl"), Setting("sgd", optax.sgd(0.05), steps=6)
    rows = list(command.measure("mnist", setting, record))
    record.add(rows)
    assert rows[0]["section"] == "smoothness" and rows[0]["score"] > 0.9
    assert [row["score"] for row in rows[1:]] == list(command.ALWAYS)
    assert all(np.isfinite(row["value"]) for row in rows[1:])
    assert list(command.measure("mnist", setting, Record(tmp_path / "record.jsonl"))) == []
    assert len(report.points(record)) == 1


def test_scores_of_our_side_are_differences_of_trainings_in_torch(tmp_path):
    # transformers' Llama computes its norms in float32 whatever it is given, which differences would show
    weights = beside_bergson.write(tmp_path, "gpt2", 3, SMALL)
    task = json.loads((tmp_path / "task.json").read_text())
    wanted, loss = by_differences(tmp_path, task)
    with jax.enable_x64(True):
        asked = our_side.question(tmp_path, task, jnp.float64)
        for way in our_side.WAYS.values():
            found, value = way(asked)[0]()
            assert value == pytest.approx(loss, rel=1e-10)
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6 * np.abs(wanted).max())
    assert weights == sum(np.size(x) for x in jax.tree.leaves(asked.start.params))


def by_differences(folder, task, step=1e-4):
    """The score of each row by central differences of its weight, and the query's loss, with Adam as its paper has it
    (and `eps_root` under the root), in float64 torch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    batches = torch.from_numpy(np.load(folder / "rows.npy")).reshape(task["steps"], task["batch"], -1)
    query = torch.from_numpy(np.load(folder / "query.npy"))

    def loss(rows, weights):
        logs = torch.log_softmax(model(rows).logits[:, :-1], -1)
        each = -logs.gather(2, rows[:, 1:, None])[..., 0].sum(1)
        return (weights * each).sum() / rows[:, 1:].numel()

    def trained(weights):
        params = dict(model.named_parameters())
        for name, value in params.items():
            value.data.copy_(start[name])
        (b1, b2), mean, square = task["betas"], dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
        for t, (rows, of) in enumerate(zip(batches, weights.reshape(task["steps"], -1), strict=True), 1):
            slopes = torch.autograd.grad(loss(rows, of), list(params.values()))
            for (name, value), slope in zip(params.items(), slopes, strict=True):
                mean[name] = b1 * mean[name] + (1 - b1) * slope
                square[name] = b2 * square[name] + (1 - b2) * slope**2
                root = (square[name] / (1 - b2**t) + task["eps_root"]).sqrt() + task["eps"]
                value.data -= task["rate"] * mean[name] / (1 - b1**t) / root
        with torch.no_grad():
            return loss(query, torch.ones(len(query), dtype=torch.float64)).item()

    ones = torch.ones(batches.shape[0] * batches.shape[1], dtype=torch.float64)
    moved = step * torch.eye(len(ones), dtype=torch.float64)
    return np.array([(trained(ones + e) - trained(ones - e)) / (2 * step) for e in moved]), trained(ones)


def test_without_bergson_its_part_is_left_out_with_a_sentence(tmp_path, capsys, monkeypatch):
    (tmp_path / "record.jsonl").write_bytes(report.RECORD.read_bytes())
    monkeypatch.setattr(beside_bergson, "PEER", "a_library_that_nobody_has")
    options = command.Options(only=("bergson",), out=tmp_path / "record.jsonl", docs=tmp_path)
    command.main(options)
    said = capsys.readouterr().out
    assert said == (
        f"a_library_that_nobody_has is left out, for {sys.executable} does not have it: give --python an interpreter "
        "that has.\n"
    )
    assert (tmp_path / report.PAGE).read_text() == report.page(Record(report.RECORD))
    assert "cannot be run" in (beside_bergson.missing(str(tmp_path / "python")) or "")


def test_our_side_is_measured_and_beside_bergson_goals_are_judged(tmp_path, monkeypatch):
    said = []

    def side(python, folder, module, *words):  # ours twice, and once as if it were bergson's
        said.append(module)
        way = words or ("bilevel.Unrolled",)
        return run(python, folder, "our_side", *way) | ({} if words else theirs)

    run, theirs = beside_bergson.side, {"seconds": 1e6, "processor_seconds": 1e6, "memory": None}
    monkeypatch.setattr(beside_bergson, "side", side)
    monkeypatch.setattr(beside_bergson, "OURS", ("bilevel.Replay",))
    record = Record(tmp_path / "record.jsonl")
    rows = list(beside_bergson.measured("llama", 3, record, sys.executable, SMALL))
    assert said == ["bergson_side", "our_side"]
    record.add(rows)
    assert list(beside_bergson.measured("llama", 3, record, sys.executable, SMALL)) == []
    own = rows[1]
    assert own["compile_seconds"] > 0 and own["memory"]["peak"] >= own["memory"]["before"] > 0
    assert own["correlation_below_1"] < 1e-6
    page = bergson_report.section(record)
    assert page.count("| met |") == 3 and "missed" not in page  # of memory nothing is known
    slow = short(rows[0] | {"seconds": 1e-6})
    record.rows = [slow, *rows[1:]]
    assert "| missed |" in bergson_report.section(record)
