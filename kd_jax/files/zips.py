"""Zip files, of which no member may claim more than the file can hold."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kd_jax.errors import DataError
from kd_jax.files import DEFLATE_RATIO, open_regular, refusing, size_of


@contextlib.contextmanager
def open_zip(path: str | Path, kind: str, remedy: str) -> Iterator[zipfile.ZipFile]:
    """The zip file `path`, of the format `kind`; whatever is raised while it is open becomes a `DataError`."""
    refused = refusing(f"{path} is no {kind} file, or a damaged one", remedy)
    with open_regular(path) as file, refused, zipfile.ZipFile(file) as archive:
        size, claimed = size_of(file), sum(info.compress_size for info in archive.infolist())
        if claimed > size:
            raise DataError(f"{path} has {size} bytes, and its members claim {claimed}: it is damaged, so {remedy}")
        yield archive


@contextlib.contextmanager
def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, what: str) -> Iterator[IO[bytes]]:
    """A member of a zip file. Raises `DataError` where it claims more than it can hold."""
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{what} is encrypted, or compressed by other means than deflate: store it uncompressed")
    ratio = 1 if info.compress_type == zipfile.ZIP_STORED else DEFLATE_RATIO
    if info.file_size > ratio * info.compress_size:
        raise DataError(
            f"{what} claims {info.file_size} bytes, more than the {info.compress_size} bytes of the file can hold: "
            "it is damaged, so make or fetch it again"
        )
    with archive.open(info) as stream:
        yield stream
