"""The baselines: each learns, spends what it may, and hands back the function that its exported parts stand for."""

import dataclasses
import functools
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from methods import cli, seconds
from methods.adapters.lora import LoRAConfig
from methods.baselines import BASELINES, Setting, adalora, alora, autolora, increlora, lora_drop, sparse
from methods.baselines.importance import start as start_triplets
from methods.baselines.lorta import LoRTA
from methods.baselines.melora import MELoRA
from methods.baselines.mos import MoS
from methods.baselines.rac_lora import beside
from methods.baselines.tied_lora import TiedLoRA
from methods.models import identity
from methods.ranges import part
from tests.methods.small import arguments

L, D = 3, 8
SHAPES = {"q_proj": (D, 8), "v_proj": (D, 4)}
LORA = LoRAConfig(rank=4, alpha=4.0)


def forward(weights, adapt, x):
    def layer(h, sliced):
        w, hook = sliced
        q, v = (hook(site, h, h @ w[site]) for site in SHAPES)
        return h + 0.3 * jnp.tanh(q) + 0.3 * jnp.concatenate([v, v], axis=-1), None

    return jax.lax.scan(layer, x, (weights, adapt))[0]


def loss(weights, adapt, head, batch):
    x, target = batch
    return jnp.mean((forward(weights, adapt, x) + head["shift"] - target) ** 2)


HEAD = {"shift": jnp.zeros(())}


@functools.cache
def setting():
    """A stack of linears that misses an update of rank 2 in its last layer."""
    keys = jax.random.split(jax.random.key(0), 8)
    sites = zip(keys, SHAPES.items(), strict=False)
    weights = {site: jax.random.normal(k, (L, *shape)) / shape[0] ** 0.5 for k, (site, shape) in sites}
    x = jax.random.normal(keys[2], (48, D))
    config = LoRAConfig(rank=2, alpha=2.0)
    true = jax.tree.map(lambda leaf: jax.random.normal(keys[3], leaf.shape), config.init(keys[4], SHAPES, L))
    target = forward(weights, config.bind(true, mask=jnp.arange(L) == L - 1), x)
    data = x, target
    train, outer = (jax.tree.map(lambda a, s=s: a[s], data) for s in (slice(0, 32), slice(32, 48)))
    return Setting(loss, weights, LORA, SHAPES, L, train, outer, 0.3, 40, 8, 2e-2, jnp.float64, lambda key: HEAD)


def trained(config=LORA, seed=5):
    leaves, tree = jax.tree.flatten(config.init(jax.random.key(seed), SHAPES, L, jnp.float64))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(tree, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


BOUND_BY_BUDGET = ("uniform", "random-k", "first-k", "last-k", "sam", "melora", "rac-lora", "mos")


@pytest.mark.parametrize("name", BASELINES)
def test_learns_within_its_budget_and_exports_what_it_is(name):
    found = BASELINES[name](setting(), jax.random.key(1))
    run = jax.jit(lambda adapt, head: loss(setting().weights, adapt, head, setting().train))
    before, after = run(identity, HEAD), run(found.adapt, found.head)
    assert found.head["shift"] != 0
    assert after < 0.9 * before
    assert set(found.on) == set(SHAPES)
    assert all(on.shape == (L,) and on.min() >= 0 and on.max() <= 1 for on in found.on.values())
    if name in BOUND_BY_BUDGET:
        assert 0 < found.parameters <= setting().budget()
    if found.exported is None:
        assert name == "sam"
    else:
        config, params, gate, mask = found.exported
        np.testing.assert_allclose(run(config.bind(params, gate, mask), found.head), after, rtol=1e-9)


def test_choices_by_depth():
    one_layer = setting()._replace(steps=1, share=0.34)
    for name, layers in (("first-k", [1, 0, 0]), ("last-k", [0, 0, 1])):
        on = BASELINES[name](one_layer, jax.random.key(0)).on
        assert [on[site].tolist() for site in SHAPES] == [layers] * 2


def test_bad_share_is_one_sentence():
    for name in ("random-k", "adalora", "melora"):
        with pytest.raises(ValueError, match=r"The share 1\.5 of the budget must be above 0 and at most 1\."):
            BASELINES[name](setting()._replace(share=1.5), jax.random.key(0))


def test_lora_drop_measures_the_norms_of_the_updates():
    adapt, h = LORA.bind(trained()), setting().train[0]
    found = lora_drop.output_norms(lambda tapped: loss(setting().weights, tapped, HEAD, setting().train), adapt)
    for layer in range(L):
        w, hook = jax.tree.map(lambda leaf, i=layer: leaf[i], (setting().weights, adapt))
        for site in SHAPES:
            size = jnp.sum((hook(site, h, h @ w[site]) - h @ w[site]) ** 2)
            np.testing.assert_allclose(found[site][layer], size, rtol=1e-10)
        h = forward(*jax.tree.map(lambda leaf, i=layer: leaf[i : i + 1], (setting().weights, adapt)), h)


def test_sam_takes_the_entries_of_largest_squared_gradient():
    on = sparse.mask(setting(), HEAD)
    gradient = jax.grad(lambda w: loss(w, identity, HEAD, setting().train))(setting().weights)
    chosen = np.concatenate([np.abs(gradient[s][on[s]]) for s in on])
    others = np.concatenate([np.abs(gradient[s][~on[s]]) for s in on])
    assert len(chosen) == setting().budget() and chosen.min() >= others.max()


def test_adalora_keeps_the_budget_at_the_end_and_falls_to_it():
    course = [int(adalora.kept(step, 24, 7, 40)) for step in range(40)]
    assert course[:5] == [24] * 5 and course[-12:] == [7] * 12
    assert all(a >= b for a, b in itertools.pairwise(course))
    config, _, values, on = BASELINES["adalora"](setting(), jax.random.key(1)).exported
    assert sum(int(m.sum()) for m in on.values()) == int(0.3 * 2 * L * config.rank)
    for site in on:
        np.testing.assert_array_equal(values[site] != 0, on[site])


def test_increlora_hands_out_its_ranks_to_the_important_modules():
    transform = increlora.grow(target=9, warm_up=2, interval=1, at_once=2)
    params = {"adapter": start_triplets(setting(), jax.random.key(0), 0.5), "head": HEAD}
    grads = jax.tree.map(jnp.zeros_like, params)
    values = grads["adapter"]["values"]
    values["v_proj"] = values["v_proj"].at[1].set(1.0)
    state, sums = transform.init(params), []
    for _ in range(6):
        updates, state = transform.update(grads, state, params, grad=grads)
        sums.append(sum(int(r.sum()) for r in state.ranks.values()))
    assert sums == [6, 6, 8, 9, 9, 9]
    assert state.ranks["v_proj"][1] > 1  # the only one with a sensitivity
    reserve = int(state.ranks["v_proj"][1])
    np.testing.assert_allclose(
        (params["adapter"]["values"]["v_proj"] + updates["adapter"]["values"]["v_proj"])[1, reserve], increlora.RESERVE
    )
    found = BASELINES["increlora"](setting(), jax.random.key(1))
    assert sum(int(m.sum()) for m in found.exported[3].values()) == max(6, int(0.3 * 24))


def test_autolora_keeps_ranks_of_at_least_average_weight():
    alpha = {"q_proj": jnp.asarray([[0.0, 0, 0, 0], [3.0, 0, 0, 3.0], [0, 1.0, 2.0, -1]])}
    expected = [[True] * 4, [True, False, False, True], [False, False, True, False]]
    np.testing.assert_array_equal(autolora.keep(alpha)["q_proj"], expected)


def test_alora_scores_by_ablation_and_moves_ranks_without_losing_any():
    mask = {site: jnp.broadcast_to(jnp.arange(4)[None, :] < 2, (L, 4)) for site in SHAPES}
    params = trained()
    importance = alora.ablation(setting(), {"adapter": params, "head": HEAD}, mask, setting().outer)

    def score(mask):
        return -loss(setting().weights, LORA.bind(params, mask=mask), HEAD, setting().outer)

    without, alone = mask["v_proj"].at[1, 0].set(False), mask["v_proj"].at[1, 1].set(False)
    expected = score(mask) - score({**mask, "v_proj": without}) + score({**mask, "v_proj": alone})
    np.testing.assert_allclose(importance["v_proj"][1, 0], expected, rtol=1e-9)
    assert np.isneginf(importance["q_proj"][:, 2:]).all()
    moved = alora.hand_over(importance, mask, 3)
    assert sum(int(m.sum()) for m in moved.values()) == 12
    flat = np.concatenate([np.asarray(i)[:, :2].ravel() for i in importance.values()])
    gone = np.concatenate([np.asarray(m)[:, :2].ravel() for m in moved.values()])
    assert set(np.flatnonzero(~gone)) == set(np.argsort(flat)[:3])


def test_melora_is_block_diagonal_and_of_full_rank():
    kind = MELoRA(dataclasses.replace(LORA, rank=1, alpha=2.0), groups=4)
    params = kind.init(jax.random.key(0), SHAPES, L, jnp.float64)
    params = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape), params)
    config, factors = kind.factors(params)
    delta = config.delta(factors)["q_proj"]
    assert np.linalg.matrix_rank(delta[0]) == 4 and sum(leaf.size for leaf in params["q_proj"].values()) == L * 16
    for g in range(4):
        block = delta[0][2 * g : 2 * g + 2, 2 * g : 2 * g + 2]
        np.testing.assert_allclose(block, 2.0 * params["q_proj"]["a"][0, g] @ params["q_proj"]["b"][0, g], rtol=1e-12)
        assert not delta[0][2 * g : 2 * g + 2, : 2 * g].any()
    with pytest.raises(ValueError, match=r"MELoRA cannot cut site 'q_proj', \(8, 8\), into 3 equal parts\."):
        MELoRA(LORA, 3).init(jax.random.key(0), SHAPES, L, jnp.float64)


def test_tied_lora_is_two_matrices_and_two_vectors_a_layer():
    kind = TiedLoRA(LORA, trained=("u", "v"))
    params = kind.init(jax.random.key(0), SHAPES, L, jnp.float64)
    params = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape), params)
    delta = jax.vmap(lambda u, v, p=params["v_proj"]: p["a"] @ jnp.diag(u) @ p["b"] @ jnp.diag(v))
    config, factors = kind.factors(params)
    expected = delta(params["v_proj"]["u"], params["v_proj"]["v"])
    np.testing.assert_allclose(config.delta(factors)["v_proj"], expected, rtol=1e-12)
    grad = jax.grad(lambda p: loss(setting().weights, LORA.bind(kind.factors(p)[1]), HEAD, setting().train))(params)
    for leaves in grad.values():
        assert not leaves["a"].any() and not leaves["b"].any() and leaves["u"].any() and leaves["v"].any()
    with pytest.raises(ValueError, match=r"Tied-LoRA trains some of 'a', 'b', 'u', 'v', not 'w'\."):
        TiedLoRA(LORA, trained=("w",))


def test_lorta_is_the_five_way_tensor():
    kind = LoRTA(LORA, SHAPES, head_dim=4)
    params = kind.init(jax.random.key(0), SHAPES, L, jnp.float64)
    params = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape), params)
    config, factors = kind.factors(params)
    for site, heads in (("q_proj", "2"), ("v_proj", "1")):
        modes = params["a"], params["d"], params["h"][heads], params["l"], params["m"][site]
        expected = jnp.einsum("ir,dr,hr,lr,r->lihd", *modes).reshape(L, D, -1)
        np.testing.assert_allclose(config.delta(factors)[site], expected, rtol=1e-10)
    with pytest.raises(ValueError, match=r"LoRTA needs sites of one input size and of whole heads of 3"):
        LoRTA(LORA, SHAPES, head_dim=3)


def test_mos_puts_shards_of_one_pool_together_and_keeps_private_ones_apart():
    kind = MoS(LORA, L, pool=8, private=1, shards=2)
    params = kind.init(jax.random.key(0), SHAPES, L, jnp.float64)
    a, index = kind.factors(params)[1]["q_proj"]["a"], kind.index("q_proj", "a")
    for layer, rank in ((0, 0), (2, 3)):
        shards = params["q_proj"]["a"][index[layer, rank]]
        np.testing.assert_array_equal(a[layer, :, rank], shards.ravel())
    assert not (index == kind.index("q_proj", "b")).all()
    for layer in range(L):
        elsewhere = np.delete(index, layer, axis=0)
        assert not np.isin(index[layer, 0], elsewhere).any()
    with pytest.raises(ValueError, match=r"the pool must be larger than the private part\."):
        MoS(LORA, L, pool=3, private=1)


def test_links_side_by_side_are_the_sum_of_their_updates():
    one, other = trained(seed=1), trained(seed=2)
    both = dataclasses.replace(LORA, rank=8, alpha=8.0)
    expected = jax.tree.map(jnp.add, LORA.delta(one), LORA.delta(other))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), both.delta(beside(one, other)), expected
    )


def test_a_share_of_a_count_is_not_one_less_than_it_is():
    for hundredths in range(1, 101):
        for count in range(1, 120):
            assert part(hundredths / 100, count) == hundredths * count // 100


def test_parts_of_a_training_are_all_of_its_steps():
    for steps in range(4, 30):
        parts = Setting.parts(types.SimpleNamespace(steps=steps), 4)
        assert sum(parts) == steps and max(parts) - min(parts) <= 1


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize(
    ("name", "share", "said"),
    [
        ("uniform", "0.25", "25% of LoRA of rank 2, of which it takes 50.0%, more than that, since it spends whole ra"),
        ("tied-lora", None, "without a budget: it takes 75.0% of LoRA of rank 2."),
        (
            "lora-drop",
            "0.5",
            "rate, after 1 step of choosing, with a budget of 50% of LoRA of rank 2, of which it takes 100.0%, more "
            "than that, since the LoRA that the other layers share comes on top",
        ),
    ],
)
def test_the_page_says_what_a_baseline_took(name, share, said, tiny_model, tiny_data, tmp_path):
    given = arguments(tiny_model, tiny_data, tmp_path / "run", "--task", "piqa", *(["--share", share] if share else []))
    assert cli.run(["baseline", name, *given]) == 0
    assert said in " ".join((tmp_path / "run" / "report.md").read_text().split())
    if name == "lora-drop":
        scores = json.loads((tmp_path / "run" / "scores.json").read_text())
        assert all(np.isclose(sum(each), 1) for each in scores.values())
        stages = {"lora-drop choice": 1, "lora-drop": 3}
        assert steps_of(tmp_path / "run") == {stage: [*range(1, count + 1)] for stage, count in stages.items()}


def steps_of(out):
    """The steps of each stage in `metrics.jsonl`."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert "inner_loss" in row
        found.setdefault(row["stage"], []).append(row["step"])
    return found


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("name", ["alora", "rac-lora"])
def test_steps_that_do_not_divide_into_the_parts_are_taken_all_the_same(name, tiny_model, tiny_data, tmp_path):
    adapters = []
    for steps in ("4", "7"):
        given = arguments(tiny_model, tiny_data, tmp_path / steps, "--task", "piqa")
        given[given.index("--finetune-steps") + 1] = steps
        assert cli.run(["baseline", name, *given]) == 0
        found = steps_of(tmp_path / steps)
        assert len(found) == 4 and sum(map(len, found.values())) == int(steps)
        assert set(seconds.read(tmp_path / steps / seconds.FILE)) == set(found)
        adapters.append((tmp_path / steps / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1]
