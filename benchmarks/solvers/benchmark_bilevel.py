"""Any stochastic solver of `bilevel`, and `Nested` with UD, inside the original benchmark_bilevel.

In a clone of https://github.com/benchopt/benchmark_bilevel, this file is a solver as it stands:

    benchopt run . -d ijcnn1 -s "/path/to/benchmarks/solvers/benchmark_bilevel.py[solver=StocBiO,settings='terms:5']"

What its `StochasticJaxSolver` wants is a carry that holds `inner_var`, `outer_var` and the states of its two samplers,
and a step on that carry; its losses are `f(inner, outer, start, batch_size)` on `batch_size` rows from row `start`. So
the batch of a `bilevel.Problem` is here the numbers of its rows, and the batches of a step are drawn by their samplers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from benchmark_utils.stochastic_jax_solver import StochasticJaxSolver

import bilevel


class Solver(StochasticJaxSolver):
    """`bilevel.<solver>`, or `UD`: `Nested` with `Unrolled(sgd)`.

    `step_size` is that of the inner variable, `step_size / outer_ratio` that of the outer one; they decay as
    `step ** -exponent`, inside and outside. `settings` are further keyword arguments, as `name:value` joined by `;`:
    those of the solver, or `steps` and `inner_start` of UD. Numbers of mini-batches are filled in.
    """

    name = "bilevel"
    parameters = {
        "solver": ["SOBA"],
        "settings": [""],
        "step_size": [0.1],
        "outer_ratio": [1.0],
        "exponents": [(0.0, 0.0)],
        "batch_size": [64],
        **StochasticJaxSolver.parameters,
    }
    requirements = ("pip::bilevel", *StochasticJaxSolver.requirements)

    def init(self):
        state = self._make().init(jax.random.key(self.random_state))
        return self._carry(state, self.state_inner_sampler, self.state_outer_sampler)

    def get_step(self, inner_sampler, outer_sampler):
        solver = self._make()
        outer_count = solver.outer_batches_per_step

        def step(carry, _):
            inner, inner_state = self._draw(
                inner_sampler, carry["state_inner_sampler"], solver.inner_batches_per_step, self.n_inner_samples
            )
            outer, outer_state = self._draw(
                outer_sampler, carry["state_outer_sampler"], outer_count, self.n_outer_samples
            )
            outer = outer.batch(0) if outer_count == 1 else outer
            state, _ = solver.step(carry["state"], inner, outer)
            return self._carry(state, inner_state, outer_state), None

        return step

    def _make(self):
        problem = bilevel.Problem(
            lambda z, x, rows, key: self.f_inner(z, x, rows[0], batch_size=len(rows)),
            lambda z, x, rows, key: self.f_outer(z, x, rows[0], batch_size=len(rows)),
            lambda key, outer: self.inner_var0,
            lambda key: self.outer_var0,
        )
        settings = dict(pair.split(":") for pair in self.settings.split(";") if pair)
        settings = {name: _number(text) for name, text in settings.items()}
        sizes = self.step_size, self.step_size / self.outer_ratio
        if self.solver == "UD":
            start = settings.pop("inner_start", "warm")
            estimator = bilevel.Unrolled(optax.sgd(sizes[0]), **settings)
            return bilevel.Nested(problem, estimator, optax.sgd(sizes[1]), inner_start=start)
        solver = getattr(bilevel, self.solver)
        fields = {field.name for field in dataclasses.fields(solver)}
        blocks = {
            "inner_blocks": self._batches(self.n_inner_samples),
            "outer_blocks": self._batches(self.n_outer_samples),
        }
        steps = (bilevel.Power(size, exponent) for size, exponent in zip(sizes, self.exponents, strict=True))
        return solver(problem, *steps, **{n: m for n, m in blocks.items() if n in fields}, **settings)

    def _draw(self, sampler, state, count, rows):
        """`count` batches of row numbers, and the sampler's next state."""
        size = self._size(rows)

        def one(state, _):
            start, *_, state = sampler(state)
            return state, start + jnp.arange(size, dtype=jnp.int32)

        state, index = jax.lax.scan(one, state, None, length=count)
        return bilevel.Indexed(jnp.arange(rows, dtype=jnp.int32), index.astype(jnp.int32), contiguous=True), state

    def _carry(self, state, inner_sampler, outer_sampler):
        return {
            "inner_var": state.inner.params,
            "outer_var": state.outer,
            "state": state,
            "state_inner_sampler": inner_sampler,
            "state_outer_sampler": outer_sampler,
        }

    def _size(self, rows):
        return rows if self.batch_size == "full" else self.batch_size

    def _batches(self, rows):
        return -(-rows // self._size(rows))


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
