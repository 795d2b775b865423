"""Each linear solver against a dense solve, alone and inside an estimator."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import CG, GMRES, BiCGStab, Dense, Neumann, NormalCG, Nystrom
from bilevel.linear_solvers.base import solved
from tests.bilevel.quadratic import KEY, error


def system(seed=0, symmetric=True, n=7):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    matrix = root @ root.T / n + np.eye(n) if symmetric else 0.3 * root / np.sqrt(n) + np.eye(n)
    return matrix, rng.normal(size=n)


def split(x, dtype=jnp.float64):
    """A vector of 7 as a tree."""
    return {"a": jnp.asarray(x[..., :3], dtype), "b": jnp.asarray(x[..., 3:], dtype).reshape(*x.shape[:-1], 2, 2)}


def join(tree):
    return jnp.concatenate([tree["a"], tree["b"].reshape(-1)])


def solve(solver, matrix, rhs, *, symmetric, start=None, dtype=jnp.float64):
    matrix = jnp.asarray(matrix, dtype)

    def matvec(x):
        return split(matrix @ join(x), dtype)

    start = None if start is None else split(start, dtype)
    function = jax.jit(lambda s, b: s.solve(matvec, b, start, KEY, symmetric=symmetric))
    solution, info = function(solver, split(rhs, dtype))
    return join(solution), {name: int(value) for name, value in info.items()}


GENERAL = [NormalCG(), GMRES(), GMRES(restart=3), BiCGStab(), Dense(), Neumann(400, 0.5)]


def name(solver):
    """Without the address of a function, so that parallel workers agree on it."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(solver))


SYMMETRIC = [CG(), CG(preconditioner=Nystrom(3, 1.0)), CG(preconditioner=lambda x: jax.tree.map(lambda x: 2 * x, x))]


@pytest.mark.parametrize("solver", GENERAL + SYMMETRIC, ids=name)
def test_positive_definite(solver):
    matrix, rhs = system()
    found, info = solve(solver, matrix, rhs, symmetric=True)
    assert error(found, np.linalg.solve(matrix, rhs)) < 1e-10
    assert 1 <= info["matvecs"] <= 400


@pytest.mark.parametrize("solver", GENERAL, ids=repr)
def test_nonsymmetric(solver):
    matrix, rhs = system(1, symmetric=False)
    found, _ = solve(solver, matrix, rhs, symmetric=False)
    assert error(found, np.linalg.solve(matrix, rhs)) < 1e-10


@pytest.mark.parametrize("solver", [CG(), NormalCG(), GMRES(), Dense()], ids=repr)
def test_indefinite(solver):
    matrix, rhs = system()
    matrix = matrix - 1.7 * np.eye(7)
    assert np.linalg.eigvalsh(matrix)[0] < -0.1
    found, _ = solve(solver, matrix, rhs, symmetric=True)
    assert error(found, np.linalg.solve(matrix, rhs)) < 1e-9


@pytest.mark.parametrize("solver", [CG(), *GENERAL[:-1]], ids=repr)
def test_float32(solver):
    matrix, rhs = system()
    found, _ = solve(solver, matrix, rhs, symmetric=True, dtype=jnp.float32)
    assert found.dtype == jnp.float32
    assert error(found, np.linalg.solve(matrix, rhs)) < 1e-4


@pytest.mark.parametrize("solver", [CG(), NormalCG(), GMRES(), BiCGStab()], ids=repr)
def test_many_unknowns_in_float32(solver):
    eigenvalues = jnp.linspace(0.1, 1.0, 100_000, dtype=jnp.float32)
    rhs = jax.random.normal(KEY, eigenvalues.shape, jnp.float32)
    found, _ = solver.solve(lambda x: eigenvalues * x, rhs, None, KEY, symmetric=True)
    assert error(found, rhs / eigenvalues) < 1e-4


def test_conjugate_gradients_where_curvature_is_not_positive():
    rhs = jnp.ones(2)
    for diagonal in ([1.0, -1.0], [0.0, 0.0], [1.0, 0.0]):
        diagonal = jnp.asarray(diagonal)
        matvec = lambda x, d=diagonal: d * x  # noqa: E731
        found, _ = CG().solve(matvec, rhs, None, KEY, symmetric=True)
        assert jnp.linalg.norm(diagonal * found - rhs) <= jnp.linalg.norm(rhs)
        found, _ = CG().solve(matvec, rhs, jnp.array([0.99, -0.99]), KEY, symmetric=True)
        assert jnp.all(jnp.isfinite(found))


def spectrum(eigenvalues, seed):
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return (basis * eigenvalues) @ basis.T, basis, rng.normal(size=len(eigenvalues))


@jax.jit
def on_matrix(solver, matrix, rhs, start=None):
    return solver.solve(lambda x: matrix @ x, rhs, start, KEY, symmetric=solver.symmetric_only)


def residuals_of(solver, matrices, sides, start=None):
    """Residuals of many systems, relative to that of the start."""
    found, _ = jax.jit(jax.vmap(on_matrix, (None, 0, 0, None)))(solver, matrices, sides, start)
    left = np.linalg.norm(np.einsum("kij,kj->ki", matrices, found) - sides, axis=1)
    at = np.zeros(len(sides[0])) if start is None else start
    return left / np.linalg.norm(np.einsum("kij,j->ki", matrices, at) - sides, axis=1)


def test_conjugate_gradients_on_an_indefinite_system_return_the_iterate_of_least_residual():
    """The textbook's iterates in NumPy: the last is far worse than one before, so the rule decides."""
    decided = 0
    for seed in range(6):
        matrix, _, rhs = spectrum([-1.0, -0.03, 0.02, 1.0, 2.0, 5.0], seed)
        for steps in (2, 3, 4, 5):
            x, r, iterates = np.zeros(6), rhs, [np.zeros(6)]
            p, curvatures = r, []
            for _ in range(steps):
                image = matrix @ p
                curvatures.append(p @ image)
                a = (r @ r) / (p @ image)
                x, left = x + a * p, r - a * image
                p, r = left + (left @ left) / (r @ r) * p, left
                iterates.append(x)
            sizes = [np.linalg.norm(matrix @ x - rhs) for x in iterates]
            best = len(sizes) - 1 if min(curvatures) > 0 else int(np.argmin(sizes))
            decided += sizes[-1] > 1.5 * sizes[best]
            found, info = on_matrix(CG(max_steps=steps, tol=1e-14), matrix, rhs)
            np.testing.assert_allclose(found, iterates[best], rtol=1e-9, atol=1e-12)
            assert info["iterations"] == steps and info["matvecs"] == steps + int(min(curvatures) <= 0)
    assert decided >= 6, "the last iterate would do as well"


def kinds_of_systems(n, count):
    """Regular and singular systems by name: `(matrices, whether they are symmetric, whether they are regular)`."""
    rng = np.random.default_rng(n)
    A = rng.normal(size=(count, n, n))
    Q = np.linalg.qr(A)[0]
    signs = np.sign(rng.normal(size=(count, n)))
    null = np.linspace(0, 1, n)
    twice = A.copy()
    twice[:, 0] = twice[:, 1]
    return {
        "general": (A, False, True),
        "indefinite": (np.einsum("kij,kj,klj->kil", Q, signs * np.linspace(0.5, 1, n), Q), True, True),
        "antisymmetric": (A - A.transpose(0, 2, 1), False, n % 2 == 0),
        "cyclic": (np.repeat(np.roll(np.eye(n), 1, 0)[None], count, 0), False, True),
        "two equal rows": (twice, False, False),
        "semidefinite": (np.einsum("kij,j,klj->kil", Q, null, Q), True, False),
        "singular and indefinite": (np.einsum("kij,kj,klj->kil", Q, signs * null, Q), True, False),
        "nilpotent": (np.repeat(np.eye(n, k=1)[None], count, 0), False, False),
        "zero": (0 * A, True, False),
    }


@pytest.mark.parametrize(
    "solver", [CG(), GMRES(), GMRES(restart=2), BiCGStab(), BiCGStab(max_steps=2), Dense()], ids=repr
)
def test_no_solution_is_worse_than_the_start(solver):
    for n in (2, 5):
        systems = kinds_of_systems(n, 60)
        # CG's residual may grow where A is semidefinite: there it is the error in the A-norm that falls.
        kinds = [k for k, (_, s, _) in systems.items() if not solver.symmetric_only or (s and k != "semidefinite")]
        matrices = np.concatenate([systems[kind][0] for kind in kinds])
        sides = np.random.default_rng(9).normal(size=(len(matrices), n))
        for start in (None, np.linspace(-1, 1, n)):
            worst = residuals_of(solver, matrices, sides, start).reshape(len(kinds), -1).max(1)
            assert np.all(worst <= 1 + 1e-9), dict(zip(kinds, worst, strict=True))  # NaN neither


def test_bicgstab_solves_regular_systems_after_breakdowns():
    for n in (3, 8):
        # Where A is antisymmetric both its inner products vanish.
        systems = {k: m for k, (m, _, regular) in kinds_of_systems(n, 100).items() if regular and k != "antisymmetric"}
        matrices = np.concatenate([*systems.values()])
        found = residuals_of(BiCGStab(max_steps=500), matrices, np.ones((len(matrices), n))).reshape(len(systems), -1)
        assert np.all(np.mean(found < 1e-6, axis=1) >= 0.98), dict(zip(systems, np.sort(found)[:, -5:], strict=True))


def test_dense_takes_the_shortest_solution_where_there_is_none_or_more_than_one():
    rng = np.random.default_rng(4)
    factor = rng.normal(size=(6, 3))
    matrix = factor @ factor.T
    matrix[:, -1] = matrix[-1] = 0  # an entry without influence: LU divides by 0
    for rhs in (matrix @ rng.normal(size=6), rng.normal(size=6)):
        found, _ = on_matrix(Dense(), matrix, rhs)
        assert error(found, np.linalg.pinv(matrix) @ rhs) < 1e-9


def test_conjugate_gradients_that_stop_early_return_the_last_iterate():
    # the error in the A-norm falls at every step, the residual does not
    eigenvalues, rhs = jnp.logspace(0, 4, 30), jnp.ones(30)
    matvec = lambda x: eigenvalues * x  # noqa: E731
    stopped = [CG(max_steps=n).solve(matvec, rhs, None, KEY, symmetric=True)[0] for n in range(1, 12)]
    errors = [jnp.sum(eigenvalues * (x - rhs / eigenvalues) ** 2) for x in stopped]
    residuals = [jnp.linalg.norm(eigenvalues * x - rhs) for x in stopped]
    assert np.all(np.diff(errors) < 0)
    assert np.any(np.diff(residuals) > 0)


def test_stops_at_its_tolerance_and_counts():
    matrix, rhs = system()
    loose, few = solve(CG(tol=1e-2), matrix, rhs, symmetric=True)
    assert 1e-12 < np.linalg.norm(matrix @ loose - rhs) / np.linalg.norm(rhs) < 2e-2
    _, many = solve(CG(), matrix, rhs, symmetric=True)
    assert few["iterations"] < many["iterations"] <= 10
    assert few["matvecs"] == few["iterations"]
    _, started = solve(CG(tol=1e-2), matrix, rhs, symmetric=True, start=rhs)
    assert started["matvecs"] == started["iterations"] + 1
    _, capped = solve(CG(max_steps=2), matrix, rhs, symmetric=True)
    assert capped["iterations"] == 2


@pytest.mark.parametrize("solver", GENERAL + SYMMETRIC, ids=name)
@pytest.mark.parametrize("unit", [2.0**-660, 2.0**530], ids=["1e-199", "1e159"])
def test_inside_an_estimator_the_unit_of_the_right_side_does_not_matter(solver, unit):
    matrix, rhs = system()
    start = np.linalg.solve(matrix, rhs) + 0.1
    matvec = lambda x: split(matrix @ join(x))  # noqa: E731
    function = jax.jit(lambda s, b, x: solved(s, matvec, b, x, KEY, symmetric=True))
    for x in (None, start):
        (plain, once), (other, again) = (
            function(solver, split(scale * rhs), None if x is None else split(scale * x)) for scale in (1.0, unit)
        )
        np.testing.assert_array_equal(join(other), unit * join(plain))
        assert {name: int(n) for name, n in once.items()} == {name: int(n) for name, n in again.items()}


@pytest.mark.parametrize(
    "solver", [CG(tol=1e-3), NormalCG(tol=3e-3), GMRES(tol=1e-3, restart=2), BiCGStab(tol=1e-3), Dense()], ids=repr
)
def test_units_of_the_system_do_not_matter(solver):
    """A tolerance is relative: in other units of A and b it stops at the same iterate, in other units."""
    matrix, rhs = system()
    found, took = on_matrix(solver, matrix, rhs)
    left = np.linalg.norm(matrix @ found - rhs) / np.linalg.norm(rhs)
    assert left < 1e-14 if isinstance(solver, Dense) else 1e-9 < left < 5e-3, left
    units = [(1.0, 1e-9), (1.0, 1e12)]
    if not isinstance(solver, GMRES):  # whose tolerance is one for steps of x as well
        units += [(1e-6, 1e3), (1e6, 1e3)]
    for of_matrix, of_rhs in units:
        scaled, again = on_matrix(solver, of_matrix * matrix, of_rhs * rhs)
        assert error(np.asarray(scaled) * (of_matrix / of_rhs), found) < 1e-9
        assert again == took


@pytest.mark.parametrize("solver", [CG(), GMRES(), BiCGStab(), Neumann(3, 0.5)], ids=repr)
def test_warm_start(solver):
    matrix, rhs = system()
    exact = np.linalg.solve(matrix, rhs)
    start = exact + 1e-6 * rhs
    cold, _ = solve(solver, matrix, rhs, symmetric=True)
    warm, _ = solve(solver, matrix, rhs, symmetric=True, start=start)
    assert error(warm, exact) <= max(1e-6, error(cold, exact) * 1e-3)
    zero, _ = solve(solver, matrix, rhs, symmetric=True, start=np.zeros(7))
    if not isinstance(solver, Neumann):
        assert error(zero, cold) < 1e-10


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_is_its_partial_sum(terms):
    matrix, rhs = system()
    wanted = 0.4 * sum(np.linalg.matrix_power(np.eye(7) - 0.4 * matrix, j) for j in range(terms)) @ rhs
    found, info = solve(Neumann(terms, 0.4), matrix, rhs, symmetric=True)
    assert error(found, wanted) < 1e-13
    assert info["matvecs"] == terms - 1


@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
def test_nystrom(sketch):
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(7, 3))
    matrix, rhs = factor @ factor.T, rng.normal(size=7)
    for rank, rho in ((3, 1e-2), (5, 1e-2), (50, 1e-3)):
        # exact as soon as the rank reaches that of the matrix, with the damping
        found, info = solve(Nystrom(rank, rho, sketch), matrix, rhs, symmetric=True)
        assert error(found, np.linalg.solve(matrix + rho * np.eye(7), rhs)) < 1e-9
        assert info["matvecs"] == min(rank, 7)
    coarse, _ = solve(Nystrom(2, 1e-2, sketch), matrix, rhs, symmetric=True)
    assert 1e-3 < error(coarse, np.linalg.solve(matrix + 1e-2 * np.eye(7), rhs))


def test_nystrom_errs_by_what_its_rank_leaves_out_over_its_damping():
    rng = np.random.default_rng(2)
    basis, _ = np.linalg.qr(rng.normal(size=(60, 60)))
    matrix, exact = (basis * np.linspace(0.1, 1.0, 60)) @ basis.T, rng.normal(size=60)

    def wrong(solver):
        found, _ = solver.solve(lambda x: matrix @ x, jnp.asarray(matrix @ exact), None, KEY, symmetric=True)
        return error(found, exact)

    assert 100 < wrong(Nystrom(12)) < 1 / Nystrom().damping  # the default is far below the eigenvalues here
    assert wrong(Nystrom(12, 0.5)) <= 1.0
    assert wrong(CG(preconditioner=Nystrom(12, 0.5))) < 1e-8


def test_zero_right_hand_side():
    matrix, rhs = system()
    for solver in [*GENERAL, *SYMMETRIC, Nystrom(3, 0.1)]:
        found, _ = solve(solver, matrix, 0 * rhs, symmetric=True)
        assert np.all(np.asarray(found) == 0), solver


@pytest.mark.parametrize("solver", [CG(), GMRES(), BiCGStab(), NormalCG(), Dense(), Neumann(200, 0.5)], ids=repr)
def test_vmap(solver):
    matrix, _ = system()
    rhs = np.random.default_rng(3).normal(size=(4, 7))

    def matvec(x):
        return split(jnp.asarray(matrix) @ join(x))

    found = jax.vmap(lambda b: join(solver.solve(matvec, split(b), None, KEY, symmetric=True)[0]))(jnp.asarray(rhs))
    assert error(found, np.linalg.solve(matrix, rhs.T).T) < 1e-9


@pytest.mark.parametrize(
    "make",
    [
        lambda: CG(max_steps=0),
        lambda: GMRES(restart=0),
        lambda: BiCGStab(max_steps=-1),
        lambda: Neumann(0),
        lambda: Neumann(3, 0.0),
        lambda: Nystrom(0),
        lambda: Nystrom(3, 0.0),
        lambda: Nystrom(3, 1.0, "rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_solvers_are_pytrees():
    preconditioned = CG(preconditioner=jax.tree_util.Partial(lambda d, x: jax.tree.map(jnp.multiply, d, x), {"a": 1.0}))
    assert jax.tree.leaves(preconditioned) == [1.0]
    assert jax.tree.structure(bilevel.CG()) == jax.tree.structure(bilevel.CG())
    assert hash(jax.tree.structure(bilevel.CG()))
