r"""LoRATRF, reconstructed: does the filter find the tokens that matter?

A synthetic mixture of two tasks in which the relevant subspace is known. The embedding of a word is

$$ e = u_{task} + (-1)^{class} s + z, \qquad z \sim N(0, I), $$

u and s being fixed random directions of length $\sqrt d$. Each sequence shuffles words of task 1, of class y,
with words of task 2, of a class drawn apart; the label is y. Both tasks write their class along the same s, so that a
mean over the tokens does not tell whose it is, while a filter along $u_1 - u_2$ does. A random encoder is frozen;
LoRA, the edit and a head are trained on few rows of which a share has a wrong label.

Told are, over seeds, the test accuracy and the AUROC of the cosine with the task vector (before it is clipped, in the
frozen model) for "this token is of task 1", at the layer where it is largest on validation rows. Task vectors are the
oracle's (mean of task 1's tokens minus that of task 2's), random, from the data, trained with the rest, or chosen on
validation rows (unrolled).

    python -m benchmarks.lora.filters [--seeds 5] [--quick]            # resumable
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import bilevel
from benchmarks.lora import low_data, low_data_report
from benchmarks.lora.planted import auroc
from methods import loratrf, models
from methods.adapters.filters import task_vectors
from methods.adapters.lora import LoRAConfig
from methods.objective import Bound, Given
from methods.runfolder import RunFolder
from methods.tasks.loss import Prediction, cross_entropy

WORDS, CLASSES, LENGTH = 8, 2, 16
CONFIG = models.EncoderConfig(
    vocab_size=2 * CLASSES * WORDS,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    max_positions=LENGTH,
)
MODEL, HEAD, LORA = models.Encoder(CONFIG, remat=False), models.Classifier(CLASSES), LoRAConfig(rank=2)
SITES = {"block_hidden": CONFIG.hidden_size}
ARMS = {
    "oracle, fixed": "fixed",
    "random, fixed": "fixed",
    "random, trained": "none",
    "random, validation": "vectors",
    "data, fixed": "fixed",
    "data, trained": "none",
    "data, validation": "vectors",
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """Sizes.

    Attributes:
      seeds: draws of the encoder, the rows and the start values.
      rows: training rows, and as many validation rows.
      wrong: share of training labels that are wrong.
      steps: of training.
      inner_steps: K of the search.
      outer_steps: T of the search.
      quick: one seed and few steps: does it run.
      out: the runs; the same command continues.
      records: folder of what they found, from which the page is made.
      docs: folder of the page.
    """

    seeds: int = 5
    rows: int = 128
    wrong: float = 0.1
    steps: int = 300
    inner_steps: int = 10
    outer_steps: int = 20
    quick: bool = False
    out: Path = Path("runs/filters")
    records: Path = low_data_report.RECORDS
    docs: Path = low_data_report.DOCS


def draw(rng: np.random.Generator, rows: int, wrong: float = 0.0) -> dict[str, jax.Array]:
    """Tokens `[N, T]`, labels `[N]`, and which tokens are of task 1."""
    labels, others = rng.integers(CLASSES, size=(2, rows))
    of_one = rng.permuted(np.tile(np.arange(LENGTH) < LENGTH // 2, (rows, 1)), axis=1)
    kind = np.where(of_one, labels[:, None], CLASSES + others[:, None])
    tokens = kind * WORDS + rng.integers(WORDS, size=of_one.shape)
    given = np.where(rng.uniform(size=rows) < wrong, 1 - labels, labels)
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "labels": jnp.asarray(given, jnp.int32),
        "of_one": jnp.asarray(of_one),
    }


def encoder(key: jax.Array) -> Any:
    """A random encoder whose words lie as the module says."""
    keys, size = jax.random.split(key, 4), CONFIG.hidden_size
    weights: Any = MODEL.init(keys[0], jnp.zeros((1, LENGTH), jnp.int32))["params"]
    kind = jnp.arange(CONFIG.vocab_size) // WORDS
    axes = jax.random.orthogonal(keys[1], size)[:3] * size**0.5
    words = axes[kind // CLASSES] + jnp.outer(jnp.where(kind % CLASSES == 0, 1.0, -1.0), axes[2])
    return weights | {"embed": words + jax.random.normal(keys[2], words.shape)}


def predict(weights: Any, bound: Bound, batch: Any) -> Prediction:
    """The head's answer to the mean hidden state."""
    hidden: Any = MODEL.apply({"params": weights}, batch["tokens"], None, bound.adapt, method="hidden")
    logits: Any = HEAD.apply({"params": bound.head}, hidden.mean(axis=1))
    return Prediction(logits, batch["labels"], jnp.ones_like(batch["labels"], bool))


def start(key: jax.Array) -> dict[str, Any]:
    """Fresh LoRA and head."""
    keys = jax.random.split(key)
    head = HEAD.init(keys[1], jnp.zeros((1, CONFIG.hidden_size)))["params"]
    return {"lora": LORA.init(keys[0], CONFIG.site_shapes(), CONFIG.num_layers), "head": head}


def relevance(weights: Any, vectors: Any, batch: Any) -> np.ndarray:
    """The cosine of each layer's output with its task vector, `[L, N, T]`, in the frozen model."""
    found = []
    for layer in range(CONFIG.num_layers):
        # The stream after block `layer` is the model's output when later blocks hand on what they are given.
        keep = jnp.arange(CONFIG.num_layers) <= layer
        cut = jax.tree_util.Partial(lambda k, site, x, y: jnp.where(k, y, x) if site == "block_hidden" else y, keep)
        hidden = np.asarray(MODEL.apply({"params": weights}, batch["tokens"], None, cut, method="hidden"))
        t = np.asarray(vectors["block_hidden"][layer])
        found.append(hidden @ t / (np.linalg.norm(hidden, axis=-1) * np.linalg.norm(t)))
    return np.stack(found)


def one(setup: Setup, seed: int) -> dict[str, dict[str, float]]:
    """One seed: accuracy and AUROC of every arm, and of plain LoRA."""
    rng, keys = np.random.default_rng(seed), jax.random.split(jax.random.key(seed), 4)
    train, val, test = draw(rng, setup.rows, setup.wrong), draw(rng, setup.rows), draw(rng, 1000)
    weights = encoder(keys[0])
    output = lambda adapt: MODEL.apply({"params": weights}, train["tokens"], None, adapt, method="hidden")  # noqa: E731

    def difference(first: jax.Array) -> dict[str, jax.Array]:
        marked = first / first.sum() - ~first / (~first).sum()
        return task_vectors(output, marked, SITES, CONFIG.num_layers)

    starts = {
        "oracle": difference(train["of_one"]),
        "data": difference((train["labels"] == 1)[:, None] & jnp.ones_like(train["of_one"])),
        "random": {"block_hidden": jax.random.normal(keys[1], (CONFIG.num_layers, CONFIG.hidden_size))},
    }
    optimizer = optax.adam(1e-2)
    fit = partial(bilevel.fit, optimizer=optimizer, data=train, steps=setup.steps, key=keys[2], progress=False)
    accuracy = lambda p: float((p.logits.argmax(axis=1) == test["labels"]).mean())  # noqa: E731

    given = Given(weights, LORA, CONFIG, lambda *args: cross_entropy(predict(*args)), predict, start)
    answer = lambda params, **hooks: predict(weights, given.bind(weights, params, **hooks), test)  # noqa: E731
    loss = jax.tree_util.Partial(lambda w, p, o, b, k: given.loss(w, given.bind(w, p), b), weights)
    plain = fit(bilevel.Problem(loss, loss, lambda key, outer: start(key), lambda key: ()), ()).inner.params
    found = {"LoRA": {"accuracy": accuracy(answer(plain))}}
    for name, outer in ARMS.items():
        vectors = starts[name.partition(",")[0]]
        level = "vectors" if outer == "fixed" else outer
        problem: Any = loratrf.problem(given, vectors, SITES, rank=4, outer=level)  # pyright: ignore[reportArgumentType]
        hyper = problem.start_outer(keys[3])
        if outer == "vectors":
            solver = bilevel.Nested(problem, bilevel.Unrolled(optimizer, setup.inner_steps), optax.adam(3e-2))
            steps = setup.outer_steps
            hyper = bilevel.run(solver, inner_data=train, outer_data=val, steps=steps, progress=False).outer
        params = fit(problem, hyper).inner.params
        edit = loratrf.bind(params, hyper, CONFIG.num_layers, "cosine", level)  # pyright: ignore[reportArgumentType]
        seen = [jax.tree.map(lambda leaf: leaf[:100], rows) for rows in (val, test)]
        layers = [relevance(weights, edit.vectors, rows) for rows in seen]
        marks = [np.asarray(rows["of_one"]).ravel() for rows in seen]
        best = int(np.argmax([auroc(c.ravel(), marks[0]) for c in layers[0]]))
        found[name] = {
            "accuracy": accuracy(answer(params["adapter"], before=edit)),
            "auroc": auroc(layers[1][best].ravel(), marks[1]),
        }
    return found


def main(setup: Setup) -> None:
    """All seeds, then the record and the page."""
    if setup.quick:
        small = {"seeds": 1, "rows": 16, "steps": 5, "inner_steps": 2, "outer_steps": 2}
        places = {name: setup.out / "quick" for name in ("out", "records", "docs")}
        setup = dataclasses.replace(setup, **small, **places)
    folder = RunFolder(setup.out / "seeds", dataclasses.replace(setup, seeds=0))  # more seeds continue it
    jobs = low_data.Jobs(setup.seeds)
    rows = [jobs.once(folder, f"seed-{seed}", partial(one, setup, seed)) for seed in range(setup.seeds)]
    here = {field: value for field, value in dataclasses.asdict(setup).items() if not isinstance(value, Path)}
    low_data_report.add("filters", {"setup": here, "runs": rows}, setup.docs, setup.records)


if __name__ == "__main__":
    main(tyro.cli(Setup, description=__doc__))
