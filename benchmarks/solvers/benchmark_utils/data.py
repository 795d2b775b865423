"""Where the arrays of the real data sets come from, and how they are split and scaled."""

import os
from pathlib import Path

import numpy as np


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of `$BILEVEL_DATA/<name>/<name>.npz`.

    Raises:
      FileNotFoundError: if the variable is not set or the file is not there.
    """
    folder = os.environ.get("BILEVEL_DATA")
    if not folder:
        raise FileNotFoundError(
            f"The data set {name} is read from the folder that the environment variable BILEVEL_DATA names, and it is "
            f"not set: point it at a folder that holds {name}/{name}.npz."
        )
    path = Path(folder) / name / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: BILEVEL_DATA must name a folder that holds {name}/{name}.npz.")
    with np.load(path) as arrays:
        return dict(arrays)


def scaler(x: np.ndarray):
    """A function that shifts and scales columns as those of `x` have to be for mean 0 and variance 1."""
    mean, scale = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
    scale[scale == 0] = 1.0
    return lambda x: ((x - mean) / scale).astype(np.float32)


def split(
    rng: np.random.RandomState, rows: int, held_out: int, kept: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`(kept, held out)` row numbers, drawn as scikit-learn's `train_test_split` draws them."""
    order = rng.permutation(rows)
    return order[held_out:][:kept], order[:held_out]
