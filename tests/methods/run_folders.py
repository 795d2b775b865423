"""Run folders by hand, as `bilevel report` reads them."""

import json

FINGERPRINT = {
    "versions": {"bilevel": "1", "float": "32"},
    "inputs": {
        "piqa training rows": {"rows": 9, "sha256": "a"},
        "encoded training rows": {"shapes": [], "sha256": "b"},
    },
    "model files": {"config.json": {"sha256": "c", "size": 2, "times": [1, 1], "inode": 5}},
    "found": [],
}


def make_run(folder, arms, rows=None, fingerprint=FINGERPRINT, **config):
    """A run with results by the names of its models; with `rows` of its steps it has a page of its own too."""
    (folder / "results").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": "models/tiny", "task": "piqa"} | config))
    if fingerprint is not None:
        (folder / "fingerprint.json").write_text(json.dumps(fingerprint))
    if rows is not None:
        (folder / "report.md").write_text("# Its own page\n")
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, result in arms.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(result))
    return folder


def result(correct, parameters, on=None):
    """A model that is right so often of ten."""
    accuracy = {"value": correct / 10, "low": correct / 10 - 0.1, "high": correct / 10 + 0.1}
    row = {"parameters": parameters, "accuracy": accuracy | {"correct": correct, "total": 10}}
    return row if on is None else row | {"on": on}
