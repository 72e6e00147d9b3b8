"""Batches of data that is read as it is needed, in the order of a training in memory. Grain reads ahead."""

import threading
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from kd_jax.data.batch import Batch, as_batch, as_key, check_counts, check_whole, epoch_order, is_in_memory
from kd_jax.data.lazy import as_lazy
from kd_jax.data.load import load
from kd_jax.data.order import called_as
from kd_jax.errors import ConfigError, DataError
from kd_jax.files.digests import digest

PyTree = Any

# Far more than are drawn: the batches have no end.
_ENDLESS = 2**48
# So many examples tell whether data on the disk is the same.
_LOOKED_AT = 64


class Batches:
    """The batches of all epochs, one after the other: what `kd.stream` gives.

    `iter` begins with the first batch, and gives Grain's iterator, whose `get_state` tells the step alone.
    steps: of an epoch.
    """

    def __init__(
        self, source: Any, *, batch_size: int, key: Any, threads: int, ahead: int, part: tuple[int, int] = (0, 1),
        numbered: bool = False,
    ) -> None:  # fmt: skip
        self.source, self.batch_size, self.key, self.threads, self.ahead = source, batch_size, key, threads, ahead
        self.examples = len(source)
        self.steps = self.examples // batch_size
        index, count = self._part = part
        self._numbered = numbered
        self._rows = slice(index * batch_size // count, (index + 1) * batch_size // count)
        self._orders: dict[int, Int[np.ndarray, "steps batch"]] = {}
        self._lock = threading.Lock()

    def part(self, index: int, count: int) -> "Batches":
        """Of each batch the part that one of `count` processes reads. Raises `ConfigError` where it has none."""
        if self.batch_size % count:
            raise ConfigError(
                f"batch_size is {self.batch_size}, and {count} processes each read a part of a batch: give a multiple "
                f"of {count}"
            )
        return self._as(part=(index, count), numbered=self._numbered)

    def numbered(self, known: int | None) -> "Batches":
        """With the rows as `indices` where the source gives none, for a teacher who knows so many examples.

        Raises `ConfigError` where he knows others than there are.
        """
        own = self.source.data.indices if isinstance(self.source, _Arrays) else None
        if own is None and known is not None and known != self.examples:
            raise ConfigError(
                f"there are {self.examples} examples and the teacher's outputs of {known}: give its outputs of every "
                "example, in the examples' order, or data with indices"
            )
        return self._as(part=self._part, numbered=True)

    def known_inputs(self) -> PyTree:
        """The inputs of all examples, in memory or mapped from a file; None where they are not, or have own indices."""
        if not isinstance(self.source, _Arrays) or self.source.data.indices is not None:
            return None
        inputs = self.source.data.inputs
        arrays = all(isinstance(leaf, np.ndarray | jax.Array) for leaf in jax.tree.leaves(inputs))
        return inputs if arrays else None

    def identity(self) -> dict[str, Any]:
        """What makes the batches the same, as JSON holds it: some examples stand for all.

        Of a source that says something else each time the types and shapes stand for it.
        """
        rows = np.unique(np.linspace(0, self.examples - 1, _LOOKED_AT).astype(np.int64))
        first, again = self.source.rows(rows), self.source.rows(rows)
        values = digest(first)
        if digest(again) != values:
            values = str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", first))
        key = np.asarray(jax.random.key_data(self.key)).tolist()
        return {"batches": self.batch_size, "key": key, "examples": self.examples, "values": values}

    def _as(self, **how: Any) -> "Batches":
        same = {name: getattr(self, name) for name in ("batch_size", "key", "threads", "ahead")}
        return Batches(self.source, **same, **how)

    def __iter__(self) -> Any:
        """From the first batch on."""
        grain = _grain()
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead)
        return iter(grain.MapDataset.source(self).to_iter_dataset(options))

    def __len__(self) -> int:
        """Beyond any training, for Grain."""
        return _ENDLESS

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps)
        rows = self._order(epoch)[place][self._rows]
        batch = self.source.rows(rows)
        return batch._replace(indices=rows) if self._numbered and batch.indices is None else batch

    def _order(self, epoch: int) -> Int[np.ndarray, "steps batch"]:
        with self._lock:
            if epoch not in self._orders:
                order = epoch_order(self.key, epoch, examples=self.examples, batch_size=self.batch_size)
                # Of this epoch and of one beside it: threads read ahead.
                self._orders = {known: rows for known, rows in self._orders.items() if abs(known - epoch) == 1}
                self._orders[epoch] = np.asarray(order)
            return self._orders[epoch]


@called_as("kd.stream(data, batch_size=…)")
def stream(data: Any, *, batch_size: int, key: Any = 0, threads: int = 2, ahead: int = 4) -> Batches:
    """Batches for `kd.distill`, read from where the data lies while the steps before them run; they need `grain`.

    The batches and their order are those of `data` in memory with the same key and batch size, so that a training is
    that of memory, to rounding, on any number of hosts, each of which reads its own part of every batch.

    data: a source as `kd.load` takes it, whose training images stay on the disk; arrays as a `Batch` has them, such as
        those of `np.load(file, mmap_mode="r")`, and data sets of h5py, of which each batch's rows are read; or
        anything with `len` and `[row]` that gives one example, a dict with `image` and `label` or a pair, as
        `grain.sources.ArrayRecordDataSource` and TFDS's `as_data_source` do.
    batch_size: of all hosts together. key: as `kd.distill` has it. threads: that read. ahead: batches that are read
        before they are asked for.
    Raises `DataError` and `ConfigError`.
    """
    _grain()
    sizes: dict[str, Any] = {"batch_size": batch_size, "threads": threads, "ahead": ahead}
    sizes = {name: check_whole(value, name) for name, value in sizes.items()}
    if isinstance(data, str) and ":" not in data and data.endswith((".npy", ".npz", ".h5", ".hdf5", ".parquet")):
        raise DataError(
            f"the data is {data!r}, a file by its name: open it, as kd.stream((np.load(images, mmap_mode='r'), "
            "labels)), or give npz:FILE for one with the images and labels of a data set"
        )
    if isinstance(data, str):
        dataset = load(data, stream=True)
        data = Batch(dataset.train_images, dataset.train_labels)
    if is_in_memory(data):
        source: Any = _Arrays(as_batch(data, convert=as_lazy))
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        source = _Examples(data)
    else:
        raise DataError(
            f"the data is a {type(data).__name__}: give arrays, the name of a source, or what has len and [row]; what "
            "gives batches already goes to kd.distill as it is"
        )
    if sizes["batch_size"] > len(source):
        raise ConfigError(f"batch_size is {batch_size}: it must be at most the {len(source)} examples")
    return Batches(source, key=as_key(key), **sizes)


def whole_pass(data: Any) -> Iterable[Any]:
    """The batches of `data` to be measured on: a single one, or those of an iterable. Raises `ConfigError`."""
    if isinstance(data, Batches):
        raise ConfigError(
            f"kd.stream has no end: measure on a kd.Batch, or on some of its batches, "
            f"list(itertools.islice(batches, {data.steps})) for an epoch"
        )
    return [data] if is_in_memory(data) or not hasattr(data, "__iter__") or hasattr(data, "shape") else data


class _Arrays:
    """Rows of arrays, which may lie on the disk."""

    def __init__(self, data: Batch) -> None:
        self.data, self.count = data, check_counts(data)

    def __len__(self) -> int:
        return self.count

    def rows(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        return jax.tree.map(lambda leaf: np.asarray(leaf[rows]), self.data)


class _Examples:
    """Examples by their number, which are put together."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        several = getattr(self.source, "__getitems__", None)
        own = [int(row) for row in rows]
        found = [self.source[row] for row in own] if several is None else several(own)
        return as_batch(jax.tree.map(lambda *leaves: np.stack(leaves), *found))


def _grain() -> Any:
    try:
        import grain
    except ImportError:
        raise ConfigError("kd.stream needs grain: pip install 'kd-jax[grain]'") from None
    return grain
