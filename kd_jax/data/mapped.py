"""Images that stay on the disk: files of NumPy in the cache, mapped into memory and read as they are needed."""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.errors import DataError
from kd_jax.files import cache

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def is_mapped(dataset: Dataset) -> bool:
    """Whether the training images are on the disk."""
    return isinstance(dataset.train_images, np.memmap)


def mapped(dataset: Dataset) -> Dataset:
    """The same data set with its training images on the disk, written there where they are not yet.

    Raises `DataError` where they cannot be.
    """

    def write(folder: Path) -> None:
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(dataset, name))

    return opened(dataset.name, cache.folder("mapped") / dataset.digest()[:32], write, classes=dataset.classes)


def opened(name: str, folder: Path, write: Callable[[Path], None], *, classes: int | None = None) -> Dataset:
    """The data set whose arrays are in a folder, which `write` fills where that is not done. Raises `DataError`."""
    try:
        found = _read(folder)
    except (OSError, ValueError, EOFError):
        # Whatever is wrong with it, it can be made again.
        with _whole(name, folder) as partial:
            write(partial)
        found = _read(folder)
    images = found["train_images"]
    dataset = make_dataset(name, *(found[key] for key in ARRAYS), classes=classes)
    return dataset._replace(train_images=images.reshape(dataset.train_images.shape))


def _read(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: np.load(folder / f"{name}.npy", mmap_mode="r" if name == "train_images" else None, allow_pickle=False)
        for name in ARRAYS
    }


@contextlib.contextmanager
def _whole(name: str, folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when that is done."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            partial = Path(place) / folder.name
            partial.mkdir()
            yield partial
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    except OSError as error:
        raise DataError(
            f"the images of {name} cannot be kept in {folder.parent} ({error.strerror}): make room, or name another "
            "folder as KD_JAX_CACHE"
        ) from None
