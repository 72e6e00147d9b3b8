"""Files that are whole or not there."""

import os
from pathlib import Path

from kd_jax.errors import DataError


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
