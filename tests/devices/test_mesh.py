"""The same answer on a mesh of eight devices."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bilevel
from benchmarks import scaling
from bilevel import Batches, Indexed, Nested, Sharding, Unrolled
from bilevel.hypergradients.contract import driven_from_host
from bilevel.measuring.flops import flops
from bilevel.running.chunks import compiled
from tests.bilevel.estimators import TABLE
from tests.bilevel.helpers import KEY, NETWORK, ROWS
from tests.bilevel.solvers.table import TABLE as SOLVERS
from tests.devices.meshes import apart, case, nested, on, run, start

EACH = [("data", AxisType.Auto), ("fsdp", AxisType.Auto), ("both", AxisType.Auto), ("both", AxisType.Explicit)]


@functools.cache
def alone():
    problem, data = case()
    return run(nested(problem), data)


@pytest.mark.parametrize(("name", "kind"), EACH, ids=str)
def test_twenty_outer_steps_are_those_of_one_device(name, kind):
    problem, data = case()
    found = run(nested(problem), data, sharding=on(name, kind))
    of = lambda result: (result.outer, result.inner.params, result.history)  # noqa: E731
    assert apart(of(found), of(alone())) < 1e-12


def test_in_single_precision():
    problem, data = case(np.float32)
    solver = nested(problem)
    one, found = run(solver, data, 5), run(solver, data, 5, sharding=on())
    assert found.history["outer_loss"].dtype == np.float32
    assert apart((found.outer, found.history), (one.outer, one.history)) < 1e-5


ROWED = [row for row in TABLE if not row.tasks and row.name != "implicit solve"]


@pytest.mark.parametrize("row", ROWED, ids=lambda row: row.name)
def test_every_estimator_is_that_of_one_device(row):
    outer, rows = NETWORK.start_outer(KEY), jax.tree.map(jnp.asarray, ROWS)
    batches = Indexed(rows, jax.random.randint(jax.random.key(3), (3, 8), 0, 12))
    held_out = jax.tree.map(lambda x: x[:8], rows)
    estimator = row.make(optax.sgd(0.1), 3)

    def estimate(problem, outer, batches, held_out, key):
        found = estimator.estimate(problem, None, outer, batches, held_out, key)
        return found.value, found.grad, found.inner_state.params

    sharding = on()
    placed = sharding.rows("rows", held_out), sharding.replicated(KEY)
    compiled = estimate if driven_from_host(estimator) else jax.jit(estimate)
    found = compiled(sharding.problem(NETWORK), *sharding.replicated((outer, batches)), *placed)
    # CG stops at a residual of 2e-12, and not at the same point.
    tolerance = 1e-11 if row.name == "implicit by CG" else 1e-12
    assert apart(found, compiled(NETWORK, outer, batches, held_out, KEY)) < tolerance


# One without a memory, one with a direction, one with tables, one with a penalty, one that moves in random directions.
KINDS = (bilevel.SOBA, bilevel.FSLA, bilevel.SABA, bilevel.F2SA, bilevel.PZOBO)


@pytest.mark.parametrize("row", [row for row in SOLVERS if row.cls in KINDS], ids=lambda row: row.cls.__name__)
def test_a_stochastic_solver_is_that_of_one_device(row):
    problem, data = case()
    solver = dataclasses.replace(row.make(step=1e-2), problem=problem)
    if hasattr(solver, "inner_blocks"):
        solver = dataclasses.replace(solver, inner_blocks=4, outer_blocks=4)
    settings = {"inner_data": Batches(data, 16, order="blocks"), "outer_data": Batches(data, 16, order="blocks")}
    one, found = (bilevel.run(solver, steps=5, progress=False, sharding=s, **settings) for s in (None, on()))
    assert apart((found.outer, found.history), (one.outer, one.history)) < 1e-12


@pytest.mark.parametrize(("before", "after"), [(None, 8), (8, 4), (4, None)], ids=str)
def test_a_run_goes_on_with_other_devices(before, after, tmp_path):
    problem, data = case()
    first, then = (None if count is None else on(count=count) for count in (before, after))
    run(nested(problem), data, 10, checkpoint_dir=tmp_path, sharding=first)
    found = run(nested(problem), data, 20, checkpoint_dir=tmp_path, sharding=then)
    assert apart((found.outer, found.history), (alone().outer, alone().history)) < 1e-12


def test_a_start_that_reads_what_is_bound_to_it_goes_on_too(tmp_path):
    problem, data = case()
    bound = {name: np.ones(shape) for name, shape in {"a": (16, 4), "b": (4, 256), "head": (256, 3)}.items()}
    begin = lambda bound, key, outer: jax.tree.map(lambda x, y: x * y, bound, start(key, outer))  # noqa: E731
    problem = dataclasses.replace(problem, init_inner=jax.tree_util.Partial(begin, bound))
    solver, key = nested(problem, optax.adam(1e-2)), jax.device_put(jax.random.key(5), jax.devices()[1])
    run(solver, data, 2, checkpoint_dir=tmp_path, sharding=on(), key=key)
    found = run(solver, data, 4, checkpoint_dir=tmp_path, key=jax.random.key(5))
    one = run(solver, data, 4, key=jax.random.key(5))
    assert apart((found.outer, found.history), (one.outer, one.history)) < 1e-11


def test_tasks_are_split_and_their_rows_are_not():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 2, 10, 5)), rng.normal(size=(32, 2, 10))
    loss = lambda w, outer, batch, key: jnp.mean((batch[0] @ w - batch[1]) ** 2)  # noqa: E731
    problem = bilevel.Problem(loss, loss, lambda key, outer: outer, lambda key: jnp.zeros(5))
    solver = Nested(problem, bilevel.PerTask(Unrolled(optax.sgd(0.05), 3)), optax.adam(1e-2))
    tasks = Batches(((x[:, 0], y[:, 0]), (x[:, 1], y[:, 1])), 16)
    one, found = (bilevel.run(solver, inner_data=tasks, steps=3, progress=False, sharding=s) for s in (None, on()))
    assert apart((found.outer, found.history), (one.outer, one.history)) < 1e-11


def test_the_memory_of_a_solver_lies_where_inner_does():
    problem, data = case()
    rule = lambda path, x: P("fsdp") if "head" in path else P()  # noqa: E731
    solver = bilevel.SOBA(problem, inner_step=1e-2, outer_step=1e-2)
    state = run(solver, data, 2, outer_data=Batches(data, 16), sharding=on(inner=rule)).state
    assert state.inner.params["head"].sharding.spec == state.memory["head"].sharding.spec == P("fsdp")


def stream(data, size):
    for number in itertools.count():
        index = np.random.default_rng(number).integers(0, 64, size)
        yield tuple(x[index] for x in data)


def test_every_form_of_data():
    problem, data = case()
    solver, sharding = nested(problem), on()
    for form in (lambda: data, lambda: stream(data, 16), lambda: Batches(data, 16, order="blocks")):
        one, found = (
            bilevel.run(solver, inner_data=form(), outer_data=form(), steps=3, progress=False, sharding=s)
            for s in (None, sharding)
        )
        assert apart((found.outer, found.history), (one.outer, one.history)) < 1e-12
    # Rows that lie on an explicit mesh already, inside its context.
    explicit = on(kind=AxisType.Explicit)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Explicit,) * 2)
    laid = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), data)
    with jax.set_mesh(mesh):
        found = run(nested(problem), laid, 20, sharding=explicit)
    assert apart((found.outer, found.history), (alone().outer, alone().history)) < 1e-12


def test_the_final_training():
    problem, data = case()
    settings = {"optimizer": optax.adam(1e-2), "data": Batches(data, 16), "steps": 5, "progress": False}
    one, found = (bilevel.fit(problem, alone().outer, **settings, sharding=s) for s in (None, on()))
    assert apart((found.inner.params, found.history), (one.inner.params, one.history)) < 1e-12


def test_an_inner_variable_that_is_split_stays_so_with_its_optimizer():
    problem, data = case()
    rules = [
        lambda path, x: P("fsdp") if "head" in path else P(),
        {"a": P(), "b": P(), "head": P("fsdp")},
    ]
    solver = nested(problem, optax.adam(1e-2))
    one = run(solver, data)
    for rule in rules:
        found = run(solver, data, sharding=on(inner=rule))
        # Adam divides a gradient by its own size, which is rounding where the gradient is small: 1.1e-12 was seen.
        assert apart((found.outer, found.history), (one.outer, one.history)) < 1e-11
        adam = found.inner.opt_state[0]
        for tree in (found.inner.params, adam.mu, adam.nu):
            assert {name: leaf.sharding.spec for name, leaf in tree.items()} == {"a": P(), "b": P(), "head": P("fsdp")}
        assert adam.count.sharding.is_fully_replicated and found.outer["decay"].sharding.is_fully_replicated


def test_a_whole_model_that_is_trained_lies_as_frozen_weights_would():
    x, y = case()[1]

    def loss(inner, outer, batch, key):
        x, y = batch
        error = jnp.tanh(x @ inner["up"]) @ inner["down"] - y
        return jnp.mean(error**2) + jnp.exp(outer) * jnp.sum(inner["up"] ** 2)

    def begin(key, outer):
        keys = jax.random.split(key)
        shapes = {"up": (16, 4096), "down": (4096, 3)}
        return {n: 0.01 * jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}

    problem = bilevel.Problem(loss, loss, begin, lambda key: jnp.full((), -3.0))
    solver = nested(problem, optax.adam(1e-2))
    one, found = (run(solver, (x, y), 3, sharding=s) for s in (None, on("fsdp", inner="weights")))
    assert apart((found.outer, found.history), (one.outer, one.history)) < 1e-11
    for tree in (found.inner.params, found.inner.opt_state[0].mu):
        specs = {name: leaf.sharding.spec for name, leaf in tree.items()}
        assert specs == {"up": P(None, "fsdp"), "down": P()}  # the second is small
    ruled = run(solver, (x, y), 1, sharding=on("fsdp", inner="weights", weights=lambda path, x: P()))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(ruled.inner.params))


def test_work_and_weights_are_split():
    problem, data = case()
    sharding = on("data")
    placed, estimator = sharding.problem(problem), Unrolled(optax.sgd(1e-2), 4)
    batches = Batches(jax.tree.map(jnp.asarray, data), 16).take(KEY, 0, 4)

    def estimate(problem, outer, batches, held_out, key):
        return estimator.estimate(problem, None, outer, batches, held_out, key).grad

    outer = problem.start_outer(KEY)
    arguments = (*sharding.replicated((outer, batches)), sharding.rows("rows", data), sharding.replicated(KEY))
    split = jax.jit(estimate).lower(placed, *arguments).compile()
    whole = jax.jit(estimate).lower(problem, outer, batches, jax.tree.map(jnp.asarray, data), KEY).compile()
    flops = lambda compiled: compiled.cost_analysis()["flops"]  # noqa: E731
    assert flops(split) < 0.2 * flops(whole)  # an eighth, and what is not rows
    held = on("fsdp").problem(problem).inner_loss.args[0]
    assert {name: leaf.addressable_shards[0].data.shape for name, leaf in held.items()} == {
        "up": (16, 256),  # small
        "stack": (2, 256, 32),  # never the first of three axes, over which a scan runs
    }


def test_work_of_a_program_of_one_device_is_that_of_all():
    mesh = jax.make_mesh((4, 2), ("data", "other"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = (jax.P("data"), jax.P())
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=jax.P("data"), axis_names={"data"})
    assert flops(product, jnp.ones((32, 16)), jnp.ones((16, 8))) == 2 * 32 * 16 * 8


BAD = {
    "an axis": (lambda: Sharding(on().mesh, batch="rows"), "the mesh has the axes data, fsdp, and no rows"),
    "an axis twice": (lambda: Sharding(on().mesh, batch=("data", "data")), "names a mesh axis twice"),
    "an axis twice in a spec": (
        lambda: on(weights=lambda path, x: P("fsdp", "fsdp")).problem(case()[0]),
        "names a mesh axis twice: it can split one axis only",
    ),
    "an open axis": (
        lambda: on(weights=lambda path, x: P(P.UNCONSTRAINED)).problem(case()[0]),
        "leaves an axis open: name mesh axes, or None",
    ),
    "a text": (lambda: on(inner="frozen"), "inner='frozen'.: must be 'weights' where it is a text"),
    "a rule of one argument": (lambda: on(weights=lambda path: P()), r"weights=.*path, array"),
    "no mesh": (lambda: Sharding(3), "must be a jax.sharding.Mesh"),
    "no rule": (lambda: on(weights=3), "must be a PartitionSpec, a tree of them, or a function"),
    "a tree like nothing": (lambda: on(weights={"a": P()}).problem(case()[0]), "is like nothing there is"),
    "no spec": (lambda: on(weights=lambda path, x: "fsdp").problem(case()[0]), "must return a PartitionSpec, but"),
    "a spec of another mesh": (lambda: on(weights=lambda path, x: P("model")).problem(case()[0]), "names model, but"),
    "too many axes": (
        lambda: on(weights=lambda path, x: P(None, None, None, "fsdp")).problem(case()[0]),
        "has fewer axes than",
    ),
    "weights": (
        lambda: on("fsdp").place("weights", {"w": np.ones((3, 300, 301))}, None, on("fsdp")._split),
        r"a weight of shape \(3, 300, 301\) in leaf \['w'\] has no axis that the 8 devices of 'fsdp' divide",
    ),
    "rows of a batch": (
        lambda: run(nested(case()[0]), case()[1], 1, inner_data=Batches(case()[1], 12), sharding=on()),
        r"inner_data: Batches\(size=12\) on 8 devices \(data=4, fsdp=2\), which do not divide it",
    ),
    "rows of a full batch": (
        lambda: run(nested(case()[0]), case()[1], 1, outer_data=(np.ones((60, 16)), np.ones((60, 3))), sharding=on()),
        r"outer_data of shape \(60, 16\) in leaf \[0\] has 60 along axis 0, which 8 devices.*what has no rows",
    ),
    "rows of an iterator": (
        lambda: run(nested(case()[0]), case()[1], 1, inner_data=stream(case()[1], 12), sharding=on()),
        r"inner_data of shape \(2, 12, 16\) in leaf \[0\] has 12 along axis 1, which 8 devices",
    ),
    "no sharding": (lambda: run(nested(case()[0]), case()[1], 1, sharding=on().mesh), r"must be a bilevel.Sharding\("),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_sentence(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value).removesuffix("\n")


def test_runs_of_a_stack_of_keys_are_split_over_devices():
    problem, data = case()
    keys = jax.random.split(KEY, 4)
    together = run(nested(problem), data, 5, key=keys)
    apart_keys = Sharding(on().mesh, batch=(), keys="data")  # weights are split over the other axis
    found = run(nested(problem), data, 5, key=keys, sharding=apart_keys)
    assert apart((found.outer, found.history), (together.outer, together.history)) < 1e-12
    assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(found.inner.params)} == {"data"}
    # Rows and runs over axes of their own.
    found = run(nested(problem), data, 5, key=keys, sharding=Sharding(on().mesh, batch="fsdp", keys="data"))
    assert apart((found.outer, found.history), (together.outer, together.history)) < 1e-12
    with pytest.raises(ValueError, match=r"A stack of keys .* has 3 along axis 0, which 4 devices .* do not divide"):
        run(nested(problem), data, 1, key=keys[:3], sharding=apart_keys)
    with pytest.raises(ValueError, match="was given one key: give a stack"):
        run(nested(problem), data, 1, sharding=apart_keys)
    both = Sharding(on().mesh, batch=(), keys="data", inner=P("data"))
    with pytest.raises(ValueError, match=r"names a mesh axis twice"):
        run(nested(problem), data, 1, key=keys, sharding=both)
    for wrong in ({"batch": (), "keys": ()}, {"batch": "data", "keys": "data"}, {"batch": (), "keys": "seeds"}):
        with pytest.raises(ValueError, match=r"splits nothing|names a mesh axis twice|and no seeds"):
            Sharding(on().mesh, **wrong)


def test_no_device_waits_for_another_where_each_has_runs_of_its_own():
    """But to hand over what the host reads."""
    problem, data = case()
    sharding = Sharding(on("data").mesh, batch=(), keys="data")
    solver = sharding.solver(nested(problem))
    solver = dataclasses.replace(solver, problem=dataclasses.replace(solver.problem, sharding=sharding))
    keys = jax.random.split(KEY, 8)
    state = sharding.place_state(jax.tree.map(lambda *x: jnp.stack(x), *map(solver.init, keys)))
    feeds = [(sharding.replicated(Batches(data, 16)), sharding.replicated(keys)) for _ in range(2)]
    parts = str(compiled.lower(solver, None, 4, state, feeds, 3).compile().as_text()).split("\n\n")
    (entry,) = (part for part in parts if part.lstrip().startswith("ENTRY"))
    assert any(" while(" in part for part in parts)
    assert not [each for part in parts if part is not entry for each in scaling.collectives(part)]
    assert {each.kind for each in scaling.collectives(entry)} == {"all-gather"}
