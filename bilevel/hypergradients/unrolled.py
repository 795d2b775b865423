"""Unrolled differentiation: the derivative of the training map itself."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from bilevel.data import narrow, slots
from bilevel.differentiation.checkpointing import Checkpoint, is_schedule
from bilevel.differentiation.custom_rules import CustomDerivativeWarning
from bilevel.differentiation.forward import forward_value_and_grad
from bilevel.differentiation.gradients import mixed_gradient, reverse_gradient
from bilevel.differentiation.influence import Lost, arrives, value_and_grad
from bilevel.differentiation.loss_checks import guarded
from bilevel.hypergradients.base import Aux, Estimate, Trained, schedule
from bilevel.hypergradients.training import InnerState, Trace, train
from bilevel.settings import integer, one_of, optional, register, setting
from bilevel.trees import combine, partition

Mode = Literal["mixed", "reverse", "forward"]

# Tangents need a gradient that can be pushed forward, which the rule of the mixed one does not allow.
_GRADIENTS = {"mixed": mixed_gradient, "reverse": reverse_gradient, "forward": reverse_gradient}


@register
@dataclasses.dataclass(frozen=True)
class Unrolled(Trained):
    r"""Differentiates through K steps of training, :math:`w_{t+1} = U_t(w_t, \lambda)`:

    .. math:: \frac{dF(w_K, \lambda)}{d\lambda} = \partial_\lambda F + \sum_{t=0}^{K-1}
              \Big(\partial_\lambda U_t\Big)^{\!\top} \Big(\prod_{s>t} \partial_w U_s\Big)^{\!\top} \partial_w F .

    Exact for the training that was run (its optimizer, its batches, its random keys). It is not the gradient of the
    converged inner problem: that is `Implicit`, or the limit K to infinity. A warm start `inner_state` is a constant;
    with `inner_state=None` the derivative includes that of `init_inner`. The update is differentiated as its values
    say, without the `stop_gradient`s an optimizer may hold (one inside a loss is the loss's own, and honoured as JAX
    does: what it holds back has no derivative); where the inner loss has a derivative of its own
    (`jax.custom_vjp`), steps are differentiated in reverse, since second derivatives need not commute there.

    With `truncate=T` only the last T steps are differentiated (and the direct term): biased, by what earlier steps
    contribute, unless T = K; the bias shrinks with the contraction of the training map to the power T.

    `mode="forward"` carries :math:`dw_t/d\lambda` along instead of going back, `chunk` columns at a time: its memory
    does not depend on K; for n outer numbers its time is that of n / chunk trainings and n Hessian-vector products a
    step (1.07 gradients each in a LoRA transformer, 1.6 in an MLP). It pays for a few.

    Args:
      optimizer: an optax transformation, or `outer -> transformation` where its settings are outer variables.
        (`optax.MultiSteps` accumulates in float32 unless its `accumulator_dtype` says otherwise.)
      steps: K, inner steps an outer iteration.
      mode: `"mixed"` (forward over reverse: keeps the point of a step, not its graph), `"reverse"` or `"forward"`.
      checkpoint: which steps keep their state: `"auto"`, `"none"`, `"step"`, `"sqrt"`, `Levels(n)`, `Binomial(c)`,
        `Auto(bytes)` (`bilevel.plan` tells what each costs). Forward mode keeps none.
      truncate: T, or None for all steps.
      chunk: in forward mode, how many outer numbers are differentiated at once: memory is that of `chunk` trainings.

    Warns:
      CustomDerivativeWarning: where mixed mode is replaced by reverse mode.

    Raises:
      ValueError: for steps < 1, an unknown mode or checkpoint, truncate outside `[1, steps]`, or a chunk or a
        checkpoint that the mode has no use for.

    References:
      Franceschi et al. 2017, arXiv 1703.01785 (reverse and forward); Shaban et al. 2019, arXiv 1810.10667 (truncation);
      Kemaev et al. 2025, arXiv 2505.00793 (mixed mode).
    """

    mode: Mode = dataclasses.field(default="mixed", kw_only=True, metadata=setting(one_of(*get_args(Mode))))
    checkpoint: Checkpoint = dataclasses.field(default="auto", kw_only=True, metadata=setting(is_schedule))
    truncate: int | None = dataclasses.field(default=None, kw_only=True, metadata=setting(optional(integer(1))))
    chunk: int = dataclasses.field(default=8, kw_only=True, metadata=setting(integer(1)))

    takes_complex: ClassVar[bool] = True

    takes_constants: ClassVar[bool] = True
    """An outer variable without a floating-point leaf has no hypergradient: `grad` is None, and training is done."""

    def __post_init__(self):
        super().__post_init__()
        if self.mode == "forward" and self.checkpoint not in ("auto", "none"):
            raise ValueError(
                f"Unrolled(mode='forward', checkpoint={self.checkpoint!r}): forward mode keeps no states, so there is "
                "nothing to schedule; leave checkpoint at 'auto'."
            )
        if self.truncate is not None and self.truncate > self.steps:
            raise ValueError(f"Unrolled(truncate={self.truncate}): must be between 1 and steps={self.steps}, or None.")

    def trajectory(self, problem, inner_state, outer, inner_batches, keys, **options):
        state, head = self._constant_part(problem, inner_state, outer, inner_batches, keys)
        return self._moving_part(problem, state, head, outer, inner_batches, keys, **options)

    @property
    def _split(self) -> int:
        return 0 if self.truncate is None else self.steps - self.truncate

    def meet_custom_rule(self, name: str) -> None:
        """Says that the inner loss has a derivative of its own, by a function of this name."""
        if self.mode == "mixed":
            warnings.warn(
                f"inner_loss has a derivative of its own (`{name}`, by jax.custom_vjp or custom_jvp), so its second "
                "derivatives need not commute, as mode='mixed' would have it: steps are differentiated as in "
                "mode='reverse', whose memory is that of a step's graph; say mode='reverse' and this is not said.",
                CustomDerivativeWarning,
                stacklevel=4,
            )

    def lost(self, problem, inner_state, outer, inner_batches, keys) -> Lost:
        """As `Trained.lost`; what acts only before the last `truncate` steps is told too."""
        nearer = super().lost(problem, inner_state, outer, inner_batches, keys)
        if not self._split:
            return nearer
        moving, fixed = partition(outer)
        whole = dataclasses.replace(self, truncate=None, mode="reverse")

        def trained(moving):
            state = whole.trajectory(problem, inner_state, combine(moving, fixed), inner_batches, keys)[0]
            return problem.split(state.params)[0]

        def reasons():
            before = arrives(trained, moving)
            cut = f"it acts only before the last {self.truncate} of {self.steps} inner steps, which truncate leaves out"
            return [cut if acts else other for acts, other in zip(before, nearer(), strict=True)]

        return reasons

    def _constant_part(
        self, problem, inner_state, outer, inner_batches, keys
    ) -> tuple[InnerState | None, Trace | None]:
        """The steps before the last `truncate`, not differentiated; `(inner_state, None)` if there are none."""
        if not self._split:
            return inner_state, None
        slots(inner_batches, self.steps)  # refuses batches for another number of steps
        frozen = jax.lax.stop_gradient
        state = frozen(self.resume(problem, inner_state, outer, keys))
        batches = narrow(inner_batches, 0, self._split)
        state, trace = train(problem, self.optimizer, state, frozen(outer), batches, keys.inner[: self._split])
        return frozen(state), trace

    def _moving_part(self, problem, state, head, outer, inner_batches, keys, **options) -> tuple[InnerState, Trace]:
        """The steps that are differentiated, after `_constant_part`; with the reports of all steps."""
        # Tangents are pushed through a loop that stores nothing.
        checkpoint = "none" if self.mode == "forward" else self.checkpoint
        options = {"gradient": _GRADIENTS[self.mode], "checkpoint": checkpoint, "first": self._split, **options}
        state = self.resume(problem, state, outer, keys)
        batches = narrow(inner_batches, self._split, self.steps) if self._split else inner_batches
        state, tail = train(problem, self.optimizer, state, outer, batches, keys.inner[self._split :], **options)
        if head is None:
            return state, tail
        return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), head, tail)

    @guarded
    def estimate(self, problem, inner_state, outer, inner_batches, outer_batch, key) -> Estimate:
        """See `Hypergradient`. Costs `steps` inner gradients and as many Hessian-vector products, `info["hvps"]` (in
        forward mode, as many for each outer number)."""
        moving, fixed = partition(outer)
        tangents = sum(jnp.size(x) for x in jax.tree.leaves(moving)) if self.mode == "forward" else 1
        products = jnp.asarray(tangents * (self.steps - self._split), jnp.int32)
        # Outside the derivative, so that forward mode runs it once and not once a chunk.
        keys = schedule(key, self.steps)
        start, head = self._constant_part(problem, inner_state, outer, inner_batches, keys)

        def objective(moving) -> tuple[jax.Array, Any]:
            outer = combine(moving, fixed)
            state, trace = self._moving_part(problem, start, head, outer, inner_batches, keys)
            value, aux = self.outer_loss(problem, state.params, outer, outer_batch, keys)
            return value, (state, Aux(trace.aux, aux, {"inner_loss": trace.value, "hvps": products}))

        lost = self.lost(problem, inner_state, outer, inner_batches, keys)
        if self.mode == "forward":
            (value, (state, aux)), grad = forward_value_and_grad(
                objective, moving, self.chunk, estimator="Unrolled", lost=lost
            )
        else:
            (value, (state, aux)), grad = value_and_grad(objective, moving, estimator="Unrolled", lost=lost)
        return Estimate(value, grad, state, aux)
