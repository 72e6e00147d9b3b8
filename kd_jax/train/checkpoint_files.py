"""One checkpoint's folder: arrays as Orbax keeps them, and the digests of its files as `sha256sum -c` reads them."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from kd_jax.errors import DamageError, DataError, MismatchError
from kd_jax.files.names import path_name
from kd_jax.train.processes import put

PyTree = Any
Arrays = dict[str, Shaped[np.ndarray, "..."]]

_DIGESTS = "sha256.txt"
# Bytes of a checkpoint beside its arrays, generously.
_ROOM = 2**18


class Checkpoint(NamedTuple):
    """What was saved after `step` steps of a stage. facts: whatever JSON can hold."""

    step: int
    arrays: Arrays
    facts: dict[str, Any]


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as `params.hidden.0.kernel`; none of those that hold nothing.

    Raises `DataError` where two have one name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = path_name(path)
        if name in named:
            raise DataError(f"two arrays of the training have the name {name}: rename one of them, without a dot")
        named[name] = _numbers(leaf)
    return {name: leaf for name, leaf in named.items() if np.size(leaf)}


def restore_tree(arrays: Mapping[str, Shaped[np.ndarray, "..."]], like: PyTree) -> PyTree:
    """The tree whose leaves `named_arrays` named, on the device, or as `like` lies on a mesh.

    Raises `MismatchError` where it is not `like`.
    """
    paths, structure = jax.tree.flatten_with_path(like)
    expected = {name: (data.shape, data.dtype) for name, data in named_arrays(like).items()}
    found = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if found != expected:
        name = next(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        raise MismatchError(
            f"the checkpoint has {found.get(name, 'nothing')} for {name}, and this kd_jax "
            f"{expected.get(name, 'nothing')}: use the versions that wrote it"
        )
    # What holds nothing is not in a file.
    leaves = [_restored(arrays[path_name(path)], leaf) if np.size(leaf) else leaf for path, leaf in paths]
    return jax.tree.unflatten(structure, leaves)


def _restored(array: Any, like: Any) -> Any:
    if _is_key(like):
        array = jax.random.wrap_key_data(jax.numpy.asarray(array), impl=jax.random.key_impl(like))
    sharding = getattr(like, "sharding", None)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return put(array, sharding)
    return array if _is_key(like) else jax.numpy.asarray(array)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbers(leaf: Any) -> Any:
    """A key of `jax.random` as the numbers that it is made of; other leaves as they are."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def write(folder: Path, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint into a folder that is not there yet. Raises whatever Orbax and TensorStore do."""
    import orbax.checkpoint.experimental.v1 as ocp

    ocp.save(folder.resolve(), arrays, custom_metadata=dict(facts))
    seal(folder)


def begin_by_all(folder: Path, arrays: Mapping[str, Any], facts: Mapping[str, Any]) -> Callable[[], None]:
    """Copies the pieces of arrays that this process has; what is given back waits until those of all are written.

    Every process of `jax.distributed` calls it. Raises whatever Orbax and TensorStore do, and so does what it gives.
    """
    import orbax.checkpoint.experimental.v1 as ocp

    # On a CPU Orbax reads the memory itself, which the next step takes.
    own = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else np.asarray(leaf), dict(arrays))
    writing = ocp.save_async(folder.resolve(), own, custom_metadata=dict(facts))
    return lambda: writing.result()


def seal(folder: Path) -> None:
    """Writes the digests of a checkpoint, without which it is damaged."""
    (folder / _DIGESTS).write_text(_digests(folder), encoding="utf-8")


def check(path: Path) -> None:
    """Whether all files of a checkpoint are those that were written. Raises `DamageError`."""
    try:
        listed = (path / _DIGESTS).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise DamageError(f"it lacks {_DIGESTS}") from None
    try:
        found = _digests(path)
    except OSError as error:
        raise DamageError(first_line(error)) from None
    if listed != found:
        changed = [line.split("  ", 1)[-1] for line in listed.splitlines() if line not in found.splitlines()]
        name = ascii(changed[0][:100])[1:-1] if changed else ""
        raise DamageError(f"{name} has another digest, or is gone" if changed else f"{_DIGESTS} is not complete")


def load(path: Path) -> Checkpoint:
    """The checkpoint in `path`, after `check`. Raises `DamageError`."""
    import orbax.checkpoint.experimental.v1 as ocp

    try:
        with _alone(ocp):
            metadata = ocp.metadata(path.resolve())
            # As arrays of NumPy, whole, wherever the pieces were when they were written.
            known = {name: np.empty(0, leaf.dtype) for name, leaf in metadata.metadata.items()}
            arrays = ocp.load(path.resolve(), known)
    except Exception as error:
        raise DamageError(f"Orbax cannot read it: {first_line(error)}") from None
    return Checkpoint(int(path.name), arrays, dict(metadata.custom_metadata))


def _alone(ocp: Any) -> Any:
    """Orbax waits for no other process of `jax.distributed`, each of which reads."""
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    context, own = ocp.Context(), jax.process_index()
    options = context.multiprocessing
    options.primary_host, options.active_processes, options.barrier_sync_key_prefix = own, {own}, f"kd_jax.{own}"
    return context


def first_line(error: Exception) -> str:
    """What an error says, no longer than is read."""
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return (text.strip().partition("\n")[0] or type(error).__name__)[:200]


def require_room(path: Path, size: int) -> None:
    """Raises `OSError` for a full disk before Orbax meets it, whose threads would each complain."""
    if hasattr(os, "posix_fallocate"):
        room = path.with_name(f"{path.name}-room")
        with room.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size + _ROOM)
            finally:
                room.unlink()


def _digests(folder: Path) -> str:
    """A line for each file, as sha256sum writes it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _DIGESTS)
    return "".join(f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
