"""Optuna in the benchmark: a black box, for reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optuna
from benchmark_utils.adapter import BilevelSolver, result, sizes
from jax.flatten_util import ravel_pytree

import bilevel
from bilevel.extend import Calls


class Solver(BilevelSolver):
    """Tree-structured Parzen estimator (TPE): each trial trains from the start by L-BFGS on all inner data, to a
    gradient of norm `tol` or for `inner_steps` steps, and returns the outer loss on all outer data. What is measured is
    the best trial so far. It searches a box of half-width `radius` around the start, which is its first trial.

    Gradients that line searches take are counted too.

    T. Akiba, S. Sano, T. Yanase, T. Ohta and M. Koyama, "Optuna: a next-generation hyperparameter optimization
    framework", KDD 2019. J. Bergstra et al., "Algorithms for hyper-parameter optimization", NIPS 2011.
    """

    name = "Optuna"
    parameters = {"inner_steps": [100], "tol": [1e-5], "radius": [5.0], "batch_size": ["full"], "seed": [0]}

    def skip(self, problem, inner, outer):
        size = sizes(problem)[1]
        return (True, f"{size} variables are too many for TPE") if size > 1000 else (False, None)

    def set_objective(self, problem, inner, outer):
        self.inner_arrays, self.outer_arrays, self.problem = inner, outer, problem

    def warm_up(self):
        lam, inner = self._start()
        self._trial(lam, inner)

    def run(self, callback):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        lam, inner = self._start()
        flat, unravel = ravel_pytree(lam)
        box = [(f"x{i}", float(c) - self.radius, float(c) + self.radius) for i, c in enumerate(flat)]
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=self.seed))
        study.enqueue_trial({name: float(c) for (name, *_), c in zip(box, flat, strict=True)})
        self.inner, self.outer, self.trials, best = inner, lam, 0, np.inf
        self.counts = np.zeros(len(Calls._fields))
        while callback():
            trial = study.ask()
            lam = unravel(jnp.asarray([trial.suggest_float(*side) for side in box], flat.dtype))
            value, trained, gradients = self._trial(lam, inner)
            study.tell(trial, value)
            self.counts += np.array(Calls(gradients, 1)) * self.weights
            self.trials += 1
            if value < best:
                best, self.inner, self.outer = value, trained, lam

    def get_result(self):
        return result(self.inner, self.outer, self.counts, self.trials)

    def _start(self):
        key = jax.random.key(self.seed)
        lam = self.problem.start_outer(key)
        return lam, self.problem.start_inner(key, lam)

    def _trial(self, lam, inner):
        data = self.inner_arrays, self.outer_arrays
        value, w, gradients = jax.block_until_ready(
            evaluate(self.problem, inner, lam, data, self.inner_steps, self.tol)
        )
        return float(value), w, int(gradients)


@jax.jit
def evaluate(problem, w, lam, data, steps, tol):
    """`(outer loss, trained inner variable, gradients taken)`; each loss on all of its data."""
    inner, outer = (bilevel.FullBatch(arrays) for arrays in data)
    key = jax.random.key(0)
    w, gradients = minimise(lambda w: problem.inner_value(w, lam, inner, key)[0], w, steps, tol)
    return problem.outer_value(w, lam, outer, key)[0], w, gradients


def minimise(loss, w, steps, tol):
    """`(minimiser, gradients taken)` by L-BFGS with a zoom line search."""
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry):
        _, _, norm, step, _ = carry
        return (step < steps) & (norm > tol)

    def body(carry):
        w, state, _, step, gradients = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = optimizer.update(grad, state, w, value=value, grad=grad, value_fn=loss)
        norm, searched = optax.tree.norm(optax.tree.get(state, "grad")), optax.tree.get(state, "num_linesearch_steps")
        return optax.apply_updates(w, updates), state, norm, step + 1, gradients + searched

    w, _, _, _, gradients = jax.lax.while_loop(unfinished, body, (w, optimizer.init(w), jnp.inf, 0, 1))
    return w, gradients
