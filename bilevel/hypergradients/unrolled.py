"""Unrolled differentiation: the derivative of the training map itself."""

from __future__ import annotations

import dataclasses

import jax

from bilevel import inner, schedules
from bilevel.data import narrow
from bilevel.gradients import mixed_gradient, reverse_gradient
from bilevel.guards import value_and_grad
from bilevel.hypergradients.base import Aux, Estimate, Trained, schedule, static
from bilevel.schedules import Checkpoint
from bilevel.trees import combine, partition

_GRADIENTS = {"mixed": mixed_gradient, "reverse": reverse_gradient}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unrolled(Trained):
    r"""Differentiates through K steps of training, :math:`w_{t+1} = U_t(w_t, \lambda)`:

    .. math:: \frac{dF(w_K, \lambda)}{d\lambda} = \partial_\lambda F + \sum_{t=0}^{K-1}
              \Big(\partial_\lambda U_t\Big)^{\!\top} \Big(\prod_{s>t} \partial_w U_s\Big)^{\!\top} \partial_w F .

    Exact for the training that was run (its optimizer, its batches, its random keys). It is not the gradient of the
    converged inner problem: that is `Implicit`, or the limit K to infinity. A warm start `inner_state` is a constant;
    with `inner_state=None` the derivative includes that of `init_inner`.

    With `truncate=T` only the last T steps are differentiated (and the direct term): biased, by what earlier steps
    contribute, unless T = K; the bias shrinks with the contraction of the training map to the power T.

    Args:
      optimizer: an optax transformation, or `outer -> transformation` where its settings are outer variables.
      steps: K, inner steps an outer iteration.
      mode: `"mixed"` (forward over reverse: keeps the point of a step, not its graph) or `"reverse"`.
      checkpoint: which steps keep their state: `"auto"`, `"none"`, `"step"`, `"sqrt"`, `Levels(n)` (`bilevel.schedules`).
      truncate: T, or None for all steps.

    Raises:
      ValueError: for steps < 1, an unknown mode or checkpoint, or truncate outside `[1, steps]`.

    References:
      Franceschi et al. 2017, arXiv 1703.01785; Shaban et al. 2019, arXiv 1810.10667 (truncation);
      Kemaev et al. 2025, arXiv 2505.00793 (mixed mode).
    """

    mode: str = static("mixed", kw_only=True)
    checkpoint: Checkpoint = static("auto", kw_only=True)
    truncate: int | None = static(None, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in _GRADIENTS:
            raise ValueError(f"Unrolled(mode={self.mode!r}): the mode must be one of {', '.join(_GRADIENTS)}.")
        schedules.validate(self.checkpoint)
        if self.truncate is not None and not 1 <= self.truncate <= self.steps:
            raise ValueError(f"Unrolled(truncate={self.truncate}): must be between 1 and steps={self.steps}, or None.")

    def trajectory(self, problem, inner_state, outer, inner_batches, key, **options):
        options = {"gradient": _GRADIENTS[self.mode], "checkpoint": self.checkpoint, **options}
        if self.truncate in (None, self.steps):
            return super().trajectory(problem, inner_state, outer, inner_batches, key, **options)
        split = self.steps - self.truncate
        keys, _ = schedule(key, self.steps)
        frozen = jax.lax.stop_gradient
        state = frozen(self.resume(problem, inner_state, outer, key))
        early, late = narrow(inner_batches, 0, split), narrow(inner_batches, split, self.steps)
        state, head = inner.train(problem, self.optimizer, state, frozen(outer), early, keys[:split])
        state = self.resume(problem, frozen(state), outer, key)
        state, tail = inner.train(problem, self.optimizer, state, outer, late, keys[split:], first=split, **options)
        return state, jax.tree.map(lambda a, b: jax.numpy.concatenate([a, b]), head, tail)

    def estimate(self, problem, inner_state, outer, inner_batches, outer_batch, key) -> Estimate:
        """See `Hypergradient`. Costs `steps` inner gradients and as many Hessian-vector products."""
        moving, fixed = partition(outer)

        def objective(moving):
            outer = combine(moving, fixed)
            state, trace = self.trajectory(problem, inner_state, outer, inner_batches, key)
            value, aux = self.outer_loss(problem, state.params, outer, outer_batch, key)
            return value, (state, Aux(trace.aux, aux, {"inner_loss": trace.value}))

        (value, (state, aux)), grad = value_and_grad(objective, moving, estimator="Unrolled", sees_training=True)
        return Estimate(value, grad, state, aux)
