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
PATIENCE = 600


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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first processes leave, the others go on with."""
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(quick_compiling: None, folder: Path) -> Any:
    """Of 2 processes, which do all that no process is killed for."""
    names = ("memory", "parts", "refused", "unlike", "uneven", "damaged", "full")
    return Ended(2, folder, *names).found()


def same_in_both(found: Any, name: str) -> list[str]:
    """The sentences that both processes say."""
    first, second = (own[name] for own in found)
    assert first == second
    assert not any("\n" in sentence for sentence in first)
    return list(first)


def test_steps_are_those_of_one_process(found: Any) -> None:
    """The means of an epoch are in float32. All measure the same, and know the same best."""
    for own in (own["memory"] for own in found):
        assert own["state"] < ROUNDING
        assert max(own["loss"], own["evaluated"]) < 1e-7
        assert own["best"][0] == own["best"][1]
        assert own["told"] < 1e-6


def test_each_reads_its_own_part(found: Any) -> None:
    """With parameters over `model`, and moments over `data`."""
    for own in (own["parts"] for own in found):
        assert own["stream"] < ROUNDING
        assert own["iterator"] < ROUNDING
        assert own["loss"] < 1e-7


@pytest.mark.slow
def test_steps_of_four_processes_are_those_of_one(tmp_path: Path) -> None:
    """On 8 devices, each process with its own part of the rows."""
    found = Ended(4, tmp_path, "parts").found()
    assert len(found) == 4
    for own in (own["parts"] for own in found):
        assert max(own["stream"], own["iterator"]) < ROUNDING
        assert own["loss"] < 1e-7


def test_refusals_are_the_same_sentence_in_all(found: Any) -> None:
    words = (
        "already holds a training",
        "settings.epochs is 9",
        "this is one training",
        "a multiple of 4",
        "fit has a mesh of several processes, which kd.distill alone takes",
        "compare has a mesh of several processes, which kd.distill alone takes",
    )
    for said, word in zip(same_in_both(found, "refused"), words, strict=True):
        assert word in said


def test_a_process_that_was_given_something_else_is_told_in_all(found: Any) -> None:
    """Before anything is trained; what one alone raises, the others say, too."""
    words = (
        "ConfigError: settings.epochs is 2 in process 1, and 3 in process 0: give all processes of a training the same",
        "ConfigError: process 1 has another data than process 0: give",
        "ConfigError: process 1 has another optimizer than process 0: give",
        "ConfigError: checkpoint is None in process 1, and ",
    )
    both = [own["unlike"] for own in found]
    assert both[0][:4] == both[1][:4]
    for said, word in zip(both[0], words, strict=False):
        assert said.startswith(word)
    # The kind of the error, and its sentence.
    assert both[1][4].startswith("ConfigError: batch_size is 6, and the mesh has 4 devices along data")
    assert both[1][5].startswith("DataError: the data is a builtin_function_or_method")
    assert both[0][4:] == [said.replace("Error: ", "Error: process 1: ", 1) for said in both[1][4:]]


def test_batches_that_end_earlier_in_one_process_end_all(found: Any) -> None:
    """A list, an iterator with `steps=`, a smaller batch, and an iterator that fails."""
    first, second = (own["uneven"] for own in found)
    assert first[:3] == second[:3]
    assert first[0].startswith(
        "DataError: the batches of process 1 end after 3 of epoch 1, and process 0 has more: give"
    )
    assert first[1].startswith(
        "DataError: the batches of process 1 end after 5 of epoch 1, and process 0 has more: give"
    )
    assert first[2].startswith(
        "DataError: batch 3 of epoch 1 has inputs float64[1, 6], labels int32[1] in process 1, and "
    )
    assert first[3] == "RunError: process 1 ended with OSError: see what it says"
    assert second[3] == "own: the disk is gone"


@pytest.mark.parametrize("when", ["before", "amid"])
def test_a_disk_that_is_full_for_one_process_costs_no_checkpoint(when: str, found: Any) -> None:
    """A limit on its files stands for it, before Orbax begins, and while it writes; all can go on, to the same bits."""
    (first, kept, apart), (second, *_) = (own["full"][when] for own in found)
    assert second.startswith("CheckpointError: ")
    assert "000000008 cannot be written (" in second
    assert second.endswith("make room or give it back, and go on from the checkpoint before")
    assert first == second.replace("Error: ", "Error: process 1: ")
    assert kept == ["000000004"]
    assert apart == 0


def test_damage_to_a_file_of_one_process_costs_a_checkpoint_alone(found: Any) -> None:
    """All pass over it, and go on from the one before to the same bits; also where one process alone cannot read it."""
    for own in (own["damaged"] for own in found):
        for name, whom in (("a file", ""), ("read by one", " for process 1")):
            apart, epochs, warned = own[name]
            assert apart == 0
            assert epochs == [3]
            assert len(warned) == 1
            assert f"000000012 is damaged{whom} (" in warned[0]
            assert warned[0].endswith("it is passed over for the one before")
        said, untouched = own["none"]
        assert "no checkpoint of the training in" in said
        assert untouched
    assert found[0]["damaged"]["none"] == found[1]["damaged"]["none"]


GONE = (
    "kd_jax: process 0 of 2 has lost another process of this training: start all of them again, with resume=True "
    r"where checkpoint= was given( \(.+\))?\n"
)


def assert_one_is_lost(ended: Ended) -> None:
    assert ended.codes == [1, -9]
    assert ended.ends[0] - ended.ends[1] < 90
    assert re.fullmatch(GONE, ended.err[0])


def test_a_process_that_is_killed_amid_a_step_ends_the_others(tmp_path: Path) -> None:
    assert_one_is_lost(Ended(2, tmp_path, "lost"))


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_costs_that_checkpoint_alone(found: Any, folder: Path) -> None:
    """The last one, for which the others only wait. One without a mesh, and 4, go on from the one before."""
    assert_one_is_lost(Ended(2, folder, "killed"))
    kept = [path.name for path in (folder / "kept" / "checkpoints" / "training").iterdir()]
    assert sorted(name for name in kept if name.isdecimal()) == ["000000008", "000000012"]
    assert any(name.startswith(".partial") for name in kept)
    for count in (1, 4):
        for own in (own["resumed"] for own in Ended(count, folder, "resumed").found()):
            assert own["epochs"] == [4]
            assert own["apart"] < ROUNDING


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
