"""Predicted costs against those of the compiled program."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.core import Tracer

import bilevel
from benchmarks.hypergradients import problems
from bilevel import Binomial, Levels, Unrolled
from bilevel.hypergradients import kept, replay_pass
from bilevel.measuring.flops import flops
from bilevel.measuring.planning import planned, temp_bytes

KEY = jax.random.key(0)


def test_flops_of_products_loops_and_branches():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert flops(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    assert flops(lambda x: jax.lax.scan(lambda c, _: (c @ a.T @ a, None), x, length=7)[0], a) == 7 * 4 * 3 * 4 * 3
    assert flops(lambda x: jax.lax.cond(True, lambda x: x + 1, lambda x: (x + 1) * 2, x), a) == 2 * 12
    assert flops(lambda x: jnp.sum(jnp.tanh(x)), a) == 12 + 12
    assert flops(lambda x: x.T.reshape(-1)[::2], a) == 0
    image, kernel = jnp.ones((1, 2, 8, 8)), jnp.ones((3, 2, 3, 3))
    assert flops(lambda x, k: jax.lax.conv(x, k, (1, 1), "SAME"), image, kernel) == 2 * 3 * 64 * 2 * 9


def test_flops_of_products_by_groups_and_of_linear_solves():
    rows, kernels, sizes = jnp.ones((16, 8)), jnp.ones((4, 8, 32)), jnp.array([4, 3, 8, 1])
    one = 2 * 16 * 8 * 32  # each row with the matrix of its group
    assert flops(jax.lax.ragged_dot, rows, kernels, sizes) == one
    total = lambda rows, kernels: jnp.sum(jax.lax.ragged_dot(rows, kernels, sizes) ** 2)  # noqa: E731
    found = flops(jax.grad(total, (0, 1)), rows, kernels)
    assert 3 * one <= found <= 3 * one + 3 * 16 * 32
    # Of what a solve is given, the solver alone is run where no derivative is taken.
    a, b = jnp.eye(8), jnp.ones(8)
    solver = lambda product, b: product(product(product(b)))  # noqa: E731
    wrapped = lambda a, b: jax.lax.custom_linear_solve(lambda x: a @ x, b, solver, symmetric=True)  # noqa: E731
    assert flops(wrapped, a, b) == flops(lambda a, b: solver(lambda x: a @ x, b), a, b) == 3 * 2 * 64


def test_flops_agree_with_the_compiler_where_nothing_loops():
    def network(x, w):
        return jnp.sum((jnp.maximum(x @ w, 0) @ w) ** 2)

    x, w = jnp.ones((64, 32)), jnp.ones((32, 32))
    compiled = jax.jit(jax.grad(network, argnums=1)).lower(x, w).compile().cost_analysis()
    np.testing.assert_allclose(flops(jax.grad(network, argnums=1), x, w), compiled["flops"], rtol=0.1)


def small(name):
    if name == "quadratic":
        return problems.quadratic(size=400)
    if name == "data_weighting":
        return problems.data_weighting(samples=64, width=32)
    return problems.lora_transformer(layers=1, width=32, tokens=16, size=2, remat=False)


def arguments(case, steps):
    outer = case.problem.start_outer(KEY)
    return case.problem, outer, case.batches(steps, KEY), case.batch(KEY), KEY


# A compilation each, so schedules and numbers of steps are spread over the problems.
MEASURED = {
    ("quadratic", 16): [("mixed", "none"), ("mixed", "sqrt"), ("reverse", "step")],
    ("quadratic", 256): [("mixed", "sqrt"), ("mixed", Levels(3)), ("mixed", Binomial(9))],
    ("data_weighting", 100): [
        *(("mixed", checkpoint) for checkpoint in ("none", "step", Levels(3), Binomial(7))),
        *(("reverse", checkpoint) for checkpoint in ("none", "sqrt")),
    ],
    ("lora_transformer", 16): [("mixed", "step"), ("reverse", "none"), ("reverse", Binomial(5))],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), MEASURED)
def test_planned_memory_is_within_15_percent_of_the_compiled(name, steps):
    case = small(name)
    problem, *rest = arguments(case, steps)
    unrolled = Unrolled(case.optimizer, steps)
    plan = planned(unrolled, problem, None, *rest)
    for mode, checkpoint in MEASURED[name, steps]:
        measured = temp_bytes(
            lambda u, p, *rest: u.estimate(p, None, *rest),
            dataclasses.replace(unrolled, mode=mode, checkpoint=checkpoint),
            problem,
            *rest,
        )
        np.testing.assert_allclose(
            plan.row(mode, checkpoint).temp_bytes, measured, rtol=0.15, err_msg=f"{mode} {checkpoint}"
        )


def test_a_plan_knows_micro_batches():
    """What is planned is what is compiled: the activations of one part, beside a copy of all rows."""

    def loss(w, outer, batch, key):
        for _ in range(12):
            batch = jnp.tanh(batch @ w)
        return jnp.mean(batch**2) * jnp.exp(outer)

    rows = jax.random.normal(KEY, (4, 512, 32))
    measured, plans = {}, {}
    for parts in (1, 8):
        part = loss if parts == 1 else bilevel.MicroBatches(loss, parts)
        problem = bilevel.Problem(part, part, lambda key, outer: 0.2 * jnp.eye(32), lambda key: jnp.zeros(()))
        unrolled = Unrolled(optax.sgd(0.1), 4, checkpoint="step")
        rest = problem.start_outer(KEY), rows, rows[0], KEY
        plans[parts] = planned(unrolled, problem, None, *rest).row("mixed", "step").temp_bytes
        measured[parts] = temp_bytes(lambda u, p, *rest: u.estimate(p, None, *rest), unrolled, problem, *rest)
        np.testing.assert_allclose(plans[parts], measured[parts], rtol=0.15)
    assert measured[8] < 0.25 * measured[1]


def test_a_plan_is_a_table_and_counts_as_theory_says():
    def loss(w, outer, batch, key):
        return jnp.sum(jnp.tanh(w @ w) * outer)

    problem = bilevel.Problem(loss, loss, lambda key, outer: jnp.ones((16, 16)), lambda key: jnp.ones(()))
    outer = problem.start_outer(KEY)
    plan = bilevel.plan(problem, Unrolled(optax.sgd(0.1), 16, checkpoint=Levels(2)), outer=outer)
    step = {row: plan.row(*row).evaluations / 16 for row in [("mixed", "none"), ("mixed", "step"), ("reverse", "step")]}
    # In mixed mode a rematerialised step keeps its gradient, and only the optimizer runs again.
    assert step["mixed", "step"] - step["mixed", "none"] < 0.2
    assert 2 < step["mixed", "step"] < 3.6
    # Every level costs another forward pass.
    assert plan.row("mixed", Levels(3)).evaluations - plan.row("mixed", "sqrt").evaluations == pytest.approx(
        16, rel=0.2
    )
    # Forward mode with one outer number: its training, and a tangent of it.
    assert 2 < plan.row("forward", "none").evaluations / 16 < 3.6
    assert plan.chosen == plan.row("mixed", "sqrt")
    text = str(plan)
    assert "through 16 steps" in text and "Binomial(c=5)" in text and "temporary kB" in text and "MFLOP" in text
    table = [line.split("│")[1:-1] for line in text.splitlines() if "│" in line]
    assert len(table) == len(plan.rows) and all(float(cell.replace(",", "")) > 0 for line in table for cell in line[2:])
    assert [line[1].strip() for line in table if "*" in line[1]] == ["sqrt *"]
    with pytest.raises(KeyError, match="no row"):
        plan.row("mixed", Levels(9))


def test_only_unrolled_is_planned():
    problem = bilevel.Problem(lambda *a: a[0], lambda *a: a[0], lambda key, outer: 1.0, lambda key: 1.0)
    with pytest.raises(TypeError, match="nothing to plan"):
        bilevel.plan(problem, bilevel.FirstOrder(optax.sgd(0.1), 4), outer=1.0)


@pytest.mark.parametrize("keep", ["all", "sqrt", Binomial(2)], ids=str)
def test_a_replay_is_planned_by_what_its_programs_do_and_its_folder_holds(keep, tmp_path, monkeypatch):
    case, steps = small("data_weighting"), 24
    hypergradient = bilevel.Replay(optax.adam(0.1), steps, segment=2, keep=keep, store=str(tmp_path / "kept"))
    problem, outer, _, batch, key = arguments(case, steps)
    data = case.batch(KEY)
    plan = bilevel.plan(problem, hypergradient, outer=outer, inner_data=data, outer_data=batch, key=key)
    assert plan.chosen.checkpoint == keep and "kept kB" in str(plan) and "keep" in str(plan)
    most, commit = [0], kept.InFolder.commit

    def noted(self, done):
        commit(self, done)
        files = (self.folder / file for file in set(self._files.values()))
        most[0] = max(most[0], sum(file.stat().st_size for file in files))

    monkeypatch.setattr(kept.InFolder, "commit", noted)
    counts = Counter()
    for name in ("advanced", "reversed_segment"):
        program = getattr(replay_pass, name)

        def counted(*given, program=program, name=name, **options):
            if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(given)):  # else it is only looked at
                counts[name] += flops(lambda *given: program(*given, **options), *given)
            return program(*given, **options)

        monkeypatch.setattr(replay_pass, name, counted)
    hypergradient.estimate(problem, None, outer, bilevel.FullBatch(data), batch, key)
    assert plan.chosen.flops == pytest.approx(counts.total(), rel=0.01)  # beside them there is the outer loss, once
    # Names and shapes stand in the files beside the numbers, and so do the losses of each step.
    assert 0.8 * plan.chosen.kept_bytes < most[0] < 1.2 * plan.chosen.kept_bytes


def test_states_of_a_replay_on_the_device_are_temporary_memory():
    case = small("data_weighting")
    problem, outer, _, batch, key = arguments(case, 24)
    given = {"outer": outer, "inner_data": batch, "outer_data": batch, "key": key}
    on_host, on_device = (
        bilevel.plan(problem, bilevel.Replay(optax.sgd(0.1), 24, store=store), **given) for store in ("host", "device")
    )
    for ours, theirs in zip(on_host.rows, on_device.rows, strict=True):
        assert theirs.temp_bytes - ours.temp_bytes == ours.kept_bytes > 0
