"""Arrays in safetensors files."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import Shaped

from kd_jax.errors import DataError
from kd_jax.files import check_shape, listed, open_regular, refusing, shown

TYPES = {
    "F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("i8"), "I32": np.dtype("i4"), "I16": np.dtype("i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("u8"), "U32": np.dtype("u4"), "U16": np.dtype("u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"), "C64": np.dtype("c8"),
}  # fmt: skip
"""What can be read, by the names that files have for it."""

Array = Shaped[np.ndarray, "..."]


def read(path: str | Path, names: Sequence[str] | None = None, shape: Sequence[int] | None = None) -> dict[str, Array]:
    """The arrays `names`, or all, of the safetensors file `path`; of another shape than `shape` they are not read.

    Raises `DataError`.
    """
    path = Path(path).expanduser()
    open_regular(path).close()
    refused = refusing(f"{path} is a damaged safetensors file", "save it again as float32")
    with refused, safetensors.safe_open(path, framework="numpy") as file:
        keys = file.keys()
        wanted = keys if names is None else names
        for name in wanted:
            if names is not None and name not in keys:
                raise DataError(
                    f"{path} lacks the array {name} (it has {listed(keys) or 'none'}): it must have {', '.join(wanted)}"
                )
        return {name: _array(file, name, f"the array {shown(name)} of {path}", shape) for name in wanted}


def _array(file: safetensors.safe_open, name: str, what: str, shape: Sequence[int] | None) -> Array:
    stored = file.get_slice(name)
    if stored.get_dtype() not in TYPES:
        raise DataError(f"{what} is of type {stored.get_dtype()}, which NumPy lacks: save it again as float32")
    check_shape(stored.get_shape(), shape, what)
    return file.get_tensor(name)
