"""Arrays that stay in their files, such as data sets of h5py, of which only the rows that are needed are read."""

from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from kd_jax.data.batch import as_array

# What has one of these is in memory already: NumPy's and JAX's arrays, tensors, series. An array of NumPy that is
# mapped is read by rows as it is.
_IN_MEMORY = ("__array_interface__", "__dlpack__", "numpy", "to_numpy", "iloc")


class LazyArray:
    """What has `shape`, `dtype` and `[rows]`, read by rows: each once, in rising order, as h5py wants them."""

    def __init__(self, values: Any) -> None:
        self.values, self.shape, self.dtype = values, tuple(values.shape), values.dtype
        self.ndim = len(self.shape)
        if self.ndim and self.shape[0]:
            # Says at once whether these are numbers.
            self[np.zeros(1, np.int64)]

    def __getitem__(self, rows: Int[np.ndarray, " batch"]) -> Shaped[np.ndarray, "batch ..."]:
        """The rows in the order that is asked for. Raises `DataError` for what are no numbers."""
        rising, places = np.unique(rows, return_inverse=True)
        found: Shaped[np.ndarray, "batch ..."] = as_array(self.values[rising])[places]
        return found


def as_lazy(value: Any) -> Any:
    """A `LazyArray` of what is not in memory, else an array. Raises `DataError`."""
    lazy = all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__"))
    return LazyArray(value) if lazy and not any(hasattr(value, name) for name in _IN_MEMORY) else as_array(value)
