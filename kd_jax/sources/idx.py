"""A folder of idx files, gzipped or not, as torchvision (`MNIST/raw`) and Debian's `dataset-fashion-mnist` have it."""

import gzip
import io
import math
import os
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from kd_jax.data import DataError, Dataset, make_dataset

_UNSIGNED_BYTE = 0x08
_PARTS = {
    "train-images": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"),
    "train-labels": ("train-labels-idx1-ubyte", "train-labels.idx1-ubyte"),
    "test-images": ("t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte"),
    "test-labels": ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"),
}


def load(place: str) -> Dataset:
    """The `Dataset` of the four idx files in the folder `place`, or in its `raw` or `*/raw` (torchvision's root)."""
    folder = _existing_folder(place)
    if folder is None:
        raise DataError(
            f"idx folder {place!r} does not exist, or is no folder that can be read: "
            "name the folder that holds the four idx files"
        )
    folders = [folder, folder / "raw", *sorted(folder.glob("*/raw"))]
    found = next(
        (f for f in folders if any((f / n).exists() or (f / f"{n}.gz").exists() for n in _PARTS["train-images"])),
        folder,
    )
    arrays = {part: read(_find(found, names)) for part, names in _PARTS.items()}
    for part, array in arrays.items():
        if (array.ndim == 1) != part.endswith("labels"):
            expected = "1 (magic number 2049)" if part.endswith("labels") else "3 (magic number 2051)"
            raise DataError(
                f"{_find(found, _PARTS[part])} has {array.ndim} dimensions (magic number {2048 + array.ndim}): "
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

    Never reads more than the header announces.
    """
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else open(path, "rb") as file:
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
            content = _read_exactly(file, math.prod(shape), path)
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: an idx folder holds the four files of MNIST's layout, gzipped or not"
        ) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}): fetch it again") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}): check the file and its permissions"
        ) from None
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_exactly(file: io.BufferedIOBase, count: int, path: Path) -> bytes:
    """`count` bytes and then the end of the file, reading in blocks so that a lying header allocates nothing."""
    blocks, left = [], count
    while left and (block := file.read(min(left, 1 << 24))):
        blocks.append(block)
        left -= len(block)
    if left:
        raise DataError(
            f"{path} holds {count - left} of the {count} bytes that its header announces: "
            "it is truncated, so fetch it again"
        )
    if file.read(1):
        raise DataError(
            f"{path} goes on after the {count} bytes that its header announces: it is corrupt, so fetch it again"
        )
    return b"".join(blocks)


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    candidates = [folder / f"{name}{ending}" for name in names for ending in ("", ".gz")]
    return next((path for path in candidates if path.exists()), candidates[0])
