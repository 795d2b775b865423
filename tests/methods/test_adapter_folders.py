"""Adapters that leave: PEFT's folder used from elsewhere, GPT-2's joint linears, headless models, LoRATRF's format."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy

from methods import models
from methods.adapters import LoRAConfig, filters, load_edit, load_peft, save_edit, save_peft
from methods.models import HFNames
from tests.conftest import require
from tests.methods.lora_files import NAMES, SHAPES, L, old_name, same_bits, settings_of, trained


def moved(config, ours, scale=0.2):
    """Parameters of which every number matters."""
    base = ours.weights["blocks"]
    params = config.init(jax.random.key(0), ours.config.site_shapes(), ours.config.num_layers, base=base)
    noise = lambda leaf: leaf + scale * jax.random.normal(jax.random.key(1), leaf.shape, leaf.dtype)  # noqa: E731
    return jax.tree.map(noise, params)


@old_name
def test_the_base_model_is_found_from_another_folder(tiny_llama, tmp_path, monkeypatch):
    torch, peft = require("torch"), require("peft")
    folder, _ = tiny_llama
    monkeypatch.chdir(folder.parent)
    ours = models.load(folder.name)  # a relative path
    assert ours.hf_names.base_model == str(folder.resolve())
    monkeypatch.chdir(tmp_path)  # from where the path would mean another folder, or none
    config = LoRAConfig(rank=4, targets=["q_proj", "down_proj"])
    params = moved(config, ours)
    save_peft(tmp_path / "adapter", config, params, ours.hf_names)
    assert settings_of(tmp_path / "adapter")["base_model_name_or_path"] == str(folder.resolve())
    model, tokens = peft.AutoPeftModelForCausalLM.from_pretrained("adapter").eval(), np.arange(12)[None]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    found = ours.model.apply({"params": ours.weights}, jnp.asarray(tokens), None, config.bind(params))
    np.testing.assert_allclose(found, theirs, atol=1e-4)


def test_a_name_on_the_hub_stays_one(tmp_path):
    config = LoRAConfig(rank=2)
    names = HFNames("owner/model", NAMES.modules)
    save_peft(tmp_path / "adapter", config, trained(config), names)
    assert settings_of(tmp_path / "adapter")["base_model_name_or_path"] == "owner/model"


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.2}
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **sizes)).save_pretrained(folder)
    return folder, models.load(folder)


def adapted_gpt2(folder, adapter):
    transformers, peft = require("transformers"), require("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained(folder), adapter).eval()


def gpt2_logits(ours, config, params):
    hook = config.bind(params, base=ours.weights["blocks"])
    return ours.model.apply({"params": ours.weights}, jnp.arange(12)[None], None, hook)


@old_name
@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_a_joint_linear_that_peft_adapted(tiny_gpt2, tmp_path, fields):
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    folder, ours = tiny_gpt2
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **fields)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(folder), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = adapted_gpt2(folder, tmp_path / "adapter")(torch.arange(12)[None]).logits.numpy()
    shapes, blocks = ours.config.site_shapes(), ours.weights["blocks"]
    found = load_peft(tmp_path / "adapter", ours.hf_names, shapes, 2, base=blocks)
    assert found.config.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    np.testing.assert_allclose(gpt2_logits(ours, found.config, found.params), wanted, atol=1e-4)


@old_name
@pytest.mark.parametrize("kind", ["dora", "rslora"])
def test_a_joint_linear_that_peft_is_to_adapt(tiny_gpt2, tmp_path, kind):
    torch, (folder, ours) = require("torch"), tiny_gpt2
    targets = ["q_proj", "k_proj", "v_proj", "up_proj"] if kind == "dora" else ["q_proj", "v_proj"]
    alphas, ranks = {"k_proj": 2.0, "v_proj": 9.0}, {"v_proj": 5}
    alphas = {name: alpha for name, alpha in alphas.items() if name in targets}
    config = LoRAConfig(3, 6.0, targets, None, kind == "rslora", kind == "dora", ranks, alphas)
    params = moved(config, ours)
    save_peft(tmp_path / "adapter", config, params, ours.hf_names)
    with torch.no_grad():
        theirs = adapted_gpt2(folder, tmp_path / "adapter")(torch.arange(12)[None]).logits.numpy()
    np.testing.assert_allclose(gpt2_logits(ours, config, params), theirs, atol=1e-4)
    again = load_peft(tmp_path / "adapter", ours.hf_names, ours.config.site_shapes(), 2)
    np.testing.assert_allclose(gpt2_logits(ours, again.config, again.params), theirs, atol=1e-4)


@old_name
def test_an_olora_of_gpt2_is_refused(tiny_gpt2, tmp_path):
    _, transformers, peft = require("torch"), require("transformers"), require("peft")
    folder, ours = tiny_gpt2
    config = peft.LoraConfig(r=3, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights="olora")
    peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(folder), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has an OLoRA of transformer\.h\.0\.attn\.c_proj, a Conv1D"):
        load_peft(tmp_path / "a", ours.hf_names, ours.config.site_shapes(), 2, base=ours.weights["blocks"])


@old_name
def test_an_adapter_of_a_model_without_head(tiny_bert, tmp_path):
    """What sentence-transformers and AutoModel leave: the base model's modules without its prefix."""
    torch, transformers, peft = require("torch"), require("transformers"), require("peft")
    folder, ours = tiny_bert
    config = peft.LoraConfig(
        r=3, target_modules=["query", "value"], layers_to_transform=[1], layers_pattern="layer",
        task_type="FEATURE_EXTRACTION", init_lora_weights=False,
    )  # fmt: skip
    base = transformers.AutoModel.from_pretrained(folder).eval()
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokens = np.arange(12)[None]
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).last_hidden_state.numpy()
    found = load_peft(tmp_path / "adapter", ours.hf_names, ours.config.site_shapes(), 2)
    assert found.config.layers == (1,) and found.head == {}
    hook = found.config.bind(found.params)
    hidden = ours.model.apply({"params": ours.weights}, jnp.asarray(tokens), None, hook, method="hidden")
    np.testing.assert_allclose(hidden, wanted, atol=1e-4)


@old_name
def test_a_head_that_is_not_whole_is_refused(tiny_bert, tmp_path):
    _, transformers, peft = require("torch"), require("transformers"), require("peft")
    folder, ours = tiny_bert
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query"])
    base = transformers.BertForSequenceClassification.from_pretrained(folder)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = safetensors_numpy.load_file(path)
    names = ["base_model.model.classifier.weight", "base_model.model.classifier.bias"]
    for change, message in (
        ({names[1]: None}, r"has a part of the head, but not classifier\.bias: save the whole head"),
        (
            {names[0]: None, names[1]: None},
            r"has no tensor of 'classifier', which by adapter_config.* task_type is SEQ_CLS",
        ),
        (
            {names[1]: np.ones(4, np.float32)},
            r"a head whose tensors do not fit together: classifier\.bias \(4,\), class",
        ),
    ):
        tensors = {name: value for name, value in (whole | change).items() if value is not None}
        safetensors_numpy.save_file(tensors, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_peft(tmp_path / "adapter", ours.hf_names, ours.config.site_shapes(), 2)


SIZES = {site: out for site, (_, out) in SHAPES.items()}
EDIT = LoRAConfig(
    3, 5.0, ["q_proj", "v_proj"], [0, 2], True, rank_pattern={"v_proj": 2}, alpha_pattern={r"0\.q_proj": 1.5}
)


def an_edit(kind="cosine", sites=SIZES, dtype=jnp.float32):
    """An edit and a LoRA of which every number is drawn."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    draw = lambda leaf: jax.random.normal(next(keys), leaf.shape, dtype)  # noqa: E731
    vectors = {site: jnp.zeros((L, d)) for site, d in sites.items()} if kind in ("cosine", "sigmoid") else {}
    numbers = filters.scalars(L) | {"gate": jnp.ones(L)}
    parts = jax.tree.map(draw, (filters.init(jax.random.key(0), sites, L, 2, kind), vectors, numbers))
    head = {"out": {"kernel": draw(jnp.zeros((6, 3))), "bias": draw(jnp.zeros(3))}}
    return filters.Edit(*parts, kind), trained(EDIT, dtype=dtype), head


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
@pytest.mark.parametrize("kind", filters.FILTERS)
def test_an_edit_comes_back_bit_for_bit(tmp_path, kind, dtype):
    sites = {"block_hidden": 6} if kind == "sigmoid" else SIZES
    edit, params, head = an_edit(kind, sites, dtype)
    folder = save_edit(tmp_path / "adapter", edit, EDIT, params, HFNames("owner/model", {}), head)
    assert sorted(path.name for path in folder.iterdir()) == ["loratrf_config.json", "loratrf_model.safetensors"]
    found = load_edit(folder, SHAPES, L)
    assert found.config == EDIT and found.edit.kind == kind and list(found.edit.params) == list(edit.params)
    wanted = (edit.params, edit.vectors, edit.scalars, params, head)
    again = (found.edit.params, found.edit.vectors, found.edit.scalars, found.params, found.head)
    assert jax.tree.structure(wanted) == jax.tree.structure(again)
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(again), strict=True):
        assert one.dtype == other.dtype and same_bits(one, other)
    save_edit(folder, edit, EDIT, params, HFNames("owner/model", {}))
    assert load_edit(folder, SHAPES, L).head == {}


CHANGES = {
    "format": (["lora", None, 3], "another format than loratrf"),
    "version": ([2, 0, True, "1", None], "is of version .*; this one reads 1: update"),
    "a_later_field": ([None, 1], "has an unknown field 'a_later_field'"),
    "num_layers": ([4, 10**12, "3", True, None], "sets num_layers|is of a model with"),
    "filter": (["cosine2", None, ["cosine"], "channel"], "sets filter|has"),
    "edit_rank": ([3, 10**30, 0, -1, 2.0, True], "sets edit_rank|has .* where|describes no LoRA"),
    "edit_sites": ([[], ["x_proj"], ["q_proj"], ["q_proj", "q_proj"], "q_proj", [1]], "edit_sites|edits|has .* where"),
    "base_model": ([3, None], "sets base_model"),
    "head": ([{}, {"out": {"kernel": [6, 4], "bias": [3]}}, {"out": [1]}, 3, {"out": {"kernel": [""]}}], "head|has"),
    "lora": (
        [{}, None, 3]
        + [
            {"rank": 3, "alpha": 5.0, "targets": ["q_proj"], "layers": None, "rslora": True, "rank_pattern": {}}
            | {"alpha_pattern": {}} | change
            for change in (
                {"dora": False}, {"rank": 4}, {"rank": 10**30}, {"rank": "3"}, {"alpha": None}, {"alpha": [1]},
                {"targets": 3}, {"targets": ["x_proj"]}, {"targets": "("}, {"layers": [7]}, {"layers": "a"},
                {"rslora": 1}, {"rank_pattern": {"(a+)+$": 3}}, {"rank_pattern": {"(": 3}}, {"rank_pattern": 3}, {},
            )
        ],
        r"lacks field 'lora\.|has an unknown field 'lora\.dora'|describes no LoRA of this model|has .* where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_an_edit_that_is_not_understood_is_refused(tmp_path, field):
    edit, params, head = an_edit()
    path = save_edit(tmp_path / "a", edit, EDIT, params, HFNames("owner/model", {}), head) / "loratrf_config.json"
    settings = json.loads(path.read_text())
    for value in CHANGES[field][0]:
        path.write_text(json.dumps(settings | {field: value}))
        with pytest.raises(ValueError, match=CHANGES[field][1]) as caught:
            load_edit(tmp_path / "a", SHAPES, L)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    path.write_text(json.dumps({name: value for name, value in settings.items() if name != field}))
    if field in settings:
        with pytest.raises(ValueError, match=f"lacks field '{field}'|version None|another format"):
            load_edit(tmp_path / "a", SHAPES, L)


def test_arrays_of_an_edit_are_all_there_and_no_others(tmp_path):
    edit, params, head = an_edit()
    folder = save_edit(tmp_path / "a", edit, EDIT, params, HFNames("owner/model", {}), head)
    path = folder / "loratrf_model.safetensors"
    whole = safetensors_numpy.load_file(path)
    for name in (*whole, "edit.q_proj.u", "nonsense", "lora.q_proj.m", "a.b.c.d"):
        changes = [None, whole[name][..., :1], np.full_like(whole[name], np.nan)] if name in whole else [np.ones(3)]
        for change in changes:
            tensors = {n: np.ascontiguousarray(v) for n, v in (whole | {name: change}).items() if v is not None}
            safetensors_numpy.save_file(tensors, path)
            if change is not None and name in whole and change.shape == whole[name].shape and np.isfinite(change).all():
                continue
            with pytest.raises(ValueError, match=r"loratrf_model\.safetensors has .*" + name.replace(".", r"\.")):
                load_edit(folder, SHAPES, L)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_edit(folder, SHAPES, L)
    with pytest.raises(ValueError, match="DoRA would turn it with the weights"):
        save_edit(folder, edit, LoRAConfig(3, dora=True), params, HFNames("owner/model", {}))
