"""The objective: how good an inner and an outer variable are, measured outside the clock."""

from benchopt import BaseObjective


class Objective(BaseObjective):
    """A bilevel problem and its data; what is measured is the data set's own `metrics(inner, outer)`.

    Every curve also carries `steps` and the oracle calls made so far (`inner_gradients`, `outer_gradients`, `hvps`,
    `mixed_products`, and their sum `oracle_calls`), any of which can be the horizontal axis instead of seconds.
    """

    name = "bilevel"
    min_benchopt_version = "1.10"
    requirements = ("pip::bilevel[bench]",)
    sampling_strategy = "callback"

    def set_data(self, problem, inner, outer, metrics):
        self.problem, self.inner, self.outer, self.metrics = problem, inner, outer, metrics

    def get_objective(self):
        return {"problem": self.problem, "inner": self.inner, "outer": self.outer}

    def evaluate_result(self, inner, outer, counts):
        return {**self.metrics(inner, outer), **counts}

    def get_one_result(self):
        import jax

        outer = self.problem.start_outer(jax.random.key(0))
        return {"inner": self.problem.start_inner(jax.random.key(0), outer), "outer": outer, "counts": {}}
