"""Runs of whole commands, which several tests look at."""

import functools

import jax
import pytest

from methods import cli
from tests.methods import commands


@pytest.fixture(scope="session")
def command_line(tiny_model, tiny_data, tiny_glue, tmp_path_factory):
    """`command_line(name)`: the words of a row of `commands.TABLE`, and the folder of its run."""
    root = tmp_path_factory.mktemp("commands")

    def words(name):
        data = tiny_glue if commands.TABLE[name].task == "rte" else tiny_data
        return commands.words(name, tiny_model, data, root / name), root / name

    return words


@pytest.fixture(scope="session")
def finished(command_line):
    """`finished(name)`: the folder of that run, which is made once."""

    @functools.cache
    def run(name):
        words, out = command_line(name)
        with jax.enable_x64(False):
            assert cli.run(words) == 0
        return out

    return run
