"""Files that are whole or not there."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_jax.errors import DataError


def without_infinities(content: Any) -> Any:
    """What JSON can hold: None in the place of each number that is NaN or infinite."""
    if isinstance(content, Mapping):
        return {name: without_infinities(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_infinities(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_whole(path: str | Path, content: bytes) -> Path:
    """Writes the file `path`, beside it first, so that a file of that name is always whole. Raises `DataError`."""
    path = Path(path).expanduser()
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DataError(
            f"{path} cannot be written ({error.strerror or error}): name a file in a folder that exists, with "
            f"{len(content)} bytes left"
        ) from None
    return path
