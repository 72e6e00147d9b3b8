"""Several processes train as one does, to rounding; `tests/processes.py` has the trainings, on 2 devices of each."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from small import DATA, HOW, net, teacher

import kd_jax as kd
from kd_jax.errors import ConfigError, RunError
from kd_jax.train import loop, processes

pytestmark = pytest.mark.usefixtures("quick_compiling")
ROOT = Path(__file__).parents[2]

# As on the devices of one process (tests/train/test_sharding.py).
ROUNDING = 1e-12
# Seconds: a machine may be busy with other things.
PATIENCE = 400


class Ended:
    """What processes that ran together left: of each its exit code, output, errors; and when each ended, in seconds."""

    def __init__(self, count: int, folder: Path, *names: str):
        folder.mkdir(exist_ok=True)
        own = {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        port, program = str(free_port()), str(ROOT / "tests" / "processes.py")
        files = [(folder / f"{number}.out", folder / f"{number}.err") for number in range(count)]
        running = []
        for number, (out, err) in enumerate(files):
            command = [sys.executable, program, str(count), str(number), port, str(folder), *names]
            with out.open("w") as stdout, err.open("w") as stderr:
                running.append(subprocess.Popen(command, stdout=stdout, stderr=stderr, env=os.environ | own))
        self.ends: dict[int, float] = {}
        try:
            last = time.monotonic() + PATIENCE
            while len(self.ends) < count and time.monotonic() < last:
                for number, process in enumerate(running):
                    if number not in self.ends and process.poll() is not None:
                        self.ends[number] = time.monotonic()
                time.sleep(0.05)
        finally:
            for process in running:
                process.kill()
                process.wait()
        self.codes = [process.returncode for process in running]
        self.out, self.err = ([path.read_text() for path in some] for some in zip(*files, strict=True))

    def found(self) -> list[dict[str, Any]]:
        """What each printed."""
        assert set(self.codes) == {0}, (self.codes, *(text[-3000:] for text in self.err))
        return [json.loads(text.splitlines()[-1]) for text in self.out]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def found(quick_compiling: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of 2 processes; 4 go on with what 2 have left, below."""
    return Ended(2, tmp_path_factory.mktemp("processes"), "memory", "parts", "told", "refused").found()


def test_steps_are_those_of_one_process(found: Any) -> None:
    """Over `data` alone, and with parameters over `model` and moments over `data`."""
    for own in found:
        assert all(value < ROUNDING for name, value in own["memory"].items() if "loss" not in name), own["memory"]
        # The means of an epoch are in float32.
        assert all(value < 1e-7 for value in own["memory"].values())


def test_each_reads_its_own_part(found: Any) -> None:
    for own in found:
        assert own["parts"]["stream"] < ROUNDING
        assert own["parts"]["iterator"] < ROUNDING


def test_all_measure_the_same(found: Any) -> None:
    for own in (own["told"] for own in found):
        assert own["best"][0] == own["best"][1]
        assert own["apart"] < 1e-6


def test_refusals_are_the_same_sentence_in_all(found: Any) -> None:
    several = [own["refused"] for own in found]
    words = (
        "already holds a training",
        "settings.epochs is 9",
        "this is one training",
        "a multiple of 4",
        "which kd.distill alone takes",
    )
    for said, word in zip(several[0], words, strict=True):
        assert word in said
        assert "\n" not in said
    assert all(one == several[0] for one in several)


def test_a_process_that_is_killed_ends_the_others_and_any_number_goes_on(tmp_path: Path) -> None:
    """With one sentence, soon; 4 processes, and one, go on from what 2 have left."""
    ended = Ended(2, tmp_path, "killed")
    assert ended.codes[1] == -9
    assert ended.ends[0] - ended.ends[1] < 90
    assert ended.codes[0] == 1
    assert re.fullmatch(
        "kd_jax: process 0 of 2 has lost another process of this training: start all of them again, with resume=True "
        r"where checkpoint= was given( \(.+\))?\n",
        ended.err[0],
    )
    for count in (4, 1):
        for own in Ended(count, tmp_path, "resumed").found():
            assert all(value < ROUNDING for value in own["resumed"].values()), own


class Device:
    def __init__(self, process: int):
        self.process_index = process


class Places(Mesh):
    """A mesh of devices that are not there."""

    devices: Any = None
    axis_names: Any = ("data", "model")


def of_processes(*rows: tuple[int, ...]) -> Mesh:
    mesh = object.__new__(Places)
    object.__setattr__(mesh, "devices", np.array([[Device(process) for process in row] for row in rows], object))
    return mesh


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (((0, 0), (0, 0), (1, 1), (1, 1)), (0, 2)),
        (((1, 1), (1, 1), (0, 0), (0, 0)), (1, 2)),
        # Processes beside each other along model read the same part.
        (((0, 1), (0, 1), (2, 3), (2, 3)), (0, 2)),
        (((0, 1), (0, 1)), (0, 1)),
    ],
)
def test_the_part_of_a_process_is_where_its_devices_are(rows: Any, part: tuple[int, int]) -> None:
    assert processes.part_of.__wrapped__(of_processes(*rows), "data") == part


@pytest.mark.parametrize("rows", [((0,), (1,), (0,), (1,)), ((0,), (0,), (0,), (1,))])
def test_parts_that_lie_apart_are_refused(rows: Any) -> None:
    with pytest.raises(ConfigError, match=r"are at the places .* of the axis data: each process needs as many"):
        processes.part_of.__wrapped__(of_processes(*rows), "data")


def test_a_mesh_without_a_device_of_this_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(ConfigError, match=r"no device of process 1: give a mesh of jax.devices\(\)"):
        kd.distill(net(), teacher(), DATA, mesh=Mesh(np.array(jax.devices()[:1]), ("data",)), **HOW)


def test_the_best_epoch_is_that_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other devices may round otherwise."""
    how = {**HOW, "validation": DATA, "best": "nll", "epochs": 2}
    assert kd.distill(net(), teacher(), DATA, **how).best_epoch is not None
    monkeypatch.setattr(loop, "agreed", lambda own, shared: False)
    assert kd.distill(net(), teacher(), DATA, **how).best_epoch is None


@pytest.mark.parametrize("error", [PermissionError("no"), KeyboardInterrupt(), UserWarning("odd")])
def test_whatever_ends_the_first_process_is_told_to_those_that_wait(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(processes, "told", lambda sentence, shared: said.append(sentence) or sentence)

    def work() -> str:
        raise error

    with pytest.raises(type(error)):
        processes.by_first(work, True)
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "told", lambda sentence, shared: said[0])
    with pytest.raises(RunError, match=f"process 0 ended with {type(error).__name__}"):
        processes.by_first(work, True)
