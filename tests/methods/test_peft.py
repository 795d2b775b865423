"""PEFT's folder: what we write, what PEFT reads and writes, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy

from methods import models
from methods.adapters import LoRAConfig, load_peft, save_peft
from methods.objective import Bound, outputs
from methods.tasks import LabelledBatch
from tests.conftest import require
from tests.methods.lora_files import NAMES, SHAPES, L, forward, old_name, same_bits, settings_of, trained


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=4, alpha=7.5),
        LoRAConfig(rank=4, layers=[0, 2], rslora=True, targets=["q_proj", "v_proj", "down_proj"]),
        LoRAConfig(rank=3, alpha=1.0, layers=[1], targets=["down_proj"]),
        LoRAConfig(rank=4, dora=True, alpha_pattern={r"0\.q_proj": 5.0}),
        LoRAConfig(rank=3, rank_pattern={"v_proj": 5}, alpha_pattern={r"1\.q_proj": 0.5}, rslora=True),
    ],
)
def test_peft_round_trip_is_exact(tmp_path, config, dtype):
    params = trained(config, dtype=dtype)
    save_peft(tmp_path / "new" / "adapter", config, params, NAMES)
    again, loaded, _ = load_peft(tmp_path / "new" / "adapter", NAMES, SHAPES, L)
    assert again == config
    chosen = np.array(config.layers if config.layers is not None else range(L))
    for site, leaves in params.items():
        rank = config.module(site, 1)[0]
        for name, leaf in {**leaves, "a": leaves["a"][..., :rank], "b": leaves["b"][:, :rank]}.items():
            cut = {"a": np.s_[..., :rank], "b": np.s_[:, :rank], "m": np.s_[:]}[name]
            # Half precision is read as PEFT computes it, in float32.
            wanted = leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf
            assert same_bits(wanted[chosen], loaded[site][name][cut][chosen])
            assert not np.delete(loaded[site][name], chosen, axis=0).any()


def test_peft_folder_of_chosen_layers(tmp_path):
    config = LoRAConfig(rank=4, alpha=8, layers=[0, 2])
    folder = save_peft(tmp_path / "adapter", config, trained(config), NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = settings_of(folder)
    assert settings["layers_to_transform"] == [0, 2] and settings["layers_pattern"] == "layers"
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 8, "base")
    tensors = safetensors_numpy.load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    assert tensors["base_model.model.model.layers.2.self_attn.v_proj.lora_A.weight"].shape == (4, 6)
    assert tensors["base_model.model.model.layers.2.self_attn.v_proj.lora_B.weight"].shape == (4, 4)


def test_peft_export_of_gates_and_ranks_is_the_same_function(tmp_path, stack):
    config = LoRAConfig(rank=4, alpha=6.0, targets=["q_proj", "v_proj"])
    params = trained(config)
    gate = {"q_proj": jnp.array([0.5, 0.0, -2.0]), "v_proj": jnp.ones(L)}
    mask = {"q_proj": jnp.arange(4)[None, :] < jnp.array([[4], [4], [1]])}
    folder = save_peft(tmp_path / "adapter", config, params, NAMES, gate=gate, mask=mask)
    settings = settings_of(folder)
    assert settings["target_modules"] == [NAMES.module("q_proj", i) for i in (0, 2)] + [
        NAMES.module("v_proj", i) for i in range(L)
    ]
    assert settings["rank_pattern"] == {r"model\.layers\.2\.self_attn\.q_proj": 1}
    assert settings["alpha_pattern"] == {r"model\.layers\.2\.self_attn\.q_proj": 1.5}
    assert "layers_to_transform" not in settings
    again, loaded, _ = load_peft(folder, NAMES, SHAPES, L)
    assert again == dataclasses.replace(config, rank_pattern={r"2\.q_proj": 1}, alpha_pattern={r"2\.q_proj": 1.5})
    expected = forward(config.bind(params, gate, mask), *stack)
    np.testing.assert_allclose(forward(again.bind(loaded), *stack), expected, rtol=1e-12)


def test_peft_import_of_different_scales(tmp_path, stack):
    config = LoRAConfig(rank=4, alpha=8.0, targets=["q_proj"])
    params = trained(config)
    folder = save_peft(tmp_path / "adapter", config, params, NAMES)
    settings = settings_of(folder) | {"alpha_pattern": {"layers.1.self_attn.q_proj": 2, ".*": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    again, loaded, _ = load_peft(folder, NAMES, SHAPES, L)
    expected = forward(config.bind(params, jnp.array([1.0, 0.25, 1.0])), *stack)
    np.testing.assert_allclose(forward(again.bind(loaded), *stack), expected, rtol=1e-13)


def test_peft_export_replaces_an_adapter_and_nothing_else(tmp_path):
    config, folder = LoRAConfig(rank=2), tmp_path / "adapter"
    save_peft(folder, config, trained(config), NAMES)
    save_peft(folder, config, trained(config, seed=5), NAMES)
    loaded = load_peft(folder, NAMES, SHAPES, L)[1]
    assert same_bits(loaded["q_proj"]["a"], trained(config, seed=5)["q_proj"]["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    (folder / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"is not replaced by an adapter, since it holds thesis\.tex\."):
        save_peft(folder, config, trained(config), NAMES)
    assert (folder / "thesis.tex").exists()


def test_a_failed_export_leaves_the_old_adapter(tmp_path, monkeypatch):
    config, folder = LoRAConfig(rank=2), tmp_path / "adapter"
    save_peft(folder, config, trained(config), NAMES)
    rename = Path.rename

    def fail_on_the_new(path, target):
        if target == folder and not path.name.endswith("-old"):
            raise OSError("disk full")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_on_the_new)
    with pytest.raises(OSError, match="disk full"):
        save_peft(folder, config, trained(config, seed=5), NAMES)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    loaded = load_peft(folder, NAMES, SHAPES, L)[1]
    assert same_bits(loaded["q_proj"]["a"], trained(config)["q_proj"]["a"])


def damage(folder, what):
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors = safetensors_numpy.load_file(weights)
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if isinstance(what, dict):
        settings.write_text(json.dumps(settings_of(folder) | what))
    elif what == "no config":
        settings.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "cut config":
        settings.write_text(settings.read_text()[:50])
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "half":
        safetensors_numpy.save_file({k: v for k, v in tensors.items() if k != first}, weights)
    elif what == "stranger":
        safetensors_numpy.save_file(tensors | {first.replace("q_proj", "x_proj"): tensors[first]}, weights)
    elif what == "shape":
        safetensors_numpy.save_file(tensors | {first: np.ascontiguousarray(tensors[first][:, :3])}, weights)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", r"There is no .*adapter_config\.json: a PEFT adapter is a folder with"),
        ("no weights", r"There is no .*adapter_model\.safetensors: adapters are read from safetensors only"),
        ("cut config", r"adapter_config\.json is damaged or no adapter config \(JSONDecodeError"),
        ("cut weights", r"adapter_model\.safetensors is damaged \(.*\): copy it again\."),
        ("half", r"has only lora_B for model\.layers\.0\.self_attn\.q_proj, where use_dora=False asks for lora"),
        (
            "stranger",
            r"has a tensor 'base_model.*x_proj.* \(2, 6\), which has no place in this model, whose linears are m",
        ),
        ("shape", r"has A \(2, 3\) and B \(8, 2\) for model.*q_proj, which is 6 to 8 in this model and of rank 2 in"),
        ({"peft_type": "IA3"}, r"sets peft_type to 'IA3', which is no LoRA: only LORA is read\."),
        ({"r": 0}, r"sets r to 0, which is no rank: a whole number from 1 up\."),
        ({"use_dora": True}, r"has only lora_A, lora_B for model\.layers\.0\.self_attn\.q_proj, where use_dora=True"),
        ({"bias": "all"}, r"sets bias to 'all', and so other biases than the base model's: merge the adapter in PEFT"),
        ({"r": 3}, r"has A \(2, 6\) and B \(8, 2\) for .* and of rank 3 in adapter_config\.json\."),
    ],
)
def test_peft_import_errors_are_one_sentence(tmp_path, what, message):
    config = LoRAConfig(rank=2)
    damage(save_peft(tmp_path / "adapter", config, trained(config), NAMES), what)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_peft(tmp_path / "adapter", NAMES, SHAPES, L)
    assert "\n" not in str(caught.value)


def test_exporting_nothing_is_an_error(tmp_path):
    config = LoRAConfig(rank=2)
    with pytest.raises(ValueError, match=r"every layer is masked or has a gate of exactly 0\."):
        save_peft(tmp_path / "adapter", config, trained(config), NAMES, gate=jnp.zeros(L))
    assert not list(tmp_path.iterdir())


@old_name
@pytest.mark.parametrize("case", ["all", "layers", "gates", "rslora", "dora", "patterns"])
def test_peft_gives_the_same_logits(tiny_llama, tmp_path, case):
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    folder, ours = tiny_llama
    layers = [0, 2] if case == "layers" else None
    config = LoRAConfig(rank=4, alpha=6.0, targets=".*_proj", layers=layers, rslora=case == "rslora")
    if case in ("dora", "patterns"):
        ranks, alphas = {"up_proj": 2, r"1\.o_proj": 5}, {r"2\..*": 3.0, "k_proj": 1.0}
        config = dataclasses.replace(config, dora=case == "dora", rank_pattern=ranks, alpha_pattern=alphas)
    base = ours.weights["blocks"]
    params = config.init(jax.random.key(0), ours.config.site_shapes(), ours.config.num_layers, base=base)
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype), params
    )
    gate = mask = None
    if case == "gates":
        gate = {"q_proj": jnp.array([0.5, 0.0, -1.0]), "down_proj": jnp.array([1.0, 2.0, 0.3])}
        mask = {"v_proj": jnp.arange(4)[None, :] < jnp.array([[1], [4], [2]])}
    save_peft(tmp_path / "adapter", config, params, ours.hf_names, gate=gate, mask=mask)

    tokens = np.arange(24).reshape(2, 12) % 50
    apply = jax.jit(lambda weights, adapt: ours.model.apply({"params": weights}, jnp.asarray(tokens), None, adapt))
    hook = config.bind(params, gate, mask, base)
    logits = np.asarray(apply(ours.weights, hook))
    base = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        plain = base(torch.tensor(tokens)).logits.numpy()
        # PEFT warns of missing and of unexpected keys, and a warning fails the test.
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        theirs = adapted(torch.tensor(tokens)).logits.numpy()
    assert np.abs(theirs - plain).max() > 1.0
    np.testing.assert_allclose(logits, theirs, atol=1e-4)

    merged = jax.tree.map(lambda leaf: leaf, ours.weights)
    kernels = {site: merged["blocks"][site]["kernel"] for site in params}
    for site, kernel in config.merge(kernels, params, gate, mask).items():
        merged["blocks"][site]["kernel"] = kernel
    np.testing.assert_allclose(apply(merged, models.identity), theirs, atol=1e-4)


@old_name
@pytest.mark.parametrize("kind", [{}, {"use_rslora": True, "alpha_pattern": {"layers.1.*": 3.5}}, {"use_dora": True}])
def test_our_import_of_an_adapter_that_peft_wrote(tiny_llama, tmp_path, kind):
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    folder, ours = tiny_llama
    torch.manual_seed(1)
    settings = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2], "rank_pattern": {"q_proj": 3}}
    settings |= kind
    wanted = peft.LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=9, init_lora_weights=False, **settings)
    adapted = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(folder), wanted).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    config, params, _ = load_peft(
        tmp_path / "adapter", ours.hf_names, ours.config.site_shapes(), ours.config.num_layers
    )
    assert (config.rank, config.targets, config.layers) == (5, ("q_proj", "up_proj"), (1, 2))
    tokens = np.arange(12).reshape(1, 12)
    hook = config.bind(params, base=ours.weights["blocks"])
    logits = ours.model.apply({"params": ours.weights}, jnp.asarray(tokens), None, hook)
    with torch.no_grad():
        np.testing.assert_allclose(logits, adapted(torch.tensor(tokens)).logits.numpy(), atol=1e-4)


def classified(ours, config, params, head, tokens):
    bound = Bound(config.bind(params, base=ours.weights["blocks"]), head)
    batch = LabelledBatch(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.asarray(tokens % 2), None)
    return outputs(ours.model, ours.classifier(3), ours.weights, bound, batch)


@old_name
@pytest.mark.parametrize("dora", [False, True])
def test_a_head_goes_to_peft_and_comes_back(tiny_bert, tmp_path, dora):
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    folder, ours = tiny_bert
    config = LoRAConfig(4, 6.0, ["q_proj", "o_proj", "up_proj"], dora=dora, rank_pattern={r"0\.q_proj": 2})
    base = ours.weights["blocks"]
    params = config.init(jax.random.key(0), ours.config.site_shapes(), 2, base=base)
    head = ours.classifier(3).init(jax.random.key(2), jnp.zeros((1, 32)))["params"]
    noise = lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)  # noqa: E731
    params, head = jax.tree.map(noise, (params, head))
    save_peft(tmp_path / "adapter", config, params, ours.hf_names, head=head, task_type="SEQ_CLS")
    assert settings_of(tmp_path / "adapter")["modules_to_save"] == ["classifier"]

    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    wanted = classified(ours, config, params, head, tokens)
    plain = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    inputs = {"input_ids": torch.tensor(tokens).long(), "token_type_ids": torch.tensor(tokens % 2).long()}
    with torch.no_grad():
        theirs = adapted(**inputs).logits.numpy()
        # The other way: what PEFT writes, with values of its own.
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        moved = adapted(**inputs).logits.numpy()
    np.testing.assert_allclose(wanted, theirs, atol=1e-4)
    adapted.save_pretrained(tmp_path / "theirs")
    found = load_peft(tmp_path / "theirs", ours.hf_names, ours.config.site_shapes(), 2)
    assert found.config == config and np.abs(moved - theirs).max() > 0.1
    np.testing.assert_allclose(classified(ours, *found, tokens), moved, atol=1e-4)


@old_name
def test_sites_that_are_one_module_there(tmp_path):
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **sizes)).save_pretrained(tmp_path / "gpt2")
    ours = models.load(tmp_path / "gpt2")
    config = LoRAConfig(3, 6.0, ["q_proj", "v_proj", "up_proj"], alpha_pattern={"v_proj": 2.0}, layers=[1])
    params = config.init(jax.random.key(0), ours.config.site_shapes(), 2)
    noise = lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)  # noqa: E731
    params = jax.tree.map(noise, params)
    save_peft(tmp_path / "adapter", config, params, ours.hf_names)
    tokens = np.arange(12).reshape(1, 12)

    def logits(config, params):
        return ours.model.apply({"params": ours.weights}, jnp.asarray(tokens), None, config.bind(params))

    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(config, params), theirs, atol=1e-4)
    adapted.save_pretrained(tmp_path / "again")
    again, loaded, _ = load_peft(tmp_path / "again", ours.hf_names, ours.config.site_shapes(), 2)
    assert again.targets == ("q_proj", "k_proj", "v_proj", "up_proj") and again.layers == (1,)
    np.testing.assert_allclose(logits(again, loaded), theirs, atol=1e-4)
    turned = dataclasses.replace(config, dora=True)
    params = turned.init(jax.random.key(0), ours.config.site_shapes(), 2, base=ours.weights["blocks"])
    with pytest.raises(ValueError, match=r"DoRA at a part of transformer\.h\.1\.attn\.c_attn has no place in PEFT's"):
        save_peft(tmp_path / "dora", turned, params, ours.hf_names)
