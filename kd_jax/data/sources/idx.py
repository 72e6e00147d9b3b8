"""A folder of idx files, gzipped or not, as torchvision (`MNIST/raw`) and Debian's `dataset-fashion-mnist` have it."""

import gzip
import math
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.errors import DataError
from kd_jax.files import DEFLATE_RATIO, Readable, open_regular, read_exactly, refusing, size_of

_UNSIGNED_BYTE = 0x08
# What begins the name of a part's file, and its number of dimensions.
_PARTS = {
    "train-images": (("train-images",), 3),
    "train-labels": (("train-labels",), 1),
    "test-images": (("t10k-images", "test-images"), 3),
    "test-labels": (("t10k-labels", "test-labels"), 1),
}
_ENDINGS = ("-idx{}-ubyte", ".idx{}-ubyte", "-idx{}.ubyte", ".idx{}")


def load(place: str) -> Dataset:
    """The `Dataset` of the four idx files in the folder `place`, or in its `raw` or `*/raw` (torchvision's root)."""
    folder = _existing_folder(place)
    if folder is None:
        raise DataError(
            f"idx folder {place!r} does not exist, or is no folder that can be read: "
            "name the folder that holds the four idx files"
        )
    folders = [folder, folder / "raw", *sorted(folder.glob("*/raw"))]
    holds_images = (f for f in folders if any(map(os.path.lexists, _candidates(f, "train-images"))))
    found = next(holds_images, folder)
    paths = {part: _find(found, part) for part in _PARTS}
    arrays = {part: read(path) for part, path in paths.items()}
    for part, array in arrays.items():
        if (array.ndim == 1) != part.endswith("labels"):
            expected = "1 (magic number 2049)" if part.endswith("labels") else "3 (magic number 2051)"
            raise DataError(
                f"{paths[part]} has {array.ndim} dimensions (magic number {2048 + array.ndim}): "
                f"{part.replace('-', ' ')} have {expected}, so check that the files are not swapped"
            )
    return make_dataset(
        f"idx:{place}", arrays["train-images"], arrays["train-labels"], arrays["test-images"], arrays["test-labels"]
    )


def _existing_folder(place: str) -> Path | None:
    """The folder, if there is one that may be looked into."""
    try:
        folder = Path(place).expanduser()
        return folder if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK) else None
    except (OSError, RuntimeError, ValueError):
        return None


def read(path: Path) -> UInt8[np.ndarray, "..."]:
    """The array of one idx file of unsigned bytes, gzipped or not. Raises `DataError` where it is no such file.

    Never reads more than the header announces, nor allocates more than the file can hold.
    """
    with open_regular(path) as file, refusing(f"{path} is a damaged idx file", "fetch it again"):
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not zipped:
            return _array(file, size_of(file), path)
        refused = refusing(f"{path} is a damaged gzip file", "fetch it again")
        with refused, gzip.open(file) as inflated:
            return _array(inflated, DEFLATE_RATIO * size_of(file), path)


def _array(file: Readable, size: int, path: Path) -> UInt8[np.ndarray, "..."]:
    """The array of an idx file of at most `size` bytes."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UNSIGNED_BYTE or not 1 <= magic[3] <= 4:
        raise DataError(
            f"{path} has the magic number 0x{magic.hex()}: an idx file of bytes starts with 0x0000080N, "
            "N its number of dimensions (1 to 4), so check that it is the file you mean"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path} ends within its header: it is truncated, so fetch it again")
    shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
    count, room = math.prod(shape), size - 4 - len(sizes)
    if count > room:
        raise DataError(
            f"{path} holds at most {room} of the {count} bytes that its header announces: "
            "it is truncated, so fetch it again"
        )
    return read_exactly(file, count, str(path)).reshape(shape)


def _candidates(folder: Path, part: str) -> list[Path]:
    """Where the file of a part may be: some archives have it in a folder of its own name."""
    starts, dimensions = _PARTS[part]
    names = [
        f"{start}{ending.format(dimensions)}{zipped}"
        for start in starts
        for ending in _ENDINGS
        for zipped in ("", ".gz")
    ]
    return [*(folder / name for name in names), *(folder / name / name for name in names)]


def _find(folder: Path, part: str) -> Path:
    candidates = _candidates(folder, part)
    # What is no regular file is named only where there is nothing else, to say why it cannot be read.
    for is_one in (os.path.isfile, os.path.lexists):
        for path in candidates:
            if is_one(path):
                return path
    raise DataError(
        f"{candidates[0]} does not exist: an idx folder holds the four files of MNIST's layout, gzipped or not"
    )
