"""Influences of training rows: closed forms, central differences, other ways to the same numbers, and their score."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import spearmanr

import bilevel
from benchmarks.lora.planted import auroc
from methods import attribute, attribution, cli, select_data
from methods.attribution import WEIGHTS, Training, numbered, problem
from methods.datamodeling import datamodeling_score, subsets
from tests.methods.small import arguments

RNG = np.random.default_rng(0)
ROWS, FEATURES = 24, 5
TRUTH = RNG.normal(size=FEATURES)
X = RNG.normal(size=(ROWS, FEATURES))
Y = X @ TRUTH + 0.3 * RNG.normal(size=ROWS)
X_ASKED = RNG.normal(size=(3, 2, FEATURES))
Y_ASKED = X_ASKED @ TRUTH + 1.0  # far from what is learned: the slope of a question says more than its bend


def squares(weights, w, outer, rows):
    x, y = rows
    return 0.5 * (x @ w - y) ** 2 + 0.05 * jnp.sum(w**2), jnp.ones_like(y)


def asked(weights, w, outer, batch):
    x, y = batch
    return 0.5 * jnp.mean((x @ w - y) ** 2)


def bends(weights, w, outer, rows):
    x, y = rows
    return 0.5 * (jnp.tanh(x @ w["in"]) @ w["out"] - y) ** 2, jnp.ones_like(y)


def training(steps=40, optimizer=None, size=8, losses=squares):
    """Of a linear model with decay, or of a small network."""
    if losses is squares:
        question, start = asked, lambda key: jnp.zeros(FEATURES)
    else:
        question = lambda weights, w, outer, batch: bends(weights, w, outer, batch)[0].mean()  # noqa: E731
        start = lambda key: {  # noqa: E731
            "in": jax.random.normal(key, (FEATURES, 4)),
            "out": jnp.ones(4) / 4,
        }
    return Training(
        problem(losses, question, start, ROWS),
        optimizer or optax.sgd(0.1),
        steps,
        bilevel.Batches(numbered((X, Y)), size),
        (X_ASKED, Y_ASKED),
        jax.random.key(0),
    )


def central(of, row, step=1e-5):
    """The derivative of the questions' losses by the weight of a row."""
    up, down = (of.answers({WEIGHTS: of.outer[WEIGHTS].at[row].add(s)}).losses for s in (step, -step))
    return (up - down) / (2 * step)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.05, eps_root=1e-6)], ids=["sgd", "adam"])
def test_influence_through_training_is_the_derivative_of_the_training(optimizer):
    of = training(losses=bends, optimizer=optimizer, steps=12)
    found = attribution.through_training(of)
    assert found.shape == (3, ROWS)
    for row in (0, 7, 23):
        np.testing.assert_allclose(found[:, row], central(of, row), rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(attribution.replayed(of), found, rtol=1e-11, atol=1e-15)


def test_at_rest_it_is_the_influence_function():
    """-grad F_q . H^-1 grad l_i / N at the solution of ridge regression, by hand."""
    of = training(steps=1000, size=ROWS)
    hessian = X.T @ X / ROWS + 0.1 * np.eye(FEATURES)
    w = np.linalg.solve(hessian, X.T @ Y / ROWS)
    rows = (X @ w - Y)[:, None] * X + 0.1 * w
    questions = np.einsum("qbf,qb->qf", X_ASKED, X_ASKED @ w - Y_ASKED) / 2
    wanted = -questions @ np.linalg.solve(hessian, rows.T) / ROWS
    np.testing.assert_allclose(attribution.through_training(of), wanted, rtol=1e-6)
    np.testing.assert_allclose(attribution.SCORES["implicit-cg"](of), wanted, rtol=5e-2)  # damped by 1e-3
    undamped = attribution.implicit(bilevel.CG(max_steps=20, tol=1e-12), damping=0.0)
    np.testing.assert_allclose(undamped(of), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", attribution.SCORES)
def test_every_score_is_a_number_for_each_question_and_row(name):
    of = training(steps=16)
    assert set(of.data.take(jax.random.key(0), 0, 1).index.shape) == {1, 8}
    scores = attribution.SCORES[name](of)
    assert scores.shape == (3, ROWS) and np.isfinite(scores).all() and scores.std() > 0


def test_products_of_gradients_are_those_of_each_rows_gradient():
    of = training(losses=bends)
    params = of.points(1)[-1]
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    rows = jax.jacrev(lambda w: bends((), unflatten(w), None, (X, Y))[0])(flat)
    questions = jax.jacrev(lambda w: jnp.mean(bends((), unflatten(w), None, (X_ASKED, Y_ASKED))[0], axis=1))(flat)
    for size in (ROWS, 7):  # rows of a batch, which are more than there are left in the last
        np.testing.assert_allclose(of.products(params, size), questions @ rows.T / ROWS, rtol=1e-10)
    # Rows in another order, of which two share a weight.
    number = np.random.default_rng(2).permutation(ROWS).astype(np.int32)
    number[number == 5] = 6
    other = dataclasses.replace(of, data=bilevel.Batches(attribution.Numbered(number, (X, Y)), 8))
    wanted = np.zeros((3, ROWS))
    np.add.at(wanted.T, number, (questions @ rows.T / ROWS).T)
    np.testing.assert_allclose(other.products(params, 7), wanted, rtol=1e-10)


def test_moments_of_a_training_are_on_its_way():
    of = training(steps=10)
    points = of.points(3)
    assert len(points) == 3
    np.testing.assert_allclose(points[-1], of.answers(of.outer).params, rtol=1e-12)
    shorter = dataclasses.replace(of, steps=4)  # 4, 3 and 3 steps
    np.testing.assert_allclose(points[0], shorter.answers(of.outer).params, rtol=1e-12)
    assert len(of.points(99)) == 10


def test_a_row_without_weight_is_a_row_that_is_not_there():
    of = training(steps=1000, size=ROWS)
    left_out = np.arange(ROWS) % 3 == 0
    kept = ~left_out
    # The weights of rows stand over the number of all rows, and so does the decay of each.
    hessian = X[kept].T @ X[kept] / ROWS + 0.1 * kept.mean() * np.eye(FEATURES)
    w = np.linalg.solve(hessian, X[kept].T @ Y[kept] / ROWS)
    wanted = 0.5 * ((X_ASKED @ w - Y_ASKED) ** 2).mean(axis=1)
    np.testing.assert_allclose(of.answers_without(left_out), wanted, rtol=1e-6)


def test_the_datamodeling_score_is_the_mean_rank_correlation():
    scores, losses = RNG.normal(size=(4, 30)), RNG.normal(size=(20, 4))
    kept = subsets(20, 30, 0.4)
    assert (kept.sum(axis=1) == 12).all() and len({row.tobytes() for row in kept}) == 20
    found = datamodeling_score(scores, kept, losses, resamples=50)
    each = [spearmanr(kept @ s, losses[:, q]).statistic for q, s in enumerate(scores)]
    np.testing.assert_allclose(found.each, each)
    np.testing.assert_allclose(found.value, np.mean(each))
    assert found.low < found.value < found.high and found.subsets == 20
    foretold = datamodeling_score(scores, kept, np.exp(kept @ scores.T), resamples=50)
    assert foretold.value == pytest.approx(1.0) and foretold.low == pytest.approx(1.0)
    for flat in (0.0, 0.1):  # sums that differ by rounding have no order
        assert datamodeling_score(np.full_like(scores, flat), kept, losses, resamples=5).value == 0


def test_influences_of_a_smooth_training_foretell_its_subsets():
    of = training(steps=40, size=ROWS)
    kept = subsets(20, ROWS, 0.8)
    losses = np.stack([of.answers_without(~each) for each in kept])
    found = datamodeling_score(attribution.through_training(of), kept, losses)
    assert found.value > 0.9 > 0.4 > abs(datamodeling_score(attribution.random(of), kept, losses).value)


@pytest.mark.parametrize(
    ("scores", "kept", "losses", "sentence"),
    [
        (np.ones((2, 5)), np.ones((4, 5), bool), np.ones((4, 3)), "must be .Q, N., .M, N. and .M, Q."),
        (np.ones((2, 5)), np.ones((4, 6), bool), np.ones((4, 2)), "must be"),
        (np.ones((2, 5)), np.ones((2, 5), bool), np.ones((2, 2)), "2 subsets have no rank correlation"),
        (np.full((2, 5), np.nan), np.ones((4, 5), bool), np.ones((4, 2)), "is not finite"),
        (np.ones((2, 5)), np.ones((4, 5), int), np.ones((4, 2)), "subsets of int64 are no masks"),
    ],
)
def test_what_does_not_fit_together_is_refused(scores, kept, losses, sentence):
    with pytest.raises(ValueError, match=sentence):
        datamodeling_score(scores, kept, losses)


MISFITS = {
    "a column": (lambda each, counts: (each[:, None], counts), r"losses .8, 1. and counts .8."),
    "a mean": (lambda each, counts: (each.mean(), counts), r"losses .. and counts .8."),
    "a count": (lambda each, counts: (each, 1), r"losses .8. and counts .. of a batch whose weights are .8."),
    "no counts": (lambda each, counts: each, r"must return .losses, counts., but returned a"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_losses_that_are_not_of_rows_are_refused(name):
    change, sentence = MISFITS[name]
    of = training(losses=lambda *given: change(*squares(*given)), steps=2)
    of = dataclasses.replace(of, problem=dataclasses.replace(of.problem, init_inner=lambda key, o: jnp.zeros(FEATURES)))
    with pytest.raises(ValueError, match=sentence):
        of.answers(of.outer)


def test_data_and_masks_that_do_not_fit_are_refused():
    of = training(steps=2)
    for data, sentence in (
        ((X, Y), "give bilevel.Batches.numbered.rows., size."),
        (attribution.Numbered(np.arange(1, ROWS + 1, dtype=np.int32), (X, Y)), "numbered from 1 to 24, but"),
    ):
        with pytest.raises(ValueError, match=sentence):
            dataclasses.replace(of, data=bilevel.Batches(data, 8))
    with pytest.raises(ValueError, match="do not lead with one axis of Q questions"):
        dataclasses.replace(of, questions=(X_ASKED, Y_ASKED[:2]))
    for mask in ([3], np.arange(ROWS), np.ones(ROWS - 1, bool)):
        with pytest.raises(ValueError, match=r"is no mask of the rows: give bool.24."):
            of.answers_without(mask)
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        subsets(3, 10, 1.5)


def test_descent_on_weights_finds_the_rows_that_are_wrong():
    drawn = np.random.default_rng(1).normal(size=(160, FEATURES))
    x, clean, wrong = drawn[:80], drawn[80:], np.arange(80) % 4 == 0
    domain = {WEIGHTS: bilevel.Interval(0.0, 2.0)}
    of = problem(squares, asked, lambda key: jnp.zeros(FEATURES), 80, domain=domain)
    data = bilevel.FullBatch(numbered((x, x @ TRUTH + np.where(wrong, 4.0, 0.0))))
    estimator = bilevel.Unrolled(optax.sgd(0.2), 30)
    solver = bilevel.Nested(of, estimator, optax.adam(0.3), inner_start="cold")
    found = bilevel.run(solver, inner_data=data, outer_data=(clean, clean @ TRUTH), steps=40, progress=False)
    weights = np.asarray(found.outer[WEIGHTS])
    assert auroc(-weights, wrong) > 0.95 and weights[wrong].mean() < 0.3 < weights[~wrong].mean()


def bench_of(model, data, out, kind, **more):
    """A bench of sixteen rows."""
    from methods import bench

    words = arguments(model, data, out)
    given = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    numbers = {name: int(value) for name, value in given.items() if value.isdigit()}
    settings = kind(**given | numbers | {"out": out} | more)
    return settings, bench.prepare(settings)


def test_influences_of_tokens_add_up_to_those_of_rows(tiny_model, tiny_data, tmp_path, float32_by_default):
    """The loss of a row is the sum of its tokens' losses, and so is its derivative by one weight for all of them."""
    settings, bench = bench_of(tiny_model, tiny_data, tmp_path, attribute.AttributeSettings, questions=2)
    rows = attribution.through_training(attribute.training(settings, bench))
    token = dataclasses.replace(settings, per="token")
    tokens = attribution.through_training(attribute.training(token, bench))
    assert rows.shape == (2, 16) and tokens.shape == (2, 16, bench.width) and np.abs(rows).max() > 1e-5
    np.testing.assert_allclose(attribute.by_row(tokens), rows, rtol=1e-3, atol=1e-4 * np.abs(rows).max())


def test_texts_are_shown_from_where_they_differ_with_the_line_that_they_are_from():
    template = "system: you are a helpful assistant\nuser: "
    table = attribute.rows_table(np.arange(4.0), [f"{template}Why {n}?" for n in "abcd"], ["in/f.jsonl line 7", *"BCD"])
    assert "| 0 (f.jsonl line 7) | +0.00e+00 | …user: Why a? |" in table and table.count("helpful") == 1
    short = attribute.rows_table(np.arange(4.0), [f"Question: {n}" for n in "abcd"], [None] * 4)
    assert "| 3 | +3.00e+00 | Question: d |" in short


def test_all_weights_of_a_model_may_be_what_is_trained(tiny_model, tiny_data, tmp_path, float32_by_default):
    given = {"questions": 0, "train": "full", "finetune_lr": 1e-2}
    settings, bench = bench_of(tiny_model, tiny_data, tmp_path, attribute.AttributeSettings, **given)
    of = attribute.training(settings, bench)
    scores = attribution.through_training(of)
    assert scores.shape == (1, 16)
    steep = int(np.abs(scores[0]).argmax())
    np.testing.assert_allclose(scores[:, steep], central(of, steep, 3e-2), rtol=2e-2)


def test_gates_and_rows_are_found_in_one_descent(tiny_model, tiny_data, tmp_path, float32_by_default):
    settings, bench = bench_of(tiny_model, tiny_data, tmp_path, select_data.SelectDataSettings, layers=True)
    of = select_data.of(bench, layers=True)
    outer = of.start_outer(jax.random.key(0))
    assert {name: leaf.shape for name, leaf in outer.items()} == {WEIGHTS: (16,), select_data.GATES: (2,)}
    (search,) = select_data.searches(settings, bench)
    found = bilevel.run(
        search.solver, inner_data=search.inner_data, outer_data=search.outer_data, steps=1, progress=False
    )
    assert all((np.asarray(found.outer[name]) != np.asarray(outer[name])).any() for name in outer)


def test_rows_of_equal_weight_are_kept_by_the_seed_and_not_by_their_order():
    weights = np.ones(1000)
    weights[990:] = np.linspace(1.1, 1.2, 10)
    weights[:10] = 0.5
    kept = select_data.largest(weights, 500, seed=0)
    assert len(kept) == 500 and (np.diff(kept) > 0).all() and set(range(990, 1000)) <= set(kept) and kept[0] >= 10
    assert 180 < (kept < 500).sum() < 310  # about half of those of equal weight are in the first half of the file
    np.testing.assert_array_equal(kept, select_data.largest(weights, 500, seed=0))
    assert (kept != select_data.largest(weights, 500, seed=1)).any()


@pytest.mark.usefixtures("float32_by_default")
def test_rows_that_no_batch_had_are_told(tiny_model, tiny_data, tmp_path, capsys):
    words = arguments(tiny_model, tiny_data, tmp_path / "run", "--task", "piqa", "--train-rows", "16")
    words += ["--batch-size", "2", "--inner-steps", "1", "--outer-steps", "2", "--random-baselines", "0"]
    assert cli.run(["select-data", *words]) == 0
    selection = json.loads((tmp_path / "run" / "selection.json").read_text())
    weights = np.asarray(selection["weights"])
    unmoved = np.flatnonzero(weights == 1)
    assert len(unmoved) == 12  # two batches of two rows are all that was seen
    both = len(set(unmoved) & set(selection["rows"]))
    page = " ".join((tmp_path / "run" / "report.md").read_text().split())
    assert f"have the weight 1 still: 12, of which {both} are kept, drawn at random" in page
