"""The solver benchmark runs under benchopt, and its closed forms are right."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "solvers"


def dataset(name):
    spec = importlib.util.spec_from_file_location(f"{name}_dataset", FOLDER / "datasets" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def central_differences(function, x, eps=1e-5):
    return np.array([(function(x + eps * e) - function(x - eps * e)) / (2 * eps) for e in np.eye(len(x))])


@pytest.mark.slow
def test_benchopt_runs_a_stochastic_and_an_unrolled_solver(tmp_path):
    output = FOLDER / "outputs" / f"test_{os.getpid()}.parquet"
    # fmt: off
    command = [
        Path(sys.executable).with_name("benchopt"), "run", FOLDER,
        "-d", "quadratic[dim=5,n_samples=256]",
        "-s", "SOBA", "-s", "UD[inner_steps=10,start=warm]",
        "--max-runs", "4", "--timeout", "300", "--no-plot", "--no-html", "--no-display", "--output", output.stem,
    ]
    # fmt: on
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        table = pd.read_parquet(output)
    finally:
        output.unlink(missing_ok=True)
    table["solver"] = table["solver_name"].str.partition("[")[0]
    for name, calls in (("SOBA", 4), ("UD", 31)):
        rows = table[table["solver"] == name].sort_values("stop_val")
        assert len(rows) >= 4
        assert (rows["objective_oracle_calls"] == calls * rows["objective_steps"]).all()
        assert rows["time"].is_monotonic_increasing
        assert rows["objective_value"].iloc[-1] < rows["objective_value"].iloc[0]


def test_closed_forms_of_the_quadratic():
    module, rng = dataset("quadratic"), np.random.default_rng(0)
    inner, outer = (module._terms(rng, 64, 4, 0.1, 0.1) for _ in range(2))
    value, x = module.ValueFunction(inner, outer), rng.normal(size=4)

    def loss(z, x, terms):
        return float(module._loss(z, x, terms, None))

    z = value.solution(x)
    assert np.abs(central_differences(lambda z: loss(z, x, inner), z)).max() < 1e-8
    slope = central_differences(lambda x: loss(value.solution(x), x, outer), x)
    np.testing.assert_allclose(value.gradient(x), slope, rtol=1e-6, atol=1e-8)
    found = value.metrics(z + 1, x)
    np.testing.assert_allclose(found["func"], loss(z, x, outer), rtol=1e-12)
    np.testing.assert_allclose([found["value"], found["inner_distance"]], [slope @ slope, 4.0], rtol=1e-5)


def test_value_function_of_the_logistic_regression():
    module, rng = dataset("ijcnn1"), np.random.default_rng(0)
    sides = [(rng.normal(size=(n, 3)), np.sign(rng.normal(size=n))) for n in (40, 50)]
    value, x = module.ValueFunction(*sides), np.array([-2.0, 0.0, -4.0])
    _, gradient, z = value(x)
    np.testing.assert_allclose(gradient, central_differences(lambda x: value(x)[0], x, 1e-3), rtol=1e-5)
    inside = module._logistic(z, *sides[0])[1] + np.exp(x) * z
    assert np.abs(inside).max() < 1e-10


def test_missing_data_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    from benchmark_utils.data import load

    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="environment variable BILEVEL_DATA names, and it is not set"):
        load("mnist")
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz does not exist: BILEVEL_DATA must name"):
        load("mnist")
