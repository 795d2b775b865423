"""Softmax regression on a balanced subset of Covertype: one regularisation weight a class."""

from benchopt import BaseDataset


class Dataset(BaseDataset):
    r"""Inner loss: mean cross-entropy plus $\tfrac12 \sum_c e^{x_c} \|z_{:,c}\|^2$; z is a linear classifier on
    54 features and 7 classes. Outer loss: mean cross-entropy on validation rows, a fifth of the training file. Starts
    at z = 0, x = -2.

    The subset has 10,959 rows and nearly equal classes: its errors are not those published for the full set of 581,012.

    Metrics: `test_error`, `train_error`, `val_error`; `value` is `val_error`.
    """

    name = "covtype_subset"
    parameters = {"random_state": [2442]}

    def get_data(self):
        import numpy as np
        from benchmark_utils.classification import regularised_classes
        from benchmark_utils.data import load, split

        arrays, rng = load("covtype_subset"), np.random.RandomState(self.random_state)
        x, y = arrays["x_train"], arrays["y_train"].astype(np.int32) - 1
        train, val = split(rng, len(x), held_out=-(-len(x) // 5))
        test = arrays["x_test"], arrays["y_test"].astype(np.int32) - 1
        return regularised_classes(train=(x[train], y[train]), val=(x[val], y[val]), test=test)
