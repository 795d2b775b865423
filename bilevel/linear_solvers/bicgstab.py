"""Stabilised biconjugate gradients, restarted from the best iterate.

They are ours: lineax's take every inner product that is negative for a breakdown unless x64 is enabled, and return
whatever iterate is the last, however large its residual.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.linear_solvers.base import info
from bilevel.linear_solvers.krylov import Preconditioned, along, dot, forward_only, larger, residual_bound, tolerance
from bilevel.settings.fields import register
from bilevel.trees import PyTree, global_norm


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiCGStab(Preconditioned):
    r"""Stabilised biconjugate gradients, for any nonsingular A, in the memory of a few vectors.

    Converges as a rule, not by a theorem: it breaks down where an inner product vanishes (at once where A is
    antisymmetric). It then starts again from the iterate with the smallest residual, as long as that makes it smaller.
    The result is never worse than the start: residuals are computed anew, not by the recurrence, before an iterate
    takes the place of another. The linear residual shows how good it is. Two matvecs an iteration, one for each time
    that it starts, one for a start.

    Args:
      tol: relative residual.
      max_steps: most iterations.
      preconditioner: as for `CG`, though it need not be symmetric.

    References:
      van der Vorst 1992.

    Examples:
      >>> import bilevel, jax
      >>> A, b = jax.numpy.array([[2.0, 1.0], [-1.0, 3.0]]), jax.numpy.array([4.0, 5.0])
      >>> solver = bilevel.BiCGStab()
      >>> x, info = solver.solve(lambda x: A @ x, b, None, jax.random.key(0), symmetric=False)
      >>> [round(float(entry), 3) for entry in x]
      [1.0, 2.0]
    """

    symmetric_only = False

    def solve(self, matvec, rhs, start, key, *, symmetric):
        """See `bilevel.linear_solvers`."""
        inverse, sketched = self.inverse(matvec, rhs, key)
        inverse = inverse or (lambda r: r)
        goal = tolerance(self.tol, rhs) * global_norm(rhs)
        x = jax.tree.map(jnp.zeros_like, rhs) if start is None else start
        r = rhs if start is None else along(-1, matvec(start), rhs)

        def more(state):
            return (state["size"] > goal) & state["improved"] & (state["steps"] < self.max_steps)

        def again(state: dict[str, Any]) -> dict[str, Any]:
            x, r, size = state["x"], state["r"], state["size"]
            found, steps, scale = _run(matvec, inverse, x, r, size, goal, state["steps"], self.max_steps)
            image = matvec(found)
            left = along(-1, image, rhs)
            improved = residual_bound(image, rhs, found, scale) < size
            x, r = jax.tree.map(lambda new, old: jnp.where(improved, new, old), (found, left), (x, r))
            size = jnp.where(improved, global_norm(left), size)
            return {"x": x, "r": r, "size": size, "steps": steps, "starts": state["starts"] + 1, "improved": improved}

        none = jnp.zeros((), jnp.int32)
        state = {"x": x, "r": r, "size": global_norm(r), "steps": none, "starts": none, "improved": jnp.asarray(True)}
        end = jax.lax.while_loop(more, again, state)
        matvecs = 2 * end["steps"] + end["starts"] + sketched + (0 if start is None else 1)
        return forward_only(end["x"]), info(end["steps"], matvecs)


def _run(matvec, inverse, x, r, size, goal, steps, max_steps) -> tuple[PyTree, jax.Array, jax.Array]:
    """The iterate with the smallest residual by the recurrence, `steps` with those taken here added, and A's size.

    Ends at `goal`, at `max_steps`, at a breakdown, and where the residual has grown so far that half the digits of the
    recurrence are lost.
    """
    shadow, lost = r, size / jnp.sqrt(jnp.finfo(size.dtype).eps)

    def more(state):
        size, steps = state["size"], state["steps"]
        return (size > goal) & (size < lost) & (steps < max_steps)  # NaN ends it too

    def step(state: dict[str, Any]) -> dict[str, Any]:
        x, r, p = state["x"], state["r"], state["p"]
        toward = inverse(p)
        image = matvec(toward)
        alpha = state["rho"] / dot(shadow, image)
        s = along(-alpha, image, r)
        toward_s = inverse(s)
        image_s = matvec(toward_s)
        square = dot(image_s, image_s)
        omega = jnp.where(square > 0, dot(image_s, s) / square, 0)  # s is 0: the half step has the solution
        x, r = along(omega, toward_s, along(alpha, toward, x)), along(-omega, image_s, s)
        rho, size = dot(shadow, r), global_norm(r)
        p = along(rho / state["rho"] * (alpha / omega), along(-omega, image, p), r)
        better = size < state["least"]  # not for NaN
        best = jax.tree.map(lambda x, k: jnp.where(better, x, k), x, state["best"])
        least = jnp.where(better, size, state["least"])
        scale = larger(state["scale"], global_norm(image) / global_norm(toward))
        vectors = {"x": x, "r": r, "p": p, "best": best}
        return vectors | {"rho": rho, "size": size, "least": least, "scale": scale, "steps": state["steps"] + 1}

    vectors = {"x": x, "r": r, "p": r, "best": x}
    numbers = {"rho": dot(r, r), "size": size, "least": size, "scale": jnp.zeros_like(size), "steps": steps}
    state = jax.lax.while_loop(more, step, vectors | numbers)
    return state["best"], state["steps"], state["scale"]
