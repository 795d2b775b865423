"""Flexora's invariants, its recipes, and the command line around them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from methods import cli, flexora
from methods.runfolder import RunFolder
from tests.methods.small import LAYERS, LORA, flexora_words, given, setting, start, trained


def problem(**options):
    return flexora.problem(given(), **options)


@functools.cache
def estimate(kind, steps, learning_rate=0.1):
    _, _, train, validation = setting()
    estimator = kind(optax.sgd(learning_rate), steps)
    run = jax.jit(lambda e, p, o, k: e.estimate(p, None, o, bilevel.FullBatch(train), validation, k))
    return run(estimator, problem(), jnp.zeros(LAYERS), jax.random.key(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_gate_is_exactly_one_at_the_start(dtype):
    sizes = [1, 2, 3, 5, 7, 12, 24, 30, 32, 47, 49, 64, 127, 128]
    gates = jax.jit(lambda alphas: [flexora.gate(a) for a in alphas])([jnp.zeros(n, dtype) for n in sizes])
    for gate in gates:
        assert gate.dtype == dtype
        np.testing.assert_array_equal(gate, 1.0)


def test_gates_sum_to_the_number_of_layers():
    alpha = 3.0 * jax.random.normal(jax.random.key(0), (30,))
    np.testing.assert_allclose(flexora.gate(alpha).sum(), 30.0, rtol=1e-14)


def test_alpha_zero_is_plain_lora_bit_for_bit():
    weights, loss, train, _ = setting()
    params = trained()
    plain_loss = lambda: loss(weights, LORA.bind(params["lora"]), train)  # noqa: E731
    gated, plain = jax.jit(lambda alpha: (problem().inner_value(params, alpha, train, None)[0], plain_loss()))(
        jnp.zeros(LAYERS)
    )
    assert gated == plain


def test_first_order_gradient_is_zero_before_the_first_step():
    _, _, _, validation = setting()
    params = start(jax.random.key(0))
    grad = jax.grad(lambda alpha: problem().outer_value(params, alpha, validation, None)[0])(jnp.ones(LAYERS))
    np.testing.assert_array_equal(grad, 0.0)


def test_one_sgd_step_from_zero_b_is_twice_first_order_for_small_steps():
    # d/dg of  <grad_B L_val, g^2 ...>: the update is linear in the gate, and the gate acts once more on what it moved.
    unrolled, first_order = (estimate(kind, 1, 1e-6).grad for kind in (bilevel.Unrolled, bilevel.FirstOrder))
    assert jnp.abs(first_order).min() > 0
    np.testing.assert_allclose(unrolled, 2.0 * first_order, rtol=1e-5)


def test_unrolled_gradient_is_that_of_the_training():
    _, _, train, validation = setting()
    estimator = bilevel.Unrolled(optax.sgd(0.1), 3)
    grad = estimate(bilevel.Unrolled, 3).grad

    @jax.jit
    def value(alpha):
        key = jax.random.key(0)
        state = estimator.solve(problem(), None, alpha, bilevel.FullBatch(train), key)
        return problem().outer_value(state.params, alpha, validation, None)[0]

    step = 1e-4
    for i in range(LAYERS):
        shift = jnp.zeros(LAYERS).at[i].set(step)
        central = (value(shift) - value(-shift)) / (2 * step)
        np.testing.assert_allclose(grad[i], central, rtol=1e-6, atol=1e-10)


def test_gradient_descent_keeps_the_sum_of_alpha_and_adam_does_not():
    _, _, train, validation = setting()
    sums = {}
    for name, outer in (("sgd", optax.sgd(5.0)), ("adam", optax.adam(0.05))):
        solver = bilevel.Nested(problem(), bilevel.Unrolled(optax.adam(1e-2), 2), outer)
        result = bilevel.run(solver, inner_data=train, outer_data=validation, steps=5, progress=False)
        assert jnp.abs(result.outer).max() > 1e-3
        sums[name] = abs(float(result.outer.sum()))
    assert sums["sgd"] < 1e-13 < sums["adam"]


def test_released_gate_acts_three_times():
    _, _, train, _ = setting()
    params = trained()
    alpha = jnp.linspace(-0.5, 0.5, LAYERS)
    gates = flexora.gate(alpha) ** 3
    released, _ = problem(power=3).inner_value(params, alpha, train, None)
    weights, loss, *_ = setting()
    np.testing.assert_allclose(released, loss(weights, LORA.bind(params["lora"], gates), train), rtol=1e-14)


def test_selection():
    alpha = np.array([0.5, 2.0, -1.0, 0.9])
    assert flexora.select(alpha) == [1, 3]
    assert flexora.select(alpha, 3) == [0, 1, 3]
    assert flexora.select(alpha, threshold=0.0) == [0, 1, 3]
    with pytest.raises(ValueError, match="top-k 5 must be between 1 and the model's 4 layers"):
        flexora.select(alpha, 5)
    with pytest.raises(ValueError, match="has not moved"):
        flexora.select(np.zeros(3))


@pytest.mark.usefixtures("float32_by_default")
def test_the_command_selects_and_says_how_far_to_trust_it(finished, command_line, capsys):
    out = finished("flexora")
    selection = json.loads((out / "selection.json").read_text())
    assert selection["layers"] == flexora.select(selection["alpha"])
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["layers_to_transform"] == selection["layers"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["stage"] == "search"] == [1, 2, 3]
    report = (out / "report.md").read_text()
    assert "So short a search cannot rank 2 logits" in report and "/6 |" in report
    capsys.readouterr()
    words, _ = command_line("flexora")
    assert cli.run([*words, "--seed", "1"]) == 2
    assert "other settings (seed)" in capsys.readouterr().err


@pytest.mark.usefixtures("float32_by_default")
def test_interrupted_and_continued_is_never_interrupted(tiny_model, tiny_data, tmp_path, capsys, monkeypatch):
    def files(out):
        assert cli.run(flexora_words(tiny_model, tiny_data, out, "--random-baselines", "0")) == 0
        names = "metrics.jsonl", "selection.json", "results/flexora.json", "adapter/adapter_model.safetensors"
        return [(out / name).read_bytes() for name in names]

    log = RunFolder.log

    def interrupting(self, stage):
        def callback(step, state, metrics):
            log(self, stage)(step, state, metrics)
            if step == 2:
                raise KeyboardInterrupt

        return callback

    out = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", interrupting)
        assert cli.run(flexora_words(tiny_model, tiny_data, out, "--random-baselines", "0")) == 130
    assert "what is done is kept" in capsys.readouterr().err
    assert [row["step"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())] == [1, 2]
    assert files(out) == files(tmp_path / "whole")


BAD = {
    "unknown method": (["nope"], "Unknown method 'nope'"),
    "unknown preset": (["flexora", "--preset", "nope"], "Unknown preset 'nope'"),
    "unknown model": (["--model", "./nowhere.gguf"], "there is no model at ./nowhere.gguf"),
    "unknown task": (["--task", "nope"], "Unknown task 'nope'"),
    "no inner steps": (["--inner-steps", "0"], "--inner-steps"),
    "rank 0": (["--rank", "0"], "rank 0"),
    "missing data": (["--data", "./nowhere"], "There is no"),
    "batch larger than the data": (["--batch-size", "17"], "larger than the data"),
    "pattern without a match": (["--targets", "nope_.*"], "matches no site of this model, which has q_proj, k_proj"),
    "longer than the positions": (["--length", "65"], "--length 65 is more than the 64 positions of "),
    "top-k": (["--top-k", "3"], "between 1 and the model's 2 layers"),
    "diverging": (["--inner-lr", "1e38"], "Outer step 0: inner_loss is nan at inner step 1"),
}


@pytest.mark.usefixtures("float32_by_default")
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_code_2(name, tiny_model, tiny_data, tmp_path, capsys):
    more, sentence = BAD[name]
    out = tmp_path / "run"
    words = more if name in ("unknown method", "unknown preset") else flexora_words(tiny_model, tiny_data, out, *more)
    assert cli.run(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("bilevel: ") and sentence in said, said
    if name == "diverging":
        assert "['a']" in said  # the leaf
        assert not (out / "selection.json").exists()
    else:
        assert not out.exists()


@pytest.mark.usefixtures("float32_by_default")
def test_truncated_gguf_is_one_sentence(smollm2_gguf, tiny_data, tmp_path, capsys):
    broken = tmp_path / "broken.gguf"
    with open(smollm2_gguf, "rb") as file:
        broken.write_bytes(file.read(3_000_000))
    assert cli.run(flexora_words(broken, tiny_data, tmp_path / "run")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "broken.gguf" in said[0]
    assert not (tmp_path / "run").exists()
