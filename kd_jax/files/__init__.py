"""Files whose bytes may be anything: each is read whole or refused by one `DataError`, and costs no more than it holds.

`npy` reads NumPy's files, `tensors` safetensors, `pt` PyTorch's; none of them ever unpickles.
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from kd_jax.errors import DataError

# A deflated byte stands for at most so many: https://zlib.net/zlib_tech.html
DEFLATE_RATIO = 1032
_BLOCK = 1 << 18
_NAMES_SHOWN, _LENGTH_SHOWN = 8, 60


@runtime_checkable
class Readable(Protocol):
    """What bytes come from: a file, or what inflates one."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, and none at the end."""


def open_regular(path: str | Path) -> BinaryIO:
    """The regular file `path`, open for reading. Raises `DataError`, also for a pipe, without waiting for it."""
    try:
        file = open(Path(path).expanduser(), "rb", opener=_without_waiting)  # noqa: SIM115
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({reason(error)}): name an existing file that you may read") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError(f"{path} is a pipe or a device: name an existing file, and write what comes from there into it")
    return file


def size_of(file: BinaryIO) -> int:
    """Bytes that a regular file holds."""
    return os.fstat(file.fileno()).st_size


def read_exactly(file: Readable, count: int, what: str) -> UInt8[np.ndarray, " bytes"]:
    """`count` bytes and then the end of `file`, which the caller has found able to hold them. Raises `DataError`."""
    content = np.empty(count, np.uint8)
    filled = 0
    while filled < count and (block := file.read(min(count - filled, _BLOCK))):
        content[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
        filled += len(block)
    if filled < count:
        raise DataError(
            f"{what} holds {filled} of the {count} bytes that its header announces: "
            "it is truncated, so make or fetch it again"
        )
    if file.read(1):
        raise DataError(
            f"{what} goes on after the {count} bytes that its header announces: "
            "it is corrupt, so make or fetch it again"
        )
    return content


@contextlib.contextmanager
def refusing(what: str, remedy: str) -> Iterator[None]:
    """Makes a `DataError` of whatever is raised within: a damaged byte leads libraries into errors of any type."""
    try:
        yield
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{what} does not fit into memory: use a smaller one, or a larger machine") from None
    except Exception as error:
        raise DataError(f"{what} ({reason(error)}): {remedy}") from None


def check_shape(found: Sequence[int], wanted: Sequence[int] | None, what: str) -> None:
    """Raises `DataError` where an array has another shape than it must have, if that is known."""
    if wanted is not None and tuple(found) != tuple(wanted):
        raise DataError(f"{what} has the shape {_shape(found)}: it must have {_shape(wanted)}")


def inputs_of(given: Any) -> Any:
    """What a model is called with: the inputs of a `Batch`, else what is given.

    Raises `DataError` for what gives batches one after another, some without an end.
    """
    if hasattr(given, "inputs"):
        return given.inputs
    if hasattr(given, "__iter__") and not isinstance(given, Mapping | tuple | list) and not hasattr(given, "shape"):
        raise DataError(f"the inputs are a {type(given).__name__}, which is iterated: give arrays, or a kd.Batch")
    return given


def as_numpy(value: Any, what: str) -> Shaped[np.ndarray, "..."]:
    """`value` as a NumPy array: a list, a tensor of PyTorch, a data set of h5py, or what else NumPy or DLPack reads.

    Raises `DataError` where it is none.
    """
    with refusing(f"{what} cannot be read as an array", "give an array, or lists of equal lengths"):
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            # NumPy lacks PyTorch's bfloat16.
            narrow = value.is_floating_point() and value.element_size() < 4
            return np.asarray(value.float() if narrow else value)
        array = np.asarray(value)
        if array.dtype == object and hasattr(value, "__dlpack__"):
            array = np.from_dlpack(value)
        return array


def floats(array: Shaped[np.ndarray, "..."], what: str) -> Float[np.ndarray, "..."]:
    """`array` in float32, or in float64 where it is that and JAX is set to compute in it.

    Raises `DataError` for other numbers than finite floats.
    """
    if array.dtype.kind != "f" and array.dtype != jnp.bfloat16:
        raise DataError(f"{what} is of type {array.dtype}: it must hold floating-point numbers, best float32")
    wanted = jax.dtypes.canonicalize_dtype(np.float64) if array.dtype == np.float64 else np.float32
    with np.errstate(over="ignore"):
        array = array.astype(wanted, copy=False)
    if not np.isfinite(array).all():
        raise DataError(f"{what} has NaN or infinite values: every value must be finite, so make it again or mend it")
    return array


def shown(name: str) -> str:
    """A name that a file holds, no longer than is read."""
    return name if len(name) <= _LENGTH_SHOWN else f"{name[:_LENGTH_SHOWN]}…"


def listed(names: Iterable[str]) -> str:
    """Names that a file holds, no more than are read."""
    every = list(names)
    more = f" and {len(every) - _NAMES_SHOWN} more" if len(every) > _NAMES_SHOWN else ""
    return ", ".join(map(shown, every[:_NAMES_SHOWN])) + more


def reason(error: BaseException) -> str:
    """The first line of what an error says, no longer than is read."""
    said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    first = said.splitlines()[0].rstrip(".: ")
    return first if len(first) <= 160 else f"{first[:160]}…"


def _shape(shape: Sequence[int]) -> str:
    axes = [shown(str(size)) for size in shape]
    return (
        f"({', '.join(axes)}{',' if len(axes) == 1 else ''})" if len(axes) <= _NAMES_SHOWN else f"of {len(axes)} axes"
    )


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
