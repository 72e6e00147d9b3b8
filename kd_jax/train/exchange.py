"""What several processes tell each other without a device: through the service of `jax.distributed`.

A collective needs all processes at the same place of the same program. Here one may have failed, be in a thread that
reads or writes, or have no more batches: what it says, all of them know, and so all end with the same sentence.
"""

import contextlib
import functools
import itertools
import json
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax._src.distributed
import numpy as np

from kd_jax.errors import ConfigError, DataError, RunError
from kd_jax.files import digests
from kd_jax.train.processes import in_words, is_shared, local, raise_again

PyTree = Any
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Seconds that a process waits for the others to begin: where their data is loaded, say.
BEGIN = 600.0
# While a training runs `processes.watched` looks whether all are there, so that a slow disk may take its time.
_PATIENCE = 24 * 3600.0
# Seconds in which a process that leaves tells so, where the others come to hear it.
LEAVING = 5.0
# Longer texts are compared by their digest.
_SHOWN = 200


class Exchange:
    """A place to which all processes come again and again, each time to the next one: what they say there, all know.

    name: the same in all of them, and of one exchange alone.
    """

    def __init__(self, name: str) -> None:
        self.name, self.number = name, 0
        # JAX has no public name for it; Orbax takes it from there, too.
        self.client: Any = jax._src.distributed.global_state.client

    def __call__(self, own: str = "", patience: float = _PATIENCE) -> dict[int, str]:
        """What those say that say anything, by their process; waits for all.

        Raises `JaxRuntimeError` where one does not come, for so many seconds.
        """
        place = self._place()
        if own:
            self.client.key_value_set(f"{place}{jax.process_index()}", own)
        self.number += 1
        self.client.wait_at_barrier(self.name, int(patience * 1000))
        return self._said(place)

    def said(self) -> dict[int, str]:
        """What others have said already at the next place."""
        return self._said(self._place())

    def _place(self) -> str:
        return f"{self.name}/{self.number}/"

    def _said(self, place: str) -> dict[int, str]:
        found = {int(key.rpartition("/")[2]): text for key, text in self.client.key_value_dir_get(place)}
        return dict(sorted(found.items()))


class _Training:
    """One shared training. met: whether its processes know that all were given the same."""

    def __init__(self, number: int) -> None:
        self.number, self.met = number, False


_numbers = itertools.count()
_now: _Training | None = None


def exchange(name: str) -> Exchange:
    """One of the training that is being begun."""
    return Exchange(f"kd_jax.{0 if _now is None else _now.number}.{name}")


def together(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function which all processes of its `mesh=` call: where one of them fails before `meet`, all do."""

    @functools.wraps(function)
    def called(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        global _now
        mesh: Any = kwargs.get("mesh")
        if not is_shared(mesh) or jax._src.distributed.global_state.client is None:
            return function(*args, **kwargs)
        before, _now = _now, _Training(next(_numbers))
        own = _now
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not own.met:
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    exchange("start")(in_words(error), BEGIN)
            raise
        finally:
            _now = before

    return called


def meet(given: Mapping[str, Any]) -> None:
    """Waits for all processes of a training, which JAX begins when they have the same.

    given: what each has, as JSON holds it. Raises `ConfigError` in all processes where one of them has something else
    than process 0, what one of them raised before, and `RunError` where one does not come.
    """
    if _now is None:
        return
    start = exchange("start")
    own = {name: _short(value) for name, value in flat(given).items()}
    try:
        said = start(json.dumps(own), BEGIN)
    except jax.errors.JaxRuntimeError:
        raise RunError(
            f"process {jax.process_index()} of {jax.process_count()} has waited {BEGIN:g} seconds for all others to "
            "begin this training: start the same program in all of them"
        ) from None
    finally:
        _now.met = True
    _raise_first(said)
    known = {process: json.loads(text) for process, text in said.items()}
    for process, other in known.items():
        names = dict.fromkeys((*known[0], *other))
        for name in (name for name in names if known[0].get(name) != other.get(name)):
            one, two = other.get(name), known[0].get(name)
            differs = f"{name} is {one} in process {process}, and {two} in process 0"
            if digests.is_digest(one) or digests.is_digest(two):
                differs = f"process {process} has another {name} than process 0"
            raise ConfigError(f"{differs}: give all processes of a training the same")


def by_all(work: Callable[[], Result], told: Exchange) -> Result:
    """What each process does by itself. Where it fails in one of them, all raise what that one says."""
    error: Exception | None = None
    try:
        found = work()
    except Exception as raised:
        error = raised
    said = told("" if error is None else in_words(error))
    if error is not None:
        raise error
    _raise_first(said)
    return found


def in_step(
    batches: Iterator[tuple[Any, Any]], told: Exchange, epoch: int, stop: threading.Event
) -> Generator[tuple[Any, Any]]:
    """The batches of an epoch, each when all processes have theirs.

    stop: set where nobody wants more. Raises `DataError` in all processes where one of them has no more batches than
    those before, or one of another shape, and what one of them raised.
    """
    before = ""
    for number in itertools.count(1):
        error: Exception | None = None
        try:
            found = next(batches, None)
            own = _END if found is None else shapes(found[0])
        except Exception as raised:
            error, own = raised, in_words(raised)
        if stop.is_set():
            _leave(told)
            return
        said = told("" if own == before else own)
        if error is not None:
            raise error
        _raise_first(said)
        _require_same_batch([said.get(process, before) for process in range(jax.process_count())], number, epoch)
        if found is None:
            return
        before = own
        try:
            yield found
        except GeneratorExit:
            _leave(told)
            raise


def _leave(told: Exchange) -> None:
    """Frees others that wait."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        told(f"!RunError!process {jax.process_index()} stopped amid an epoch: see what it says", LEAVING)


def _require_same_batch(all_said: list[str], number: int, epoch: int) -> None:
    first = all_said[0]
    other = next((process for process, own in enumerate(all_said) if own != first), None)
    if other is None:
        return
    if _END in (first, all_said[other]):
        ended, more = (0, other) if first == _END else (other, 0)
        raise DataError(
            f"the batches of process {ended} end after {number - 1:,} of epoch {epoch + 1}, and process {more} has "
            "more: give all processes as many, or say with steps= how many an epoch has"
        )
    raise DataError(
        f"batch {number:,} of epoch {epoch + 1} has {all_said[other]} in process {other}, and {first} in process 0: "
        "give each process as many examples, of the same shapes"
    )


@functools.cache
def end_service_with_program() -> None:
    """When the program ends, ends the service before Python waits for a thread that waits for another process there."""
    # Python has no public name for it, and `atexit` comes behind the threads.
    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(jax.distributed.shutdown)


def digest_here(tree: PyTree) -> str:
    """SHA-256 of what this process knows of a tree: of arrays with pieces on devices of others their shapes."""

    def here(leaf: Any) -> Any:
        return leaf if getattr(leaf, "is_fully_addressable", True) else np.asarray(leaf.shape)

    return digests.digest(jax.tree.map(here, local(tree)))


def _raise_first(said: Mapping[int, str]) -> None:
    for process, text in said.items():
        raise_again(text, f"process {process}: ")


def shapes(batch: PyTree) -> str:
    """What the arrays of a batch are, for a person."""
    return ", ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(batch)
    )


def _short(value: Any) -> Any:
    return digests.text_digest(value) if isinstance(value, str) and len(value) > _SHOWN else value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dict of dicts as one, by names with dots."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


_END = "no batch"
