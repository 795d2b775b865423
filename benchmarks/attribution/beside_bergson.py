r"""Influences through training beside those of bergson, EleutherAI's library in torch, whose MAGIC computes the same:

$$ s_i = \left. \frac{d}{d\lambda_i} F(w_K(\lambda)) \right|_{\lambda = 1} $$

for the weight $\lambda_i$ of each training row, F being the loss of a batch of query rows. Both sides read the
same files: a model of random weights in Hugging Face layout, the token ids of all rows in the order of their batches,
those of the query, and the settings of Adam. All weights are trained in float32, each row is seen once, and the loss of
a batch is the weighted sum of its tokens' cross-entropies over their number.

Each side computes in a process of its own, on one core, one after the other in one run. Seconds are of the training and
its derivative; what compiling takes is told apart, and both sides have started up before, in a short training. Memory
is the peak of the resident memory during the computation, beyond what the process held before it.

bergson needs an environment of its own, for it pins its dependencies:

    python3.11 -m venv bergson-environment && bergson-environment/bin/pip install bergson
    python -m benchmarks.attribution --only bergson --python bergson-environment/bin/python

Source: Ilyas and Engstrom 2025, arXiv 2504.16430 (MAGIC).
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.record import Record, Row

SECTION, PEER = "bergson", "bergson"
OURS = "bilevel.Replay", "bilevel.Unrolled"


class Sizes(NamedTuple):
    """How large a task is, but for its steps.

    Attributes:
      layers, width, heads: of the model.
      vocabulary: number of tokens.
      batch, tokens: rows of a batch, of the query as well, and tokens of a row.
    """

    layers: int = 4
    width: int = 64
    heads: int = 4
    vocabulary: int = 1024
    batch: int = 8
    tokens: int = 64


MODELS = "llama", "gpt2"
STEPS = 64, 512
REPEATS = {64: 3, 512: 1}
"""Of the computation, of which the fastest counts."""
ADAM = {"rate": 1e-3, "betas": (0.95, 0.975), "eps": 1e-8, "eps_root": 1e-8}
"""The settings of Adam: betas and eps are bergson's defaults. Its `eps_root`, 1e-17, is nothing in float32 beside the
squares of gradients, and the derivative of the square root is then of any size where a gradient is almost 0."""

JOBS = [(model, steps) for steps in STEPS for model in MODELS]


def write(folder: Path, model: str, steps: int, sizes: Sizes, repeats: int = 1) -> int:
    """The task: `model/`, `rows.npy` `[steps * batch, tokens]`, `query.npy` `[batch, tokens]`, and `task.json`.

    Rows are walks on the tokens, from each of which a few others are likely: there is something to learn. Head and
    embedding are not tied: bergson's state holds a tied matrix twice, and trains one apart from the other.

    Returns:
      The number of weights of the model.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    if model == "llama":
        built = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=sizes.vocabulary,
                hidden_size=sizes.width,
                intermediate_size=3 * sizes.width,
                num_hidden_layers=sizes.layers,
                num_attention_heads=sizes.heads,
                num_key_value_heads=sizes.heads,
                max_position_embeddings=sizes.tokens,
                tie_word_embeddings=False,
                **none,
            )
        )
    else:
        built = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=sizes.vocabulary,
                n_embd=sizes.width,
                n_layer=sizes.layers,
                n_head=sizes.heads,
                n_positions=sizes.tokens,
                tie_word_embeddings=False,
                **none,
            )
        )
    built.float().save_pretrained(folder / "model")
    rows = walks(sizes.vocabulary, (steps + 1) * sizes.batch, sizes.tokens)
    np.save(folder / "query.npy", rows[: sizes.batch])
    np.save(folder / "rows.npy", rows[sizes.batch :])
    task = {"steps": steps, "batch": sizes.batch, "repeats": repeats, **ADAM}
    (folder / "task.json").write_text(json.dumps(task))
    return sum(x.numel() for x in built.parameters())


def walks(vocabulary: int, count: int, length: int, ways: int = 8) -> np.ndarray:
    """Random walks on the tokens, int64 `[count, length]`, where each token is followed by one of `ways` others."""
    generator = np.random.default_rng(0)
    after = generator.integers(vocabulary, size=(vocabulary, ways))
    found = np.empty((count, length), np.int64)
    found[:, 0] = generator.integers(vocabulary, size=count)
    for place in range(1, length):
        found[:, place] = after[found[:, place - 1], generator.integers(ways, size=count)]
    return found


def missing(python: str) -> str | None:
    """A sentence if bergson cannot be measured with this interpreter, else None."""
    look = f"import importlib.util, sys; sys.exit(3 if importlib.util.find_spec({PEER!r}) is None else 0)"
    try:
        done = subprocess.run([python, "-c", look], capture_output=True, text=True)
    except OSError as error:
        return f"{PEER} is left out, for {python} cannot be run ({error.strerror}): give --python an interpreter."
    if done.returncode == 3:
        return f"{PEER} is left out, for {python} does not have it: give --python an interpreter that has."
    if done.returncode:
        return f"{PEER} is left out, for {python} does not run: {done.stderr.strip()[-300:]}"
    return None


def measured(model: str, steps: int, record: Record, python: str, sizes: Sizes | None = None) -> Iterator[Row]:
    """A row for each side of a task, bergson's first; nothing if they are there. Each is of one and the same run.

    Raises:
      RuntimeError: if a side fails, with the end of what it said.
    """
    if record.find(section=SECTION, model=model, steps=steps):
        return
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = write(folder, model, steps, sizes, REPEATS.get(steps, 1))
        sides = {PEER: side(python, folder, "bergson_side")}
        sides |= {way: side(sys.executable, folder, "our_side", way) for way in OURS}
    theirs = sides[PEER]["scores"]
    of = {"section": SECTION, "model": model, "steps": steps, "date": datetime.date.today().isoformat()}
    of |= {"sizes": sizes._asdict(), "weights": weights, "adam": dict(ADAM)}
    rows = []
    for way, found in sides.items():
        own = found.pop("scores")
        rows.append(of | {"side": way} | found | agreement(own, theirs))
    yield from rows


def agreement(own: Any, theirs: Any) -> Row:
    """By how much the correlation and the cosine of two vectors of scores are below 1, and the largest score."""
    own, theirs = np.asarray(own, np.float64), np.asarray(theirs, np.float64)

    def short_of_one(x: np.ndarray, y: np.ndarray) -> float:
        apart = x / np.linalg.norm(x) - y / np.linalg.norm(y)
        return float(apart @ apart / 2)  # of a cosine near 1 nothing is lost to rounding

    return {
        "correlation_below_1": short_of_one(own - own.mean(), theirs - theirs.mean()),
        "cosine_below_1": short_of_one(own, theirs),
        "largest": float(np.abs(own).max()),
    }


def side(python: str, folder: Path, module: str, *words: str) -> Row:
    """What a side found, in a process of its own on one core. Raises RuntimeError with the end of what it said."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # compiling is measured
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "JAX_TRACEBACK_FILTERING": "off",
    }
    command = [python, "-W", "ignore", "-m", f"benchmarks.attribution.{module}", str(folder), *words]
    if hasattr(os, "sched_setaffinity"):
        core = min(os.sched_getaffinity(0))
        command = [sys.executable, "-c", _ON_A_CORE, str(core), *command]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, cwd=root)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(words)} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


_ON_A_CORE = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execvp(sys.argv[2], sys.argv[2:])"
