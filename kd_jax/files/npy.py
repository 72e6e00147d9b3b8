"""Arrays of numbers in NumPy's `.npy` and `.npz` files."""

import io
import math
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from kd_jax.errors import DataError
from kd_jax.files import Readable, check_shape, listed, open_regular, read_exactly, refusing, shown, size_of
from kd_jax.files.zips import open_member, open_zip

_READERS: dict[tuple[int, ...], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# NumPy's own bound, too.
_LONGEST_HEADER = 10_000

Array = Shaped[np.ndarray, "..."]


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    start: int


def read_npy(path: str | Path, shape: Sequence[int] | None = None) -> Array:
    """The array of the `.npy` file `path`; of another shape than `shape` it is not read. Raises `DataError`."""
    with open_regular(path) as file, refusing(f"{path} is a damaged npy file", "make or fetch it again"):
        return _array(file, size_of(file), str(path), shape)


def read_npz(path: str | Path, names: Sequence[str], shape: Sequence[int] | None = None) -> list[Array]:
    """The arrays `names` of the `.npz` file `path`; of another shape than `shape` they are not read.

    Raises `DataError`.
    """
    with open_zip(path, "npz", "make it with numpy.savez or numpy.savez_compressed") as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        for name in names:
            if name not in members:
                raise DataError(
                    f"{path} lacks the array {name} (it has {listed(members) or 'none'}): "
                    f"it must have {', '.join(names)}"
                )
        return [_member(archive, members[name], f"the array {name} of {path}", shape) for name in names]


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, what: str, shape: Sequence[int] | None) -> Array:
    with open_member(archive, info, what) as stream:
        return _array(stream, info.file_size, what, shape)


def _array(stream: Readable, size: int, what: str, shape: Sequence[int] | None) -> Array:
    """The array that `size` bytes of a `stream` hold."""
    header = _header(stream, what)
    check_shape(header.shape, shape, what)
    announced = math.prod(header.shape) * header.dtype.itemsize
    if header.start + announced != size:
        raise DataError(
            f"{what} has {size - header.start} bytes, and its header announces {announced:.16g}: "
            "it is damaged, so make or fetch it again"
        )
    content = read_exactly(stream, announced, what).view(header.dtype)
    return content.reshape(header.shape[::-1]).T if header.fortran_order else content.reshape(header.shape)


def _header(stream: Readable, what: str) -> _Header:
    start = stream.read(10)
    version = tuple(start[6:8])
    if not start.startswith(np.lib.format.MAGIC_PREFIX) or version not in _READERS:
        raise DataError(f"{what} is no array of numbers: save it with numpy.save or numpy.savez")
    if version == (2, 0):
        start += stream.read(2)
    length = int.from_bytes(start[8:], "little")
    if length > _LONGEST_HEADER:
        raise DataError(f"{what} has a header of {length} bytes: one of an array of numbers has some hundred")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns of headers that Python 2 wrote.
            shape, fortran_order, dtype = _READERS[version](io.BytesIO(start[8:] + stream.read(length)))
    except (MemoryError, RecursionError):
        raise DataError(f"{what} has a header nested too deeply: it is damaged, so make or fetch it again") from None
    if dtype.hasobject:
        raise DataError(f"{what} holds Python objects, which are never unpickled: save it as numbers")
    if dtype.kind not in "biuf":
        raise DataError(f"{what} is of type {shown(str(dtype))}: it must hold numbers")
    if any(size < 0 for size in shape):
        raise DataError(f"{what} has a negative length: it is damaged, so make or fetch it again")
    return _Header(shape, fortran_order, dtype, len(start) + length)
