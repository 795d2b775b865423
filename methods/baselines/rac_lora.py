r"""RAC-LoRA: a chain of LoRAs, in each of which one factor is drawn at random and frozen.

Published (Malinovsky et al. 2024, arXiv 2410.08305): in each link either A is drawn and frozen and B trained from 0, or
B is drawn and A trained; the product is merged into the weights, and the next link starts. Unlike LoRA, such a chain
provably converges to the solution of full fine-tuning; with one factor frozen the update is linear in the other.

Our choice: the links are kept side by side, as one LoRA of their summed rank, instead of being merged into the weights:
the same function, and an adapter that PEFT can read. Which factor is frozen is a coin's toss a link; four links; the
rank of a link is the budget's share of LoRA's, and `Found.parameters` counts what one link trains. A drawn factor is
Gaussian with variance 1 / its length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.extend import PyTree
from methods.adapters.lora import LoRAConfig
from methods.baselines.base import Found, Setting, fit, resized
from methods.models.hooks import Hook
from methods.ranges import part

LINKS = 4


def beside(before: PyTree | None, link: PyTree) -> PyTree:
    """Two LoRAs as one: A along its columns, B along its rows."""
    if before is None:
        return link
    return {
        site: {
            "a": jnp.concatenate([before[site]["a"], leaves["a"]], axis=2),
            "b": jnp.concatenate([before[site]["b"], leaves["b"]], axis=1),
        }
        for site, leaves in link.items()
    }


def extend(
    setting: Setting, lora: LoRAConfig, before: PyTree, key: jax.Array, steps: int, name: str
) -> tuple[PyTree, int]:
    """`{"adapter": chain, "head": ...}` after one more link of `steps`; and how many numbers that link trained."""
    coin, draw, train = jax.random.split(key, 3)
    frozen, moving = ("a", "b") if jax.random.bernoulli(coin) else ("b", "a")
    shapes = jax.eval_shape(lambda: lora.init(key, setting.shapes, setting.num_layers, setting.dtype))
    drawn = {
        site: jax.random.normal(k, leaves[frozen].shape, setting.dtype) / leaves[frozen].shape[1] ** 0.5
        for k, (site, leaves) in zip(jax.random.split(draw, len(shapes)), shapes.items(), strict=True)
    }

    def whole(params: PyTree) -> PyTree:
        return beside(before["adapter"], {s: {frozen: drawn[s], moving: leaf} for s, leaf in params.items()})

    def start(key: jax.Array) -> PyTree:
        return {site: jnp.zeros(leaves[moving].shape, setting.dtype) for site, leaves in shapes.items()}

    here = setting._replace(start_head=lambda key: before["head"])
    trained = fit(here, train, start, lambda params: _bind(lora, whole(params)), steps=steps, part=name).params
    return trained | {"adapter": whole(trained["adapter"])}, sum(leaf.size for leaf in trained["adapter"].values())


def find(setting: Setting, key: jax.Array, links: int = LINKS) -> Found:
    """The chain, a training of `setting.steps / links` steps each, to one."""
    setting.budget()
    lora = resized(setting.lora, max(1, part(setting.share, setting.lora.rank)))
    chain, trained = setting.with_head(key, None), []
    parts = zip(jax.random.split(key, links), setting.parts(links), strict=True)
    for number, (link_key, steps) in enumerate(parts, 1):
        chain, count = extend(setting, lora, chain, link_key, steps, f"link {number}")
        trained.append(count)
    everywhere = {site: np.ones(setting.num_layers) for site in setting.sites}
    config = resized(lora, lora.rank * links)
    factors, head = chain["adapter"], chain["head"]
    return Found(config.bind(factors), head, everywhere, max(trained), (config, factors, None, None))


def _bind(lora: LoRAConfig, params: PyTree) -> Hook:
    return resized(lora, next(iter(params.values()))["a"].shape[2]).bind(params)
