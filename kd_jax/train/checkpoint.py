"""Checkpoints: written while the training goes on, recognised by their digest, the newest and the one before kept.

A run's folder has `run.json`, what the run is, and for each stage `checkpoints/STAGE/STEP/`: an Orbax checkpoint
(https://orbax.readthedocs.io, its v1 API) and `sha256.txt`, the digests of its files as `sha256sum -c` reads them.
A folder gets its final name when all of it is written, so that one without its digests is damaged, not unfinished.
"""

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from kd_jax import errors
from kd_jax.errors import CheckpointError, DamageError, MismatchError
from kd_jax.train import checkpoint_files
from kd_jax.train.checkpoint_files import Arrays, Checkpoint, first_line

KEPT = 2
"""Checkpoints of each stage: the newest and the one before."""

_FORMAT = 1
_RUN, _LOCK, _CHECKPOINTS = "run.json", ".lock", "checkpoints"
PARTIAL = ".partial"
"""The name of a checkpoint that is being written begins so."""


class CheckpointPolicy(NamedTuple):
    """When a training keeps what it has done, and where.

    store: where checkpoints go; None for none. every: steps of an epoch between two places for one; None for its end
    alone. pause: seconds from one checkpoint to the next at least, but for a stage's first, its last and one before
    leaving, and none while one is being written: where epochs are short, writing may take longer than training. 0 for a
    checkpoint at every place. should_stop: asked after every chunk whether to save and leave. defer: entered while a
    signal must not cut anything in two.
    """

    store: "Store | None" = None
    every: int | None = None
    pause: float = 0.0
    should_stop: Callable[[], bool] = lambda: False
    defer: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


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
        return folder.is_dir() and any(self._steps(stage.name) for stage in folder.iterdir())

    def require_description(self, *others: str) -> None:
        """Raises `CheckpointError` where something lies in the place of checkpoints, or in one of `others`, and nothing
        tells what it is of.
        """
        for name in () if self.started else (_CHECKPOINTS, *others):
            place = self.folder / name
            if place.is_dir() and any(place.iterdir()):
                raise CheckpointError(f"{self.folder / _RUN} is gone, and {place} is not empty", errors.START_AGAIN)

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
            return not (self.kept or (self.started and self.finished))
        except (CheckpointError, MismatchError):
            # It may be a file of somebody else's.
            return False

    def start(self, identity: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Says what the run is, and forgets an older one. overwrite: also checkpoints that nothing describes.

        Raises `CheckpointError` where it cannot be written, and as `require_description`.
        """
        if not overwrite:
            self.require_description()
        try:
            self.discard()
        except OSError as error:
            raise unwritable(self.folder, error) from None
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
        """Forgets the run and its checkpoints, and leaves whatever else is there. Raises `OSError`."""
        folder = self.folder / _CHECKPOINTS
        for stage in list(folder.iterdir()) if folder.is_dir() else ():
            self._remove_unfinished(stage.name)
            for step in self._steps(stage.name):
                shutil.rmtree(self._path(stage.name, step))
            _remove_empty(stage)
        _remove_empty(folder)
        # The last: without it nothing tells what the others are.
        (self.folder / _RUN).unlink(missing_ok=True)

    def tidy(self, made: bool) -> None:
        """Takes back what was put into a folder where nothing came of the run; `made`: the folder itself, too."""
        with contextlib.suppress(OSError):
            self.discard()
        if made:
            (self.folder / _LOCK).unlink(missing_ok=True)
            _remove_empty(self.folder)

    def forget(self, trials: str) -> None:
        """Removes the checkpoints of the stages `trials-0`, `trials-1` and so on, whose results are kept elsewhere."""
        self.wait()
        for path in (self.folder / _CHECKPOINTS).glob(f"{trials}-*"):
            if path.name.removeprefix(f"{trials}-").isdecimal():
                shutil.rmtree(path, ignore_errors=True)

    def identity(self) -> dict[str, Any]:
        """What `start` was told. Raises `CheckpointError` where that is damaged, `MismatchError` for another format."""
        return dict(self._description()["run"])

    def newest(self, stage: str) -> Checkpoint | None:
        """The newest good checkpoint of a stage; None where none was written. Changes nothing.

        Raises `CheckpointError` where there are checkpoints and none is good.
        """
        steps = self._steps(stage)
        for step in reversed(steps):
            path = self._path(stage, step)
            try:
                return self.read(stage, step)
            except DamageError as damage:
                self._warn(f"checkpoint {path} is damaged ({damage}): it is passed over for the one before")
        if steps:
            raise self._none_is_good(stage)
        return None

    def _none_is_good(self, stage: str) -> CheckpointError:
        place = self.folder / _CHECKPOINTS / stage
        return CheckpointError(f"no checkpoint of the {stage} in {place} is good", errors.START_AGAIN)

    def read(self, stage: str, step: int) -> Checkpoint:
        """The checkpoint after `step` steps. Raises `DamageError` where it is not good."""
        checkpoint_files.check(self._path(stage, step))
        return self._loaded(stage, step)

    def _loaded(self, stage: str, step: int) -> Checkpoint:
        found = checkpoint_files.load(self._path(stage, step))
        own = {"run": self._run_digest(), "phase": stage, "step": step}
        if {name: found.facts.get(name) for name in own} != own:
            raise DamageError("it is of another run, phase or step")
        return found

    def save(self, stage: str, step: int, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Copies the arrays to the host, and writes them while the caller goes on.

        Waits for the write before, and raises `CheckpointError` where that one failed.
        """
        self.wait()
        copies = {name: np.array(value) for name, value in arrays.items()}
        known = {**facts, "run": self._run_digest(), "phase": stage, "step": step}
        self._writing = self._writer.submit(self._write, stage, step, copies, known)

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

    def _write(self, stage: str, step: int, arrays: Arrays, facts: dict[str, Any]) -> None:
        path = self._path(stage, step)
        with self._told(path, stage):
            self._clear(path, sum(array.nbytes for array in arrays.values()))
            checkpoint_files.write(path.with_name(PARTIAL), arrays, facts)
            self._keep(stage, step)

    def _clear(self, path: Path, size: int) -> None:
        """Makes the place of a checkpoint of so many bytes. Raises `OSError`."""
        if not self.started:
            raise FileNotFoundError(errno.ENOENT, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished(path.parent.name)
        checkpoint_files.require_room(path.with_name(PARTIAL), size)

    def _keep(self, stage: str, step: int) -> None:
        """Gives a whole checkpoint its name, and lets go of old ones."""
        path = self._path(stage, step)
        if path.exists():
            # Only a damaged one is written again.
            shutil.rmtree(path)
        path.with_name(PARTIAL).rename(path)
        steps = self._steps(stage)
        # Later ones are damaged, or this one would not have been written.
        kept = [other for other in steps if other <= step][-KEPT:]
        for other in set(steps) - set(kept):
            shutil.rmtree(self._path(stage, other), ignore_errors=True)

    @contextlib.contextmanager
    def _told(self, path: Path, stage: str) -> Iterator[None]:
        """Raises `CheckpointError` for whatever Orbax and TensorStore raise: a full disk, a folder that is gone."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):
                self._remove_unfinished(stage)
            raise unwritable(path, error, self.started and self.kept) from None

    def _remove_unfinished(self, stage: str) -> None:
        for path in (self.folder / _CHECKPOINTS / stage).glob(f"{PARTIAL}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _describe(self, content: dict[str, Any]) -> None:
        text = json.dumps(content | {"sha256": _digest_of(content)}, indent=2, ensure_ascii=False)
        partial = self.folder / f".{_RUN}{PARTIAL}"
        try:
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.folder / _RUN)
        except OSError as error:
            raise unwritable(self.folder, error, self.started and self.kept) from None
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

    def _path(self, stage: str, step: int) -> Path:
        return self.folder / _CHECKPOINTS / stage / f"{step:09d}"

    def _steps(self, stage: str) -> list[int]:
        folder = self.folder / _CHECKPOINTS / stage
        if not folder.is_dir():
            return []
        names = [path.name for path in folder.iterdir() if path.name.isascii() and path.name.isdigit()]
        return sorted(int(name) for name in names if name == self._path(stage, int(name)).name)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """The folder for this process alone. Raises `CheckpointError` where another one has it."""
    held = FileLock(folder / _LOCK, blocking=False)
    try:
        held.acquire()
    except Timeout:
        raise CheckpointError(f"another process is running in {folder}", errors.WAIT) from None
    except (OSError, NotImplementedError) as error:
        raise unwritable(folder, error) from None
    try:
        yield
    finally:
        held.release()


def _remove_empty(folder: Path) -> None:
    """Leaves a folder that holds anything."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def unwritable(path: Path, error: Exception, kept: bool = False) -> CheckpointError:
    """What to raise for a folder that takes no more. kept: whether there is a checkpoint to go on from."""
    remedy = errors.MAKE_ROOM_AND_GO_ON if kept else errors.MAKE_ROOM
    return CheckpointError(f"{path} cannot be written ({first_line(error)})", remedy)
