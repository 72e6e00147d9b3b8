"""An npz file with `x_train, y_train, x_test, y_test`, as Keras lays data sets out."""

from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.files.npy import read_npz


def load(place: str) -> Dataset:
    """The `Dataset` of the npz file `place`. Arrays of Python objects are refused: nothing is ever unpickled."""
    x_train, y_train, x_test, y_test = read_npz(place, ["x_train", "y_train", "x_test", "y_test"])
    return make_dataset(f"npz:{place}", x_train, y_train, x_test, y_test)
