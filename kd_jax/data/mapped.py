"""Images that stay on the disk: files of NumPy in the cache, mapped into memory and read as they are needed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.errors import DataError
from kd_jax.files import cache, reason

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
        found = _made(name, folder, write)
    images = found["train_images"]
    dataset = make_dataset(name, *(found[key] for key in ARRAYS), classes=classes)
    if not np.may_share_memory(dataset.train_images, images) and images.max():
        raise DataError(
            f"the images of {name} are 0 and 1 alone, which are scaled to bytes in memory and not on the disk: load "
            "them without stream"
        )
    return dataset._replace(train_images=images.reshape(dataset.train_images.shape))


def _made(name: str, folder: Path, write: Callable[[Path], None]) -> dict[str, np.ndarray]:
    """Its arrays, written by one process, for which the others wait. Raises `DataError`."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            with contextlib.suppress(NotImplementedError):
                # There are file systems without locks.
                held.enter_context(FileLock(folder.parent / f".{folder.name}.lock"))
            with contextlib.suppress(OSError, ValueError, EOFError):
                return _read(folder)
            with tempfile.TemporaryDirectory(dir=folder.parent) as place:
                partial = Path(place) / folder.name
                partial.mkdir()
                write(partial)
                for file in partial.iterdir():
                    with file.open("rb+") as written:
                        os.fsync(written.fileno())
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            return _read(folder)
    except OSError as error:
        raise DataError(
            f"the images of {name} cannot be kept in {folder.parent} ({reason(error)}): make room, or name another "
            "folder as KD_JAX_CACHE"
        ) from None


def _read(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: np.load(folder / f"{name}.npy", mmap_mode="r" if name == "train_images" else None, allow_pickle=False)
        for name in ARRAYS
    }
