"""How many products with the matrix a solver says it took, against a matrix that counts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel

DRAWN = np.random.default_rng(0).normal(size=(5, 5))
SYMMETRIC, GENERAL = jnp.asarray(DRAWN @ DRAWN.T + np.eye(5)), jnp.asarray(DRAWN + 3.0 * np.eye(5))
RHS = jnp.arange(1.0, 6.0)

SOLVERS = {
    "cg": (bilevel.CG(), SYMMETRIC),
    "cg, sketched": (bilevel.CG(preconditioner=bilevel.Nystrom(rank=3)), SYMMETRIC),
    "cg, cut off": (bilevel.CG(max_steps=2), SYMMETRIC),
    "normal cg": (bilevel.NormalCG(), GENERAL),
    "gmres": (bilevel.GMRES(), GENERAL),
    "gmres, restarted": (bilevel.GMRES(restart=2), SYMMETRIC),
    "gmres, sketched": (bilevel.GMRES(preconditioner=bilevel.Nystrom(rank=3)), SYMMETRIC),
    "bicgstab": (bilevel.BiCGStab(), GENERAL),
    "bicgstab, sketched": (bilevel.BiCGStab(preconditioner=bilevel.Nystrom(rank=3)), SYMMETRIC),
    "neumann": (bilevel.Neumann(terms=5, scale=0.05), SYMMETRIC),
    "dense": (bilevel.Dense(), GENERAL),
}


def counting(matrix, *, transposed):
    """`x -> A x`, and the list of its calls; with `transposed`, those of its transpose are among them."""
    calls = []

    def product(of):
        def multiply(_, x):
            jax.debug.callback(lambda _: calls.append(of), x)  # once for each vector of a batch
            return {"A": matrix, "A'": matrix.T}[of] @ x

        return multiply

    if transposed:
        return lambda x: jax.custom_derivatives.linear_call(product("A"), product("A'"), (), x), calls
    return lambda x: product("A")((), x), calls


@pytest.mark.parametrize("start", [None, jnp.ones(5)], ids=["from 0", "from a start"])
@pytest.mark.parametrize("name", SOLVERS)
def test_it_says_how_many_products_it_took(name, start):
    solver, matrix = SOLVERS[name]
    matvec, calls = counting(matrix, transposed=name == "normal cg")
    symmetric = matrix is SYMMETRIC
    solve = jax.jit(lambda rhs: solver.solve(matvec, rhs, start, jax.random.key(0), symmetric=symmetric))
    solution, info = jax.block_until_ready(solve(RHS))
    jax.effects_barrier()
    assert info["matvecs"] == len(calls) > 0
    if name not in ("neumann", "cg, cut off"):
        np.testing.assert_allclose(matrix @ solution, RHS, rtol=1e-8, atol=1e-8)
