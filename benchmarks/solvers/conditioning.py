r"""Unrolled against implicit hypergradients, over condition number, inner steps and noise, on quadratics.

    python benchmarks/solvers/conditioning.py

Inner loss: mean over rows of $\tfrac12 (a_i^\top w)^2 - (b_i + C \lambda)^\top w$, the eigenvalues of the mean of
$a a^\top$ from 1 to 1 over the condition number; outer loss: $\tfrac12 \|w - c\|^2$. From w = 0, K steps of
SGD of size $1 / (1 + \mathrm{tr} H / b)$ on batches of b rows, then the hypergradient by `Unrolled`, by
`Implicit` with CG of at most LINEAR_STEPS iterations, or by `Implicit` with the exact solution of its system. The error
is $|\hat g - g| / |g|$, where g is the gradient at the minimiser over all rows. Medians over seeds, float64, in
records/conditioning.json.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel

RECORD = Path(__file__).parent / "records" / "conditioning.json"
CONDITIONS = [10.0, 100.0, 1000.0, 10000.0]
STEPS = [1, 3, 10, 30, 100, 300, 1000]
BATCHES = {"no noise": None, "batches of 64": 64, "batches of 4": 4}
ROWS, INNER, OUTER, SEEDS, LINEAR_STEPS = 2048, 20, 5, 10, 10


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    record = {"conditions": CONDITIONS, "steps": STEPS, "errors": {}}
    for label, batch in BATCHES.items():
        record["errors"][label] = {name: [] for name in estimators(1)}
        for steps in STEPS:
            for name in estimators(steps):
                found = np.asarray(errors(name, steps, batch, jnp.asarray(CONDITIONS), jnp.arange(SEEDS)))
                medians = np.median(found, axis=1)  # [conditions]
                record["errors"][label][name].append([float(f"{x:.3g}") if np.isfinite(x) else None for x in medians])
            last = {name: rows[-1] for name, rows in record["errors"][label].items()}
            print(f"{label}, K = {steps}: {last}", flush=True)
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record) + "\n")


def estimators(steps):
    """Name -> `optimizer -> estimator`, of `steps` inner steps."""
    return {
        "unrolled": lambda optimizer: bilevel.Unrolled(optimizer, steps),
        "implicit": lambda optimizer: bilevel.Implicit(
            optimizer, steps, linear_solver=bilevel.CG(max_steps=LINEAR_STEPS)
        ),
        "implicit, exact": lambda optimizer: bilevel.Implicit(optimizer, steps, linear_solver=bilevel.Dense()),
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def errors(name, steps, batch, conditions, seeds):
    """Relative errors `[conditions, seeds]`."""
    return jax.vmap(lambda c: jax.vmap(lambda seed: error(name, steps, batch, c, jax.random.key(seed)))(seeds))(
        conditions
    )


def error(name, steps, batch, condition, key):
    """Relative error of one hypergradient on one draw of the problem."""
    keys = jax.random.split(key, 7)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (INNER, INNER)))[0]
    eigenvalues = condition ** -jnp.linspace(0.0, 1.0, INNER)
    a = jax.random.normal(keys[1], (ROWS, INNER)) * jnp.sqrt(eigenvalues)
    # Whitened, so that the mean of a a' has exactly these eigenvalues.
    a = jnp.linalg.qr(a)[0] * jnp.sqrt(ROWS * eigenvalues) @ basis.T
    b = jax.random.normal(keys[2], (INNER,)) + jax.random.normal(keys[3], (ROWS, INNER))
    coupling, target = jax.random.normal(keys[4], (INNER, OUTER)), jax.random.normal(keys[5], (INNER,))
    lam = jnp.ones(OUTER)

    def inner_loss(w, lam, rows, key):
        return 0.5 * jnp.mean((rows["a"] @ w) ** 2) - (rows["b"].mean(0) + coupling @ lam) @ w

    problem = bilevel.Problem(
        inner_loss,
        lambda w, lam, batch, key: 0.5 * jnp.sum((w - target) ** 2),
        lambda key, lam: jnp.zeros(INNER),
        lambda key: lam,
    )
    arrays = {"a": a, "b": b}
    index = None if batch is None else jax.random.randint(keys[6], (steps, batch), 0, ROWS)
    batches = bilevel.FullBatch(arrays) if batch is None else bilevel.Indexed(arrays, index)
    size = 1.0 / (1.0 + (0.0 if batch is None else eigenvalues.sum() / batch))
    estimator = estimators(steps)[name](lambda lam: optax.sgd(size))
    _, found = bilevel.value_and_hypergrad(problem, estimator)(lam, None, batches, None, key)
    hessian = a.T @ a / ROWS
    solution = jnp.linalg.solve(hessian, b.mean(0) + coupling @ lam)
    wanted = coupling.T @ jnp.linalg.solve(hessian, solution - target)
    return jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)


if __name__ == "__main__":
    main()
