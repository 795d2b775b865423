"""Where the arrays of the real data sets come from, and how they are split and scaled."""

import os
import tempfile
import urllib.request
from pathlib import Path

import numpy as np


def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of `$BILEVEL_DATA/<name>/<name>.npz`; where that is not there, of the public source in `PUBLIC`.

    Raises:
      FileNotFoundError: if neither is to be had.
    """
    folder = os.environ.get("BILEVEL_DATA")
    path = Path(folder or ".") / name / f"{name}.npz"
    if folder and path.is_file():
        with np.load(path) as arrays:
            return dict(arrays)
    missing = (
        f"{path} does not exist"
        if folder
        else f"The environment variable BILEVEL_DATA is not set to a folder that holds {name}/{name}.npz"
    )
    if name not in PUBLIC:
        raise FileNotFoundError(f"{missing}, and this data set has no public source: make the file and set it.")
    try:
        return PUBLIC[name]()
    except ImportError as error:
        raise FileNotFoundError(f"{missing}, and its public source needs scikit-learn: pip install it.") from error
    except OSError as error:  # urllib's errors are OSErrors
        raise FileNotFoundError(
            f"{missing}, and its public source cannot be reached ({error}): get online, or make the file."
        ) from error


def _covtype():
    from sklearn.datasets import fetch_covtype

    x, y = fetch_covtype(return_X_y=True)
    return {"x": x.astype(np.float32), "y": y}


def _ijcnn1():
    from sklearn.datasets import load_svmlight_files

    base = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary/"
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("ijcnn1.bz2", "ijcnn1.t.bz2")]
        for file in files:
            urllib.request.urlretrieve(base + file.name, file)
        x, y, x_test, y_test = load_svmlight_files([str(file) for file in files], n_features=22, dtype=np.float32)
    return {"x_train": x.toarray(), "y_train": y, "x_test": x_test.toarray(), "y_test": y_test}


def _mnist():
    from sklearn.datasets import fetch_openml

    x, y = fetch_openml("mnist_784", version=1, return_X_y=True, as_frame=False)
    x, y = x.astype(np.float32), y.astype(np.int32)
    return {"x_train": x[:60_000], "y_train": y[:60_000], "x_test": x[60_000:], "y_test": y[60_000:]}


PUBLIC = {"covtype": _covtype, "ijcnn1": _ijcnn1, "mnist": _mnist}
"""What scikit-learn fetches, in the form of the npz files."""


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
