"""Softmax regression on the whole of Covertype: one regularisation weight a class."""

from benchopt import BaseDataset


class Dataset(BaseDataset):
    r"""The problem of `covtype_subset` on all 581,012 rows: 371,847 for the inner loss, 92,962 for the outer one,
    116,203 for the test. Starts at z = 0, x = -2.

    Metrics: `test_error`, `train_error`, `val_error`; `value` is `val_error`.
    """

    name = "covtype"
    parameters = {"random_state": [2442]}
    requirements = ("pip::scikit-learn",)

    def get_data(self):
        import numpy as np
        from benchmark_utils.classification import regularised_classes
        from benchmark_utils.data import load, split

        arrays, rng = load("covtype"), np.random.RandomState(self.random_state)
        x, y = arrays["x"], arrays["y"].astype(np.int32) - 1
        rest, test = split(rng, len(x), held_out=-(-len(x) // 5))
        train, val = (rest[part] for part in split(rng, len(rest), held_out=-(-len(rest) // 5)))
        return regularised_classes(**{n: (x[i], y[i]) for n, i in (("train", train), ("val", val), ("test", test))})
