"""Unrolled differentiation: the derivative of the training map itself."""

from __future__ import annotations

import dataclasses
import warnings
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from bilevel.data import narrow, slots
from bilevel.differentiation.custom_rules import CustomDerivativeWarning
from bilevel.differentiation.forward import forward_value_and_grad
from bilevel.differentiation.gradients import mixed_gradient, reverse_gradient
from bilevel.differentiation.influence import arrives
from bilevel.differentiation.schedules import Checkpoint, is_schedule
from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.query import Answer, Query
from bilevel.hypergradients.training import InnerState, Trace, train
from bilevel.problem.problem import split_inner
from bilevel.settings.fields import register, setting
from bilevel.settings.numeric import integer
from bilevel.settings.rules import one_of, optional
from bilevel.trees import PyTree

Mode = Literal["mixed", "reverse", "forward"]

# Tangents need a gradient that can be pushed forward, which the rule of the mixed one does not allow.
_GRADIENTS = {"mixed": mixed_gradient, "reverse": reverse_gradient, "forward": reverse_gradient}


@register
@dataclasses.dataclass(frozen=True)
class Unrolled(Trained):
    r"""Differentiates through K steps of training, $w_{t+1} = U_t(w_t, \lambda)$:

    $$
    \frac{dF(w_K, \lambda)}{d\lambda} = \partial_\lambda F + \sum_{t=0}^{K-1}
      \Big(\partial_\lambda U_t\Big)^{\!\top} \Big(\prod_{s>t} \partial_w U_s\Big)^{\!\top} \partial_w F .
    $$

    Exact for the training that was run (its optimizer, its batches, its random keys). It is not the gradient of the
    converged inner problem: that is `Implicit`, or the limit K to infinity. A warm start `inner_state` is a constant;
    with `inner_state=None` the derivative includes that of `init_inner`. The update is differentiated as its values
    say, without the `stop_gradient`s an optimizer may hold (one inside a loss is the loss's own, and honoured as JAX
    does: what it holds back has no derivative); where the inner loss has a derivative of its own
    (`jax.custom_vjp`), steps are differentiated in reverse, since second derivatives need not commute there.

    With `truncate=T` only the last T steps are differentiated (and the direct term): biased, by what earlier steps
    contribute, unless T = K; the bias shrinks with the contraction of the training map to the power T.

    `mode="forward"` carries $dw_t/d\lambda$ along instead of going back, `chunk` columns at a time: its memory
    does not depend on K; for n outer numbers its time is that of n / chunk trainings and n Hessian-vector products a
    step, without the gradient that all of them share (1.07 gradients each in a LoRA transformer, 1.0 to 1.7 in an MLP).
    It pays for a few.

    Args:
      optimizer: an optax transformation, or `outer -> transformation` where its settings are outer variables.
        (`optax.MultiSteps` accumulates in float32 unless its `accumulator_dtype` says otherwise.)
      steps: K, inner steps an outer iteration.
      mode: `"mixed"` (forward over reverse: keeps the point of a step, not its graph), `"reverse"` or `"forward"`.
      checkpoint: which steps keep their state: `"auto"`, `"none"`, `"step"`, `"sqrt"`, `Levels(n)`, `Binomial(c)`,
        `Offload()`, `Auto(bytes)` (`bilevel.plan` tells what each costs). Forward mode keeps none.
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

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)
      0.143
    """

    mode: Mode = dataclasses.field(default="mixed", kw_only=True, metadata=setting(one_of(*get_args(Mode))))
    checkpoint: Checkpoint = dataclasses.field(default="auto", kw_only=True, metadata=setting(is_schedule))
    truncate: int | None = dataclasses.field(default=None, kw_only=True, metadata=setting(optional(integer(1))))
    chunk: int = dataclasses.field(default=8, kw_only=True, metadata=setting(integer(1)))

    takes_complex: ClassVar[bool] = True

    takes_constants: ClassVar[bool] = True

    takes_frozen: ClassVar[bool] = True
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

    def trajectory(self, query, **options):
        return self._moving_part(*self._constant_part(query), **options)

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

    def trained(self, query: Query, moving: PyTree) -> PyTree:
        # All steps: of what `truncate` leaves out `lost` tells, and not the operation that it is left out by.
        return Trained(self.optimizer, self.steps).trained(query, moving)

    def lost(self, query) -> list[str | None]:
        """As `Trained.lost`; what acts only before the last `truncate` steps is told too."""
        nearer = super().lost(query)
        if not self._split:
            return nearer
        whole = dataclasses.replace(self, truncate=None, mode="reverse")

        def trained(moving):
            state = whole.trajectory(dataclasses.replace(query, outer=query.at(moving)))[0]
            return split_inner(query.problem, state.params)[0]

        before = arrives(trained, query.moving)
        cut = f"it acts only before the last {self.truncate} of {self.steps} inner steps, which truncate leaves out"
        return [cut if acts else other for acts, other in zip(before, nearer, strict=True)]

    def _constant_part(self, query: Query) -> tuple[Query, Trace | None]:
        """The steps before the last `truncate`, not differentiated: `query` at their end, and what they reported."""
        if not self._split:
            return query, None
        slots(query.inner_batches, self.steps)  # refuses batches for another number of steps
        frozen = jax.lax.stop_gradient
        state = frozen(self.resume(query))
        batches, keys = narrow(query.inner_batches, 0, self._split), query.keys.inner[: self._split]
        state, trace = train(query.problem, self.optimizer, state, frozen(query.outer), batches, keys)
        return dataclasses.replace(query, inner_state=frozen(state)), trace

    def _moving_part(self, query: Query, head: Trace | None, **options) -> tuple[InnerState, Trace]:
        """The steps that are differentiated, after `_constant_part`; with the reports of all steps."""
        # Tangents are pushed through a loop that stores nothing.
        checkpoint = "none" if self.mode == "forward" else self.checkpoint
        options = {"gradient": _GRADIENTS[self.mode], "checkpoint": checkpoint, "first": self._split, **options}
        state, batches, keys = self.resume(query), query.inner_batches, query.keys.inner[self._split :]
        if self._split:
            batches = narrow(batches, self._split, self.steps)
        state, tail = train(query.problem, self.optimizer, state, query.outer, batches, keys, **options)
        if head is None:
            return state, tail
        return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), head, tail)

    def differentiate(self, query: Query) -> Answer:
        """Costs `steps` inner gradients and as many Hessian-vector products, `info["hvps"]` (in forward mode, as many
        for each outer number)."""
        # Outside the derivative, so that forward mode runs it once and not once a chunk.
        after, head = self._constant_part(query)

        def objective(moving):
            outer = query.at(moving)
            state, trace = self._moving_part(dataclasses.replace(after, outer=outer), head)
            value, aux = query.outer_loss(state.params, outer)
            return value, (state, trace, aux)

        tangents = 1
        if self.mode == "forward":
            tangents = sum(jnp.size(x) for x in jax.tree.leaves(query.moving))
            (value, (state, trace, aux)), grad = forward_value_and_grad(objective, query.moving, self.chunk)
        else:
            (value, (state, trace, aux)), grad = jax.value_and_grad(objective, has_aux=True)(query.moving)
        products = jnp.asarray(tangents * (self.steps - self._split), jnp.int32)
        return Answer(value, grad, state, trace, aux, {"hvps": products})
