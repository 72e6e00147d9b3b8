"""Arrays that a later reader maps into memory: safetensors files that tell what they are of, with their own digest.

A file has its final name when all of it is on the disk, so that one under that name is whole, or damaged.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from kd_jax.errors import DataError, OutputError
from kd_jax.files import open_regular, reason, size_of
from kd_jax.files.digests import bytes_of

Arrays = dict[str, Shaped[np.ndarray, "..."]]

_NAMES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64, "U8": np.uint8,
    "U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "I8": np.int8, "I16": np.int16, "I32": np.int32,
    "I64": np.int64, "BOOL": np.bool_,
}  # fmt: skip
_TYPES = {name: np.dtype(kind) for name, kind in _NAMES.items()}
_NAME_OF = {kind: name for name, kind in _TYPES.items()}
_MOST_HEADER = 1 << 20


def write(path: Path, arrays: Mapping[str, Any], about: Mapping[str, str], *, remedy: str) -> None:
    """Writes `arrays`, and what they are about, to `path`. Raises `OutputError`, and leaves nothing then."""
    # The widest first, so that every array lies at a multiple of its width.
    ordered = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(about) | {"sha256": _digest(ordered, about)}}
    end = 0
    for name, array in ordered:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _NAME_OF[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, [len(text).to_bytes(8, "little"), text, *(bytes_of(array) for _, array in ordered)], remedy)


def write_whole(path: Path, blocks: list[Any], remedy: str) -> None:
    """Writes a file that is under its name only when all of it is on the disk. Raises `OutputError`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        with contextlib.suppress(OSError):
            _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({reason(error)}): {remedy}") from None


def read_header(path: Path, remedy: str) -> tuple[dict[str, Any], dict[str, str], int]:
    """The arrays' places by name, what the file is about, and where its data begins. Raises `DataError`."""
    with open_regular(path) as file:
        size = size_of(file)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MOST_HEADER, size - 8):
            raise _damaged(path, f"its {size} bytes do not hold its header", remedy)
        try:
            header = json.loads(file.read(length))
            about = header.pop("__metadata__")
            places = {name: _place(one) for name, one in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _damaged(path, "its header cannot be read", remedy) from None
    end = 8 + length + sum(stop - start for _, _, start, stop in places.values())
    ordered = sorted(place[2:] for place in places.values())
    whole = all(one[1] == other[0] for one, other in itertools.pairwise(ordered))
    if not (isinstance(about, dict) and whole and (not ordered or ordered[0][0] == 0)):
        raise _damaged(path, "its header cannot be read", remedy)
    if size != end:
        raise _damaged(path, f"it has {size} bytes, and its header announces {end}", remedy)
    return places, about, 8 + length


def mapped(path: Path, remedy: str, *, check: bool) -> Arrays:
    """The arrays of a file, mapped into memory. check: whether its digest is compared, which reads all of it.

    Raises `DataError`.
    """
    places, about, begin = read_header(path, remedy)
    try:
        raw = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise DataError(f"{path} cannot be mapped ({reason(error)}): close files, or raise `ulimit -n`") from None
    except ValueError as error:
        raise _damaged(path, reason(error), remedy) from None
    arrays = {
        name: raw[begin + start : begin + stop].view(kind).reshape(shape)
        for name, (kind, shape, start, stop) in places.items()
    }
    if check:
        said = {name: value for name, value in about.items() if name != "sha256"}
        if about.get("sha256") != _digest(list(arrays.items()), said):
            raise _damaged(path, "its digest is another", remedy)
    return arrays


def _place(one: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    kind, shape, (start, stop) = _TYPES[one["dtype"]], tuple(map(int, one["shape"])), one["data_offsets"]
    count = 1
    for size in shape:
        count *= size
    if not (all(size >= 0 for size in shape) and start >= 0 and stop - start == count * kind.itemsize):
        raise ValueError
    return kind, shape, int(start), int(stop)


def _digest(arrays: list[tuple[str, Any]], about: Mapping[str, str]) -> str:
    sha = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, array in sorted(arrays):
        sha.update(f"{name} {array.shape} {array.dtype}".encode())
        sha.update(bytes_of(array))
    return sha.hexdigest()


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damaged(path: Path, how: str, remedy: str) -> DataError:
    return DataError(f"{path} is damaged ({how}): {remedy}")
