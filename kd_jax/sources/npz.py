"""An npz file with `x_train, y_train, x_test, y_test`, as Keras lays data sets out."""

import zipfile
from pathlib import Path

import numpy as np

from kd_jax.data import DataError, Dataset, make_dataset

_NAMES = ("x_train", "y_train", "x_test", "y_test")


def load(place: str) -> Dataset:
    """The `Dataset` of the npz file `place`. Arrays of Python objects are refused: nothing is ever unpickled."""
    try:
        path = Path(place).expanduser()
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise DataError(
                    f"{place} is no npz file, or a damaged one: make it with numpy.savez or numpy.savez_compressed"
                )
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                missing = [name for name in _NAMES if name not in archive]
                if missing:
                    raise DataError(
                        f"{place} lacks the array {missing[0]} (it has {', '.join(archive.files) or 'none'}): "
                        f"an npz data set has {', '.join(_NAMES)}"
                    )
                arrays = [_array(archive, name, place) for name in _NAMES]
    except OSError as error:
        raise DataError(f"{place} cannot be read ({error.strerror or error}): name an existing npz file") from None
    except DataError:
        raise
    except Exception as error:  # NumPy and zipfile raise whatever a damaged byte leads them into.
        raise DataError(f"{place} is a damaged npz file ({error}): make or fetch it again") from None
    return make_dataset(f"npz:{place}", arrays[0], arrays[1], arrays[2], arrays[3])


def _array(archive: np.lib.npyio.NpzFile, name: str, place: str) -> np.ndarray:
    try:
        array = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise DataError(
            f"the array {name} of {place} holds Python objects, which are never unpickled: save it as numbers"
        ) from None
    except MemoryError:
        raise DataError(
            f"the array {name} of {place} does not fit into memory: it is too large or its header is damaged"
        ) from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"the entry {name} of {place} is no array: save it with numpy.savez")
    return array
