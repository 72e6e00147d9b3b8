"""`python -m kd_jax.export`: a run's student, and a file's."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import kd_jax as kd
from kd_jax.data.dataset import Dataset, make_dataset
from kd_jax.experiments.notebook import report, saved
from kd_jax.experiments.notebook.config import Config
from kd_jax.experiments.notebook.experiment import run_experiment
from kd_jax.experiments.shell.progress import Silent
from kd_jax.export import __main__ as command

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

CONFIG = Config(
    teacher_hidden=(12,), teacher_dropout=0.1, student_hidden=(4,), epochs=2, learning_rate=0.01, seeds=2, seed=5,
    dataset="npz:small",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(quick_compiling: None, small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(report.plots, "write", lambda *arguments: [])
        report.write(run_experiment(CONFIG, small_dataset, Silent()), small_dataset, folder)
    return folder


@pytest.fixture(autouse=True)
def few_images(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "load", lambda source: small_dataset)


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        command.main([str(one) for one in arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("kd_jax: ")
    assert error.count("\n") == 1
    return error


def test_every_model_of_a_run_is_as_accurate_as_the_run_says(run: Path, small_dataset: Dataset) -> None:
    known = json.loads((run / "results.json").read_text())["models"]
    found = saved.read(run, 6)
    images = small_dataset.test_images.astype(np.float32) / 255
    for name, model in found.models.items():
        place = 0 if name == "teacher" else 1
        measured = kd.evaluate(model, kd.Batch(images, small_dataset.test_labels))
        assert measured["correct"] == known[name]["runs"][place]["correct"]
        assert known[name]["runs"][place]["seed"] == (5 if name == "teacher" else 6)


def test_a_student_goes_out_with_its_report(
    run: Path, small_dataset: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command.main([str(run), "--format", "onnx", "int8", "--out", str(out), "--rounds", "1", "--license", "mit"])
    printed = capsys.readouterr().out
    assert "distilled, int8" in printed
    assert printed.splitlines()[-1] == (
        f"{out}/ has README.md, distilled-int8.onnx, distilled.onnx, report.json, report.md, report.png."
    )
    session = onnxruntime.InferenceSession(str(out / "distilled.onnx"))
    (logits,) = session.run(["logits"], {"inputs": small_dataset.test_images})
    right = int((logits.argmax(-1) == small_dataset.test_labels).sum())
    assert right == json.loads((run / "results.json").read_text())["models"]["distilled"]["runs"][0]["correct"]
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "- student_hidden: [4]" in card


def test_one_model_of_one_seed_without_a_report(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command.main([str(run), "--model", "student", "--seed", "6", "--format", "safetensors", "--no-report", "--out",
                  str(tmp_path)])  # fmt: skip
    assert capsys.readouterr().out == f"{tmp_path}/ has README.md, student.json, student.safetensors.\n"
    wanted = saved.read(run, 6).models["student"]
    back = kd.restore(kd.mlp([36, 4, 3]), tmp_path / "student.safetensors")
    x = np.ones((1, 36), np.float32)
    np.testing.assert_array_equal(back(x), wanted(x))


def test_a_run_s_own_file_is_the_same_program_again(
    run: Path, small_dataset: Dataset, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    command.main([str(run), "--model", "student", "--seed", "6", "--no-report", "--out", str(out),
                  "--format", "safetensors"])  # fmt: skip
    known = json.loads((out / "student.json").read_text())
    assert known["made"] == {"by": "kd_jax.models:mlp", "arguments": {"sizes": [36, 4, 3]}}
    assert known["prepare"] == "kd_jax.experiments.images:prepare"
    card = (out / "README.md").read_text()
    assert "A model that no teacher taught" in card
    assert "- seed: 6" in card
    for absent in ("temperature", "teacher_", "seed: 5", "method"):
        assert absent not in card
    command.main([str(out / "student.safetensors"), "--format", "onnx", "--out", str(again)])
    session = onnxruntime.InferenceSession(str(again / "student.onnx"))
    (logits,) = session.run(["logits"], {"inputs": small_dataset.test_images})
    model = saved.read(run, 6).models["student"]
    np.testing.assert_allclose(logits, model(small_dataset.test_images.astype(np.float32) / 255), atol=1e-4)
    assert "already holds student.onnx" in failed(capsys, out / "student.safetensors", "--format", "onnx",
                                                  "--out", again)  # fmt: skip
    command.main([str(out / "student.safetensors"), "--format", "onnx", "--out", str(again), "--overwrite"])


def test_the_teacher_s_card_is_of_the_teacher(run: Path, tmp_path: Path) -> None:
    command.main([str(run), "--model", "teacher", "--seed", "6", "--format", "safetensors", "--out", str(tmp_path)])
    card = (tmp_path / "README.md").read_text()
    assert "- seed: 5" in card
    assert "- teacher_hidden: [12]" in card
    for absent in ("temperature", "student_hidden", "distil"):
        assert absent not in card
    x = np.ones((1, 36), np.float32)
    back = kd.export.from_safetensors(tmp_path / "teacher.safetensors")
    np.testing.assert_array_equal(back(x), saved.read(run).models["teacher"](x))


def test_a_file_that_was_prepared_by_another_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, x = kd.mlp([5, 3]).init(0), np.ones((1, 5), np.float32)
    path = tmp_path / "small.safetensors"
    made = {"made": "kd_jax.models:mlp", "arguments": {"sizes": [5, 3]}}
    kd.export.to_safetensors(model, path, inputs=x, prepare=lambda key, x, train: x / 255, **made)
    error = failed(capsys, path, "--format", "onnx")
    assert "prepares, which the file does not hold: export the model itself" in error
    assert not (tmp_path / "export").exists()


def test_a_file_with_its_description(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, x = kd.mlp([5, 3]).init(0), np.ones((1, 5), np.float32)
    path = tmp_path / "small.safetensors"
    kd.export.to_safetensors(model, path, made="kd_jax.models:mlp", arguments={"sizes": [5, 3]}, inputs=x)
    command.main([str(path)])
    assert capsys.readouterr().out == (
        f"{tmp_path}/export/ has README.md, small-int8.onnx, small.json, small.onnx, small.safetensors, "
        "small.stablehlo.\n"
    )
    back = kd.export.from_safetensors(tmp_path / "export" / "small.safetensors")
    np.testing.assert_array_equal(back(x), model(x))
    assert "--seed is of a run" in failed(capsys, path, "--seed", "3")


def test_what_does_not_fit_is_one_sentence(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "does not exist: name the folder of a run" in failed(capsys, tmp_path / "none")
    assert "has no results.json" in failed(capsys, tmp_path)
    assert "unknown --format 'tflite': use some of onnx" in failed(capsys, run, "--format", "tflite")
    assert "unknown --model 'best'" in failed(capsys, run, "--model", "best")
    assert "has the seeds 5 to 6" in failed(capsys, run, "--seed", "7")
    assert "--rounds is 0" in failed(capsys, run, "--rounds", "0")
    assert "did you mean --format?" in failed(capsys, run, "--formt", "onnx")
    (tmp_path / "results.json").write_text("{")
    assert "is damaged" in failed(capsys, tmp_path)
    (tmp_path / "results.json").write_text("[" * 200_000)
    assert "is damaged" in failed(capsys, tmp_path)
    (tmp_path / "results.json").write_text("[]")
    assert "is not of python -m kd_jax.run" in failed(capsys, tmp_path)


def test_litert_is_made_where_it_is_asked_for_and_its_packages_are_there(
    run: Path, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "litert_converter.mlir.ir", None)
        error = failed(capsys, run, "--format", "litert", "--out", tmp_path / "none")
    assert "litert-converter is needed for LiteRT" in error
    assert error.endswith("pip install 'kd-jax[litert]'\n")
    assert not (tmp_path / "none").exists()
    pytest.importorskip("litert_converter")
    runtime = pytest.importorskip("ai_edge_litert.interpreter")
    command.main([str(run), "--format", "litert", "--no-report", "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path}/ has README.md, distilled.tflite.\n"
    runner = runtime.Interpreter(str(tmp_path / "distilled.tflite")).get_signature_runner()
    logits = runner(inputs=small_dataset.test_images)["logits"]
    right = int((logits.argmax(-1) == small_dataset.test_labels).sum())
    assert right == json.loads((run / "results.json").read_text())["models"]["distilled"]["runs"][0]["correct"]


def test_other_images_than_the_runs_are_refused(
    run: Path, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = (small_dataset.train_images, small_dataset.train_labels)
    other = make_dataset("small", *train, small_dataset.test_images, small_dataset.test_labels[::-1])
    monkeypatch.setattr(saved, "load", lambda source: other)
    assert "is not what the run in" in failed(capsys, run)


def test_the_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for word in ("RUN", "--format", "--model", "--seed", "--out", "--no-report", "examples:", "exit codes:"):
        assert word in text
