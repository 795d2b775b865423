"""The derivative of the last step alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from bilevel.hypergradients.base import Trained
from bilevel.hypergradients.query import Answer, Query
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.settings.fields import register
from bilevel.trees import PyTree


@register
@dataclasses.dataclass(frozen=True)
class OneStep(Trained):
    r"""Trains K steps and differentiates the last, $w_K = U(w_{K-1}, \lambda)$, with $w_{K-1}$ constant:

    $$ \widehat{\frac{dF}{d\lambda}} = \partial_\lambda F + (\partial_\lambda U)^\top \partial_w F . $$

    For gradient descent with step $\eta$ this is T1-T2, $\partial_\lambda F - \eta\,
    \partial^2_{\lambda w} f\, \partial_w F$: `Implicit` with the identity, times $\eta$, for the inverse
    Hessian. It is `Unrolled` with truncate=1.

    It leaves out what steps before the last contribute, and keeps the sign of the whole when the Hessian is close to a
    multiple of the identity. It is exact for K = 1. Its norm carries the factor $\eta$, so the balance with the
    direct term is not that of the true hypergradient: it is best where $\partial_\lambda F = 0$.

    Args:
      optimizer, steps: as for `Unrolled`.

    Raises:
      ValueError: for steps < 1.

    References:
      Luketina et al. 2016 (T1-T2), arXiv 1511.06727; Bolte et al. 2023 (one-step differentiation), arXiv 2305.13768.

    Examples:
      >>> import bilevel, jax, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.OneStep(optax.sgd(0.5), steps=20)
      >>> estimate = hypergradient.estimate(
      ...     problem, None, jax.numpy.zeros(()), bilevel.FullBatch(train), val, jax.random.key(0)
      ... )
      >>> round(float(estimate.grad), 3)  # the whole is 0.143
      0.107
    """

    takes_complex: ClassVar[bool] = True

    takes_constants: ClassVar[bool] = True

    takes_frozen: ClassVar[bool] = True

    @property
    def _unrolled(self) -> Unrolled:
        return Unrolled(self.optimizer, self.steps, truncate=1)

    def trajectory(self, query, **options):
        """The training map; its derivative is that of the last step."""
        return self._unrolled.trajectory(query, **options)

    def trained(self, query: Query, moving: PyTree) -> PyTree:
        return self._unrolled.trained(query, moving)

    def lost(self, query) -> list[str | None]:
        return self._unrolled.lost(query)

    def meet_custom_rule(self, name: str) -> None:
        self._unrolled.meet_custom_rule(name)

    def differentiate(self, query: Query) -> Answer:
        """Costs `steps` inner gradients and one Hessian-vector product."""
        return self._unrolled.differentiate(query)
