"""Zero-shot accuracy of a model as it comes, on whole published splits of multiple-choice tasks.

    python -m benchmarks.lora.zero_shot --model MODEL [--tasks piqa arc_easy] [--split validation] [--rows N]

Prints accuracy by likelihood per character (the harness's acc_norm), per token, and by likelihood itself (acc), with
Wilson 95 % intervals; with --out, writes the same as JSON.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from methods import models, tasks
from methods.tasks.loss import answer_log_likelihood_at


@partial(jax.jit, static_argnums=(0, 1))
def _score(model, width, weights, batch):
    variables = {"params": weights}
    hidden = model.apply(variables, batch.tokens, batch.mask, method="hidden")
    return answer_log_likelihood_at(lambda h: model.apply(variables, h, method="head"), hidden, batch, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, .gguf file, or name on the hub")
    parser.add_argument("--tasks", nargs="+", default=["piqa", "arc_easy"])
    parser.add_argument("--split", default="validation")
    parser.add_argument("--rows", type=int, default=None, help="the first so many rows only")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    pretrained = models.load(options.model)

    def score(*arrays):
        batch = tasks.TokenBatch(*map(jnp.asarray, arrays))
        width = -(-int(np.asarray(arrays[2]).sum(axis=1).max()) // 16) * 16  # few widths, so few compilations
        return _score(pretrained.model, width, pretrained.weights, batch)

    found = {}
    for name in options.tasks:
        task, start = tasks.get(name), time.perf_counter()
        rows = tasks.load(task, options.split)[: options.rows]
        limits = {"max_length": pretrained.config.max_positions, "multiple": 16}
        result = tasks.evaluate(score, task, rows, pretrained.tokenizer, batch_size=options.batch_size, **limits)
        figures = {"acc_norm": result.accuracy, "per_token": result.per_token, "acc": result.unnormalised}
        found[name] = {key: figure._asdict() for key, figure in figures.items()} | {
            "split": options.split,
            "seconds": round(time.perf_counter() - start, 1),
        }
        percent = {key: [f"{100 * share:.1f}" for share in figure[:3]] for key, figure in figures.items()}
        shown = ", ".join(f"{key} {value} % [{low}, {high}]" for key, (value, low, high) in percent.items())
        print(f"{name} {options.split} ({len(rows)} rows, {found[name]['seconds']} s): {shown}", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps({"model": str(options.model), "tasks": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
