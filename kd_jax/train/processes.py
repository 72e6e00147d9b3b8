"""Several processes, each with devices of its own, that train together (`jax.distributed`).

All of them call the same functions. Whatever all devices have is the same in each process. What has pieces on devices
of others is brought together for a file or a digest, in which every process takes part.
"""

import contextlib
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax._src.distributed
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd_jax import errors
from kd_jax.errors import CheckpointError, ConfigError, DataError, MismatchError, NotFiniteError, RunError

PyTree = Any


def is_shared(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return jax.process_index() == 0


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """A copy of an array, which every process has whole, where it belongs: each takes the part of its devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding, may_alias=False)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(leaf)
    host = np.asarray(leaf)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def put_part(leaf: Any, sharding: NamedSharding, count: int) -> jax.Array:
    """An array of which this process has its part of the first axis; `count`: of all parts."""
    if sharding.is_fully_addressable:
        return put(leaf, sharding)
    host = np.asarray(leaf)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_process_local_data(sharding, host, (count, *host.shape[1:]))


@functools.lru_cache(maxsize=16)
def part_of(mesh: Mesh, axis: str) -> tuple[int, int]:
    """Which part of the axis this process has, and how many parts there are. Raises `ConfigError` for uneven ones."""
    along = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    places: dict[int, set[int]] = {}
    for place, row in enumerate(along):
        for device in np.ravel(row):
            places.setdefault(device.process_index, set()).add(place)
    size = len(along) // len({min(own) for own in places.values()})
    for process, own in places.items():
        if min(own) % size or own != set(range(min(own), min(own) + size)):
            raise ConfigError(
                f"the devices of process {process} are at the places {', '.join(map(str, sorted(own)))} of the axis "
                f"{axis}: each process needs as many, beside each other, as jax.make_mesh puts them"
            )
    return min(places[jax.process_index()]) // size, len(along) // size


def of_all(mesh: Mesh | None, axis: str, tree: PyTree) -> PyTree:
    """Arrays of which each process has a part of the first axis, as the shapes that all parts have together."""
    parts = 1 if mesh is None else part_of(mesh, axis)[1]
    if parts == 1:
        return tree
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((parts * len(leaf), *leaf.shape[1:]), leaf.dtype), tree)


def on_host(leaf: Any) -> Any:
    """An array of NumPy, of a key its numbers. What has pieces on devices of other processes is brought together: all
    take part.
    """
    if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        mesh: Any = leaf.sharding
        leaf = jax.jit(lambda array: array, out_shardings=NamedSharding(mesh.mesh, PartitionSpec()))(leaf)
    return np.asarray(leaf)


def local(tree: PyTree) -> PyTree:
    """What every device has, as arrays of this process alone; what has pieces elsewhere as it is."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or not leaf.is_fully_replicated:
            return leaf
        return leaf.addressable_data(0)

    return jax.tree.map(own, tree)


def alone(tree: PyTree) -> PyTree:
    """`local`; None where something has pieces on devices of other processes."""
    own = local(tree)
    return own if all(getattr(leaf, "is_fully_addressable", True) for leaf in jax.tree.leaves(own)) else None


def told(sentence: str, shared: bool) -> str:
    """What the first process says, in all of them; they wait for it."""
    if not shared:
        return sentence
    from jax.experimental import multihost_utils

    known = np.zeros(2048, np.uint8)
    said = sentence.encode()[:2048]
    known[: len(said)] = np.frombuffer(said, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(known))).rstrip(b"\0").decode(errors="ignore")


def agreed(decision: bool, shared: bool) -> bool:
    """What the first process decides, in all of them."""
    return told("yes" if decision else "", shared) == "yes" if shared else decision


def by_first(work: Callable[[], str], shared: bool) -> str:
    """What the first process does alone; what it says, or raises in one sentence, all of them say or raise."""
    if not shared:
        return work()
    error: BaseException | None = None
    said = ""
    if is_first():
        try:
            said = work()
        except BaseException as raised:
            # The others wait.
            error, said = raised, in_words(raised)
    said = told(said, shared)
    if error is not None:
        raise error
    raise_again(said)
    return said


def in_words(error: BaseException) -> str:
    """An error of this process, as `raise_again` reads it in another one."""
    kind = next((kind for kind in _TOLD if isinstance(error, kind)), None)
    if kind is None:
        return f"!RunError!process {jax.process_index()} ended with {type(error).__name__}: see what it says"
    return f"!{kind.__name__}!{error}"


def raise_again(said: str, whose: str = "") -> None:
    """Raises the error of another process, where it is one that it says. whose: before a sentence that names none."""
    if said.startswith("!"):
        _, kind, sentence = said.split("!", 2)
        raise getattr(errors, kind)(sentence if sentence.startswith("process ") else f"{whose}{sentence}")


@contextlib.contextmanager
def watched(mesh: Mesh | None) -> Iterator[None]:
    """Ends this process, with one sentence and the exit code 1, where another one of a shared training has gone.

    A collective fails at once, or waits for ever. Each process meets the others in a thread, too, every few seconds:
    one that does not come for `_SILENT` seconds has gone.
    """
    # JAX has no public name for it; Orbax takes it from there, too.
    client = jax._src.distributed.global_state.client if is_shared(mesh) else None
    if client is None:
        yield
        return
    global _watches
    _watches += 1
    name, over = f"kd_jax.watch.{_watches}", threading.Event()
    threading.Thread(target=_watch, args=(client, name, over), name="watch", daemon=True).start()
    try:
        yield
        client.wait_at_barrier(f"{name}.over", int(10 * _SILENT * 1000))
    except jax.errors.JaxRuntimeError as error:
        if any(word in str(error) for word in _GONE):
            _leave(f" ({str(error).splitlines()[0][:200]})")
        raise
    finally:
        over.set()


def _watch(client: Any, name: str, over: threading.Event) -> None:
    for number in itertools.count():
        try:
            client.wait_at_barrier(f"{name}.{number}", int(_SILENT * 1000))
        except Exception:
            if over.is_set():
                return
            _leave()
        if over.wait(_PAUSE):
            return


def _leave(why: str = "") -> None:
    """Ends this process. At a usual end it would wait for the one that has gone, and in a collective for ever."""
    sys.stderr.write(
        f"kd_jax: process {jax.process_index()} of {jax.process_count()} has lost another process of this training: "
        f"start all of them again, with resume=True where checkpoint= was given{why}\n"
    )
    sys.stderr.flush()
    os._exit(1)


# Of its own kind the first that fits; each is made of a sentence.
_TOLD = (CheckpointError, ConfigError, DataError, MismatchError, NotFiniteError, RunError)
_watches = 0
# What collectives and the service of `jax.distributed` say of a process that has gone.
_GONE = ("Gloo", "NCCL", "onnection", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Barrier failed")
# Seconds: less than the 100 after which JAX gives up, and more than a busy machine keeps a thread waiting.
_SILENT, _PAUSE = 60.0, 2.0
