"""A cached teacher is asked by the indices of the data, in memory as from an iterator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError, MismatchError
from kd_jax.teachers import disk
from kd_jax.train import caching
from kd_jax.train.lookup import of_batch

pytestmark = pytest.mark.usefixtures("quick_compiling")
RNG = np.random.default_rng(5)
X, W = RNG.normal(size=(24, 6)).astype(np.float32), RNG.normal(size=(6, 5)).astype(np.float32)
TEACHER = kd.from_function(lambda params, x: x @ params["w"], {"w": W})
SHUFFLED = RNG.permutation(24).astype(np.int32)
# The student is the teacher: where he is asked for the right rows nothing is left to learn.
HOW: dict[str, Any] = {"method": kd.KD(alpha=0.0), "optimizer": optax.sgd(0.1), "epochs": 2}


def on_disk(folder: Path) -> Any:
    return kd.cached(TEACHER, X, path=folder / "cache", shard_size=5)


def in_memory(folder: Path) -> Any:
    return kd.cached(TEACHER, X)


def several(folder: Path) -> Any:
    return [in_memory(folder), on_disk(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [in_memory, on_disk, several])
def test_data_in_memory_finds_its_rows(
    make: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caching, "_SHARE", 0)
    monkeypatch.setattr(disk, "_PART", 200)
    known, some = make(tmp_path), SHUFFLED[:16]
    for rows in (SHUFFLED, some):
        data = kd.Batch(X[rows], indices=rows)
        loss = kd.distill(TEACHER, known, data, batch_size=8, **HOW).history["loss"]
        np.testing.assert_allclose(loss, 0, atol=1e-6)
        _, history = kd.fit(0, data, TEACHER, teacher=known, batch_size=8, **HOW)
        np.testing.assert_allclose(history["loss"], 0, atol=1e-6)
        assert kd.evaluate(TEACHER, data, teacher=known)["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    if make is in_memory:
        free = known.in_memory()
        wrong = kd.distill(TEACHER, free, kd.Batch(X[SHUFFLED]), batch_size=8, **HOW)
        assert wrong.history["loss"][0] > 0.1


@pytest.mark.slow
def test_a_comparison_finds_its_rows_and_asks_a_live_teacher_once() -> None:
    """Answers that are computed in the data's order stay in it."""
    data = kd.Batch(X[SHUFFLED[:16]], (X @ W)[SHUFFLED[:16]].argmax(-1), indices=SHUFFLED[:16])
    how = {
        "methods": {"kd": kd.KD(alpha=0.0)},
        "seeds": 1,
        "epochs": 1,
        "batch_size": 8,
        "test": data,
        "measure": "nll",
        "optimizer": HOW["optimizer"],
    }
    trained = [
        kd.compare(kd.mlp([6, 5]), known, data, progress=False, **how) for known in (TEACHER, kd.cached(TEACHER, X))
    ]
    fitted = kd.distill(TEACHER, lambda x: x @ W, data, batch_size=8, validation=data, **HOW)
    np.testing.assert_allclose(fitted.history["validation_kl_to_teacher"], 0, atol=1e-6)
    loss, other = (one.history["kd"]["loss"] for one in trained)
    np.testing.assert_allclose(loss, other, rtol=1e-4)


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        (np.arange(24) + 1, "a batch has the index 24, and the teacher knows 24 examples"),
        (np.zeros((24, 6, 2), np.int32), r"the teacher has answers of \[\] positions: give indices \[examples\]"),
        (X[:, 0], r"the indices are float32 \[24\]: give whole numbers"),
    ],
)
def test_what_he_does_not_know_is_refused(indices: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        kd.distill(TEACHER, kd.cached(TEACHER, X), kd.Batch(X, indices=indices), batch_size=8, **HOW)


@pytest.mark.parametrize("wrong", [3, -1])
def test_positions_are_bounded_in_memory_too(wrong: int) -> None:
    known = kd.cached(RNG.normal(size=(4, 3, 5)).astype(np.float32))
    indices = np.array([[[0, 0], [0, 2], [1, wrong]]])
    batch = kd.Batch(np.zeros((1, 3), np.int32), indices=indices)
    with pytest.raises(DataError, match=f"a position is {wrong}, and the teacher has 0 to 2 of each example"):
        of_batch(known, batch)
    found: Any = of_batch(known, batch._replace(weights=np.array([[1, 1, 0]])))
    np.testing.assert_array_equal(found.output.logits[0, 1], known.output.logits[0, 2])


def test_a_stream_numbers_its_rows_for_him(tmp_path: Path) -> None:
    pytest.importorskip("grain")
    for known in (in_memory(tmp_path), on_disk(tmp_path)):
        data = kd.stream(kd.Batch(X), batch_size=8)
        np.testing.assert_allclose(kd.distill(TEACHER, known, data, **HOW).history["loss"], 0, atol=1e-6)
    with pytest.raises(ConfigError, match="there are 16 examples and the teacher's outputs of 24"):
        kd.distill(TEACHER, known, kd.stream(kd.Batch(X[:16]), batch_size=8), **HOW)
    numbered = kd.stream(kd.Batch(X[SHUFFLED], indices=SHUFFLED), batch_size=8)
    np.testing.assert_allclose(kd.distill(TEACHER, known, numbered, **HOW).history["loss"], 0, atol=1e-6)


def test_shuffled_inputs_are_still_those_of_the_cache(tmp_path: Path) -> None:
    known, data = on_disk(tmp_path), kd.Batch(X[SHUFFLED] + 1, indices=SHUFFLED)
    with pytest.raises(MismatchError, match="is of other inputs"):
        kd.distill(TEACHER, known, data, batch_size=8, **HOW)


def test_processes_agree_whether_what_is_on_disk_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one says so, whatever memory another has."""
    known = on_disk(tmp_path)
    monkeypatch.setattr(caching, "is_shared", lambda mesh: True)
    monkeypatch.setattr(caching, "replicated", lambda mesh, teacher: teacher)
    for first in (True, False):
        monkeypatch.setattr(caching, "agreed", lambda own, shared, first=first: first)
        mesh = jax.make_mesh((1,), ("data",))
        found = caching.kept_teacher(known, kd.KD(), kd.Batch(jnp.asarray(X)), None, 2, mesh=mesh, asked=known)
        assert isinstance(found, disk.DiskTeacher) == (not first)
