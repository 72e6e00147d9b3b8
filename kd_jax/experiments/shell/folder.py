"""The folder that a command leaves its results in."""

import itertools
import sys
from pathlib import Path

from kd_jax.errors import OutputError

RESULTS, TABLE = "results.json", "results.md"


def claim(folder: Path) -> bool:
    """Makes `folder` ready for results, before anything is trained; tells whether it had to be made.

    Raises `OutputError` where it cannot be written.
    """
    _require_encodable(folder)
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".kd_jax-can-write"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"--out {folder} cannot be written ({reason}): choose another folder") from None
    return made


def new_folder(name: str) -> Path:
    """A folder `runs/name` that nobody else has, made at once, or `runs/name-2` and so on. Raises `OutputError`."""
    _require_encodable(Path())
    for number in itertools.count(1):
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be made ({error.strerror or error}): choose a folder by --out"
            ) from None
        return folder
    raise AssertionError("numbers do not end")


def _require_encodable(folder: Path) -> None:
    """Checkpoints are written by a library that takes names as UTF-8."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise OutputError(
            f"--out {str(folder)!a} has letters that the locale's encoding ({sys.getfilesystemencoding()}) cannot "
            "hold: set PYTHONUTF8=1, or choose another folder"
        ) from None


def write_whole(path: Path, content: str | bytes) -> None:
    """All of it or nothing. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def write_part(path: Path, content: str | bytes) -> None:
    """A part of the results, all of it or nothing; its folder is made. Raises `OutputError`."""
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise not_written(path, error) from None


def not_written(path: Path, error: OSError) -> OutputError:
    """What to raise where results cannot be written."""
    return OutputError(
        f"the results cannot be written to {path} ({error.strerror or error}): make room, and go on with --resume"
    )
