"""What bergson computes of a task of `benchmarks.attribution.beside_bergson`, in a process of its own:

    python -m benchmarks.attribution.bergson_side FOLDER

with an interpreter that has bergson, whatever else it has: nothing of bilevel is imported. The last line of the output
is a JSON object. bergson's own trainer, data stream and backward pass are called as its command for MAGIC calls them.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.attribution.runs import runs, summary

PACKAGES = ("bergson", "torch", "torchopt", "transformers")
WARM = 2
"""Steps of the training that is differentiated before anything is measured: libraries start up in it."""


class Ready(NamedTuple):
    """A training that has not begun: bergson's trainer, its state and model, the rows, the query, and a new folder."""

    trainer: Any
    state: Any
    model: Any
    rows: Any
    query: Any
    checkpoints: Path


def ready(folder: Path, task: dict[str, Any], steps: int) -> Ready:
    """The model is read, and its first `steps` batches; training changes its state in place, so it is for one use."""
    from bergson.config.config import TrainingConfig
    from bergson.magic.data_stream import DataStream
    from bergson.magic.trainer import prepare_trainer
    from datasets import Dataset

    config = TrainingConfig(
        run_path=str(folder / "run"),
        model=str(folder / "model"),
        precision="fp32",
        optimizer="adamw",
        adam_beta1=task["betas"][0],
        adam_beta2=task["betas"][1],
        adam_eps=task["eps"],
        eps_root=task["eps_root"],
        weight_decay=0.0,
    )
    checkpoints = folder / "checkpoints"
    shutil.rmtree(checkpoints, ignore_errors=True)
    rows, query = np.load(folder / "rows.npy")[: steps * task["batch"]], np.load(folder / "query.npy")
    streams = (
        DataStream(Dataset.from_dict({"input_ids": rows.tolist()}), task["batch"]),
        DataStream(Dataset.from_dict({"input_ids": query.tolist()}), len(query)),
    )
    return Ready(*prepare_trainer(config, 0, lambda step: task["rate"]), *streams, checkpoints)


def scores(of: Ready) -> tuple[np.ndarray, float]:
    """The derivative of the query's loss by the weight of each row, `[steps * batch]`, and the loss."""
    from bergson.magic.cli import compute_query_gradients
    from bergson.magic.trainer import BackwardState
    from torchopt.pytree import tree_iter

    kept = str(of.checkpoints)
    state = of.trainer.train(of.state, of.rows, inplace=True, save_dir=kept, save_mode="sqrt")
    slopes, loss = compute_query_gradients(state, of.model, of.query, "mean")
    of.rows.requires_grad = True
    floating = [x for x in tree_iter(state.opt_state) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    cotangents = BackwardState(slopes, [torch.zeros_like(x) for x in floating], torch.zeros_like(of.rows.weights))
    found = of.trainer.backward(kept, of.rows, cotangents, state, inplace=True, save_mode="sqrt")
    return found.weight_grads.detach().numpy().astype(np.float64), loss


def main(folder: Path) -> None:
    """Prints what was found and what it took."""
    torch.set_num_threads(1)
    task = json.loads((folder / "task.json").read_text())
    scores(ready(folder, task, WARM))
    found, memory = runs(lambda: ready(folder, task, task["steps"]), scores, task["repeats"])
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(json.dumps(summary(found, memory) | {"versions": versions}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
