"""Flexora as its authors released it, against a transcription of their loop in NumPy; its options; SGD inside."""

import functools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from methods import bench as benches
from methods import cli, driver, flexora, flexora_variants
from methods.bench import Bench
from methods.flexora import FlexoraSettings
from methods.models import HFNames, Pretrained
from methods.runfolder import RunFolder
from methods.tasks import Cycled, TokenBatch
from tests.methods.small import CONFIG, LAYERS, LORA, MODEL, adapter, flexora_words, setting

TRAIN, OUTER, LENGTH = 6, 5, 10


def rows(seed, count):
    """Sequences whose answers have one to five tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (count, LENGTH), dtype=np.int32)
    answers = 1 + np.arange(count)[:, None] % 5
    ends = LENGTH - np.arange(count)[:, None] % 3
    places = np.arange(LENGTH)[None]
    return TokenBatch(tokens, places < ends, (places >= ends - 1 - answers) & (places < ends - 1))


@functools.cache
def bench(row_means=True):
    weights = setting()[0]
    pretrained = Pretrained("drawn", MODEL, CONFIG, weights, None, HFNames("drawn", {}))
    train, outer = rows(0, TRAIN), rows(1, OUTER)
    return Bench(pretrained, LORA, None, None, train, outer, 5, 0, None, row_means)  # pyright: ignore


@pytest.fixture
def float64_start(monkeypatch):
    monkeypatch.setattr(benches, "start", lambda bench, key: {"lora": adapter(jax.random.key(3)), "head": {}})


def row_loss(params, alpha, tokens, mask, answer):
    """One sequence's mean over its answer; the gate multiplies what dropout, A and B are given."""
    gate = (LAYERS * jax.nn.softmax(alpha))[:, None, None]
    scaled = {site: {"a": gate * gate * p["a"], "b": gate * p["b"]} for site, p in params.items()}
    logits = MODEL.apply({"params": setting()[0]}, tokens[None], mask[None], LORA.bind(scaled))[0]  # pyright: ignore
    log_p = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(log_p[:-1], tokens[1:, None], axis=-1)[:, 0]
    return -jnp.where(answer[:-1], chosen, 0.0).sum() / answer.sum().astype(chosen.dtype)


BY_PARAMS = jax.jit(jax.grad(row_loss))
BY_ALPHA = jax.jit(jax.grad(row_loss, argnums=1))


def released_loop(params, train, outer, steps, size):
    """The authors' loop: a step of an AdamW without memory, then one of Adam on alpha by the sum over `size` rows."""
    alpha, first, second, trace = np.zeros(LAYERS), np.zeros(LAYERS), np.zeros(LAYERS), []
    params, seen = jax.tree.map(np.asarray, params), 0
    for step in range(steps):
        progress = (step - 0.1) / max(1.0, steps - 0.1)
        rate = 0.0 if step < 0.1 else 1e-4 * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
        each = [BY_PARAMS(params, alpha, *(a[i] for a in train)) for i in range(TRAIN)]
        grads = jax.tree.map(lambda *g: np.mean([np.asarray(x) for x in g], axis=0), *each)
        norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        short = min(1.0, 1.0 / (norm + 1e-6))
        params = jax.tree.map(
            lambda p, g: p * (1 - rate * 0.01) - rate * (short * g) / (np.abs(short * g) + 1e-8),  # noqa: B023
            params,
            grads,
        )
        total = np.zeros(LAYERS)
        for _ in range(size):
            total += np.asarray(BY_ALPHA(params, alpha, *(a[seen % OUTER] for a in outer)))
            seen += 1
        first, second = 0.9 * first + 0.1 * total, 0.999 * second + 0.001 * total**2
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        alpha = alpha - 0.01 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        trace.append(alpha)
    return np.array(trace)


@pytest.mark.usefixtures("float64_start")
def test_the_released_search_is_the_authors_loop_also_where_it_was_interrupted(tmp_path, monkeypatch):
    sizes = {"batch_size": TRAIN, "outer_batch_size": 3, "outer_steps": 6, "train_rows": TRAIN}
    settings = FlexoraSettings("m", released=True, **sizes)
    log, folder = RunFolder.log, RunFolder(tmp_path / "run", settings)
    (search,) = flexora.searches(flexora.used(settings), bench())

    def interrupting(self, stage):
        def callback(step, state, metrics):
            log(self, stage)(step, state, metrics)
            raise KeyboardInterrupt

        return callback

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", interrupting)
        with pytest.raises(KeyboardInterrupt):
            driver.search(search, folder)
    done = len(folder.rows("search"))
    assert 1 <= done < 6
    found = driver.search(search, folder).history["alpha"]
    wanted = released_loop(adapter(jax.random.key(3)), rows(0, TRAIN), rows(1, OUTER), 6, 3)
    np.testing.assert_array_equal(found[0], 0.0)  # the first rate is 0, so that B is 0 and no gate can matter
    assert np.abs(wanted[-1]).min() > 1e-4
    np.testing.assert_allclose(found, wanted, rtol=1e-8)


def test_the_released_rates_are_those_of_transformers():
    pytest.importorskip("torch")
    from transformers.optimization import _get_cosine_schedule_with_warmup_lr_lambda as published

    for steps in (1, 6, 600):
        schedule = flexora_variants.cosine(1e-4, steps)
        counts = {"num_warmup_steps": 0.1, "num_training_steps": steps, "num_cycles": 0.5}
        wanted = [1e-4 * published(step, **counts) for step in range(steps)]  # pyright: ignore
        np.testing.assert_allclose(schedule(jnp.arange(steps)), wanted, rtol=1e-12, atol=1e-20)


def test_cycled_rows_come_in_their_order_and_none_is_skipped():
    stream = Cycled(rows(1, OUTER), 3)
    tokens = [next(stream).tokens for _ in range(5)]
    order = np.arange(15) % OUTER
    np.testing.assert_array_equal(np.concatenate(tokens), rows(1, OUTER).tokens[order])
    stream.set_state(3)
    np.testing.assert_array_equal(next(stream).tokens, tokens[3])
    assert stream.get_state() == 4
    with pytest.raises(ValueError, match="Cycled batches of 6 rows: a batch must have between 1 and the 5 rows"):
        Cycled(rows(1, OUTER), 6)


@pytest.mark.usefixtures("float64_start")
def test_the_papers_inner_loop_is_gradient_descent():
    sizes = {"batch_size": TRAIN, "outer_batch_size": OUTER, "train_rows": TRAIN, "outer_steps": 1}
    settings = FlexoraSettings("m", inner_optimizer="sgd", inner_steps=2, inner_lr=0.5, outer_lr=2.0, **sizes)
    solver = flexora.solver(settings, bench(row_means=False).given())
    train, outer = (jax.tree.map(jnp.asarray, rows(seed, count)) for seed, count in ((0, TRAIN), (1, OUTER)))
    state = solver.init(jax.random.key(0))
    after, _ = jax.jit(solver.step)(state, bilevel.FullBatch(train), outer)
    given = bench(row_means=False).given()

    def value(params, alpha, batch):
        gates = LAYERS * jax.nn.softmax(alpha)
        scaled = {site: p | {"b": gates[:, None, None] * p["b"]} for site, p in params["lora"].items()}
        return given.loss(given.weights, given.bind(given.weights, {"lora": scaled, "head": {}}), batch)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def by_alpha(alpha):
        params = state.inner.params
        for _ in range(2):
            params = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(value)(params, alpha, train))
        return value(params, alpha, outer), params

    slope, trained = by_alpha(jnp.zeros(LAYERS))
    for ours, theirs in zip(jax.tree.leaves(after.inner.params), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(after.outer, -2.0 * slope, rtol=1e-8)


# --- options ------------------------------------------------------------------------------------------------------


SAID = flexora_variants.RELEASED_OPTIONS | flexora_variants.RELEASED_FINAL


@pytest.mark.parametrize(("name", "value"), SAID.items())
def test_an_option_beside_released_agrees_or_is_refused(name, value):
    other = {"hypergradient": "unrolled", "inner_optimizer": "sgd", "inner_start": "cold", "outer_optimizer": "sgd"}
    other = other | {"per": "module", "warmup": 0.5, "finetune_optimizer": "sgd", "schedule": "linear"}
    used = flexora.used(FlexoraSettings("m", released=True, **{name: value}))
    assert getattr(used, name) == value and used.variant == flexora_variants.RELEASED
    wrong = other.get(name, 7)
    flag = "--" + name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"--released is {flag} {value}, and {flag} {wrong} contradicts it: leave"):
        flexora.used(FlexoraSettings("m", released=True, **{name: wrong}))
    assert getattr(flexora.used(FlexoraSettings("m", **{name: wrong})), name) == wrong


def test_what_is_not_given_is_the_papers():
    used = flexora.used(FlexoraSettings("m"))
    assert used.variant == flexora_variants.PAPER and flexora.used(used) is used
    assert None not in [getattr(used, name) for name in flexora_variants.PAPER_OPTIONS]
    assert set(flexora_variants.PAPER_OPTIONS) == set(flexora_variants.RELEASED_OPTIONS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["inner_lr", "outer_lr", "outer_decay"])
def test_rates_are_numbers(name, value):
    lowest = "at least 0" if name == "outer_decay" else "above 0"
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} {value:g} must be {lowest} and at most 3\.4"):
        flexora.used(FlexoraSettings("m", **{name: value}))


@pytest.mark.parametrize("preset", flexora.PRESETS)
def test_every_preset_is_free_of_contradictions(preset):
    used = flexora.used(FlexoraSettings("m", **flexora.PRESETS[preset]))
    assert used.released == (preset == "released")
    if used.released:
        # 18,000 rows in 3 epochs of batches of 8; the first tenth is the warm-up.
        plan = flexora_variants.final_recipe(used, used.variant)
        assert (plan.steps, plan.warming, plan.clip, plan.by_length) == (3 * 18_000 // 8, 675, 1.0, False)


def test_rows_prepared_for_another_variant_are_refused():
    with pytest.raises(ValueError, match="The rows were prepared for another variant of the search"):
        flexora.searches(FlexoraSettings("m", released=True), bench(row_means=False))


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_with_end(tiny_model, tmp_path_factory):
    """`tiny_model`, whose tokenizer has a mark of the end: "Question", which no answer holds."""
    model = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("end") / "model"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "Question"}))
    return model


def test_the_mark_of_the_end_is_trained_on(model_with_end, tiny_data):
    settings = FlexoraSettings(
        str(model_with_end), data=str(tiny_data), released=True, length=24, train_rows=16, outer_rows=8, test_rows=0
    )
    for prepared, last in ((flexora.COMMAND.prepare(settings), "Question"), (benches.prepare(settings), None)):
        tokenizer = prepared.pretrained.tokenizer
        for batch in (prepared.train, prepared.outer):
            ends = np.asarray(batch.mask).sum(axis=1) - 1
            rows_ = np.arange(len(ends))
            assert np.asarray(batch.answer_mask)[rows_, ends - 1].all()
            words = {tokenizer.decode(int(token)) for token in np.asarray(batch.tokens)[rows_, ends]}
            assert words == {last} if last else words <= {"soap", "fast"}
    assert flexora.COMMAND.prepare(settings).row_means


@pytest.mark.usefixtures("float32_by_default")
def test_released_selects_what_is_positive_and_says_what_it_used(model_with_end, tiny_data, tmp_path):
    out = tmp_path / "run"
    words = flexora_words(model_with_end, tiny_data, out, "--released", "--random-baselines", "0")
    at = words.index("--inner-steps")
    del words[at : at + 2]
    # The gradients of two layers under one softmax are opposite, and so are Adam's steps: just one alpha is positive.
    assert cli.run(words) == 0
    selection = json.loads((out / "selection.json").read_text())
    assert selection["rule"] == "alpha > 0" and len(selection["layers"]) == 1
    np.testing.assert_allclose(sum(selection["alpha"]), 0.0, atol=1e-5)
    assert selection["layers"] == [int(np.argmax(selection["alpha"]))]
    config = json.loads((out / "config.json").read_text())
    for name, value in flexora_variants.RELEASED_OPTIONS.items():
        assert config[name] == value
    variant = config["variant"]
    assert variant["gate_power"] == 3 and variant["schedule"] == "cosine" and variant["outer_data"] == "cycled"
    assert variant["loss"] == "mean over rows of means" and variant["end_of_text"] is True
    assert [text.partition(":")[0] for text in variant["left_out"]][:3] == ["sizes", "chat template", "cutting"]
    rows_ = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows_ if row["stage"] == "search"]) == 3


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--released", "--random-baselines", "0"], "--released is --inner-steps 1, and --inner-steps 2 contra"),
        (["--inner-optimizer", "lion"], "inner-optimizer"),
    ],
)
def test_a_contradiction_is_one_sentence_and_nothing_is_made(more, sentence, tiny_model, tiny_data, tmp_path, capsys):
    try:
        code = cli.run(flexora_words(tiny_model, tiny_data, tmp_path / "run", *more))
    except SystemExit as ended:  # the parser of options
        code = ended.code
    assert code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_mark_of_the_end_is_refused(tiny_model, tiny_data):
    settings = FlexoraSettings(
        str(tiny_model), data=str(tiny_data), released=True, length=24, train_rows=16, outer_rows=8, test_rows=0
    )
    with pytest.raises(ValueError, match="has no mark of a text's end, which is to be trained on"):
        flexora.COMMAND.prepare(settings)


def test_a_cleared_optimizer_forgets():
    optimizer = flexora_variants.cleared(optax.adam(0.1))
    params, grad = jnp.ones(3), jnp.asarray([1.0, -2.0, 1e-3])
    with jax.numpy_dtype_promotion("standard"):  # optax's own code
        state = optimizer.init(params)
        first, state = optimizer.update(grad, state, params)
        second, _ = optimizer.update(100.0 * grad, state, params)
    np.testing.assert_allclose(first, -0.1 * jnp.sign(grad), rtol=1e-4)
    np.testing.assert_allclose(second, first, rtol=1e-4)
