"""A command on a mesh: the numbers of one device, and a run that goes on with another."""

import json

import jax
import numpy as np
import pytest

from methods import cli
from tests.methods.small import flexora_words


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_flexora_on_a_mesh_is_flexora_on_a_device(tiny_model, tiny_data, tmp_path, capsys):
    one, many = tmp_path / "one", tmp_path / "many"
    with jax.enable_x64(False):
        assert cli.run(flexora_words(tiny_model, tiny_data, one)) == 0
        assert cli.run(flexora_words(tiny_model, tiny_data, many, "--mesh", "data=2,fsdp=2")) == 0
        capsys.readouterr()
        assert cli.run(flexora_words(tiny_model, tiny_data, many, "--mesh", "fsdp=4")) == 0
    assert capsys.readouterr().out.count("already finished") >= 4
    selected = [json.loads((out / "selection.json").read_text())["layers"] for out in (one, many)]
    assert selected[0] == selected[1]
    for alone, split in zip(rows(one), rows(many), strict=True):
        assert alone.keys() == split.keys()
        for name in alone.keys() - {"stage"}:
            np.testing.assert_allclose(split[name], alone[name], rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("data=16", "--mesh data=16 wants 16 devices, but JAX finds 8 (cpu): name fewer (XLA_FLAGS="),
        ("data=3", "--batch-size 4 cannot be split over the 3 devices of --mesh: take a multiple of 3."),
        ("data=8", "--batch-size 4 cannot be split over the 8 devices"),
        ("rows=2", "--mesh 'rows=2': give each of the axes data and fsdp once at most"),
        ("data=2,data=2", "once at most"),
        ("data", "with a number of devices"),
        ("data=0", "with a number of devices"),
        ("data=-2", "with a number of devices"),
        ("data=2,", "with a number of devices"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_sentence(mesh, sentence, tiny_model, tiny_data, tmp_path, capsys):
    assert cli.run(flexora_words(tiny_model, tiny_data, tmp_path / "run", "--mesh", mesh)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
