import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel import Problem, Unrolled
from tests.bilevel.helpers import KEY, LINE


def estimate(inner_loss=LINE.inner_loss, outer_loss=LINE.outer_loss, has_aux=False, **settings):
    problem = Problem(inner_loss, outer_loss, LINE.init_inner, LINE.init_outer, has_aux=has_aux, **settings)
    return Unrolled(optax.sgd(0.1), 2).estimate(problem, None, jnp.ones(2), None, None, KEY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"inner_loss": lambda w, o, b, k: (w - o) ** 2},
            r"inner_loss returned an array of shape \(2,\).*mean or a sum",
        ),
        ({"outer_loss": lambda w, o, b, k: w}, r"outer_loss returned an array of shape \(2,\)"),
        ({"inner_loss": lambda w, o, b, k: jnp.asarray(3)}, "int"),
        ({"inner_loss": lambda w, o, b, k: jnp.sum(w + 1j)}, "complex"),
        ({"inner_loss": lambda w, o, b, k: None}, "inner_loss returned a NoneType"),
        ({"inner_loss": lambda w, o, b, k: (jnp.sum(w), 1)}, "tuple of 2.*has_aux"),
        ({"has_aux": True}, "must return a pair"),
        ({"inner_loss": lambda w, o, b, k: (jnp.sum(w), 1, 2), "has_aux": True}, "tuple of 3"),
    ],
)
def test_losses_that_return_something_else_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        estimate(**settings)


def test_shapes_that_do_not_fit_are_told_with_the_loss_and_the_leaves():
    problem = Problem(
        lambda w, o, b, k: jnp.mean((b["x"] @ w["w"] - b["y"]) ** 2),
        lambda w, o, b, k: jnp.sum(w["w"] * o),
        lambda key, outer: {"w": jnp.zeros(3)},
        LINE.init_outer,
    )
    batches = {"x": jnp.ones((2, 5, 4), jnp.float32), "y": jnp.ones((2, 5))}
    with pytest.raises((TypeError, ValueError)) as caught:
        Unrolled(optax.sgd(0.1), 2).estimate(problem, None, jnp.ones(3), batches, None, KEY)
    note = " ".join(caught.value.__notes__)
    assert "inner_loss" in note and "['w'] float64[3]" in note and "['x'] float32[5, 4]" in note
    assert "outer: float64[3]" in note


@pytest.mark.parametrize("key", ["outer", "a"])
def test_a_list_where_an_array_is_meant_is_told_with_its_place(key):
    start = {"outer": lambda k: [0.0, 0.0], "a": lambda k: {"a": [0.0, 0.0]}}[key]
    loss = lambda w, o, b, k: jnp.sum(w * jnp.exp(o["a"] if key == "a" else o))  # noqa: E731
    problem = Problem(loss, loss, lambda k, o: jnp.zeros(2), start)
    place = {"outer": "outer", "a": r"outer\['a'\]"}[key]
    with pytest.raises(
        TypeError, match=rf"^inner_loss failed \(exp .*, and {place} is a list of 2 numbers.*init_outer"
    ):
        Unrolled(optax.sgd(0.1), 2).estimate(problem, None, problem.start_outer(KEY), None, None, KEY)


def test_numbers_of_python_and_numpy_become_arrays_of_fixed_type():
    problem = Problem(
        lambda w, o, b, k: (w["w"] - o["a"]) ** 2 * o["n"].astype(float),
        lambda w, o, b, k: w["w"] ** 2,
        lambda key, outer: {"w": 1.5},
        lambda key: {"a": 0.3, "n": 2, "b": np.float32(1.0)},
    )
    with pytest.warns(bilevel.StructuralZeroWarning, match=r"\['b'\]"):
        solver = bilevel.Nested(problem, Unrolled(optax.sgd(0.1), 2), optax.adam(0.1))
        result = bilevel.run(solver, steps=3, progress=False)
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type), result.outer) == {
        "a": (jnp.float64, False),
        "n": (jnp.int64, False),
        "b": (jnp.float32, False),
    }


def test_a_problem_is_a_pytree_of_what_is_bound():
    bound = jax.tree_util.Partial(lambda weights, *args: LINE.inner_loss(*args), jnp.ones(3))
    problem = Problem(bound, LINE.outer_loss, LINE.init_inner, LINE.init_outer)
    leaves, structure = jax.tree.flatten(problem)
    assert len(leaves) == 1
    again = jax.tree.unflatten(structure, leaves)
    assert jax.tree.structure(again) == structure
    same = Problem(bound, LINE.outer_loss, LINE.init_inner, LINE.init_outer)
    assert jax.tree.structure(same) == structure  # so that a compiled step is found again


def test_any_callable_serves():
    class Loss:
        def __init__(self, power):
            self.power = power

        def __call__(self, w, o, b, k):
            return jnp.sum((w - o) ** self.power)

        def method(self, w, o, b, k):
            return jnp.sum(w**self.power)

    result = estimate(inner_loss=Loss(2), outer_loss=Loss(4).method)
    w = 1 - 0.8**2
    np.testing.assert_allclose(result.grad, 4 * w**3 * w, rtol=1e-12)


def test_what_the_losses_report_comes_back():
    result = estimate(
        inner_loss=lambda w, o, b, k: (jnp.sum((w - o) ** 2), {"w": w}),
        outer_loss=lambda w, o, b, k: (jnp.sum(w**2), {"twice": 2 * w}),
        has_aux=True,
    )
    np.testing.assert_allclose(result.aux.inner["w"], [[0.0, 0.0], [0.2, 0.2]], rtol=1e-14)
    np.testing.assert_allclose(result.aux.outer["twice"], 2 * result.inner_state.params, rtol=1e-14)


def test_without_aux_there_is_none():
    result = estimate()
    assert result.aux.inner is None and result.aux.outer is None


@pytest.mark.parametrize(
    "project", [lambda outer: outer[:1], lambda outer: outer.astype(np.float32), lambda outer: (outer,)]
)
def test_a_projection_to_another_kind_of_tree_is_refused(project):
    from bilevel.problem.problem import projected

    problem = Problem(LINE.inner_loss, LINE.outer_loss, LINE.init_inner, LINE.init_outer, project=project)
    with pytest.raises(ValueError, match=r"project returned .* for an outer variable that is float64"):
        projected(problem, jnp.ones(2))


def test_a_projection_to_the_same_kind_of_tree_is_taken():
    from bilevel.problem.problem import projected

    problem = Problem(LINE.inner_loss, LINE.outer_loss, LINE.init_inner, LINE.init_outer, project=lambda x: 2.0 * x)
    np.testing.assert_array_equal(projected(problem, jnp.ones(2)), [2.0, 2.0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_loss_with_updates_and_aux_returns_two_things_beside_its_value(count):
    def inner_loss(inner, outer, batch, key):
        rest = ({"mean": inner["mean"] + 1.0}, "aux", "more")[:count]
        return jnp.sum((inner["w"] - outer) ** 2), rest

    start = lambda key, outer: {"w": outer, "mean": 0.0}  # noqa: E731
    problem = Problem(inner_loss, LINE.outer_loss, start, LINE.init_outer, has_aux=True, mutable=("mean",))
    inner = {"w": jnp.ones(2), "mean": jnp.zeros(())}
    if count == 2:
        assert problem.inner_value(inner, jnp.ones(2), None, KEY)[1] == "aux"
    else:
        with pytest.raises(ValueError, match=rf"a tuple of {count} beside its value.*\(updates, aux\)"):
            problem.inner_value(inner, jnp.ones(2), None, KEY)


def test_variables_of_nnx_that_are_no_parameters_belong_into_mutable_entries():
    nnx = pytest.importorskip("flax.nnx")
    start = lambda key, outer: {"w": jnp.ones(2), "stats": {"mean": nnx.BatchStat(jnp.zeros(2))}}  # noqa: E731
    problem = Problem(LINE.inner_loss, LINE.outer_loss, start, LINE.init_outer)
    with pytest.raises(ValueError, match=r"flax nnx BatchStat in leaf \['stats'\]\['mean'\], which is no parameter"):
        problem.start_inner(KEY, jnp.ones(2))
    assert Problem(LINE.inner_loss, LINE.outer_loss, start, LINE.init_outer, mutable=("stats",)).start_inner(
        KEY, jnp.ones(2)
    )
