"""`python -m kd_jax.run` that is stopped, damaged, refused and resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import kills
from kd_jax import run
from kd_jax.data.dataset import Dataset
from kd_jax.errors import MismatchError, RunError
from kd_jax.experiments.shell import environment, progress, resume
from kd_jax.experiments.shell.folder import RESULTS
from kd_jax.train import checkpoint
from kd_jax.train.checkpoint import Store

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compiling", "without_plots")

OPTIONS = ["--teacher-hidden", "16", "--student-hidden", "4", "--epochs", "3", "--batch-size", "8"]
OPTIONS += ["--learning-rate", "0.01", "--seeds", "2", "--quiet"]


@pytest.fixture
def source(tmp_path: Path, small_dataset: Dataset) -> str:
    return write(tmp_path / "small.npz", small_dataset)


def write(path: Path, dataset: Dataset) -> str:
    arrays = {"x_train": dataset.train_images, "y_train": dataset.train_labels}
    np.savez(path, x_test=dataset.test_images, y_test=dataset.test_labels, **arrays)
    return f"npz:{path}"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == code
    assert error.splitlines()[-1].startswith("kd_jax: ")
    return error


def unfinish(out: Path) -> None:
    """As if the run had been killed before it left its results."""
    store = checkpoint.Store(out)
    store._describe(store._description() | {"finished": False})
    (out / RESULTS).unlink()


def stopped(arguments: list[str], number: signal.Signals, at: str = "epoch 1/") -> tuple[int, str]:
    """Exit code and stderr of a run that is sent a signal when it has printed a line with `at`."""
    # A shell that runs the tests in the background has its children ignore Ctrl-C, from birth.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heed}; from kd_jax import run; run.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, *(a for a in arguments if a != "--quiet")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if at in line:
                    process.send_signal(number)
                    break
            _, error = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, error


@pytest.fixture
def half_done(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that failed after an epoch of the teacher."""
    out = tmp_path / "half"

    def no_more(*arguments: object, **more: object) -> None:
        raise RunError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(progress.Silent, "advance", no_more)
        with pytest.raises(SystemExit):
            run.main(["--dataset", source, *OPTIONS, "--checkpoint-steps", "1", "--out", str(out)])
    assert len(list(out.glob("checkpoints/teacher/*"))) == 1
    return out


@pytest.mark.slow
def test_kills_cost_nothing_but_time(source: str, tmp_path: Path) -> None:
    """SIGKILL, twice while a checkpoint is written; dropout, two seeds.

    `benchmarks.kills` does it many times, in the programs that users compile. A checkpoint that was being written may
    be there before the signal is.
    """
    options = ["--dataset", source, *OPTIONS[:-1], "--epochs", "12", "--checkpoint-steps", "7"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kills.finish(whole, options)
    rng, places = random.Random(1), list[str]()
    while sum(place.startswith("writing") for place in places) < 2:
        place = kills.kill_once(killed, options, writing=True, longest_s=5, rng=rng)
        assert place is not None, f"the run ended before a checkpoint was met twice: {places}"
        places.append(place)
    kills.kill_once(killed, options, writing=False, longest_s=5, rng=rng)
    kills.finish(killed, options)
    assert kills.differences(whole, killed) == []
    assert len(kills.differences(whole, whole)) == 0
    (killed / "parameters" / "student-seed42.safetensors").write_bytes(b"")
    assert kills.differences(whole, killed) == ["student-seed42.safetensors"]


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signals_write_a_checkpoint_and_say_how_to_go_on(
    source: str, tmp_path: Path, number: signal.Signals, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a folder"
    arguments = ["--dataset", source, *OPTIONS, "--epochs", "2000", "--out", str(out)]
    code, error = stopped(arguments, number)
    assert code == 128 + number
    assert error == f"kd_jax: {word}: go on with python -m kd_jax.run --out '{out}' --resume\n"
    assert len(list(out.glob("checkpoints/teacher/0*"))) == 2
    assert not (out / RESULTS).exists()
    assert "--epochs is 3, and the run in" in refused([*arguments, "--epochs", "3", "--resume"], capsys, code=2)


def test_a_signal_before_anything_is_trained_leaves_nothing(source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, error = stopped(["--dataset", source, *OPTIONS, "--out", str(out)], signal.SIGTERM, at="Compiling")
    assert code == 143
    assert error == "kd_jax: terminated: there are no results, so run it again\n"
    assert not out.exists()


def test_a_stopped_run_is_resumed_with_its_own_options(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["--dataset", source, *OPTIONS, "--epochs", "10", "--checkpoint-steps", "30"]
    run.main([*arguments, "--out", str(whole)])
    code, _ = stopped([*arguments, "--out", str(out)], signal.SIGINT)
    assert code == 130
    assert "holds a run that was stopped: add --resume" in refused([*arguments, "--out", str(out)], capsys, code=2)
    run.main(["--out", str(out), "--resume"])
    assert "of 300 steps from a checkpoint" in capsys.readouterr().out
    assert kills.differences(whole, out) == []
    run.main(["--out", str(out), "--resume"])
    assert "is finished" in capsys.readouterr().out


def test_resume_starts_where_there_is_nothing_yet(source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.main(["--dataset", source, *OPTIONS, "--epochs", "1", "--out", str(out), "--resume"])
    assert (out / RESULTS).exists()


def test_overwriting_forgets_the_run_before(source: str, half_done: Path) -> None:
    arguments = ["--dataset", source, *OPTIONS, "--epochs", "1", "--out", str(half_done), "--overwrite"]
    run.main(arguments)
    found = json.loads((half_done / RESULTS).read_text())
    assert found["config"]["epochs"] == 1
    assert sorted(path.name for path in half_done.glob("checkpoints/teacher/*")) == ["000000030"]


@pytest.mark.slow
def test_results_of_an_older_run_are_not_taken_for_those_of_a_run_that_was_stopped(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--dataset", source, *OPTIONS, "--out", str(out)]
    run.main([*arguments, "--epochs", "1"])
    code, _ = stopped([*arguments, "--epochs", "2000", "--overwrite"], signal.SIGINT)
    assert code == 130
    assert (out / RESULTS).exists()
    assert "holds a run that was stopped" in refused([*arguments, "--epochs", "2000"], capsys, code=2)
    assert not checkpoint.Store(out).finished


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    for folder in (whole, out):
        run.main(["--dataset", source, *OPTIONS, "--out", str(folder)])
    unfinish(out)
    # The first and the last epoch's: there are no ten seconds between them.
    assert [path.name for path in sorted(out.glob("checkpoints/student/*"))] == ["000000030", "000000090"]
    damaged = out / "checkpoints" / "student" / "000000090"
    (damaged / "state" / "manifest.ocdbt").unlink()
    capsys.readouterr()
    run.main(["--out", str(out), "--resume", "--quiet"])
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"checkpoint {damaged} is damaged (state/manifest.ocdbt" in warning
    assert kills.differences(whole, out) == []


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_without_a_good_checkpoint_nothing_is_touched(
    source: str, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run.main(["--dataset", source, *OPTIONS, "--out", str(out)])
    unfinish(out)
    for path in out.glob(f"checkpoints/{stage}/*/sha256.txt"):
        path.write_bytes(path.read_bytes()[1:])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error = refused(["--out", str(out), "--resume", "--quiet"], capsys, code=1)
    assert f"no checkpoint of the {stage} in" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_other_options_are_refused(half_done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, value, saved in [
        ("--alpha", "0.25", "--alpha is 0.25, and the run in {} has 0.5"),
        ("--teacher-hidden", "17", "--teacher-hidden is 17, and the run in {} has 16"),
        ("--checkpoint-steps", "5", "--checkpoint-steps is 5, and the run in {} has 1"),
    ]:
        error = refused(["--out", str(half_done), "--resume", option, value], capsys, code=2)
        assert saved.format(half_done) in error


def test_other_data_are_refused(
    source: str, half_done: Path, small_dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    images = small_dataset.train_images.copy()
    images[3, 0, 0, 0] ^= 1
    write(Path(source.removeprefix("npz:")), small_dataset._replace(train_images=images))
    error = refused(["--out", str(half_done), "--resume"], capsys, code=2)
    assert "has the digest" in error
    assert list(half_done.glob("checkpoints/teacher/0*"))


def test_other_versions_and_devices_are_refused(
    half_done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = environment.describe()
    for other, says in [
        ({"packages": now["packages"] | {"jax": "99.0"}}, "jax is 99.0, and the run in {} has " + jax.__version__),
        ({"backend": "tpu"}, "backend is tpu, and the run in {} has cpu"),
        ({"devices": ["TPU v5"]}, "devices is TPU v5, and the run in {} has cpu"),
        ({"cpus": 1000}, "cpus is 1000, and the run in {} has " + str(now["cpus"])),
    ]:
        monkeypatch.setattr(environment, "describe", lambda other=other: now | other)
        assert says.format(half_done) in refused(["--out", str(half_done), "--resume"], capsys, code=2)


def test_a_finished_run_needs_no_checkpoints(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--dataset", source, *OPTIONS, "--epochs", "1", "--out", str(tmp_path / "out")])
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for _ in range(2):
        capsys.readouterr()
        run.main(["--out", str(tmp_path / "out"), "--resume"])
        assert "is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_resuming_needs_to_know_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--resume is given without --out" in refused(["--resume"], capsys, code=2)
    assert "choose one" in refused(["--resume", "--overwrite", "--out", "x"], capsys, code=2)
    assert "--checkpoint-steps is 0" in refused(["--checkpoint-steps", "0"], capsys, code=2)


def test_a_run_of_a_kd_jax_that_knew_less_is_told_so(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.start({"config": {"epochs": 1}})
    resume.require_same(store, {"config": {"epochs": 1}})
    with pytest.raises(MismatchError, match="was started by a kd_jax that knew no shift: go on with that one"):
        resume.require_same(store, {"config": {"epochs": 1, "shift": 0}})


def test_two_processes_do_not_share_a_folder(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "kd_jax.run", "--dataset", source, *OPTIONS[:-1], "--epochs", "2000"]
    arguments += ["--out", str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            next(line for line in first.stdout if "epoch 1/" in line)
            for more in ([], ["--resume"], ["--overwrite"]):
                error = refused([*arguments[3:], *more], capsys, code=1)
                assert error.startswith(f"kd_jax: another process is running in {out}: ")
                assert error.count("\n") == 1
            assert first.poll() is None
        finally:
            first.kill()


@pytest.mark.slow
def test_a_disk_that_is_full_costs_no_checkpoint(source: str, tmp_path: Path) -> None:
    """A limit on the size of files, set after the first checkpoints, stands for the full disk."""
    limit = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from kd_jax import run\nfrom kd_jax.train import checkpoint\n"
        "save, calls = checkpoint.Store.save, []\n"
        "def limited(self, *arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 4:\n"
        "        self.wait(); resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "    save(self, *arguments)\n"
        "checkpoint.Store.save = limited; run.main(sys.argv[1:])"
    )
    out = tmp_path / "out"
    options = [*OPTIONS, "--epochs", "20", "--checkpoint-steps", "30"]
    command = [sys.executable, "-c", limit, "--dataset", source, *options, "--out", str(out)]
    full = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "KD_JAX_CACHE": str(tmp_path / "c")}
    )
    assert full.returncode == 1, full.stderr
    assert full.stderr.count("\n") == 1
    assert "cannot be written" in full.stderr
    assert "--resume" in full.stderr
    assert sorted(path.name for path in out.glob("checkpoints/teacher/*")) == ["000000060", "000000090"]
    run.main(["--out", str(out), "--resume", "--quiet"])
    assert (out / RESULTS).exists()


def test_a_run_that_failed_ends_although_a_thread_waits(source: str, tmp_path: Path) -> None:
    """As those of Orbax do where a folder becomes unwritable while it writes: Python alone would wait for them."""
    program = (
        "import runpy, sys, threading; from kd_jax.errors import CheckpointError\nfrom kd_jax.train import checkpoint\n"
        "def never(*arguments):\n"
        "    threading.Thread(target=threading.Event().wait).start(); raise CheckpointError('no more')\n"
        "checkpoint.Store._write = never; runpy.run_module('kd_jax.run', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", program, "--dataset", source, *OPTIONS, "--out", str(tmp_path / "out")]
    failed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (failed.returncode, failed.stderr) == (1, "kd_jax: no more\n")
