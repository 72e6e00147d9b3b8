import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import X, Y

import kd_jax as kd
from kd_jax.data.batch import as_batch, as_key, check_counts, check_values, epoch_order, is_in_memory, take
from kd_jax.errors import DataError

KEY = jax.random.key(7)


class ArrayLike:
    """As an h5py data set: it is no array, and NumPy reads it."""

    shape, dtype, ndim = (3, 2), np.dtype(np.float32), 2

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.ones((3, 2), np.float32)


def test_whatever_holds_inputs_and_labels_is_a_batch() -> None:
    torch = pytest.importorskip("torch")
    wanted, labels = np.ones((3, 2), np.float32), np.array([0, 1, 2])
    for inputs in (wanted, wanted.tolist(), jnp.asarray(wanted), torch.ones(3, 2, requires_grad=True), ArrayLike()):
        for data in ((inputs, labels.tolist()), {"image": inputs, "label": labels}, kd.Batch(inputs, (0, 1, 2))):
            found = as_batch(data)
            np.testing.assert_array_equal(found.inputs, wanted)
            np.testing.assert_array_equal(found.labels, labels)
            assert found.weights is None


@pytest.mark.parametrize("name", ["weights", "weight", "sample_weight"])
def test_weights_of_a_dict_are_kept(name: str) -> None:
    np.testing.assert_array_equal(as_batch({"x": X, "y": Y, name: np.arange(24.0)}).weights, np.arange(24.0))


@pytest.mark.parametrize(
    ("labels", "weights", "says"),
    [
        (np.eye(4)[Y] * 2, None, "a row of soft labels sums to 2: give probabilities"),
        (-np.eye(4)[Y], None, "a row of soft labels has -1"),
        (np.full((24, 4), np.nan), None, "a row of soft labels sums to nan"),
        (Y, np.ones((24, 3)), r"the weights have the shape \(24, 3\) and the labels \(24,\)"),
    ],
)
def test_labels_that_cannot_be_are_told(labels: np.ndarray, weights: np.ndarray | None, says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_values(kd.Batch(X, labels, weights), 4, soft=True)


def test_soft_labels_of_weight_0_and_of_another_kind_may_be_anything() -> None:
    hot = np.eye(4, dtype=np.float32)[Y]
    check_values(kd.Batch(X, np.where(Y[:, None] == 0, np.nan, hot), (Y != 0) * 1.0), 4, soft=True)
    check_values(kd.Batch(X, 2 * hot), 4)
    check_values(kd.Batch(X, hot.astype(np.float16)), 4, soft=True)
    check_values(kd.Batch(X, Y, np.zeros(24)), 4, absent=True)


def test_inputs_and_labels_may_be_trees() -> None:
    found = as_batch(
        kd.Batch({"tokens": [[1, 2], [3, 4]], "mask": np.ones((2, 2), bool)}, {"a": [0, 1], "b": [1.0, 2.0]})
    )
    assert found.inputs["tokens"].shape == (2, 2)
    assert found.labels["b"].dtype.kind == "f"
    pair = as_batch(kd.Batch((X, X), Y))
    assert isinstance(pair.inputs, tuple)
    assert take(pair, jnp.array([2, 0])).inputs[1].shape == (2, 6)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ((X, Y[:3]), "24 examples and labels of 3: give one for each"),
        ((X, Y, np.ones(3)), "24 examples and weights of 3"),
        (((X, X[:3]), Y), "the inputs of the batch have 24 and 3 examples"),
        (([X[:8], X[:9]], Y[:2]), r"a list of 2 arrays of the shapes \[8, 6\], \[9, 6\], .* np.stack\(arrays\), after"),
        (([X[:8]] * 3, Y[:3]), r"a list of 3 arrays of the shapes \[8, 6\], each of"),
        ((np.array([X[0], X[0, :5]], object), Y[:2]), "values of type object: give numbers, in one array"),
        ((np.float32(1), Y), "a single number"),
        (((), Y), "has no inputs"),
        ({"x": X, "y": Y, "mask": np.ones(24)}, "a batch has mask, which nothing here reads: give it as weights"),
        ({"x": X, "y": Y, "sample_weights": np.ones(24)}, "a batch has sample_weights, which"),
        ((X.astype(np.complex64), Y), "values of type complex64: give real numbers"),
        ({"pixels": X}, "a batch has pixels: give it as a dict with inputs and labels"),
        (X, "the data is a ndarray: give"),
        ("mnist", "the data is a str: give"),
        (iter([(X, Y)]), "the data is a list_iterator, which gives batches, and all examples are needed together"),
        ((X,), "the data is a tuple: give"),
        ((np.array(["a"]), Y[:1]), "values of type <U1: give numbers"),
        (([[1, 2], [3]], Y[:2]), "cannot be read as an array"),
        ((X, np.array([2**31] * 24)), "the number 2147483648: whole numbers must be -2147483648 to 2147483647"),
        ((X, np.array([-(2**31) - 1] * 24)), "the number -2147483649"),
    ],
)
def test_what_is_no_batch_is_refused(data: object, says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        as_batch(data)
    assert "\n" not in str(error.value)


def test_labels_are_looked_at_where_they_weigh() -> None:
    labels, weights = np.array([0, -1, 9]), np.array([1.0, 0.0, 1.0])
    with pytest.raises(DataError, match="the label 9 is outside the 4 classes: labels must be 0 to 3"):
        check_values(kd.Batch(None, labels, weights), 4)
    check_values(kd.Batch(None, labels[:2], weights[:2]), 4)
    check_values(kd.Batch(None, labels.astype(np.float32)), 4)
    check_values(kd.Batch(None, labels), None)
    per_position = np.array([[0, -1], [3, 2]])
    check_values(kd.Batch(None, per_position, np.array([[1, 0], [1, 1]])), 4)
    with pytest.raises(DataError, match="the label -1"):
        check_values(kd.Batch(None, per_position, np.array([1, 1])), 4)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1, np.nan], "NaN or infinite"),
        ([1, np.inf], "NaN or infinite"),
        ([1, -2], "a weight is -2"),
        ([0, 0], "sum to 0"),
    ],
)
def test_weights_that_cannot_weigh_are_refused(weights: list[float], says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_values(kd.Batch(None, None, np.array(weights, np.float32)), 4)


def test_nothing_that_is_traced_is_looked_at() -> None:
    def traced(labels: jax.Array, weights: jax.Array) -> int:
        batch = kd.Batch(labels, labels, weights)
        check_values(batch, 4)
        return check_counts(batch)

    assert jax.eval_shape(traced, jnp.zeros(3, jnp.int32), jnp.zeros(3)).shape == ()


def test_every_epoch_shows_every_example_once_in_another_order() -> None:
    orders = [epoch_order(KEY, epoch, examples=50, batch_size=7) for epoch in range(3)]
    for order in orders:
        assert order.shape == (7, 7)
        assert len(np.unique(order)) == 49
    assert (orders[0] != orders[1]).any()
    whole = epoch_order(KEY, 0, examples=48, batch_size=8)
    np.testing.assert_array_equal(np.sort(whole.ravel()), np.arange(48))


@pytest.mark.parametrize(("size", "says"), [(51, "at most the 50 examples"), (0, "at least 1")])
def test_a_batch_larger_than_the_data_is_refused(size: int, says: str) -> None:
    with pytest.raises(DataError, match=f"batch_size is {size}: it must be {says}"):
        epoch_order(KEY, 0, examples=50, batch_size=size)


def test_batches_are_those_of_a_training() -> None:
    found = list(kd.batches(kd.Batch(X, Y), key=7, batch_size=10, epochs=2))
    assert len(found) == 4
    rows = epoch_order(KEY, 1, examples=24, batch_size=10)[0]
    np.testing.assert_array_equal(found[2].inputs, X[np.asarray(rows)])
    np.testing.assert_array_equal(found[2].labels, Y[np.asarray(rows)])


def test_keys_of_every_kind() -> None:
    for key in (7, np.int64(7), jax.random.key(7), jax.random.PRNGKey(7)):
        np.testing.assert_array_equal(jax.random.key_data(as_key(key)), jax.random.key_data(KEY))
    for wrong in (True, 7.0, "7", None, jnp.zeros(3)):
        with pytest.raises(DataError, match=r"key is .*: give a whole number such as 0"):
            as_key(wrong)


def test_large_whole_numbers_are_keys_of_their_own() -> None:
    """JAX looks at 32 bits of them."""
    numbers = (1, 1 + 2**32, 1 + 2**33, 1 - 2**40, -1, -2)
    assert len({tuple(jax.random.key_data(as_key(number)).tolist()) for number in numbers}) == len(numbers)


def test_a_list_is_a_batch_of_two_or_three_arrays_and_else_several_batches() -> None:
    arrays = [X, Y, np.ones(24, np.float32)]
    assert [is_in_memory(arrays[:count]) for count in range(4)] == [False, False, True, True]
    assert not is_in_memory([*arrays, X])
    assert not is_in_memory([(X, Y), (X, Y)])


def test_a_list_of_numbers_of_numpy_is_one_array() -> None:
    batch = as_batch(([np.array(1.0), np.array(2.0)], [np.int64(0), np.int64(1)]))
    np.testing.assert_array_equal(batch.inputs, [1.0, 2.0])
    np.testing.assert_array_equal(batch.labels, [0, 1])
