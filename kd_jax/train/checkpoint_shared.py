"""Checkpoints that several processes write and read together: each the pieces that its devices have.

What fails in one of them (a full disk, a file that it cannot read) all of them say, and none waits for ever.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from kd_jax.errors import DamageError
from kd_jax.train import checkpoint_files
from kd_jax.train.checkpoint import PARTIAL, Store, unwritable
from kd_jax.train.checkpoint_files import Checkpoint
from kd_jax.train.exchange import by_all, end_service_with_program, exchange
from kd_jax.train.processes import by_first, is_first

Result = TypeVar("Result")

# Seconds between two looks at whether another process has failed while Orbax waits for it.
_LOOK = 0.5


class SharedStore(Store):
    """A `Store` of which all processes call `save` and `newest` at the same places; the first does what one can do."""

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda sentence: None) -> None:
        super().__init__(folder, warn)
        self._all = exchange("checkpoint")

    def save(self, stage: str, step: int, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """As `Store.save`. The first process gives a checkpoint its name when all pieces are written."""
        self.wait()
        path = self._path(stage, step)
        known = {**facts, "run": self._run_digest(), "phase": stage, "step": step}

        def begin() -> str:
            with self._told(path, stage):
                self._clear(path, sum(array.nbytes for array in arrays.values()))
            return ""

        def room() -> None:
            # The first has looked for the room of all; a limit of another process is found here.
            with self._told(path, stage):
                if not is_first():
                    place = path.with_name(f"{PARTIAL}-{jax.process_index()}")
                    checkpoint_files.require_room(place, sum(map(_bytes_here, arrays.values())))

        by_first(begin, True)
        by_all(room, self._all)
        with self._told(path, stage):
            finish = checkpoint_files.begin_by_all(path.with_name(PARTIAL), arrays, known)
        self._writing = self._writer.submit(self._end, stage, step, finish)

    def _end(self, stage: str, step: int, finish: Callable[[], None]) -> None:
        path = self._path(stage, step)

        def end() -> None:
            with self._told(path, stage):
                if self._all_wrote(finish) and is_first():
                    checkpoint_files.seal(path.with_name(PARTIAL))
                    self._keep(stage, step)

        try:
            by_all(end, self._all)
        except Exception:
            if is_first():
                with contextlib.suppress(OSError):
                    self._remove_unfinished(stage)
            raise

    def _all_wrote(self, finish: Callable[[], None]) -> bool:
        """Waits for Orbax, which waits for all processes; False as soon as one of these has said that it failed."""
        over, errors = threading.Event(), list[Exception]()

        def wait() -> None:
            try:
                finish()
            except Exception as error:
                errors.append(error)
            over.set()

        threading.Thread(target=wait, name="orbax", daemon=True).start()
        while not over.wait(_LOOK):
            if self._all.said():
                end_service_with_program()
                return False
        if errors:
            raise errors[0]
        return True

    def newest(self, stage: str) -> Checkpoint | None:
        """As `Store.newest`: the newest that is good for all processes."""
        steps = [int(step) for step in by_first(lambda: " ".join(map(str, self._steps(stage))), True).split()]
        for step in reversed(steps):
            path = self._path(stage, step)
            # In two: Orbax counts what it reads, and waits for a process that has read more or less than others.
            if self._good(partial(_checked, path), path):
                found = self._good(partial(self._loaded, stage, step), path)
                if found is not None:
                    return found
        if steps:
            raise self._none_is_good(stage)
        return None

    def _good(self, work: Callable[[], Result], path: Path) -> Result | None:
        """What each process finds; None, and a warning in all, where one of them finds damage."""
        found, damage = None, ""
        try:
            found = work()
        except DamageError as error:
            damage = str(error)
        said = self._all(damage)
        if not said:
            return found
        process, sentence = next(iter(said.items()))
        whom = "" if len(said) == jax.process_count() else f" for process {process}"
        self._warn(f"checkpoint {path} is damaged{whom} ({sentence}): it is passed over for the one before")
        return None

    @contextlib.contextmanager
    def _told(self, path: Path, stage: str) -> Iterator[None]:
        """As of `Store`; what is unfinished stays until no process writes."""
        try:
            yield
        except Exception as error:
            raise unwritable(path, error, self.started and self.kept) from None


def _checked(path: Path) -> bool:
    checkpoint_files.check(path)
    return True


def _bytes_here(array: Any) -> int:
    """What this process writes of an array; of what all have, the first does."""
    if not isinstance(array, jax.Array):
        return 0
    return sum(np.size(piece.data) * array.dtype.itemsize for piece in array.addressable_shards if not piece.replica_id)
