import itertools

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel import Batches, FullBatch
from bilevel.data import resolve
from tests.bilevel.helpers import KEY


def index(batches, first, count, key=KEY):
    return np.asarray(batches.take(key, first, count).index)


@pytest.mark.parametrize(("n", "size"), [(1, 1), (2, 1), (3, 3), (7, 3), (8, 8), (33, 8), (100, 3), (257, 8)])
def test_an_epoch_visits_rows_at_most_once_and_all_it_has_room_for(n, size):
    epochs, rounds = 20, n // size
    rows = index(Batches(jnp.arange(n), size), 0, epochs * rounds)
    assert rows.shape == (epochs * rounds, size) and rows.min() >= 0 and rows.max() < n
    for epoch in rows.reshape(epochs, -1):
        assert len(set(epoch)) == rounds * size


def test_epochs_and_keys_differ():
    batches = Batches(jnp.arange(64), 64)
    first, second, other = index(batches, 0, 1), index(batches, 1, 1), index(batches, 0, 1, jax.random.key(8))
    assert not np.array_equal(first, second) and not np.array_equal(first, other)


def test_a_batch_depends_on_its_number_alone():
    batches = Batches(jnp.arange(10), 3)
    whole = index(batches, 0, 20)
    for first, count in ((0, 4), (7, 4), (13, 4)):
        np.testing.assert_array_equal(index(batches, first, count), whole[first : first + count])
    np.testing.assert_array_equal(jax.jit(lambda f: batches.take(KEY, f, 4).index)(9), whole[9:13])


@pytest.mark.parametrize(("n", "size", "order"), [(10, 3, "rows"), (7, 3, "blocks"), (4, 4, "rows")])
def test_takes_from_anywhere_equal_those_one_by_one(n, size, order):
    """Also those that start inside an epoch and end two borders later: they need an epoch more than their length."""
    batches = Batches(jnp.arange(n), size, order=order)
    epoch = batches.per_epoch

    def takes(count):
        return jax.jit(lambda first: batches.take(KEY, first, count).index)

    one = takes(1)
    alone = np.concatenate([one(b) for b in range(5 * epoch)])
    for count in sorted({2, epoch, 2 * epoch, 2 * epoch + 1}):
        take = takes(count)
        for first in range(2 * epoch):
            np.testing.assert_array_equal(take(first), alone[first : first + count])
    # and of one shuffle, taken piece by piece
    first = 2 * epoch - 1
    shuffled = batches.shuffle(KEY, first, 2 * epoch)
    piece = jax.jit(lambda b: shuffled.take(b, 1).index)
    for b in range(first, first + 2 * epoch):
        np.testing.assert_array_equal(piece(b), alone[b : b + 1])


@pytest.mark.parametrize("n", [6, 8, 10, 16])
def test_rows_and_pairs_of_rows_are_equally_likely(n):
    # Batches of two rows. Over many epochs every row comes first equally often, and every pair meets equally often.
    batches = Batches(jnp.arange(n), 2)
    epochs = 4000
    rows = index(batches, 0, epochs * (n // 2)).reshape(epochs, n // 2, 2)

    def chi_square(counts, expected):
        return float(np.sum((counts - expected) ** 2 / expected) / (len(counts) - 1))

    first = np.bincount(rows[:, 0, 0], minlength=n)
    assert chi_square(first, epochs / n) < 3.0
    pairs = np.sort(rows.reshape(-1, 2), axis=1) @ np.array([n, 1])
    counts = np.bincount(pairs, minlength=n * n)
    counts = counts[[i * n + j for i, j in itertools.combinations(range(n), 2)]]
    assert chi_square(counts, len(pairs) / len(counts)) < 2.0


def test_the_remainder_waits_for_another_epoch():
    batches = Batches(jnp.arange(10), 4)
    left = [set(range(10)) - set(epoch.ravel()) for epoch in index(batches, 0, 60).reshape(30, 2, 4)]
    assert all(len(rows) == 2 for rows in left) and set().union(*left) == set(range(10))


def test_batches_are_a_pytree():
    batches = Batches({"x": jnp.ones((4, 2)), "y": jnp.ones(4)}, 2)
    doubled = jax.tree.map(lambda x: 2 * x, batches)
    assert doubled.size == 2 and np.all(doubled.arrays["x"] == 2)


@pytest.mark.parametrize(
    ("arrays", "size", "message"),
    [
        ({}, 1, "empty"),
        ({"x": np.ones((0, 3))}, 1, "empty"),
        ({"x": np.ones(3), "y": np.ones(4)}, 1, r"one row count.*\['x'\]: \(3,\).*\['y'\]: \(4,\)"),
        ({"x": np.ones(3)}, 4, r"size=4.* 3 rows"),
        ({"x": np.ones(3)}, 0, r"size=0.*integer >= 1"),
        ({"x": np.asarray(1.0)}, 1, "leading axis"),
    ],
)
def test_data_that_make_no_batches_are_refused(arrays, size, message):
    with pytest.raises(ValueError, match=message):
        Batches(arrays, size)


# datasets.Dataset


def table():
    return datasets.Dataset.from_dict(
        {
            "x": np.random.default_rng(0).normal(size=(11, 3)),
            "grid": np.arange(44.0, dtype=np.float32).reshape(11, 2, 2),
            "id": np.arange(11, dtype=np.int32),
            "seen": [i % 2 == 0 for i in range(11)],
            "text": [f"row {i}" for i in range(11)],
        }
    )


def test_columns_keep_their_values_types_and_shapes():
    source = table()
    arrays = Batches(source.remove_columns("text"), 4).arrays
    assert {name: (x.shape, x.dtype) for name, x in arrays.items()} == {
        "x": ((11, 3), np.float64),
        "grid": ((11, 2, 2), np.float32),
        "id": ((11,), np.int32),
        "seen": ((11,), np.bool_),
    }
    np.testing.assert_array_equal(arrays["x"], np.random.default_rng(0).normal(size=(11, 3)))
    np.testing.assert_array_equal(arrays["grid"], np.arange(44.0).reshape(11, 2, 2))
    # rows that were chosen, in chunks, and a format that chooses columns
    chosen = datasets.concatenate_datasets([source.select([3, 1]), source.select([9])])
    chosen.set_format("numpy", columns=["id"])
    arrays = FullBatch(chosen).arrays
    assert list(arrays) == ["id"]
    np.testing.assert_array_equal(arrays["id"], [3, 1, 9])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: table(), "Column 'text' holds values of type string"),
        (lambda: datasets.Dataset.from_dict({"ids": [[1, 2], [3]]}), "'ids' holds lists of different lengths: pad"),
        (lambda: datasets.Dataset.from_dict({"y": [1.0, None]}), "'y' holds missing values"),
        (lambda: datasets.Dataset.from_dict({"y": [1.0]}).select([]), "empty"),
        (lambda: table().to_iterable_dataset(), "streamed data set"),
    ],
)
def test_columns_that_are_no_arrays_are_refused_by_name(source, message):
    with pytest.raises(ValueError, match=message):
        Batches(source(), 1)


def test_the_permutation_is_computed_once_however_many_read_the_batch():
    """Fused into its readers it was computed again for every entry (20 times a step's time), and LLVM of jaxlib 0.12
    did not end compiling this very program."""
    arrays = (jnp.ones((100, 24, 8)), jnp.ones((100, 24), bool))

    def train(weights, key, read):
        def step(weights, number):
            batch = Batches(arrays, 4).take(key, number, 1).batch(0)
            return read(weights, batch)

        return jax.lax.scan(step, weights, jnp.arange(50))

    def rows_alone(weights, batch):
        return weights, batch.index

    def attention(weights, batch):
        x, seen = resolve(batch)
        h = x @ weights
        scores = jnp.where(seen[:, None, :] & seen[:, :, None], h @ h.swapaxes(1, 2), -1e9)
        out = jax.nn.softmax(scores) @ h
        total = jnp.sum(out) * jnp.sum(seen, dtype=x.dtype)
        return weights + 1e-3 * (total + x[0].T @ x[0]), total

    def xors(read):
        compiled = jax.jit(train, static_argnums=2).lower(jnp.ones((8, 8)), KEY, read).compile()
        return compiled.as_text().count(" xor(")

    assert 0 < xors(attention) <= xors(rows_alone)
