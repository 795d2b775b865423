"""Losses with a derivative of their own: their second derivatives need not commute, and nobody takes it for granted."""

import functools
import warnings

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel
from bilevel.differentiation.custom_rules import custom_rule
from tests.bilevel.helpers import KEY, estimate
from tests.bilevel.quadratic import error


def ruled(forward, backward):
    function = jax.custom_vjp(lambda x: forward(x))
    function.defvjp(lambda x: (forward(x), x), lambda x, ct: (backward(x, ct),))
    return function


@jax.custom_jvp
def straight_forward(x):
    return jnp.round(x)


straight_forward.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


floor = jax.custom_jvp(jnp.floor)
floor.defjvp(lambda primals, tangents: (jnp.floor(primals[0]), tangents[0]))


@jax.custom_gradient
def straight_gradient(x):
    return jnp.round(x), lambda ct: ct


@jax.custom_jvp
def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


@sigmoid.defjvp
def _(primals, tangents):
    y = sigmoid(primals[0])  # its rule once more: the second derivative comes from it, and so does the third
    return y, y * (1 - y) * tangents[0]


@jax.custom_vjp
def exponential(x):
    return jnp.exp(x)


exponential.defvjp(lambda x: (exponential(x), x), lambda x, ct: (exponential(x) * ct,))


@jax.custom_jvp
def exponential_but_half(x):
    return jnp.exp(x)


@exponential_but_half.defjvp
def _(primals, tangents):
    y = exponential_but_half(primals[0])
    return y, 0.5 * y * tangents[0]


@jax.custom_jvp
def sine(x):
    return jnp.sin(x)


@jax.custom_jvp
def cosine(x):
    return jnp.cos(x)


sine.defjvp(lambda primals, tangents: (sine(primals[0]), cosine(primals[0]) * tangents[0]))
cosine.defjvp(lambda primals, tangents: (cosine(primals[0]), -0.3 * sine(primals[0]) * tangents[0]))


OWN = {
    "a rule that calls its own function, and is half of the derivative": exponential_but_half,
    "a true rule that calls a function whose rule is not": sine,
    "straight through": ruled(jnp.round, lambda x, ct: ct),
    "straight through a sign": ruled(jnp.sign, lambda x, ct: jnp.where(jnp.abs(x) < 1, ct, 0.0)),
    "reversal": ruled(lambda x: x, lambda x, ct: -ct),
    "clipping": ruled(lambda x: x, lambda x, ct: jnp.clip(ct, -0.1, 0.1)),
    "scaling": ruled(lambda x: x, lambda x, ct: ct * (1 + 0.3 * jnp.tanh(x))),
    "straight through, by a forward rule": straight_forward,
    "straight through, by custom_gradient": straight_gradient,
    "a rule of the user's for a function of the library": floor,
    "clipping far away": ruled(lambda x: jnp.clip(x, -200.0, 200.0), lambda x, ct: ct),
    "a second derivative that is stopped": ruled(lambda x: x**2, lambda x, ct: 2 * jax.lax.stop_gradient(x) * ct),
    "optax's scale_gradient": lambda x: optax.scale_gradient(x, 2.0),
}


def printing(function, backward):
    """A function that tells what it computes, before and while it is differentiated."""

    def forward(x):
        jax.debug.print("{}", x.sum(), ordered=False)
        jax.debug.callback(lambda _: None, x.sum())
        return function(x), x

    def back(x, ct):
        jax.debug.callback(lambda _: None, ct.sum())
        return (backward(x, ct),)

    told = jax.custom_vjp(lambda x: forward(x)[0])
    told.defvjp(forward, back)
    return told


def on_the_host(function, slope):
    """A function that JAX does not see, whose slope somebody has given."""
    hosted = jax.custom_jvp(
        lambda x: jax.pure_callback(function, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")
    )
    hosted.defjvp(lambda primals, tangents: (hosted(primals[0]), slope(primals[0]) * tangents[0]))
    return hosted


def reading_the_host(x, ct):
    return ct * jax.experimental.io_callback(lambda: np.ones(()), jax.ShapeDtypeStruct((), x.dtype))


def beside_something_large(dtype, size):
    large = jax.custom_vjp(lambda h, s: size * h + s)
    large.defvjp(lambda h, s: (large(h, s), None), lambda _, ct: (size * ct, -ct))
    return lambda x: large(x.astype(dtype), jnp.sin(x).astype(dtype)).astype(x.dtype)


def in_one_array(x):
    both = ruled(lambda z: 1e7 * z[:1] + z[1:], lambda z, ct: jnp.concatenate([1e7 * ct, -ct]))
    return both(jnp.concatenate([1e-7 * x[:1], x[1:2]]))


def two_outputs(x):
    both = jax.custom_vjp(lambda x: (1e9 * x, x))
    both.defvjp(lambda x: (both(x), None), lambda _, cts: (1e9 * cts[0] - cts[1],))
    return both(x)[1]


def fixed_point(tangent_solve):
    mix = 0.4 * jnp.asarray([[0.2, 0.5, -0.3], [-0.4, 0.1, 0.6], [0.3, -0.2, 0.25]])

    def iterate(f, start):
        return jax.lax.fori_loop(0, 60, lambda _, x: x - f(x), start)

    return lambda a: jax.lax.custom_root(lambda x: x - mix @ jnp.tanh(x) - a, a, iterate, tangent_solve)


def cast(function, dtype):
    return lambda x: function(x.astype(dtype)).astype(x.dtype)


HIDDEN = {
    "a reversal that prints": printing(lambda x: x, lambda x, ct: -0.7 * ct),
    "half of the derivative of a function on the host": on_the_host(np.sin, lambda x: 0.5 * jnp.cos(x)),
    "the derivative of a function on the host, which nobody can look into": on_the_host(np.sin, jnp.cos),
    "a rule that asks the host": ruled(lambda x: x, reading_the_host),
    "a wrong sign beside something large": beside_something_large(jnp.float64, 1e7),
    "a wrong sign beside something large, in float32": beside_something_large(jnp.float32, 1e4),
    "a wrong sign in an entry beside a large one": in_one_array,
    "a wrong sign in an output beside a large one": two_outputs,
    "a factor near 1, in float32": cast(ruled(lambda x: x, lambda x, ct: 0.992 * ct), jnp.float32),
    "a reversal in half precision": cast(ruled(lambda x: x, lambda x, ct: -ct), jnp.bfloat16),
    "clipping smoothly and late": ruled(lambda x: x, lambda x, ct: ct / jnp.sqrt(1 + (ct / 1e6) ** 2)),
    "an offset of the gradient": ruled(lambda x: x, lambda x, ct: ct + 1e-14),
    "a rule that is wrong far away": ruled(lambda x: x, lambda x, ct: ct / jnp.sqrt(1 + (x / 3e3) ** 2)),
    "a root whose tangents are solved for roughly": fixed_point(lambda g, y: 2 * y - g(y)),
}
TRUE = {
    "a rule that prints": printing(jnp.sin, lambda x, ct: ct * jnp.cos(x)),
    "a rule for positive numbers": ruled(jnp.log, lambda x, ct: ct / x),
    "a rule for probabilities": ruled(lambda x: jnp.log(x / (1 - x)), lambda x, ct: ct / (x * (1 - x))),
    "a rule where its function overflows": ruled(
        lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x)),
        lambda x, ct: (p := jnp.exp(x) / jnp.sum(jnp.exp(x))) * (ct - jnp.sum(p * ct)),
    ),
    "a rule in float32": cast(ruled(jnp.tanh, lambda x, ct: 4 * ct / (jnp.exp(x) + jnp.exp(-x)) ** 2), jnp.float32),
    "a rule that calls its own function": sigmoid,
    "a rule that calls its own function, both ways": exponential,
    "a cube": ruled(lambda x: x**3, lambda x, ct: 3 * x**2 * ct),
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,
    "stop_gradient, which is no rule": lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
@pytest.mark.parametrize("name", [*OWN, *HIDDEN, *TRUE])
def test_rules_that_are_not_known_to_be_derivatives_are_told_from_those_that_are(name, wrap):
    function = wrap((OWN | HIDDEN | TRUE)[name])
    jaxpr = jax.make_jaxpr(lambda x, y: jnp.sum(function(x) * y))(jnp.ones(3), jnp.ones(3)).jaxpr
    assert (custom_rule(jaxpr, [True, False]) is not None) == (name not in TRUE)
    assert custom_rule(jaxpr, [False, True]) is None  # of the other factor there is none


rng = np.random.default_rng(0)
A, Y = jnp.asarray(rng.normal(size=(8, 4))), jnp.asarray(rng.normal(size=8))
START, K, RATE, AT = jnp.linspace(-2, 2, 4), 6, 0.05, jnp.asarray(0.8)


def problem(function, of):
    def inner(w, outer, batch, key):
        fit = A @ function(w) * outer if of == "inner" else A @ w * function(3 * outer)
        return jnp.mean((fit - Y) ** 2) + 0.05 * outer * jnp.sum(w**2)

    return bilevel.Problem(inner, lambda w, o, b, k: jnp.mean((A @ w - Y) ** 2), lambda k, o: START, lambda k: AT)


def by_loop(case):
    """The derivative of a loop of descent steps, by JAX alone."""

    def train(outer):
        w = START
        for _ in range(K):
            w = w - RATE * jax.grad(case.inner_loss)(w, outer, None, None)
        return case.outer_loss(w, outer, None, None)

    return jax.jit(jax.grad(train))(AT)


MODES = ("auto", "sqrt", bilevel.Binomial(2))


@pytest.mark.parametrize("of", ["inner", "outer"])
@pytest.mark.parametrize("name", OWN)
def test_mixed_mode_takes_reverse_mode_by_itself_and_says_so(name, of):
    case = problem(OWN[name], of)
    hypergradient = bilevel.Unrolled(optax.sgd(RATE), K, checkpoint=MODES[len(name) % 3])
    with pytest.warns(bilevel.CustomDerivativeWarning, match="inner_loss has a derivative of its own"):
        result = hypergradient.estimate(case, None, AT, None, None, KEY)
    np.testing.assert_allclose(result.grad, by_loop(case), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ["a reversal that prints", "a wrong sign beside something large"])
def test_and_where_it_is_hidden(name):
    case = problem(HIDDEN[name], "inner")
    with pytest.warns(bilevel.CustomDerivativeWarning, match="inner_loss has a derivative of its own"):
        result = bilevel.Unrolled(optax.sgd(1e-3), 1).estimate(case, None, AT, None, None, KEY)
    reverse = estimate(case, bilevel.Unrolled(optax.sgd(1e-3), 1, mode="reverse"), None, AT, None, None, KEY)
    np.testing.assert_allclose(result.grad, reverse.grad, rtol=1e-9)


SQUARE, UNIT = jnp.asarray(np.random.default_rng(5).uniform(0.1, 0.9, (3, 3))), jnp.asarray([0.2, 0.5, 0.7])
LIBRARY = {
    jax.nn: "relu relu6 silu gelu elu celu selu softplus sigmoid log_sigmoid mish hard_tanh squareplus softmax "
    "log_softmax logsumexp standardize leaky_relu",
    jax.scipy.special: "logsumexp gammaln digamma erf erfinv expit logit entr ndtr ndtri log_ndtr i0 i0e i1 i1e "
    "log_softmax softmax expi exp1",
    jax.scipy.linalg: "cholesky expm sqrtm lu_factor",
    jnp.linalg: "norm det slogdet inv pinv cholesky eigh svd qr",
    jnp: "sinc logaddexp hypot cbrt log1p",
    optax.losses: "softmax_cross_entropy sigmoid_binary_cross_entropy huber_loss log_cosh l2_loss",
    optax.projections: "projection_simplex projection_l1_ball projection_l2_ball projection_non_negative",
}


@pytest.mark.parametrize("module", LIBRARY, ids=lambda module: module.__name__)
def test_the_rules_of_libraries_are_true(module):
    for name in LIBRARY[module].split():
        function = getattr(module, name)
        for arguments in ([SQUARE], [UNIT], [SQUARE, SQUARE]):
            try:
                with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
            except (TypeError, ValueError):
                continue
            assert custom_rule(jaxpr, [True] * len(jaxpr.invars)) is None, name
            break
        else:
            pytest.fail(f"{name} was not called")


def test_reverse_mode_says_nothing():
    case = problem(OWN["straight through"], "inner")
    result = estimate(case, bilevel.Unrolled(optax.sgd(RATE), K, mode="reverse"), None, AT, None, None, KEY)
    np.testing.assert_allclose(result.grad, by_loop(case), rtol=1e-9)


def test_so_does_the_reversible_training():
    case = problem(OWN["scaling"], "inner")
    result = estimate(case, bilevel.Reversible(RATE, 0.5, 3), None, AT, None, None, KEY)
    reverse = bilevel.Unrolled(optax.sgd(RATE, 0.5), 3, mode="reverse")
    np.testing.assert_allclose(result.grad, estimate(case, reverse, None, AT, None, None, KEY).grad, rtol=1e-9)


# At rest: a field g(w, lam) whose Jacobian J in w is not symmetric. dF/dlam = -(dF/dw)' J^-1 dg/dlam.
MIX = jnp.asarray(rng.normal(size=(4, 4))) / 3


def field_loss(w, outer, batch, key):
    return 0.5 * jnp.sum((A / 3 @ OWN["scaling"](MIX @ w + w) - outer) ** 2) + 0.5 * jnp.sum(w**2)


FIELD = bilevel.Problem(field_loss, lambda w, o, b, k: jnp.sum((w - 1.0) ** 2), lambda k, o: jnp.zeros(4), lambda k: AT)


@functools.cache
def at_rest():
    def g(w, lam):
        return jax.grad(field_loss)(w, lam, None, None)

    w = jnp.zeros(4)
    for _ in range(40):
        w = w - jnp.linalg.solve(jax.jacobian(g)(w, AT), g(w, AT))
    J, cross = jax.jacobian(g, argnums=(0, 1))(w, AT)
    assert float(jnp.abs(J - J.T).max()) > 0.1
    return w, -2 * (w - 1.0) @ jnp.linalg.solve(J, cross)


GENERAL = [bilevel.GMRES(), bilevel.NormalCG(), bilevel.BiCGStab(), bilevel.Dense()]


@pytest.mark.parametrize("linear_solver", GENERAL, ids=lambda s: type(s).__name__)
def test_implicit_systems_are_transposed(linear_solver):
    hypergradient = bilevel.Implicit(optax.sgd(0.1), 600, linear_solver=linear_solver)
    assert error(estimate(FIELD, hypergradient, None, AT, None, None, KEY).grad, at_rest()[1]) < 1e-9


@pytest.mark.parametrize("push", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
def test_and_in_the_solution_as_a_function(push):
    hypergradient = bilevel.Implicit(optax.sgd(0.1), 600, linear_solver=bilevel.Dense())

    def value(lam):
        return jnp.sum((hypergradient.solve(FIELD, None, lam, None, KEY).params - 1.0) ** 2)

    assert error(jax.jit(push(value))(AT), at_rest()[1]) < 1e-9


def test_fixed_points_are_right_as_they_are():
    hypergradient = bilevel.FixedPoint(optax.sgd(0.1), 600, linear_solver=bilevel.Dense())
    assert error(estimate(FIELD, hypergradient, None, AT, None, None, KEY).grad, at_rest()[1]) < 1e-9


@pytest.mark.parametrize("linear_solver", [bilevel.CG(), bilevel.Nystrom(2)], ids=lambda s: type(s).__name__)
def test_solvers_of_symmetric_systems_are_refused_with_the_reason(linear_solver):
    hypergradient = bilevel.Implicit(optax.sgd(0.1), 3, linear_solver=linear_solver)
    with pytest.raises(ValueError, match=r"derivative of its own .* need not be symmetric.*use GMRES"):
        hypergradient.estimate(FIELD, None, AT, None, None, KEY)


@pytest.mark.parametrize("kind", [bilevel.FiniteDifference, bilevel.SAMA])
def test_differences_in_the_place_of_second_derivatives_are_refused(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: inner_loss has a derivative of its own.*OneStep"):
        kind(optax.sgd(0.1), 3).estimate(FIELD, None, AT, None, None, KEY)


@pytest.mark.parametrize("kind", [bilevel.SOBA, bilevel.AmIGO])
def test_stochastic_solvers_come_to_the_hypergradient_of_the_field(kind):
    solver = kind(FIELD, 0.1, 0.0)  # outer stays where it is

    @jax.jit
    def path(state):
        return jax.lax.scan(lambda s, _: (solver.step(s, None, None)[0], None), state, None, length=1500)[0]

    _, metrics = solver.step(path(solver.init(KEY)), None, None)
    np.testing.assert_allclose(metrics["direction_norm"], abs(at_rest()[1]), rtol=1e-9)


@pytest.mark.parametrize("make", [functools.partial(bilevel.F2SA, penalty=2.0), bilevel.BOME], ids=["F2SA", "BOME"])
def test_solvers_of_penalties_are_refused(make):
    solver = make(FIELD, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"derivative of its own.*use SOBA"):
        solver.step(solver.init(KEY), None, None)


def test_an_estimator_without_second_derivatives_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(FIELD, bilevel.EvolutionStrategies(optax.sgd(0.1), 2, population=4), None, AT, None, None, KEY)
