"""Data that is read as it is needed: those of a training in memory, exact resuming, and a limit of memory."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from small import DATA, SGD, X, Y, assert_close, assert_same, net, teacher

import kd_jax as kd
from kd_jax.data.mapped import is_mapped
from kd_jax.errors import ArgumentError, ConfigError, DataError, MismatchError

grain = pytest.importorskip("grain")
pytestmark = pytest.mark.usefixtures("quick_compiling")
ROOT = Path(__file__).parents[2]
HOW: dict[str, Any] = {"optimizer": optax.sgd(0.1, momentum=0.9), "method": kd.KD(0.3), "key": 7, "epochs": 3}


def batches(iterator: Any, count: int) -> list[Any]:
    return [next(iterator) for _ in range(count)]


def test_the_batches_are_those_of_memory() -> None:
    """In all epochs, each of which has another order."""
    wanted = list(kd.batches(DATA, key=7, batch_size=5, epochs=3))
    found = kd.stream(DATA, batch_size=5, key=7)
    assert found.steps == 4
    assert_same(batches(iter(found), 12), wanted)


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_several_processes_make_the_batch(count: int) -> None:
    whole = kd.stream(DATA, batch_size=8, key=7)
    parts = [iter(whole.part(index, count)) for index in range(count)]
    for batch in batches(iter(whole), 5):
        own = [next(part) for part in parts]
        assert_same(kd.Batch(*(np.concatenate(some) for some in zip(*(one[:2] for one in own), strict=True))), batch)
    # The state is the step alone: another number of processes goes on from it.
    again = iter(whole)
    again.set_state(parts[0].get_state())
    np.testing.assert_array_equal(next(again).inputs[: 8 // count], next(parts[0]).inputs)
    with pytest.raises(ConfigError, match="batch_size is 8, and 3 processes each read a part"):
        whole.part(0, 3)


def test_a_training_is_that_of_memory() -> None:
    memory = kd.distill(net(), teacher(), DATA, batch_size=8, **HOW)
    found = kd.distill(net(), teacher(), kd.stream(DATA, batch_size=8, key=7), **HOW)
    assert int(found.state.step) == 9
    assert_close(found.state, memory.state)
    np.testing.assert_allclose(found.history["loss"], memory.history["loss"], rtol=1e-5)


def array_record(folder: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordWriter

    path = str(folder / "examples.array_record")
    writer = ArrayRecordWriter(path, "group_size:1")
    for image, label in zip(X, Y, strict=True):
        writer.write(pickle.dumps({"image": image, "label": label}))
    writer.close()
    return grain.MapDataset.source(grain.sources.ArrayRecordDataSource(path)).map(pickle.loads)


def of_array_record(folder: Path) -> Any:
    return array_record(folder).seed(3).shuffle().repeat().batch(8).to_iter_dataset()


def of_rows(folder: Path) -> Any:
    """The same file, in the order of kd_jax."""
    return kd.stream(array_record(folder), batch_size=8, key=7)


def of_parquet(folder: Path) -> Any:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"image": list(X), "label": Y}), str(folder / "examples.parquet"))
    rows = grain.experimental.ParquetIterDataset(str(folder / "examples.parquet"))
    return rows.map(lambda row: {"image": np.asarray(row["image"], np.float32), "label": row["label"]}).batch(8)


def of_loader(folder: Path) -> Any:
    source = [{"image": image, "label": label} for image, label in zip(X, Y, strict=True)]
    sampler = grain.samplers.IndexSampler(24, shuffle=True, seed=3, num_epochs=1)
    return grain.DataLoader(data_source=source, sampler=sampler, operations=[grain.transforms.Batch(8)])


def mapped(folder: Path) -> Any:
    np.save(folder / "x.npy", X)
    return kd.stream((np.load(folder / "x.npy", mmap_mode="r"), Y), batch_size=8, key=7)


class Stopped(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("make", [of_array_record, of_rows, of_parquet, of_loader, mapped])
def test_a_resumed_training_is_exact(make: Any, tmp_path: Path) -> None:
    """From files of array_record and Parquet, Grain's `DataLoader` and `IterDataset`, and mapped arrays."""

    def stop(epoch: Any) -> None:
        if epoch.number == 2:
            raise Stopped

    # One pass of Parquet and of the loader is an epoch of 3 steps.
    steps = None if make in (of_parquet, of_loader) else 2
    how = {**HOW, "epochs": 4, "steps": steps}
    for name in ("whole", "stopped", "resumed"):
        (tmp_path / name).mkdir()
    whole = kd.distill(net(), teacher(), make(tmp_path / "whole"), **how)
    with pytest.raises(Stopped):
        kd.distill(net(), teacher(), make(tmp_path / "stopped"), checkpoint=tmp_path / "kept", callbacks=stop, **how)
    resumed = kd.distill(net(), teacher(), make(tmp_path / "resumed"), checkpoint=tmp_path / "kept", resume=True, **how)
    assert_same(resumed.state, whole.state)


def test_an_order_of_rows_is_that_of_memory_for_every_source(tmp_path: Path) -> None:
    wanted = kd.distill(net(), teacher(), kd.stream(DATA, batch_size=8, key=7), **HOW)
    for make in (of_rows, mapped):
        assert_same(kd.distill(net(), teacher(), make(tmp_path), **HOW).state, wanted.state)


def test_a_source_by_its_name_stays_on_the_disk() -> None:
    """Once it is there, it is not written again."""
    small, kept = kd.load("mnist"), kd.load("mnist", stream=True)
    assert is_mapped(kept)
    assert kept.digest() == small.digest()
    file = Path(str(kept.train_images.filename))
    changed = file.stat().st_mtime_ns
    found = next(iter(kd.stream("mnist", batch_size=8, key=1)))
    wanted = next(kd.batches(kd.Batch(small.train_images, small.train_labels), key=1, batch_size=8, epochs=1))
    assert_same(found[:2], wanted[:2])
    assert file.stat().st_mtime_ns == changed
    file.write_bytes(file.read_bytes()[:-1])
    assert kd.load("mnist", stream=True).digest() == small.digest()


@pytest.mark.parametrize(
    ("data", "more", "words"),
    [
        (DATA, {"batch_size": 25}, "batch_size is 25: it must be at most the 24 examples"),
        (DATA, {"batch_size": 0}, "batch_size is 0: it must be a whole number"),
        (DATA, {"batch_size": 8, "threads": 0}, "threads is 0: it must be a whole number"),
        (iter([DATA]), {"batch_size": 8}, "goes to kd.distill as it is"),
        ("cifar", {"batch_size": 8}, "unknown data set 'cifar'"),
    ],
)
def test_what_cannot_be_streamed_is_one_sentence(data: Any, more: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words) as error:
        kd.stream(data, **more)
    assert "\n" not in str(error.value)


def test_it_has_no_end_to_measure_at() -> None:
    endless = kd.stream(DATA, batch_size=8)
    with pytest.raises(ConfigError, match=r"kd.stream has no end: measure on a kd.Batch, or .*islice\(batches, 3\)"):
        kd.evaluate(teacher(), endless)
    with pytest.raises(ConfigError, match=r"kd.stream has no end"):
        kd.distill(net(), teacher(), DATA, batch_size=8, optimizer=SGD, validation=endless)


class InFile:
    """As a data set of h5py: rows in rising order, each once, and never all of them unasked."""

    def __init__(self, values: np.ndarray) -> None:
        self.shape, self.dtype, self._values, self.most = values.shape, values.dtype, values, 0

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        if (np.diff(rows) <= 0).any():
            raise TypeError("Indexing elements must be in increasing order")
        self.most = max(self.most, len(rows))
        return self._values[rows]

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("the whole data set is read")


def test_what_lies_in_a_file_is_read_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_jax.data.stream._LOOKED_AT", 3)
    x, y = InFile(X), InFile(Y.astype(np.int64))
    found = kd.stream(({"image": x}, y), batch_size=5, key=7)
    wanted = list(kd.batches(kd.Batch({"image": X}, Y), key=7, batch_size=5, epochs=3))
    assert_same(
        jax.tree.map(np.int32, [one.labels for one in batches(iter(found), 12)]), [one.labels for one in wanted]
    )
    assert_same([found[step].inputs for step in range(12)], [one.inputs for one in wanted])
    found.identity()
    assert x.most == y.most == 5
    np.testing.assert_array_equal(found.source.rows(np.array([3, 1, 3])).inputs["image"], X[[3, 1, 3]])
    with pytest.raises(DataError, match="values of type <U1: give numbers"):
        kd.stream((InFile(np.array(["a", "b"])), Y[:2]), batch_size=1)
    with pytest.raises(DataError, match="there are 24 examples and labels of 3"):
        kd.stream((x, InFile(Y[:3])), batch_size=1)


def test_a_data_set_of_h5py_stays_in_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = X
        with monkeypatch.context() as patched:
            patched.setattr(h5py.Dataset, "__array__", InFile.__array__)
            found = kd.stream((file["x"], Y), batch_size=5, key=7)
            assert_same(batches(iter(found), 8), list(kd.batches(DATA, key=7, batch_size=5, epochs=2)))


class Noisy:
    """A source that says something else each time."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> Any:
        return self.random.normal(size=X.shape[1:]).astype(np.float32), Y[row]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: kd.stream(DATA, batch_size=8, key=8), r"data.key is \[0, 8\], and the training in .* has \[0, 7\]"),
        (lambda: kd.stream((-X, Y), batch_size=8, key=7), "has another data.values"),
        (lambda: kd.stream(DATA, batch_size=6, key=7), "data.batches is 6, and the training in .* has 8"),
        (lambda: kd.stream(Noisy(), batch_size=8, key=7), "data.values is "),
    ],
)
def test_another_stream_is_not_resumed(other: Any, says: str, tmp_path: Path) -> None:
    how: dict[str, Any] = HOW | {"steps": 3, "epochs": 1, "checkpoint": tmp_path / "training"}
    kd.distill(net(), teacher(), kd.stream(DATA, batch_size=8, key=7), **how)
    with pytest.raises(MismatchError, match=says):
        kd.distill(net(), teacher(), other(), resume=True, **how)


def test_without_grain_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ConfigError, match=r"kd.stream needs grain: pip install 'kd-jax\[grain\]'"):
        kd.stream(DATA, batch_size=8)


def test_a_user_s_steps_go_before_those_of_an_epoch() -> None:
    found = kd.distill(net(), None, kd.stream(DATA, batch_size=8), steps=1, epochs=2, optimizer=SGD)
    assert int(found.state.step) == 2


LIMITED = """
import resource, sys
from pathlib import Path
import jax
import numpy as np
import optax
import kd_jax as kd

HEADROOM, WIDE, EXAMPLES = 32 * 2**20, 1024, 4 * 32 * 2**10
path = Path(sys.argv[1]) / "images.npy"
images = np.lib.format.open_memmap(path, "w+", np.uint8, (EXAMPLES, WIDE))
labels = (np.arange(EXAMPLES) % 4).astype(np.int32)
images[:, 0] = 50 * labels
images.flush()
del images
assert path.stat().st_size > 4 * HEADROOM

def scale(key, inputs, train):
    return inputs.astype(jax.numpy.float32) / 255

def train(count, teacher=kd.mlp([WIDE, 8, 4]).init(1)):
    data = np.load(path, mmap_mode="r")[:count], labels[:count]
    data = kd.stream(data, batch_size=128) if sys.argv[2] == "stream" else (np.array(data[0]), data[1])
    how = dict(batch_size=128) if sys.argv[2] != "stream" else {}
    # So wide that the temporary memory of all steps of an epoch would not fit.
    return kd.distill(kd.mlp([WIDE, 256, 4]), teacher, data, optimizer=optax.sgd(0.1), epochs=1, prepare=scale, **how)

train(4096)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + HEADROOM, resource.RLIM_INFINITY))
print(int(train(EXAMPLES).state.step))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("kind", ["stream", "memory"])
def test_four_times_the_memory_is_trained_on_within_it(kind: str, tmp_path: Path) -> None:
    """The process may allocate 32 MiB beyond what a few examples took; in memory the data does not fit."""
    own = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path), kind], capture_output=True, text=True, env=own)
    if kind == "stream":
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(done.stdout) == 4 * 32 * 2**10 // 128
    else:
        assert done.returncode != 0
        assert any(word in done.stderr for word in ("MemoryError", "RESOURCE_EXHAUSTED", "bad_alloc"))


@pytest.mark.parametrize("given", [kd.predict, kd.cached, kd.feature_names])
def test_what_has_no_end_is_no_input(given) -> None:
    streamed = kd.stream((np.zeros((8, 5), np.float32), np.zeros(8, np.int32)), batch_size=4)
    with pytest.raises(kd.DataError, match=r"the inputs are a Batches, which is iterated: give arrays, or a kd\.Batch"):
        given(kd.mlp([5, 3]).init(0), streamed)
    with pytest.raises(kd.DataError, match="a generator"):
        given(kd.mlp([5, 3]).init(0), (row for row in np.zeros((2, 5))))


@pytest.mark.parametrize("kept", ["memory", "disk"])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_teacher_who_was_asked_about_other_rows_is_refused(kept: str, mapped: bool, tmp_path: Path) -> None:
    """As in memory: each example would learn from the answer to another."""
    known = kd.cached(teacher(), X, **({"path": tmp_path / "answers"} if kept == "disk" else {}))
    inputs = X
    if mapped:
        np.save(tmp_path / "x.npy", X)
        inputs = np.load(tmp_path / "x.npy", mmap_mode="r")
    how: dict[str, Any] = {"epochs": 1, "optimizer": SGD}
    kd.distill(net(), known, kd.stream((inputs, Y), batch_size=8), **how)
    for wrong in (inputs[::-1], inputs + np.float32(1)):
        with pytest.raises(MismatchError, match="of other inputs, or of these in another order"):
            kd.distill(net(), known, kd.stream((wrong, Y), batch_size=8), **how)
    # Its own numbers say which rows are meant.
    named = kd.Batch(inputs[::-1], Y, indices=np.arange(len(X))[::-1].astype(np.int32))
    kd.distill(net(), known, kd.stream(named, batch_size=8), **how)


def test_files_and_arguments_that_are_not_its_own_are_one_sentence() -> None:
    with pytest.raises(DataError, match=r"the data is 'x.npy', a file by its name: open it, as kd.stream\(\(np.load"):
        kd.stream("x.npy", batch_size=8)
    with pytest.raises(ArgumentError, match=r"kd\.stream has no batchsize: did you mean batch_size\?"):
        kd.stream((X, Y), batchsize=8)  # type: ignore[call-arg]
