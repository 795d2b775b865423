"""A registry is read and never copied: what is registered is a choice of its command, with nothing else touched."""

import ast
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods import cli, hiddenkey, proxies
from methods.adapters import filters, gates
from methods.adapters.dropout import DropoutConfig
from methods.adapters.edit_folder import load_edit, save_edit
from methods.adapters.lora import LoRAConfig
from methods.baselines import BASELINES, uniform
from methods.flexora_variants import INNER_OPTIMIZERS
from methods.models import loading
from methods.models.loading import HFNames
from methods.tasks import METRICS, TASKS, Classification
from methods.tasks.loss import DIVERGENCES
from tests.methods.small import arguments

ROOT = Path(__file__).parents[2]

REGISTRIES = {
    "commands": (cli.COMMANDS, "cli.py", "lora", ["mine"]),
    "baselines": (BASELINES, "baselines/__init__.py", "uniform", ["baseline", "mine"]),
    "proxies": (proxies.PROXIES, "proxies.py", "snip", ["heterolora", "--proxy", "mine"]),
    "gatings": (gates.GATINGS, "adapters/gates.py", "untied", ["finegates", "--gating", "mine"]),
    "gate families": (gates.FAMILIES, "adapters/gates.py", "stg", ["finegates", "--family", "mine"]),
    "filters": (filters.FILTERS, "adapters/filters.py", "cosine", ["loratrf", "--filter", "mine"]),
    "hypergradients": (hiddenkey.HYPERGRADIENTS, "hiddenkey.py", "implicit", ["hiddenkey", "--hypergradient", "mine"]),
    "inner optimizers": (INNER_OPTIMIZERS, "flexora_variants.py", "sgd", ["flexora", "--inner-optimizer", "mine"]),
    "divergences": (DIVERGENCES, "tasks/loss.py", "js", ["hiddenkey", "--rules", "ffn_hidden element mine"]),
    "tasks": (TASKS, "tasks/__init__.py", "piqa", ["lora", "--task", "mine"]),
}
"""A registry, its file, an entry to register once more under the name "mine", and how that is asked for."""


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("name", REGISTRIES)
def test_what_is_registered_is_a_choice_of_the_command(name, monkeypatch, capsys, tmp_path):
    registry, _, entry, (method, *more) = REGISTRIES[name]
    first, rest = (more[:1], more[1:]) if method == "baseline" else ([], more)
    words = [method, *first, *arguments("./no-model", tmp_path / "no-data", tmp_path / "run"), *rest]
    assert cli.run(words) == 2
    unknown = capsys.readouterr().err
    assert "mine" in unknown and entry in unknown and "no-data" not in unknown  # says what there is
    monkeypatch.setitem(registry, "mine", registry[entry])
    # On to what is wrong besides: there is no data.
    assert cli.run(words) == 2
    assert "no-data" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["baselines", "proxies", "gatings", "gate families", "filters", "hypergradients"])
def test_help_lists_what_is_registered_and_shows_the_default_plainly(name, monkeypatch, capsys):
    registry, _, entry, (method, *_) = REGISTRIES[name]
    monkeypatch.setitem(registry, "mine", registry[entry])
    assert cli.run([method, "--help"]) == 0
    shown = re.sub(r"[│\s]+", "", capsys.readouterr().out)
    assert ",".join(registry) in shown and registry.keys() >= {"mine"}
    assert f"(default:{next(iter(registry))})" in shown


@pytest.mark.usefixtures("float32_by_default")
def test_a_registered_baseline_runs(tiny_model, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(BASELINES, "mine", uniform.find)
    out = tmp_path / "run"
    assert cli.run(["baseline", "mine", *arguments(tiny_model, tiny_data, out, "--share", "0.5")]) == 0
    assert json.loads((out / "results" / "mine.json").read_text())["parameters"] == 2 * (16 + 16 + 16 + 8)
    assert "| mine |" in (out / "report.md").read_text()


def test_a_registered_filter_edits_and_is_read_back(tmp_path, monkeypatch):
    half = filters.Filter(lambda h, params, vector, scalars: jnp.full_like(h[..., :1], 0.5), vectors=True)
    monkeypatch.setitem(filters.FILTERS, "mine", half)
    lora, sizes = LoRAConfig(rank=2, targets=["q_proj"]), {"q_proj": (4, 4)}
    params = filters.init(jax.random.key(0), {"q_proj": 4}, 1, 2, "mine")
    params["q_proj"]["d"] = jnp.ones((1, 2, 4), jnp.float32)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    scalars = {name: x.astype(jnp.float32) for name, x in filters.scalars(1).items()} | {"gate": jnp.ones(1, "float32")}
    edit = filters.Edit(params, {"q_proj": jnp.ones((1, 4), jnp.float32)}, scalars, "mine")
    h = jnp.arange(8, dtype=jnp.float32).reshape(1, 2, 4)
    layer = jax.tree.map(lambda leaf: leaf[0], edit)
    p = layer.params["q_proj"]
    np.testing.assert_allclose(layer("q_proj", h, h), h + 0.5 * h @ p["c"] @ p["d"], rtol=1e-6)
    names = HFNames("base", {"q_proj": "layers.{layer}.q"})
    save_edit(tmp_path / "edit", edit, lora, lora.init(jax.random.key(1), sizes, 1), names, {})
    found = load_edit(tmp_path / "edit", sizes, 1)
    assert found.edit.kind == "mine" and list(found.edit.vectors) == ["q_proj"]


def test_registered_gates_open_and_close(monkeypatch):
    step = gates.Family(2.0, lambda l, key: (l > 0).astype(l.dtype), jax.nn.sigmoid)
    monkeypatch.setitem(gates.FAMILIES, "mine", step)
    structures = {"ffn": gates.Structure("ffn_hidden", (3,), (3,), (3,))}
    values = gates.init(jax.random.key(0), "mine", structures, 2)
    np.testing.assert_allclose(values["ffn"], 2.0, atol=0.5)
    closed = {"ffn": values["ffn"].at[:, 0].set(-1.0)}
    layer = jax.tree.map(lambda leaf: leaf[0], gates.bind(closed, structures, "mine"))
    np.testing.assert_array_equal(layer("ffn_hidden", jnp.ones((1, 3)), jnp.ones((1, 3))), [[0.0, 1.0, 1.0]])
    np.testing.assert_allclose(gates.open_probability("mine", jnp.zeros(1)), 0.5)


def test_a_registered_divergence_is_a_term_of_the_loss(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown word 'mine', known are rescale, .*, kl, js"):
        DropoutConfig(["ffn_hidden element mine"])
    monkeypatch.setitem(DIVERGENCES, "mine", DIVERGENCES["kl"])
    assert DropoutConfig(["ffn_hidden element mine"]).term == "mine"
    with pytest.raises(ValueError, match="ask for js and mine: two passes"):
        DropoutConfig(["ffn_hidden element mine", "attention_logits column js"])


def displays(file):
    """The texts in each tuple, list, set, dict and `Literal` that a source writes out, and the line."""
    for node in ast.walk(ast.parse(file.read_text())):
        parts = node.elts if isinstance(node, (ast.Tuple, ast.List, ast.Set)) else getattr(node, "keys", [])
        if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
            yield {part.value for part in parts if isinstance(part, ast.Constant)}, node.lineno


# The names of hypergradients and inner optimizers stand in other lists too: of proxies, of outer optimizers.
@pytest.mark.parametrize("name", [name for name in REGISTRIES if name not in ("hypergradients", "inner optimizers")])
def test_no_list_is_written_a_second_time(name):
    registry, own, *_ = REGISTRIES[name]
    copies = [
        f"{file}:{line}"
        for file in sorted((ROOT / "methods").rglob("*.py"))
        for found, line in displays(file)
        if file != ROOT / "methods" / own and len(found & registry.keys()) > len(registry) / 2
    ]
    assert copies == []


PAGES = {
    "baselines.md": BASELINES,
    "heterolora.md": proxies.PROXIES,
    "finegates.md": gates.FAMILIES | gates.GATINGS,
    "loratrf.md": filters.FILTERS,
    "hiddenkey.md": DIVERGENCES,
    "lora.md": TASKS,
}


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_every_choice(page):
    text = (ROOT / "docs" / page).read_text()
    assert [name for name in PAGES[page] if not re.search(rf"[`\s]{re.escape(name)}\b", text)] == []


def test_the_table_of_baselines_is_the_registry():
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "baselines.md").read_text(), flags=re.MULTILINE)
    assert re.findall(r"`(.*?)`", " ".join(rows)) == [*BASELINES]


def test_the_table_of_models_is_the_registry():
    text = (ROOT / "docs" / "models.md").read_text()
    column = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| (?:yes|no) \|", text, flags=re.MULTILINE)
    assert re.findall(r"`(.*?)`", " ".join(column)) == [kind for family in loading.FAMILIES for kind in family.keys]


def test_a_family_is_known_by_its_entry(tiny_model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loading, "FAMILIES", tuple(f for f in loading.FAMILIES if "llama" not in f.keys))
        with pytest.raises(ValueError, match=r"of architecture 'llama', which is not known: phi3, .*mpnet are\."):
            loading.load(tiny_model)
    assert loading.load(tiny_model).config.num_layers == 2


def test_metrics_of_tasks_are_registered():
    used = {metric for task in TASKS.values() if isinstance(task, Classification) for metric in task.metrics}
    assert used and used <= METRICS.keys()
