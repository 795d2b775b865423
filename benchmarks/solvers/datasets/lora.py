"""Layer gates of LoRA on a small decoder: which layers a planted update is on, learned with the adapter."""

from benchopt import BaseDataset


class Dataset(BaseDataset):
    r"""A random decoder misses a low-rank update that its teacher has on `planted` of its `layers`. Inner variable:
    LoRA on all layers. Outer variable: one logit a layer, whose gate is $n\,\mathrm{softmax}(x)$. Both losses are
    $\mathrm{KL}(p_{teacher} \| p_{student})$, a mean over tokens, on `rows` sequences each; the inner one has
    $\tfrac{decay}{2}\|z\|^2$ beside. Starts at x = 0 and LoRA's usual start. Not convex.

    Metrics: `val_loss`, `test_loss` on as many sequences of their own; `planted_share`, the gates' mean share on the
    planted layers, `planted / layers` at the start; `value` is `val_loss`.
    """

    name = "lora"
    parameters = {"layers": [4], "planted": [1], "rows": [512], "decay": [1e-3], "random_state": [2442]}

    def get_data(self):
        import dataclasses

        import jax
        import jax.numpy as jnp
        import numpy as np

        from methods import flexora
        from methods.adapters import LoRAConfig
        from methods.models import Decoder, DecoderConfig
        from methods.objective import of_hook

        width, vocab, length, rank = 32, 32, 8, 4
        config = DecoderConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=2 * width,
            num_layers=self.layers,
            num_heads=4,
            num_kv_heads=4,
            head_dim=width // 4,
            max_positions=length,
            tied=False,
        )
        lora, model = LoRAConfig(rank=rank, alpha=float(rank)), Decoder(config, remat=False)
        keys = jax.random.split(jax.random.key(self.random_state), 5)
        tokens = jax.random.randint(keys[0], (3, self.rows, length), 0, vocab)
        start = model.init(keys[1], tokens[0, :1])["params"]
        # Kernels of unit gain: a decoder's usual start hardly lets its layers act.
        weights = jax.tree.map(lambda w: w / (0.02 * np.sqrt(w.shape[-2])) if w.ndim == 3 else w, start)
        weights |= {name: start[name] / 0.02 / np.sqrt(width) for name in ("embed", "head")}

        def logits(weights, adapt, tokens):
            return model.apply({"params": weights}, tokens, None, adapt)

        def loss(weights, adapt, batch):
            found = jax.nn.log_softmax(logits(weights, adapt, batch["tokens"]))
            return jnp.mean(jnp.sum(jnp.exp(batch["target"]) * (batch["target"] - found), axis=-1))

        here = jax.random.permutation(keys[2], self.layers) < self.planted
        update = lora.init(keys[3], config.site_shapes(), self.layers)
        update = {s: {"a": p["a"], "b": jax.random.normal(keys[4], p["b"].shape)} for s, p in update.items()}
        target = jax.nn.log_softmax(
            logits(weights, lora.bind(update, here.astype(jnp.float32)), tokens.reshape(-1, length))
        )
        target = target.reshape(*tokens.shape, vocab)
        inner, outer, test = ({"tokens": t, "target": y} for t, y in zip(tokens, target, strict=True))
        layers = flexora.problem(of_hook(loss, weights, lora, config))
        decay = self.decay

        def decayed(gated, z, x, batch, key):
            return gated(z, x, batch, key) + 0.5 * decay * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(z))

        problem = dataclasses.replace(layers, inner_loss=jax.tree_util.Partial(decayed, layers.inner_loss))

        @jax.jit
        def measure(z, x):
            val, unseen = (layers.outer_loss(z, x, batch, None) for batch in (outer, test))
            share = jnp.sum(flexora.gate(x) * here) / self.layers
            return {"value": val, "val_loss": val, "test_loss": unseen, "planted_share": share}

        def metrics(inner, outer):
            return {name: float(number) for name, number in measure(inner, outer).items()}

        return {"problem": problem, "inner": inner, "outer": outer, "metrics": metrics}
