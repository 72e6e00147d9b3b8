"""Tensors in PyTorch's files (`torch.save`), read without PyTorch and without unpickling.

`torch.load(weights_only=True)` calls what it trusts, and that is enough for a file of some hundred bytes to have
gigabytes allocated.
"""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from kd_jax.errors import DataError
from kd_jax.files import read_exactly, shown
from kd_jax.files.pickled import Storage, Tensor, interpret
from kd_jax.files.zips import open_member, open_zip

_REMEDY = "save it with torch.save(model.state_dict(), path), in PyTorch 1.6 or newer"

_WEIGHTS = ("state_dict", "model_state_dict", "model", "net")

Array = Shaped[np.ndarray, "..."]


def read(path: str | Path) -> dict[str, Array]:
    """The tensors of the `.pt` or `.pth` file `path`, by their names in their order; of a checkpoint its `weights`.

    Raises `DataError`.
    """
    with open_zip(path, "PyTorch", _REMEDY) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise DataError(f"{path} has {len(pickles)} members data.pkl and must have 1: {_REMEDY}")
        tensors = _tensors(weights(interpret(_member(archive, pickles[0], path).tobytes(), str(path))), path)
        root = pickles[0].removesuffix("data.pkl")
        swap = f"{root}byteorder" in archive.namelist() and bytes(_member(archive, f"{root}byteorder", path)) == b"big"
        keys = dict.fromkeys(tensor.storage.key for tensor in tensors.values())
        contents = {key: _member(archive, f"{root}data/{key}", path) for key in keys}
    return {name: _view(contents[tensor.storage.key], tensor, path, swap=swap) for name, tensor in tensors.items()}


def weights(saved: Any) -> Any:
    """The `state_dict` in a checkpoint, under one of the names that trainings give it; `saved` where there is none."""
    if not isinstance(saved, Mapping):
        return saved
    return next((saved[name] for name in _WEIGHTS if isinstance(saved.get(name), Mapping)), saved)


def _tensors(mapping: object, path: str | Path) -> dict[str, Tensor]:
    """`mapping`, if it is a `state_dict` whose tensors do not claim more numbers than there are."""
    if not isinstance(mapping, dict):
        raise DataError(f"{path} holds a {type(mapping).__name__}, no state_dict: {_REMEDY}")
    for name, tensor in mapping.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise DataError(
                f"{path} holds more than tensors (a {type(tensor).__name__} named {shown(str(name))}): {_REMEDY}"
            )
    held = {tensor.storage.key: _bytes(tensor.storage, tensor.storage.length) for tensor in mapping.values()}
    if sum(_bytes(tensor.storage, math.prod(tensor.shape)) for tensor in mapping.values()) > sum(held.values()):
        raise DataError(f"{path} has tensors that share their numbers: save a clone() of each")
    return mapping


def _bytes(storage: Storage, count: int) -> int:
    return storage.dtype.itemsize * count


def _member(archive: zipfile.ZipFile, name: str, path: str | Path) -> UInt8[np.ndarray, " bytes"]:
    info, what = archive.getinfo(name), f"{shown(name)} of {path}"
    if info.compress_type != zipfile.ZIP_STORED:
        raise DataError(f"{what} is compressed, which PyTorch never does: {_REMEDY}")
    with open_member(archive, info, what) as stream:
        return read_exactly(stream, info.file_size, what)


def _view(content: UInt8[np.ndarray, " bytes"], tensor: Tensor, path: str | Path, *, swap: bool) -> Array:
    """The numbers of one tensor, as they lie in its storage."""
    storage = tensor.storage
    if content.size != _bytes(storage, storage.length):
        raise DataError(
            f"data/{shown(storage.key)} of {path} has {content.size} bytes, and {storage.length} numbers of type "
            f"{storage.dtype} need {_bytes(storage, storage.length)}: it is damaged, so {_REMEDY}"
        )
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, storage.dtype)
    strides = [stride * storage.dtype.itemsize for stride in tensor.strides]
    start = content.view(storage.dtype)[tensor.offset :]
    view = np.lib.stride_tricks.as_strided(start, tensor.shape, strides, writeable=False)
    return view.byteswap() if swap else view
