"""Every field of PEFT's config: with each value that is read the weights that PEFT gets; others refused by name."""

import dataclasses
import json
import time

import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy

from methods.adapters import load_peft
from methods.adapters.patterns import compiled
from methods.adapters.peft_fields import FIELDS
from tests.methods.lora_files import old_name


def edit(folder, fields=(), remove=()):
    """Writes other fields into a folder's config."""
    path = folder / "adapter_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove} | dict(fields)
    path.write_text(json.dumps(settings))
    return folder


READ = {
    "peft_type": [{}],
    "r": [{"r": 1}, {"r": 40}],
    "lora_alpha": [{"lora_alpha": 3}, {"lora_alpha": 0.5}],
    "rank_pattern": [
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3, "q_proj|.*": 7}},
        {"rank_pattern": {r"^model\.layers\.[02]\.self_attn\.q_proj": 6}, "use_rslora": True},
    ],
    "alpha_pattern": [{"alpha_pattern": {"layers.0.*": 2, ".*": 5}}, {"alpha_pattern": {"0": 9, "proj": 9}}],
    "use_rslora": [{"use_rslora": True, "r": 5}],
    "use_dora": [{"use_dora": True}, {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 3}}],
    "target_modules": [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:k|up)_proj.*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.gate.*)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["model.layers.1.self_attn.o_proj", "0.mlp.up_proj", "self_attn.k_proj", "x_proj"]},
    ],
    "exclude_modules": [
        {"exclude_modules": r".*\.1\..*"},
        {"exclude_modules": ["0.self_attn.q_proj", "mlp.down_proj", "proj"]},
    ],
    "layers_to_transform": [{"layers_to_transform": 1}, {"layers_to_transform": [2, 0]}, {"layers_to_transform": []}],
    "layers_pattern": [
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "lay.rs"]},
        {"layers_to_transform": [1], "layers_pattern": []},
    ],
    "modules_to_save": [{"modules_to_save": []}],
    "task_type": [{"task_type": "CAUSAL_LM"}, {"task_type": None}],
    "init_lora_weights": [
        *({"init_lora_weights": start} for start in (True, False, "gaussian", "orthogonal", "mica", "pissa", "olora")),
        {"init_lora_weights": "pissa", "use_rslora": True, "r": 3, "rank_pattern": {"down_proj": 5}},
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "olora", "alpha_pattern": {"q_proj": 3}, "target_modules": "all-linear"},
        {"init_lora_weights": "OLoRA", "use_dora": True, "use_rslora": True},
    ],
    "lora_dropout": [{"lora_dropout": 0.4}, {"lora_dropout": 0}],
    "bias": [{"bias": "none"}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "inference_mode": [{"inference_mode": True}],
    "revision": [{"revision": "main"}],
    "base_model_name_or_path": [{"base_model_name_or_path": "some/model"}],
    "ensure_weight_tying": [{"ensure_weight_tying": True}],
    "megatron_core": [{"megatron_core": "my.core"}],
    "qalora_group_size": [{"qalora_group_size": 4}],
    "peft_version": [{"peft_version": "0.4.0"}],
    "auto_mapping": [{"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}}],
    "loftq_config": [{"loftq_config": {"loftq_bits": 4}}],
}


@old_name
@pytest.mark.parametrize(("field", "index"), [(field, i) for field, values in READ.items() for i in range(len(values))])
def test_what_is_read_gives_the_weights_that_peft_gets(llama, tmp_path, field, index):
    llama.check(llama.write(tmp_path / "adapter", **READ[field][index]))


# What PEFT passes over when it reads a file (or an older version wrote), put into the file.
@old_name
@pytest.mark.parametrize(
    ("fields", "remove"),
    [
        ({"runtime_config": {"ephemeral_gpu_offload": False}}, ()),
        ({"merge_weights": False, "enable_lora": None}, ()),
        ({"eva_config": {"rho": 2.0}, "corda_config": {}, "lora_ga_config": {}}, ()),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}, ()),
        ({"a_later_field": None, "another": False, "more": [], "and_more": {}, "text": ""}, ()),
        ({"lora_bias": None, "target_parameters": [], "layer_replication": []}, ()),
        ({}, ("rank_pattern", "use_dora", "init_lora_weights", "bias", "task_type", "lora_dropout", "lora_alpha")),
    ],
)
def test_fields_that_change_nothing(llama, tmp_path, fields, remove):
    llama.check(edit(llama.write(tmp_path / "adapter"), fields, remove))


REFUSED = {
    "alora_invocation_tokens": [[5, 6], []],
    "arrow_config": [{"top_k": 2}, {}],
    "bias": ["all", "lora_only", None],
    "enable_lora": [[True, False, True]],
    "init_lora_weights": ["pissa_niter_4", "corda", "loftq", "lora_ga", "PiSSA", "something", 1, ["pissa"]],
    "kasa_config": [{"beta": 1.0}],
    "layer_replication": [[[0, 2], [1, 3]]],
    "lora_bias": [True],
    "megatron_config": [{"hidden_size": 32}],
    "monteclora_config": [{"num_samples": 8}],
    "target_parameters": [["mlp.experts"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}],
    "use_bdlora": [{"nblocks": 2}],
    "use_qalora": [True],
    "velora_config": [{"num_groups": 4}],
    "peft_type": ["ADALORA", None, ["LORA"]],
    "r": [0, -1, 4.0, True, "4", 10**30, None],
    "lora_alpha": [0, -3, "16", float("nan"), float("inf"), True, None, 10**400],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": 2.5}, ["q_proj"], {"q_proj": True}],
    "alpha_pattern": [{"q_proj": -1}, {"q_proj": "8"}, {"q_proj": float("nan")}],
    "use_rslora": ["yes", 1, None],
    "use_dora": ["no", 1, True],
    "target_modules": [None, [], "", ["q_proj", 3], {"q_proj": 1}, ["q_proj"], ["q_proj", "down_proj", "up_proj"]],
    "exclude_modules": [["q_proj"], 3],
    "layers_to_transform": [[0], "1", [True], [-1], 1.0],
    "layers_pattern": ["layers", 3],
    "modules_to_save": ["lm_head", ["lm_head"], ["q_proj"], [3]],
    "task_type": ["TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "whatever", 3],
    "lora_dropout": ["0.1", 1.5, -0.1, float("nan"), True],
    "a_later_field": [True, 1, "on", {"a": 1}],
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_understood_is_refused_by_name(llama, tmp_path, field):
    folder = llama.write(tmp_path / "adapter")
    before = (folder / "adapter_config.json").read_text()
    for value in REFUSED[field]:
        (folder / "adapter_config.json").write_text(before)
        edit(folder, {field: value})
        with pytest.raises(ValueError, match=field) as caught:
            llama.read(folder)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700, value


def test_no_field_of_peft_is_left_out(llama):
    assert {field.name for field in dataclasses.fields(llama.peft.LoraConfig)} <= set(FIELDS)
    assert set(FIELDS) <= set(READ) | set(REFUSED) | {"runtime_config", "merge_weights"} | {
        f"{name}_config" for name in ("eva", "corda", "lora_ga")
    }
    assert all(field.reason for field in FIELDS.values() if field.kind == "inert")


@pytest.mark.parametrize(
    "field", ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]
)
def test_patterns_of_a_file_are_matched_in_bounded_time(llama, tmp_path, field):
    folder = llama.write(tmp_path / "adapter")
    table = field in ("rank_pattern", "alpha_pattern")
    beside = {"layers_to_transform": [0, 1, 2]} if field == "layers_pattern" else {}
    for pattern in (
        r"(\w+\.?)+!",
        r"(((.+)+)+)+!",
        "(?:(?:(?:.?){50}){50}){50}!",
        "(a{1000}){1000}",
        "(a|" * 900 + ")" * 900,
    ):
        edit(folder, beside | {field: {pattern: 4} if table else pattern})
        start = time.perf_counter()
        try:
            llama.read(folder)
        except ValueError as error:
            assert "\n" not in str(error)
        assert time.perf_counter() - start < 5, pattern
    for pattern, reason in (
        ("(", r"no regular expression \("),
        ("(" * 5000, "longer than 4000 characters"),
        ("a{99999999999999999999}", r"no regular expression \("),
        (r"(?!x).*", r"cannot be matched in bounded time \(.*\): write it without look-around"),
        (r"(a)\1", "bounded time"),
        ("a{,3}", r"write \{0,n\}"),
        ("[[a]]", r"no regular expression \(Possible nested set"),
    ):
        edit(folder, beside | {field: {pattern: 4} if table else pattern})
        with pytest.raises(ValueError, match=rf"sets {field} .*{reason}"):
            llama.read(folder)


def test_both_engines_mean_the_same():
    import re

    names = ["model.layers.10.self_attn.q_proj", "model.layers.1.mlp.down_proj", "h.0.attn.c_attn", "", "a.b"]
    expressions = [r".*", r"(.*\.)?(q_proj)$", r"[qv]_proj", r".*\.(?P<i>\d+)\..*", r"^model\..*proj$", r"(?i:MODEL).*"]
    expressions += [
        r"(a)|(b).*",
        r"\bmodel\.layers\.[\d]{1,}\.(?:mlp|x).*",
        r"(?:^|.*?\.)layers\.(?P<i>\d+)\.",
        r"a.?b",
    ]
    for expression in expressions:
        for name in names:
            for kind in ("match", "fullmatch"):
                ours, theirs = getattr(compiled(expression), kind)(name), getattr(re, kind)(expression, name)
                assert bool(ours) == bool(theirs)
                assert not ours or (ours.group(0), ours.groupdict()) == (theirs.group(0), theirs.groupdict())


LINEAR = "base_model.model.model.layers.0.self_attn.q_proj"


def rewritten(folder, rename=lambda name: name, add=(), convert=lambda tensor: tensor):
    path = folder / "adapter_model.safetensors"
    tensors = {rename(name): convert(value) for name, value in safetensors_numpy.load_file(path).items()}
    safetensors_numpy.save_file(tensors | dict(add), path, {"format": "pt"})
    return folder


@old_name
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dora", [False, True])
def test_other_precisions_are_computed_in_float32(llama, tmp_path, dtype, dora):
    import ml_dtypes

    folder = llama.write(tmp_path / "adapter", use_dora=dora)
    rewritten(folder, convert=lambda t: t.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
    llama.check(folder)
    assert str(llama.read(folder).params["q_proj"]["a"].dtype) == ("float64" if dtype == "float64" else "float32")


@old_name
def test_spellings_that_peft_reads(llama, tmp_path):
    folder = llama.write(tmp_path / "adapter", use_dora=True)
    llama.check(
        rewritten(folder, lambda n: n.replace("A.weight", "A.default.weight").replace("vector", "vector.weight"))
    )
    tensor = np.ones((4, 32), np.float32)
    with pytest.raises(ValueError, match=r"twice, with and without an adapter's name: drop one\."):
        llama.read(rewritten(folder, add={f"{LINEAR}.lora_A.weight": tensor}))


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: f"_orig_mod.{n}",
        lambda n: n.replace("model.model.", "model.model._orig_mod."),
        lambda n: f"module.{n}",
        lambda n: n.removeprefix("base_model.model."),
        lambda n: f"base_model.model.{n}",
        lambda n: n.replace("weight", "other.weight"),
        lambda n: n.replace("_proj", "_Proj"),
        lambda n: n.replace("layers.", "layers.0"),
        lambda n: n.replace("layers.0", "layers.7"),
        lambda n: n.replace("lora_A", "lora_C"),
    ],
)
def test_spellings_that_peft_passes_over_are_refused(llama, tmp_path, rename):
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has ") as caught:
        llama.read(rewritten(llama.write(tmp_path / "adapter"), rename))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "base_model.model.lm_head.weight",
            (50, 32),
            r"a tensor of the base model itself: beside the adapter only a cla",
        ),
        ("base_model.model.model.embed_tokens.weight", (50, 32), r"a tensor of the base model itself"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 50), r"an adapter of an embedding, which ours"),
        (f"{LINEAR}.lora_B.bias", (32,), r"a bias beside A and B"),
        (
            f"{LINEAR}.lora_magnitude_vector",
            (32,),
            r"has only lora_A, lora_B, lora_magnitude_vector for .*use_dora=Fal",
        ),
        ("base_model.model.lm_head.lora_A.weight", (4, 32), r"has no place in this model"),
        ("base_model.model.score.weight", (2, 32, 1), r"whose tensors do not fit together"),
        (
            "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
            (4, 32),
            r"holds an adapter for .*do not name",
        ),
    ],
)
def test_no_tensor_is_passed_over(llama, tmp_path, name, shape, message):
    with pytest.raises(ValueError, match=message):
        llama.read(rewritten(llama.write(tmp_path / "adapter"), add={name: np.ones(shape, np.float32)}))


@old_name
def test_modules_saved_whole_are_refused_for_what_they_are(llama, tmp_path):
    for saved in (["lm_head"], ["embed_tokens"], ["norm"]):
        folder = llama.write(tmp_path / saved[0], modules_to_save=saved)
        with pytest.raises(ValueError, match=rf"modules_to_save replaces whole \({saved[0]}\): .*merge_and_unload"):
            llama.read(folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(llama, tmp_path, bad):
    folder = llama.write(tmp_path / "adapter")
    tensor = np.full((4, 32), bad, np.float32)
    with pytest.raises(
        ValueError, match=r"has NaN or infinity in 'base_model.*layers\.0.*lora_A\.weight': its training"
    ):
        llama.read(rewritten(folder, add={f"{LINEAR}.lora_A.weight": tensor}))
    with pytest.raises(ValueError, match=r"of type I64: only F64, F32, F16, BF16 are read"):
        llama.read(rewritten(folder, add={f"{LINEAR}.lora_A.weight": np.ones((4, 32), np.int64)}))


@old_name
def test_starts_from_the_base_need_it(llama, tmp_path):
    names, config = llama.ours.hf_names, llama.ours.config
    for start in ("pissa", "olora"):
        folder = llama.write(tmp_path / start, init_lora_weights=start)
        with pytest.raises(
            ValueError, match=rf"init_lora_weights='{start}'.*give base=weights\['blocks'\].*conversion"
        ):
            load_peft(folder, names, config.site_shapes(), config.num_layers)
