"""An npz file with `x_train, y_train, x_test, y_test`, as Keras lays data sets out."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from kd_jax.data import DataError, Dataset, make_dataset

_NAMES = ("x_train", "y_train", "x_test", "y_test")


def load(place: str) -> Dataset:
    """The `Dataset` of the npz file `place`. Arrays of Python objects are refused: nothing is ever unpickled."""
    path = Path(place).expanduser()
    try:
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
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{place} is a damaged npz file ({error}): make or fetch it again") from None
    return make_dataset(f"npz:{place}", arrays[0], arrays[1], arrays[2], arrays[3])


def _array(archive: np.lib.npyio.NpzFile, name: str, place: str) -> np.ndarray:
    try:
        array = archive[name]
    except (ValueError, SyntaxError, TypeError) as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"the array {name} of {place} holds Python objects, which are never unpickled: save it as numbers"
            ) from None
        raise DataError(f"the array {name} of {place} is damaged ({error}): make or fetch the file again") from None
    except MemoryError:
        raise DataError(
            f"the array {name} of {place} does not fit into memory: it is too large or its header is damaged"
        ) from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"the entry {name} of {place} is no array: save it with numpy.savez")
    return array
