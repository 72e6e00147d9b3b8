"""A store of several processes, of which the other one is only what it says; real ones: test_processes.py."""

import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import CheckpointError
from kd_jax.train import checkpoint_files, checkpoint_shared
from kd_jax.train.checkpoint_shared import SharedStore
from kd_jax.train.exchange import Exchange

ARRAYS = {"a": jnp.arange(4.0), "b": np.ones(2)}


class Others(Exchange):
    """What another process says at each place; nothing behind these."""

    def __init__(self, *said: str):
        self.left = list(said)

    def __call__(self, own: str = "", patience: float = 0.0) -> dict[int, str]:
        other = self.left.pop(0) if self.left else ""
        return {process: text for process, text in enumerate((own, other)) if text}

    def said(self) -> dict[int, str]:
        return {1: self.left[0]} if self.left and self.left[0] else {}


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def open_(*said: str) -> SharedStore:
        warned.clear()
        monkeypatch.setattr(checkpoint_shared, "exchange", lambda name: Others(*said))
        monkeypatch.setattr(checkpoint_shared, "end_service_with_program", lambda: ended.append(True))
        store = SharedStore(tmp_path, warn=warned.append)
        if not store.started:
            store.start({})
        return store

    warned: list[str] = []
    ended: list[bool] = []
    open_.warned, open_.ended = warned, ended  # type: ignore[attr-defined]
    return open_


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints" / "training").iterdir())


def test_what_all_wrote_is_read_by_all(opened: Any, tmp_path: Path) -> None:
    store = opened()
    for step in (1, 2, 3):
        store.save("training", step, ARRAYS, {"epoch": step})
    store.wait()
    assert names(tmp_path) == ["000000002", "000000003"]
    found = opened().newest("training")
    assert (found.step, found.facts["epoch"]) == (3, 3)
    np.testing.assert_array_equal(found.arrays["a"], np.arange(4.0))
    assert opened().newest("other") is None


def test_another_process_without_room_ends_all_before_anything_is_written(opened: Any, tmp_path: Path) -> None:
    store = opened("", "", "!CheckpointError!it cannot be written")
    store.save("training", 1, ARRAYS, {})
    with pytest.raises(CheckpointError, match=r"^process 1: it cannot be written$"):
        store.save("training", 2, ARRAYS, {})
    assert names(tmp_path) == ["000000001"]


def test_another_process_that_fails_amid_writing_is_not_waited_for(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orbax would wait for it for 20 minutes."""
    store, never = opened("", "", "", "!CheckpointError!it cannot be written"), threading.Event()
    store.save("training", 1, ARRAYS, {})
    store.wait()
    begin = checkpoint_files.begin_by_all

    def waiting(*given: Any) -> Any:
        begin(*given)()
        return lambda: never.wait(60)

    monkeypatch.setattr(checkpoint_files, "begin_by_all", waiting)
    store.save("training", 2, ARRAYS, {})
    with pytest.raises(CheckpointError, match=r"^process 1: it cannot be written$"):
        store.wait()
    assert not never.is_set()
    assert opened.ended == [True]
    assert names(tmp_path) == ["000000001"]
    never.set()


def test_what_another_process_cannot_read_is_passed_over(opened: Any) -> None:
    store = opened()
    for step in (1, 2):
        store.save("training", step, ARRAYS, {})
    store.wait()
    # Of its files, and of what Orbax finds in them.
    for said in (["its disk is gone"], ["", "its disk is gone"]):
        store = opened(*said)
        assert store.newest("training").step == 1
        assert len(opened.warned) == 1
        assert "000000002 is damaged (its disk is gone): it is passed over for the one before" in opened.warned[0]
    store = opened("a", "b")
    with pytest.raises(CheckpointError, match=r"no checkpoint of the training in .* is good"):
        store.newest("training")


def test_each_process_needs_room_for_its_own_pieces() -> None:
    assert checkpoint_shared._bytes_here(jnp.zeros((4, 3), jnp.float32)) == 48
    assert checkpoint_shared._bytes_here(np.zeros(9)) == 0
