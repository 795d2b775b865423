"""Language models whose weights are split over a mesh: the numbers of one device, and what devices send each other."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import bilevel
from benchmarks import scaling
from benchmarks.record import Record
from bilevel import Batches, Nested, Unrolled
from methods import flexora, models
from methods.adapters.lora import LoRAConfig
from methods.models import loading
from methods.models.decoder import Decoder, DecoderConfig
from methods.objective import of_hook
from tests.conftest import require
from tests.devices.meshes import apart, on

ROWS, TOKENS = 8, 64


def test_a_search_on_a_split_decoder_is_that_of_one_device():
    config = DecoderConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_positions=16,
    )
    model = Decoder(config, param_dtype=jnp.float64)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 512, (32, 12)))
    weights = model.init(jax.random.key(0), tokens[:1])["params"]
    assert weights["embed"].size >= 2**16  # split

    def loss(weights, adapt, batch):
        logits = model.apply({"params": weights}, batch, None, adapt)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()

    lora = LoRAConfig(rank=2)

    def start(key):  # in double precision
        drawn = lora.init(key, config.site_shapes(), config.num_layers)
        return jax.tree.map(lambda x: x.astype(jnp.float64), drawn)

    problem = flexora.problem(of_hook(loss, weights, lora, config, start))
    solver = Nested(problem, Unrolled(optax.adam(1e-3), 2), optax.sgd(0.1))
    settings = {"inner_data": Batches(tokens[:16], 8), "outer_data": Batches(tokens[16:], 8), "progress": False}
    one = bilevel.run(solver, steps=3, **settings)
    found = bilevel.run(solver, steps=3, sharding=on(), **settings)
    assert apart((found.outer, found.history), (one.outer, one.history)) < 1e-11


def test_a_model_is_loaded_straight_onto_a_mesh(tiny_model):
    whole = models.load(tiny_model).weights
    rule = lambda path, x: P(None, None, "fsdp") if "q_proj" in path else P()  # noqa: E731
    found = models.load(tiny_model, sharding=on(weights=rule)).weights
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        expected = P(None, None, "fsdp") if "q_proj" in jax.tree_util.keystr(path) else P()
        assert len(leaf.sharding.device_set) == 8 and leaf.sharding.spec == expected
    assert found["blocks"]["q_proj"]["kernel"].addressable_shards[0].data.shape == (2, 16, 8)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_device_is_given_its_part_of_each_tensor(name, tmp_path, monkeypatch):
    """Read as slices of the file: turned, cut out of a tensor of three, along any axis, and none twice."""
    transformers, torch = require("transformers"), require("torch")
    if name == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes, dtype="bfloat16")
        oracle = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    else:
        sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
        oracle = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    folder = tmp_path / name
    oracle.save_pretrained(folder)
    whole = models.load(folder).weights
    read = []

    def counting(checkpoint):
        def counted(tensor, part=()):
            array = checkpoint.read(tensor, part)
            read.append(array.nbytes)
            return array

        return dataclasses.replace(checkpoint, read=counted)

    opened = loading.open_folder
    monkeypatch.setattr(loading, "open_folder", lambda path: counting(opened(path)))
    models.load(folder)
    all_of_it, numbers = sum(read), sum(leaf.size for leaf in jax.tree.leaves(whole))
    for axis in (-1, -2):

        def rule(path, x, axis=axis):
            spec = [None] * x.ndim
            if x.ndim >= 2 and x.shape[axis] % 8 == 0:
                spec[axis] = "fsdp"
            return P(*spec)

        read.clear()
        found = models.load(folder, sharding=on("fsdp", weights=rule)).weights
        jax.tree.map(np.testing.assert_array_equal, found, whole)
        assert any(leaf.sharding.spec != P() for leaf in jax.tree.leaves(found))
        assert sum(read) <= all_of_it and len(read) > 8
        if name == "llama":  # of GPT-2's tensors of three, all is read three times where one is not cut
            assert sum(read) == 2 * numbers


@pytest.fixture(scope="module")
def split():
    return scaling.row(scaling.SIZES["tiny"], jax.devices(), ROWS, TOKENS, steps=2)


def test_each_device_holds_an_eighth_of_the_weights(split):
    # Both losses are given the weights, which are one buffer where they are arrays, but are counted twice here.
    assert split["arguments"] / 2 <= 1.05 * split["weights"] / 8


def test_no_activation_of_another_device_is_ever_gathered(split):
    floats = [each for each in split["sent"] if each.shape.startswith(("f32", "bf16"))]
    assert floats and not [each for each in floats if f"[{ROWS},{TOKENS}," in each.shape]
    # What is gathered is one layer's weights at a time, never those of all layers.
    layers = scaling.SIZES["tiny"].layers
    assert not [each for each in floats if f"[{layers}," in each.shape]


def test_collectives_are_read_from_a_compiled_program():
    text = """
      %all-gather.1 = f32[1,512,256]{2,1,0} all-gather(%x), channel_id=1
      %all-reduce.2 = (f32[8,256]{1,0}, bf16[3]{0}) all-reduce(%y, %z), to_apply=%sum
      %all-gather-start = f64[4]{0} all-gather-start(%w)
      %add = f32[8]{0} add(%a, %b)
    """
    assert [tuple(each) for each in scaling.collectives(text)] == [
        ("all-gather", "f32[1,512,256]", 524288),
        ("all-reduce", "(f32[8,256], bf16[3])", 8198),
        ("all-gather", "f64[4]", 32),
    ]


def test_a_sum_of_which_each_device_takes_a_part_is_told_from_others():
    text = """
%add.1 (x: bf16[], y: bf16[]) -> bf16[] {
  ROOT %add.3 = bf16[] add(%x, %y)
}

%all-reduce-scatter.7 (input: bf16[4096,4096]) -> bf16[4096,512] {
  %all-reduce.2 = bf16[4096,4096]{1,0} all-reduce(%input), channel_id=4, to_apply=%add.1
  ROOT %dynamic-slice.3 = bf16[4096,512]{1,0} dynamic-slice(%all-reduce.2, %zero, %first)
}

ENTRY %main (param: bf16[512,4096]) -> bf16[4096,512] {
  %fusion = bf16[4096,512]{1,0} fusion(%product), kind=kCustom, calls=%all-reduce-scatter.7
  %all-reduce.9 = f32[8]{0} all-reduce(%small), channel_id=5, to_apply=%add.1
}
"""
    assert [tuple(each) for each in scaling.collectives(text)] == [
        ("reduce-scatter", "bf16[4096,512]", 2 * 4096 * 512),
        ("all-reduce", "f32[8]", 32),
    ]


def test_a_whole_model_that_is_trained_is_split_with_its_optimizer():
    found = scaling.row(scaling.SIZES["tiny"], jax.devices(), ROWS, TOKENS, steps=2, train="all")
    # Kept are two steps' weights, both moments of Adam and the gradient, in float32. A device that held them whole
    # would hold more than that; an eighth of them, with what a step computes, is less than half of it.
    kept = 2 * 4 * found["weights"]
    assert found["temporary"] < kept / 2.5
    layers = scaling.SIZES["tiny"].layers
    assert not [each for each in found["sent"] if each.kind == "all-gather" and f"[{layers}," in each.shape]


def test_the_page_shows_the_record():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.table(Record(scaling.RECORD)) in page


def test_float32_copies_are_told_from_other_memory():
    text = """
    %inside = f32[9]{0} fusion(%weights)

    ENTRY %main (weights: bf16[2,3]) -> f32[3] {
      %weights = bf16[2,3]{1,0} parameter(0), metadata={op_name="w"}
      %x = f32[2,3]{1,0} parameter(1)
      %copy = f32[2,3]{1,0} fusion(%weights), kind=kLoop, calls=%convert
      %turned = f32[3,2]{0,1} fusion(%weights), kind=kLoop, calls=%transpose
      %row = f32[3]{0} fusion(%weights), kind=kLoop, calls=%slice
      %sum = f32[2,3]{1,0} add(%weights, %x)
      ROOT %again = f32[2,3]{1,0} copy(%x)
    """
    assert scaling.float32_copies(text) == 4 * 6
