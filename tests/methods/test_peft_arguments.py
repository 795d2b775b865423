"""What `save_peft` and `load_peft` are given in place of what they take: each told in a sentence."""

import dataclasses
import types

import jax.numpy as jnp
import pytest

from methods.adapters import LoRAConfig, load_edit, load_peft, save_peft
from tests.methods.lora_files import NAMES, SHAPES, L, trained

CONFIG = LoRAConfig(rank=2)
PARAMS = trained(CONFIG)
MODEL = types.SimpleNamespace(hf_names=NAMES, config=types.SimpleNamespace(num_layers=L), weights={"blocks": {}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_peft(tmp_path_factory.mktemp("peft") / "adapter", CONFIG, PARAMS, NAMES)


WRONG = {
    "folder": [None, 3, NAMES],
    "names": [MODEL, MODEL.config, None, "base", NAMES.modules, type(NAMES)],
    "shapes": [MODEL.config, None, {"q_proj": 16}, {"q_proj": (16, 0)}, {"q_proj": (16,)}, list(SHAPES)],
    "num_layers": [0, -1, True, "2", 2.0, None, MODEL.config],
    "base": [MODEL.weights, MODEL, 3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_load_peft_names_an_argument_that_is_something_else(name, value, folder):
    given = {"folder": folder, "names": NAMES, "shapes": SHAPES, "num_layers": L} | {name: value}
    with pytest.raises(TypeError, match=rf"^load_peft\({name}=\.\.\.\) was given .*: it must be .*\.$"):
        load_peft(**given)
    if name in ("folder", "shapes", "num_layers"):
        with pytest.raises(TypeError, match=rf"^load_edit\({name}=\.\.\.\) was given "):
            load_edit(**{at: given[at] for at in ("folder", "shapes", "num_layers")})


WRONG_OUT = {
    "folder": [None, NAMES],
    "config": [PARAMS, None, LoRAConfig],
    "params": [CONFIG, {"lora": PARAMS, "head": {}}, {"q_proj": {"a": 1.0, "b": 2.0}}, None],
    "names": [MODEL, None],
    "head": [3, jnp.ones(2), {"out": jnp.ones(2)}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_OUT.items() for value in values])
def test_save_peft_names_an_argument_that_is_something_else(name, value, tmp_path):
    given = {"folder": tmp_path / "new", "config": CONFIG, "params": PARAMS, "names": NAMES} | {name: value}
    with pytest.raises(TypeError, match=rf"^save_peft\({name}=\.\.\.\) was given .*: it must be .*\.$"):
        save_peft(**given)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (L - 1, rf"an adapter of layer {L - 1}, .* but num_layers={L - 1} has the layers 0 to {L - 2}: give"),
        (L + 3, rf"has adapters up to layer {L - 1}, but .* num_layers={L + 3} has layers up to {L + 2}: give"),
    ],
)
def test_a_wrong_number_of_layers_is_told(layers, sentence, folder):
    with pytest.raises(ValueError, match=sentence):
        load_peft(folder, NAMES, SHAPES, layers)


def test_names_and_shapes_are_of_one_model(folder):
    with pytest.raises(ValueError, match=r"load_peft\(shapes=\.\.\.\) has no q_proj"):
        load_peft(folder, NAMES, {site: size for site, size in SHAPES.items() if site != "q_proj"}, L)
    other = dataclasses.replace(NAMES, modules={"q_proj": "model.blocks.{layer}.q"})
    with pytest.raises(ValueError, match="has no place in this model"):
        load_peft(folder, other, SHAPES, L)
