"""Checkpoints: written while the training goes on, recognised by their digest, the newest and the one before kept.

A run's folder has `run.json`, what the run is, and for each phase `checkpoints/PHASE/STEP/`: an Orbax checkpoint
(https://orbax.readthedocs.io, its v1 API) and `sha256.txt`, the digests of its files as `sha256sum -c` reads them.
A folder gets its final name when all of it is written, so that one without its digests is damaged, not unfinished.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Shaped

PyTree = Any
Arrays = dict[str, Shaped[np.ndarray, "..."]]

KEPT = 2
"""Checkpoints of each phase: the newest and the one before."""

_FORMAT = 1
_RUN, _LOCK, _CHECKPOINTS, _DIGESTS, _PARTIAL = "run.json", ".lock", "checkpoints", "sha256.txt", ".partial"


# Bytes of a checkpoint beside its arrays, generously.
_ROOM = 2**18


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; one sentence with the remedy."""


class MismatchError(ValueError):
    """A run that is not the one to be resumed; one sentence that names the difference."""


class Checkpoint(NamedTuple):
    """What was saved after `step` steps of a phase. facts: whatever JSON can hold."""

    step: int
    arrays: Arrays
    facts: dict[str, Any]


class Store:
    """The checkpoints of one run. One process at a time: `lock` the folder before anything else."""

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda sentence: None) -> None:
        """folder: the run's. warn: told, in a sentence, of every checkpoint that is passed over."""
        self.folder = folder
        self._warn = warn
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._digest: str | None = None

    @property
    def kept(self) -> bool:
        """Whether there is any checkpoint."""
        folder = self.folder / _CHECKPOINTS
        return folder.is_dir() and any(self._steps(phase.name) for phase in folder.iterdir())

    def require_description(self) -> None:
        """Raises `CheckpointError` where there are checkpoints and nothing that tells what they are of."""
        if self.kept and not self.started:
            raise CheckpointError(
                f"{self.folder / _RUN} is gone, and {self.folder} has checkpoints: "
                "start the run again, in another folder or with --overwrite"
            )

    @property
    def started(self) -> bool:
        """Whether the folder has a run, finished or not."""
        return (self.folder / _RUN).exists()

    @property
    def finished(self) -> bool:
        """Whether the run has left its results. Raises as `identity` does."""
        return bool(self._description()["finished"])

    @property
    def empty(self) -> bool:
        """Whether nothing came of a run: there is no checkpoint, and it is not finished."""
        try:
            finished = self.started and self.finished
        except (CheckpointError, MismatchError):
            # A description that is damaged.
            finished = False
        return not (self.kept or finished)

    def start(self, identity: Mapping[str, Any]) -> None:
        """Says what the run is, and forgets an older one. Raises `CheckpointError` where it cannot be written."""
        try:
            self.discard()
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        self._describe({"format": _FORMAT, "finished": False, "run": dict(identity)})

    def finish(self) -> None:
        """Says that the run has left its results. Raises `CheckpointError` where that cannot be written."""
        self._describe(self._description() | {"finished": True})

    def note(self, **facts: Any) -> None:
        """Keeps, beside what the run is, what else is to be known of it. Raises `CheckpointError` as `start` does."""
        self._describe(self._description() | {"notes": self.notes | facts})

    @property
    def notes(self) -> dict[str, Any]:
        """What `note` was told since `start`. Raises as `identity` does."""
        return dict(self._description().get("notes", {}))

    def discard(self) -> None:
        """Forgets the run and its checkpoints. Raises `OSError`."""
        (self.folder / _RUN).unlink(missing_ok=True)
        if (self.folder / _CHECKPOINTS).exists():
            shutil.rmtree(self.folder / _CHECKPOINTS)

    def tidy(self, made: bool) -> None:
        """Takes back what was put into a folder where nothing came of the run; `made`: the folder itself, too."""
        with contextlib.suppress(OSError):
            self.discard()
        if made:
            (self.folder / _LOCK).unlink(missing_ok=True)
            # Leaves a folder that holds anything.
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def forget(self, group: str) -> None:
        """Removes the checkpoints of the phases `group-0`, `group-1` and so on, whose results are kept elsewhere."""
        self.wait()
        for path in (self.folder / _CHECKPOINTS).glob(f"{group}-*"):
            if path.name.removeprefix(f"{group}-").isdecimal():
                shutil.rmtree(path, ignore_errors=True)

    def identity(self) -> dict[str, Any]:
        """What `start` was told. Raises `CheckpointError` where that is damaged, `MismatchError` for another format."""
        return dict(self._description()["run"])

    def newest(self, phase: str) -> Checkpoint | None:
        """The newest good checkpoint of a phase; None where none was written. Changes nothing.

        Raises `CheckpointError` where there are checkpoints and none is good.
        """
        steps = self._steps(phase)
        for step in reversed(steps):
            path = self._path(phase, step)
            try:
                found = _read(path)
                own = {"run": self._run_digest(), "phase": phase, "step": step}
                if {name: found.facts.get(name) for name in own} != own:
                    raise _DamageError("it is of another run, phase or step")
                return found
            except _DamageError as damage:
                self._warn(f"checkpoint {path} is damaged ({damage}): it is passed over for the one before")
        if steps:
            raise CheckpointError(
                f"no checkpoint of the {phase} in {self.folder / _CHECKPOINTS / phase} is good: "
                "start the run again, in another folder or with --overwrite"
            )
        return None

    def save(self, phase: str, step: int, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Copies the arrays to the host, and writes them while the caller goes on.

        Waits for the write before, and raises `CheckpointError` where that one failed.
        """
        self.wait()
        copies = {name: np.array(value) for name, value in arrays.items()}
        known = {**facts, "run": self._run_digest(), "phase": phase, "step": step}
        self._writing = self._writer.submit(self._write, phase, step, copies, known)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> None:
        """Until everything is written. Raises `CheckpointError` where it could not be."""
        if self._writing is not None:
            self._writing.result()
        self._writing = None

    def close(self) -> CheckpointError | None:
        """Waits for the last write, and returns why it failed, if it did; raises nothing."""
        self._writer.shutdown()
        try:
            self.wait()
        except CheckpointError as error:
            return error
        return None

    def _write(self, phase: str, step: int, arrays: Arrays, facts: dict[str, Any]) -> None:
        path = self._path(phase, step)
        partial = path.with_name(_PARTIAL)
        try:
            import orbax.checkpoint.experimental.v1 as ocp

            if not self.started:
                raise FileNotFoundError(errno.ENOENT, "")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished(phase)
            _require_room(partial, sum(array.nbytes for array in arrays.values()))
            ocp.save(partial.resolve(), arrays, custom_metadata=facts)
            (partial / _DIGESTS).write_text(_digests(partial), encoding="utf-8")
            if path.exists():
                # Only a damaged one is written again.
                shutil.rmtree(path)
            partial.rename(path)
            steps = self._steps(phase)
            # Later ones are damaged, or this one would not have been written.
            kept = [other for other in steps if other <= step][-KEPT:]
            for other in set(steps) - set(kept):
                shutil.rmtree(self._path(phase, other), ignore_errors=True)
        except Exception as error:
            # Whatever Orbax and TensorStore raise for a full disk, a folder that is gone, and the like.
            with contextlib.suppress(OSError):
                self._remove_unfinished(phase)
            raise _unwritable(path, error, self.started and self.kept) from None

    def _remove_unfinished(self, phase: str) -> None:
        for path in (self.folder / _CHECKPOINTS / phase).glob(f"{_PARTIAL}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _describe(self, content: dict[str, Any]) -> None:
        text = json.dumps(content | {"sha256": _digest_of(content)}, indent=2, ensure_ascii=False)
        partial = self.folder / f".{_RUN}{_PARTIAL}"
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.folder / _RUN)
        except OSError as error:
            raise _unwritable(self.folder, error, self.started and self.kept) from None
        self._digest = _digest_of(content["run"])

    def _description(self) -> dict[str, Any]:
        path = self.folder / _RUN
        try:
            content = json.loads(path.read_bytes())
            digest = content.pop("sha256")
            if digest != _digest_of(content):
                raise ValueError("its digest is another")
            kept = content["format"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise CheckpointError(f"{path} is damaged: start the run again, in another folder") from None
        if kept != _FORMAT:
            raise MismatchError(
                f"{path} has format {kept}, and this kd_jax reads {_FORMAT}: use the kd_jax that wrote it"
            )
        return dict(content)

    def _run_digest(self) -> str:
        if self._digest is None:
            self._digest = _digest_of(self.identity())
        return self._digest

    def _path(self, phase: str, step: int) -> Path:
        return self.folder / _CHECKPOINTS / phase / f"{step:09d}"

    def _steps(self, phase: str) -> list[int]:
        folder = self.folder / _CHECKPOINTS / phase
        if not folder.is_dir():
            return []
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isascii() and path.name.isdigit())


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """The folder for this process alone. Raises `CheckpointError` where another one has it."""
    held = FileLock(folder / _LOCK, blocking=False)
    try:
        held.acquire()
    except Timeout:
        raise CheckpointError(f"another process is running in {folder}: wait for it, or choose another --out") from None
    except (OSError, NotImplementedError) as error:
        raise _unwritable(folder, error) from None
    try:
        yield
    finally:
        held.release()


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as `params.hidden.0.kernel`."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def restore_tree(arrays: Mapping[str, Shaped[np.ndarray, "..."]], like: PyTree) -> PyTree:
    """The tree whose leaves `named_arrays` named, on the device. Raises `MismatchError` where it is not `like`."""
    paths, structure = jax.tree.flatten_with_path(like)
    expected = {_name(path): (leaf.shape, leaf.dtype) for path, leaf in paths}
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if found != expected:
        name = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        raise MismatchError(
            f"the checkpoint has {found.get(name, 'nothing')} for {name}, and this kd_jax "
            f"{expected.get(name, 'nothing')}: use the versions that wrote it"
        )
    return jax.tree.unflatten(structure, [jax.numpy.asarray(arrays[name]) for name in expected])


class _DamageError(Exception):
    """Why a checkpoint is not good."""


def _read(path: Path) -> Checkpoint:
    """The checkpoint in `path`, whose digests are checked before Orbax sees it. Raises `_DamageError`."""
    try:
        listed = (path / _DIGESTS).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise _DamageError(f"it lacks {_DIGESTS}") from None
    try:
        found = _digests(path)
    except OSError as error:
        raise _DamageError(_first_line(error)) from None
    if listed != found:
        changed = [line.split("  ", 1)[-1] for line in listed.splitlines() if line not in found.splitlines()]
        name = ascii(changed[0][:100])[1:-1] if changed else ""
        raise _DamageError(f"{name} has another digest, or is gone" if changed else f"{_DIGESTS} is not complete")
    import orbax.checkpoint.experimental.v1 as ocp

    try:
        arrays, metadata = ocp.load(path.resolve()), ocp.metadata(path.resolve())
    except Exception as error:
        raise _DamageError(f"Orbax cannot read it: {_first_line(error)}") from None
    return Checkpoint(int(path.name), arrays, dict(metadata.custom_metadata))


def _require_room(path: Path, size: int) -> None:
    """Raises `OSError` for a full disk before Orbax meets it, whose threads would each complain."""
    if hasattr(os, "posix_fallocate"):
        room = path.with_name(f"{path.name}-room")
        with room.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size + _ROOM)
        room.unlink()


def _digests(folder: Path) -> str:
    """A line for each file, as sha256sum writes it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _DIGESTS)
    return "".join(f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def _unwritable(path: Path, error: Exception, kept: bool = False) -> CheckpointError:
    """kept: whether there is a checkpoint to go on from."""
    remedy = "go on with --resume from the checkpoint before" if kept else "run it again"
    return CheckpointError(f"{path} cannot be written ({_first_line(error)}): make room or give it back, and {remedy}")


def _first_line(error: Exception) -> str:
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return (text.strip().partition("\n")[0] or type(error).__name__)[:200]
