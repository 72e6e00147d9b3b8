"""Callbacks that write into logs: one log for each training."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

import kd_jax as kd
from kd_jax.train.callbacks import Epoch, Log


def epoch(number: int, epochs: int = 2) -> Epoch:
    return Epoch(number, epochs, number, 0.1, {"loss": float(number)}, lambda: None, {})


class Writer:
    """As of tensorboardX."""

    every: list["Writer"]

    def __init__(self, folder: str) -> None:
        self.folder, self.steps, self.closed = folder, [], False
        self.every.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not self.closed
        self.steps.append(step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[Writer]:
    found: list[Writer] = []
    kind = type("Own", (Writer,), {"every": found})
    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=kind))
    return found


def test_each_training_has_a_folder_of_its_own(writers: list[Writer]) -> None:
    log: Any = kd.callbacks.tensorboard("board")
    for number in (1, 2, 1, 1, 2, 3):
        log(epoch(number, 9))
    assert [one.folder for one in writers] == ["board", str(Path("board") / "2"), str(Path("board") / "3")]
    assert [one.steps for one in writers] == [[1, 2], [1], [1, 2, 3]]
    assert [one.closed for one in writers] == [True, True, False]
    log.end()
    assert writers[-1].closed
    # A resumed training goes on in the same folder.
    log(epoch(4, 9))
    assert writers[-1].folder == writers[-2].folder


@pytest.mark.usefixtures("quick_compiling")
def test_a_training_that_ends_early_closes_its_log(writers: list[Writer]) -> None:
    from small import DATA, HOW, net

    def stop(_: Any) -> bool:
        return True

    kd.distill(net(), None, DATA, callbacks=[kd.callbacks.tensorboard("board"), stop], **HOW | {"epochs": 3})
    assert [(one.closed, set(one.steps)) for one in writers] == [(True, {1})]


def test_each_training_has_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    def init(**options: Any) -> Any:
        said.append(options)
        return types.SimpleNamespace(
            log=lambda metrics, step: said.append((metrics["loss"], step)), finish=lambda: said.append("finish")
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = kd.callbacks.wandb(project="mine", id="a")
    for number in (1, 2, 1):
        log(epoch(number))
    assert isinstance(log, Log)
    # What the user logs after the training goes to its run.
    log.end()
    first, second = {"project": "mine", "id": "a"}, {"project": "mine", "id": "a-2"}
    assert said == [first, (1.0, 1), (2.0, 2), "finish", second, (1.0, 1)]
