"""What several files of tests look at: runs of whole commands, models of torch and ours, a stack of layers."""

import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from methods import cli, models
from methods.settings import Settings
from tests.conftest import require
from tests.methods import commands
from tests.methods.lora_files import L
from tests.methods.peft_oracle import Llama


@pytest.fixture(scope="session")
def command_line(tiny_model, tiny_data, tiny_glue, tmp_path_factory):
    """`command_line(name)`: the words of a row of `commands.TABLE`, and the folder of its run."""
    root = tmp_path_factory.mktemp("commands")

    def words(name):
        data = tiny_glue if commands.TABLE[name].task == "rte" else tiny_data
        return commands.words(name, tiny_model, data, root / name), root / name

    return words


@pytest.fixture(scope="session")
def options_read():
    """`options_read[name]`: the options that the run of that command read, but to look at them or to tell of them."""
    return {}


@pytest.fixture(scope="session")
def finished(command_line, options_read):
    """`finished(name)`: the folder of that run, which is made once."""

    @functools.cache
    def run(name):
        words, out = command_line(name)
        with jax.enable_x64(False), listening(options_read.setdefault(name, set())):
            assert cli.run(words) == 0
        return out

    return run


TELLING = {"dataclasses", "methods.cli", "methods.configuration", "methods.options", "methods.pages", "methods.ranges"}
TELLING |= {"methods.runfolder", "methods.side_by_side"}
LOOKING = {"_check_batches", "check", "check_model", "page", "settled", "unsettled", "unused", "used"}
"""Modules and functions that read options in order to check them, to keep them or to tell of them."""


@contextlib.contextmanager
def listening(names):
    """Adds to `names` those of the settings that the block reads, but in `TELLING` and for `LOOKING`."""

    def read(settings, name):
        frame = sys._getframe(1)
        telling = frame.f_globals["__name__"] in TELLING
        while frame is not None and not telling:
            telling, frame = frame.f_code.co_name in LOOKING, frame.f_back
        names.update(() if telling else [name])
        return object.__getattribute__(settings, name)

    Settings.__getattribute__ = read
    try:
        yield
    finally:
        del Settings.__getattribute__


@pytest.fixture
def stack():
    key = jax.random.key(7)
    return jax.random.normal(key, (L, 6, 8), jnp.float64), jax.random.normal(key, (2, 5, 6), jnp.float64)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A random Llama as torch makes it, and the same one as we load it."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
    ).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return folder, models.load(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A random BERT with three classes as torch makes it, and the same one as we load it."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, num_labels=3, **sizes)
    config.initializer_range = 0.2
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder, models.load(folder)


@pytest.fixture(scope="session")
def llama(tiny_llama):
    """Our tiny Llama, PEFT's way to write an adapter of it, and its merged weights of a folder."""
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    folder, ours = tiny_llama
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    return Llama(ours, theirs, torch, peft)
