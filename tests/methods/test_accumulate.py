"""`--accumulate`: a search over larger batches, computed in parts."""

from importlib import import_module

import jax
import numpy as np
import pytest

import bilevel
from methods import cli, driver
from methods.options import parse
from tests.methods.commands import words

SAME = ("flexora",)
"""Searches whose losses draw nothing."""


@pytest.mark.parametrize("name", SAME)
def test_a_search_is_that_of_the_larger_batch(name, tiny_model, tiny_data, tiny_glue, tmp_path):
    command = import_module(cli.COMMANDS[name].module).COMMAND

    def found(*more):
        given = words(name, tiny_model, tiny_data, tmp_path / "run")[1:]
        setup = command.used(parse(command, name, [*given, *more]))
        bench = command.prepare(setup)
        each = driver.accumulated(command.searches(setup, bench)[0], setup, bench)
        data = {"inner_data": each.inner_data, "outer_data": each.outer_data}
        result = bilevel.run(each.solver, **data, steps=2, key=each.key, progress=False)
        return result.outer, result.inner.params, result.history

    small = found("--batch-size", "2", "--outer-batch-size", "2", "--accumulate", "2")
    large = found("--batch-size", "4", "--outer-batch-size", "4")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), small, large)


def test_more_rows_than_there_are_is_one_sentence(tiny_model, tiny_data, tmp_path, capsys):
    given = [*words("flexora", tiny_model, tiny_data, tmp_path / "run"), "--accumulate", "1000"]
    assert cli.run(given) == 2
    assert "--accumulate 1000 batches of --" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
