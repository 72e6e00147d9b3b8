import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kd_jax.errors import CheckpointError, MismatchError
from kd_jax.train import checkpoint
from kd_jax.train.checkpoint import Store

ARRAYS = {
    "params.0.kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "step": np.int32(7),
}


def store_with(folder: Path, *steps: int, warnings: list[str] | None = None) -> Store:
    folder.mkdir(exist_ok=True)
    store = Store(folder, warn=(warnings if warnings is not None else []).append)
    store.start({"config": {"epochs": 2}})
    for step in steps:
        store.save("teacher", step, {**ARRAYS, "step": np.int32(step)}, {"train_s": step / 3})
    store.wait()
    return store


def place(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / "teacher" / f"{step:09d}"


def test_what_is_saved_is_read_bit_for_bit(tmp_path: Path) -> None:
    store_with(tmp_path, 7)
    found = Store(tmp_path).newest("teacher")
    assert found is not None
    assert found.step == 7
    assert found.facts["train_s"] == 7 / 3
    assert found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()


def test_a_later_change_of_an_array_does_not_reach_the_checkpoint(tmp_path: Path) -> None:
    store, array = store_with(tmp_path), np.ones(1000)
    store.save("teacher", 1, {"a": array}, {})
    array[:] = 2
    store.wait()
    found = store.newest("teacher")
    assert found is not None
    assert (found.arrays["a"] == 1).all()


def test_the_newest_and_the_one_before_are_kept(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2, 30, 400)
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "teacher").iterdir()) == ["000000030", "000000400"]


def test_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    store_with(tmp_path, 1)
    check = ["sha256sum", "--check", "--strict", "--quiet", "sha256.txt"]
    if shutil.which(check[0]) is None:
        pytest.skip("there is no sha256sum")
    assert subprocess.run(check, cwd=place(tmp_path, 1), check=False).returncode == 0


def files_of(folder: Path, step: int) -> list[str]:
    return sorted(p.relative_to(place(folder, step)).as_posix() for p in place(folder, step).rglob("*") if p.is_file())


@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "remove", "add"])
def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, damage: str) -> None:
    store_with(tmp_path / "good", 1, 2)
    for number, name in enumerate(files_of(tmp_path / "good", 2)):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        path = place(folder, 2) / name
        content = path.read_bytes()
        if damage == "truncate":
            if not content:
                continue
            path.write_bytes(content[:-1])
        elif damage == "flip a bit":
            if not content:
                continue
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        elif damage == "remove":
            path.unlink()
        else:
            (path.parent / "more").write_bytes(b"x")
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        warnings: list[str] = []
        found = Store(folder, warn=warnings.append).newest("teacher")
        assert found is not None
        assert found.step == 1
        assert len(warnings) == 1
        assert str(place(folder, 2)) in warnings[0]
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_where_none_is_good_nothing_is_touched(tmp_path: Path) -> None:
    store_with(tmp_path, 1, 2)
    for step in (1, 2):
        (place(tmp_path, step) / "sha256.txt").unlink()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"no checkpoint of the teacher in .* is good"):
        Store(tmp_path).newest("teacher")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_written_again(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1, 2)
    (place(tmp_path, 2) / "sha256.txt").write_text("")
    store.save("teacher", 2, ARRAYS, {})
    store.wait()
    found = Store(tmp_path).newest("teacher")
    assert found is not None
    assert found.step == 2


def test_what_was_being_written_when_the_process_died_is_no_checkpoint(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    shutil.copytree(place(tmp_path, 1), place(tmp_path, 1).with_name(".partial"))
    found = Store(tmp_path).newest("teacher")
    assert found is not None
    assert found.step == 1
    store.save("teacher", 2, ARRAYS, {})
    store.wait()
    assert not list((tmp_path / "checkpoints" / "teacher").glob(".*"))


def test_a_checkpoint_of_another_run_is_not_used(tmp_path: Path) -> None:
    store_with(tmp_path / "one", 1)
    other = Store(tmp_path / "two")
    (tmp_path / "two").mkdir()
    other.start({"config": {"epochs": 3}})
    shutil.copytree(tmp_path / "one" / "checkpoints", tmp_path / "two" / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Store(tmp_path / "two").newest("teacher")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff", b'{"sha256": "x", "format": 1}'])
def test_a_damaged_description_of_the_run_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    store_with(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        Store(tmp_path).identity()


def test_a_changed_description_of_the_run_is_damage(tmp_path: Path) -> None:
    store_with(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"epochs": 2', '"epochs": 3'))
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        Store(tmp_path).identity()


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FORMAT", 99)
    store_with(tmp_path)
    monkeypatch.undo()
    with pytest.raises(MismatchError, match="has format 99"):
        Store(tmp_path).identity()


def test_a_folder_that_takes_no_more_leaves_the_last_checkpoint_intact(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; the next process still reads."""
    program = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from kd_jax.errors import CheckpointError
from kd_jax.train.checkpoint import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]))
store.start({})
store.save("teacher", 1, {"a": np.random.default_rng(0).bytes(1000).__len__() * np.ones(3)}, {})
store.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
store.save("teacher", 2, {"a": np.random.default_rng(0).normal(size=100_000)}, {})
try:
    store.wait()
except CheckpointError as error:
    print(error)
store.close()
"""
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert found.stdout.count("\n") == 1
    assert "000000002 cannot be written (" in found.stdout
    assert "go on from the checkpoint before" in found.stdout
    last = Store(tmp_path).newest("teacher")
    assert last is not None
    assert last.step == 1
    assert len(list((tmp_path / "checkpoints" / "teacher").iterdir())) == 1


def test_a_folder_that_vanished_is_one_sentence(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    store.save("teacher", 2, ARRAYS, {})
    with pytest.raises(CheckpointError, match=r"cannot be written .* run it again$"):
        store.wait()


def test_the_remedy_is_to_go_on_only_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    for step, remedy in [(1, "run it again"), (2, "go on from the checkpoint before")]:
        store = store_with(tmp_path / str(step), *range(1, step))
        place(tmp_path / str(step), step).parent.mkdir(parents=True, exist_ok=True)
        # In the way of what tests whether there is room.
        (place(tmp_path / str(step), step).parent / ".partial-room").mkdir()
        store._remove_unfinished = lambda stage: None  # type: ignore[method-assign]
        store.save("teacher", step, ARRAYS, {})
        with pytest.raises(CheckpointError, match=f"cannot be written .* and {remedy}$"):
            store.wait()


def test_a_folder_is_for_one_process(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from kd_jax.train import checkpoint; "
        "checkpoint.lock(pathlib.Path(sys.argv[1])).__enter__()"
    )
    with checkpoint.lock(tmp_path):
        found = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
        )
    assert "another process is running in" in found.stderr
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_the_description_tells_the_run(tmp_path: Path) -> None:
    store_with(tmp_path)
    assert Store(tmp_path).identity() == {"config": {"epochs": 2}}
    assert json.loads((tmp_path / "run.json").read_text())["run"] == {"config": {"epochs": 2}}
    assert not Store(tmp_path).finished
    Store(tmp_path).finish()
    assert Store(tmp_path).finished
    assert Store(tmp_path).identity() == {"config": {"epochs": 2}}


def test_checkpoints_that_nothing_describes_are_not_forgotten(tmp_path: Path) -> None:
    store_with(tmp_path, 1)
    (tmp_path / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run\.json is gone"):
        Store(tmp_path).require_description()


def test_what_others_keep_beside_checkpoints_stays(tmp_path: Path) -> None:
    """Also under names that look like steps."""
    store, own = store_with(tmp_path, 1), tmp_path / "checkpoints" / "my_resnet" / "100" / "weights.bin"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    store.discard()
    assert [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()] == [own]
    with pytest.raises(CheckpointError, match=r"run\.json is gone, and .*checkpoints is not empty"):
        Store(tmp_path).start({})
    Store(tmp_path).start({}, overwrite=True)
    Store(tmp_path).tidy(made=True)
    assert own.read_bytes() == b"mine"
    (tmp_path / "run.json").write_text("[somebody else's]")
    assert not Store(tmp_path).empty


def test_a_folder_without_its_description_takes_no_checkpoint(tmp_path: Path) -> None:
    store = store_with(tmp_path, 1)
    shutil.rmtree(tmp_path)
    store.save("teacher", 2, ARRAYS, {})
    for _ in range(2):
        with pytest.raises(CheckpointError, match="cannot be written"):
            store.wait()
    assert "cannot be written" in str(store.close())
    assert not tmp_path.exists()


@pytest.mark.parametrize(("stage", "step"), [("teacher", 2), ("student", 1)])
def test_a_checkpoint_in_another_place_is_damaged(tmp_path: Path, stage: str, step: int) -> None:
    store_with(tmp_path, 1)
    shutil.copytree(place(tmp_path, 1), tmp_path / "checkpoints" / stage / f"{step:09d}")
    warnings: list[str] = []
    store = Store(tmp_path, warn=warnings.append)
    if stage == "teacher":
        found = store.newest(stage)
        assert found is not None
        assert found.step == 1
    else:
        with pytest.raises(CheckpointError):
            store.newest(stage)
    assert "another run, phase or step" in warnings[0]


def test_a_damaged_later_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path: Path) -> None:
    store = store_with(tmp_path, 60, 90)
    (place(tmp_path, 90) / "sha256.txt").unlink()
    store.save("teacher", 70, ARRAYS, {})
    store.save("teacher", 80, ARRAYS, {})
    store.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "teacher").iterdir()) == ["000000070", "000000080"]


def test_a_store_tells_that_it_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(Store, "_write", lambda *arguments: go_on.wait(60))
    store = Store(tmp_path)
    store.start({})
    assert not store.writing
    store.save("teacher", 1, {}, {})
    assert store.writing
    go_on.set()
    store.wait()
    assert not store.writing
