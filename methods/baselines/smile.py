r"""SMILE: several fine-tuned models in one, each a low-rank expert that its own inputs are routed to.

Published (Tang et al. 2024, arXiv 2408.10174): from the weight differences :math:`\Delta W_t = U_t S_t V_t^\top` of T
fine-tuned models, without data or training: an expert a model, of the k largest singular triplets; the router sends an
input x to the experts whose leading input singular vectors hold most of it,

.. math:: y = x W + \sum_{t \in \mathrm{top}} w_t\, x U_t S_t V_t^\top, \qquad
          w = \mathrm{softmax}(\|x U_t^{(g)}\|)_t \text{ over the top, renormalised.}

Our choice: the base weights are the pretrained ones (published: these, or an average); a layer routes every token by
itself; updates are matrices `{site: [L, in, out]}`, as from `LoRAConfig.delta`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Smile:
    """The hook.

    Attributes:
      inputs: U, `{site: [L, T, in, k]}`.
      outputs: S V', `{site: [L, T, k, out]}`.
      gate_rank: g, singular vectors that the router looks at.
      top: experts an input goes to.
    """

    inputs: dict[str, jax.Array]
    outputs: dict[str, jax.Array]
    gate_rank: int = dataclasses.field(metadata={"static": True})
    top: int = dataclasses.field(metadata={"static": True})

    def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if site not in self.inputs:
            return y
        u = self.inputs[site]
        hidden = jnp.einsum("...i,tik->...tk", x.astype(u.dtype), u)
        found = jnp.sqrt(jnp.sum(hidden[..., : self.gate_rank] ** 2, axis=-1))
        place = jnp.argsort(jnp.argsort(-found, axis=-1, stable=True), axis=-1)
        weights = jax.nn.softmax(jnp.where(place < self.top, found, -jnp.inf), axis=-1)
        update = jnp.einsum("...t,...tk,tko->...o", weights, hidden, self.outputs[site])
        return y + update.astype(y.dtype)


def merge(updates: Sequence[dict[str, jax.Array]], rank: int, *, gate_rank: int = 1, top: int = 1) -> Smile:
    """One hook out of the updates of T models.

    Args:
      updates: `{site: [L, in, out]}` of every model, with the same sites.
      rank: k, singular triplets kept of each.
      gate_rank: g, between 1 and k.
      top: experts an input goes to, between 1 and T.

    Raises:
      ValueError: for no update, different sites, or numbers out of range.
    """
    if not updates or any(set(update) != set(updates[0]) for update in updates):
        raise ValueError(f"SMILE merges updates of the same sites, not {[sorted(update) for update in updates]}.")
    smallest = min(min(delta.shape[1:]) for delta in updates[0].values())
    if not (1 <= gate_rank <= rank <= smallest and 1 <= top <= len(updates)):
        raise ValueError(
            f"SMILE needs 1 <= gate_rank <= rank <= {smallest} and 1 <= top <= {len(updates)}, "
            f"not gate_rank={gate_rank}, rank={rank}, top={top}."
        )
    inputs, outputs = {}, {}
    for site in updates[0]:
        u, s, v = jnp.linalg.svd(jnp.stack([update[site] for update in updates], axis=1), full_matrices=False)
        inputs[site] = u[..., :rank]
        outputs[site] = s[..., :rank, None] * v[..., :rank, :]
    return Smile(inputs, outputs, gate_rank, top)
