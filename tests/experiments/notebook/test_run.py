import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from slowly import all_but_first

from kd_jax import run
from kd_jax.data.dataset import Dataset
from kd_jax.errors import ConfigError, OutputError
from kd_jax.experiments import images as of_images
from kd_jax.experiments import stage_loop
from kd_jax.experiments.images import Images
from kd_jax.experiments.notebook import experiment, fits, options, recipes
from kd_jax.experiments.notebook.config import PRESETS, make_config
from kd_jax.experiments.shell import folder, progress
from kd_jax.experiments.shell.folder import RESULTS
from kd_jax.models import Network, Output, mlp
from kd_jax.train import checkpoint, memory

pytestmark = pytest.mark.usefixtures("quick_compiling")

SMALL = ["--teacher-hidden", "16", "--student-hidden", "4", "--epochs", "2", "--batch-size", "8"]
SMALL += ["--learning-rate", "0.01", "--temperature", "4"]


@pytest.fixture
def source(tmp_path: Path, small_dataset: Dataset) -> str:
    path = tmp_path / "small.npz"
    np.savez(
        path,
        x_train=small_dataset.train_images,
        y_train=small_dataset.train_labels,
        x_test=small_dataset.test_images,
        y_test=small_dataset.test_labels,
    )
    return f"npz:{path}"


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int = 2) -> str:
    """The one sentence on stderr with which `arguments` are refused."""
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    output = capsys.readouterr()
    assert caught.value.code == code
    assert output.err.count("\n") == 1
    assert output.err.startswith("kd_jax: ")
    return output.err


def test_a_run_leaves_what_it_promises(
    source: str, tmp_path: Path, small_dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run.main(["--dataset", source, *SMALL, "--seeds", "3", "--seed", "5", "--out", str(out)])
    printed = capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())

    assert found["config"]["seeds"] == 3
    assert found["config"]["temperature"] == 4
    assert found["environment"]["backend"] == jax.default_backend()
    assert found["data"]["sha256"] == small_dataset.digest()
    assert [len(found["models"][name]["runs"]) for name in ("teacher", "student", "distilled")] == [1, 3, 3]
    assert [one["seed"] for one in found["models"]["distilled"]["runs"]] == [5, 6, 7]
    assert "teacher_agreement" not in found["models"]["teacher"]["runs"][0]
    for one in found["models"]["student"]["runs"]:
        assert set(one) == {"seed", "correct", "errors", "accuracy", "nll", "ece", "teacher_agreement", "kl_to_teacher"}
        assert one["correct"] + one["errors"] == 60
    differences = [
        d["correct"] - s["correct"]
        for s, d in zip(found["models"]["student"]["runs"], found["models"]["distilled"]["runs"], strict=True)
    ]
    assert found["comparison"]["mean_difference"] == pytest.approx(np.mean(differences))
    assert set(found["comparison"]) == {"metric", "n", "mean_difference", "ci95", "p_value"}
    timing = found["timing"]
    assert timing["student"]["steps"] == 3 * 2 * 30
    assert 0 < timing["student"]["train_s"] < timing["total_s"]

    assert found["conclusion"] in printed
    assert "paired t-test" in printed
    kept = (out / "results.md").read_text()
    assert found["conclusion"] in kept
    assert "\n- training: 2 epochs of" in kept
    assert "distilled  epoch 2/2" in printed
    for name in ("learning-curves.png", "comparison.png", "digits.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_saved_parameters_give_the_reported_numbers(source: str, tmp_path: Path, small_dataset: Dataset) -> None:
    """Read with safetensors and NumPy alone, and evaluated here."""
    out = tmp_path / "out"
    run.main(["--dataset", source, *SMALL, "--seeds", "2", "--out", str(out), "--quiet"])
    found = json.loads((out / "results.json").read_text())
    pixels = small_dataset.test_images.reshape(60, -1) / 255
    for name, seed, place in (("teacher", 42, 0), ("student", 43, 1), ("distilled", 42, 0)):
        saved = load_file(out / "parameters" / f"{name}-seed{seed}.safetensors")
        hidden = np.maximum(pixels @ saved["hidden.0.kernel"] + saved["hidden.0.bias"], 0)
        answers = (hidden @ saved["output.kernel"] + saved["output.bias"]).argmax(-1)
        assert (answers == small_dataset.test_labels).sum() == found["models"][name]["runs"][place]["correct"]


def saved(out: Path, name: str) -> dict[str, bytes]:
    """The parameters of a model by their names, to the bit."""
    return {part: array.tobytes() for part, array in load_file(out / "parameters" / f"{name}.safetensors").items()}


def test_students_and_distilled_students_are_pairs(source: str, tmp_path: Path) -> None:
    """They have the same initial parameters and batches: at alpha 1, where no teacher counts, they are the same."""
    out = tmp_path / "out"
    run.main(["--dataset", source, *SMALL, "--seeds", "2", "--alpha", "1", "--out", str(out), "--quiet"])
    for seed in (42, 43):
        assert saved(out, f"student-seed{seed}") == saved(out, f"distilled-seed{seed}")
    assert saved(out, "student-seed42") != saved(out, "student-seed43")


def test_the_teacher_has_its_own_learning_rate(source: str, tmp_path: Path) -> None:
    """With the option it is the teacher of a run at that rate, and the students keep theirs."""
    rates = {"own": ["--teacher-learning-rate", "0.003"], "of-all": ["--learning-rate", "0.003"], "none": []}
    teacher, student = {}, {}
    for name, given in rates.items():
        out = tmp_path / name
        arguments = ["--dataset", source, *SMALL, *given, "--epochs", "1", "--seeds", "1", "--quiet"]
        run.main([*arguments, "--out", str(out)])
        teacher[name], student[name] = saved(out, "teacher-seed42"), saved(out, "student-seed42")
    assert teacher["own"] == teacher["of-all"] != teacher["none"]
    assert student["own"] == student["none"] != student["of-all"]


def test_the_same_seed_gives_the_same_results_file_but_for_the_timings(source: str, tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        run.main(["--dataset", source, *SMALL, "--seeds", "2", "--out", str(tmp_path / name), "--quiet"])
        found = json.loads((tmp_path / name / "results.json").read_text())
        del found["timing"]
        texts.append(json.dumps(found))
    assert texts[0] == texts[1]


def test_quiet_prints_the_table_and_the_conclusion_alone(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(["--dataset", source, *SMALL, "--seeds", "2", "--out", str(tmp_path / "out"), "--quiet"])
    printed = capsys.readouterr()
    assert "epoch" not in printed.out
    assert "Distillation changed the number of correct images" in printed.out
    assert printed.err == ""


def test_help_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for option in ("dataset", "preset", "method", "epochs", "batch-size", "learning-rate", "alpha", "temperature"):
        assert f"--{option} " in text
    for option in ("--seeds", "--seed ", "--out", "--overwrite", "--quiet", "default: 0.0003", "exit codes"):
        assert option in text


def test_help_tells_every_preset_as_options(capsys: pytest.CaptureFixture[str]) -> None:
    """Given back to the command, they are the preset."""
    with pytest.raises(SystemExit):
        run.main(["--help"])
    _, _, told = capsys.readouterr().out.partition("\npresets:\n")
    blocks = re.findall(r"^  (\S+)\n((?:    .*\n)+)", told, re.MULTILINE)
    assert [name for name, _ in blocks] == list(PRESETS)
    parser = run._parser()
    for name, words in blocks:
        given = [] if "defaults above" in words else words.split()
        found = make_config(**options.given(parser.parse_args(given)))
        assert dataclasses.replace(found, preset=name) == make_config(name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset", "mnits"], "unknown data set 'mnits'"),
        (["--preset", "x"], "unknown preset 'x'"),
        (["--method", "x"], "unknown method 'x'"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--epochs", "many"], "--epochs: 'many' is no whole number"),
        (["--epochs"], "--epochs: expected one argument"),
        (["--student-hidden", "20.20"], "'20.20' are no sizes of layers: give whole numbers joined by commas"),
        (["--alpha", "2"], "--alpha is 2.0"),
        (["--alpha", "half"], "--alpha: 'half' is no number"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--learning-rate", "0"], "--learning-rate is 0.0"),
        (["--epoch", "3"], "unknown option '--epoch': did you mean --epochs?"),
        (["--temp", "4"], "unknown option '--temp': did you mean --temperature?"),
        (["--dropout", "0.2"], "unknown option '--dropout': did you mean --teacher-dropout?"),
        (["--learning_rate", "1"], "unknown option '--learning_rate': did you mean --learning-rate?"),
        (["--lr", "1"], "unknown option '--lr': see --help"),
        (["--student-hidden", "10,10", "20,20"], "--student-hidden is 10,10 20,20: give the layers of one network"),
        (["mnist"], "'mnist' belongs to no option: give an option's name before it"),
        (["--temperature", "1", "2"], "'2' belongs to no option: give an option's name before it, and one value to"),
        (["--batch-size", "60001"], "at most the 60,000 training examples"),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(arguments, capsys)


def test_results_are_not_replaced_unasked(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["--dataset", source, *SMALL, "--seeds", "2", "--quiet", "--out", str(out)]
    run.main(arguments)
    before = (out / "results.json").read_bytes()
    capsys.readouterr()
    assert "already holds results" in refused(arguments, capsys)
    assert (out / "results.json").read_bytes() == before
    # Without what it was, there is nothing to go on with; nothing is said to be started.
    (out / "run.json").unlink()
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(SystemExit):
        run.main([argument for argument in arguments if argument != "--quiet"] + ["--resume"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "already holds results" in printed.err
    run.main([*arguments, "--overwrite"])
    assert (out / "results.json").read_bytes() != before


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/kd_jax", "x" * 300])
def test_an_output_folder_must_be_writable(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(["--dataset", source, "--out", str(tmp_path / place)], capsys)


def test_a_loss_that_is_not_finite_ends_the_run(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    error = refused(["--dataset", source, *SMALL, "--learning-rate", "1e30", "--out", str(out)], capsys, code=1)
    assert "the loss of the teacher with seed 42 is not finite at step 2 at" in error
    assert "--teacher-learning-rate 1e+30" in error
    assert not out.exists()


def test_a_run_that_fails_tells_what_it_leaves_however_slow_the_disk_is(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.Store._write

    def slowly(*arguments: Any) -> None:
        time.sleep(1)
        write(*arguments)

    monkeypatch.setattr(checkpoint.Store, "_write", slowly)
    out = tmp_path / "out"
    arguments = ["--dataset", source, *SMALL, "--quiet", "--checkpoint-steps", "1", "--out", str(out)]
    error = refused([*arguments, "--learning-rate", "1e20"], capsys, code=1)
    assert "seed 42 is not finite at step 2 at --teacher-learning-rate 1e+20" in error
    assert error.endswith("start again with --overwrite\n")
    last = checkpoint.Store(out).newest("teacher")
    assert last is not None
    assert last.step == 1
    assert all(np.isfinite(array).all() for array in last.arrays.values())


def test_a_reader_that_leaves_early_is_no_error(source: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "kd_jax.run", "--dataset", source, *SMALL, "--out", str(out)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert error == b""
    assert process.returncode == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--seeds", "1000000000"], "--seeds is 1000000000: that needs"),
        (["--teacher-hidden", "10000000", "10000000"], "--teacher-hidden is 10000000 10000000: that needs"),
    ],
)
def test_what_cannot_fit_into_memory_is_refused(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    error = refused(["--dataset", source, *SMALL, *arguments, "--out", str(tmp_path / "out")], capsys)
    assert says in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["batch_size", "seeds"])
def test_the_number_that_would_fit_is_the_largest_that_does(
    option: str, small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine with 100 kB."""
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    small: dict[str, Any] = {"teacher_hidden": (16,), "student_hidden": (4,), "batch_size": 1, "seeds": 1}
    large = {"batch_size": 240, "seeds": 1000}[option]
    name = option.replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{name} is {large}: that needs .* it must be at most [0-9]+$") as caught:
        fits.check(make_config(**{**small, option: large}), small_dataset)
    most = int(str(caught.value).rpartition(" ")[2])
    assert 1 < most < large
    fits.check(make_config(**{**small, option: most}), small_dataset)
    with pytest.raises(ConfigError):
        fits.check(make_config(**{**small, option: most + 1}), small_dataset)


def test_views_that_do_not_fit_are_refused(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 views of 240 images, 3 classes each, are 72,000 bytes, of which no student has any."""
    config = make_config(teacher_hidden=(16,), student_hidden=(4,), batch_size=1, seeds=1, shift=2)
    for free, says in [
        (71_999, r"^--shift is 2: the teacher's outputs for all 25 views need 0.0 GiB"),
        (72_001, "^--student-hidden is 4: that needs"),
    ]:
        monkeypatch.setattr(memory, "available", lambda free=free: free)
        with pytest.raises(ConfigError, match=says):
            fits.check(config, small_dataset)
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    fits.check(config, small_dataset)


def test_importing_needs_neither_tensorflow_nor_its_data_sets() -> None:
    code = (
        "import sys, kd_jax, kd_jax.run; from kd_jax.experiments.notebook import experiment, report; "
        "kd_jax.load('mnist'); "
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'torch', 'matplotlib.pyplot') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@dataclass(frozen=True)
class Counted(Network):
    """`network`, which counts how often Python sees it applied."""

    name: str
    network: Network
    traces: Counter[str] = field(compare=False)

    def init(self, key: Any) -> Any:
        """As the network."""
        return self.network.init(key)

    def apply(
        self, variables: Any, inputs: Any, *, train: bool = False, key: Any = None, features: tuple[str, ...] = ()
    ) -> tuple[Output, Any]:
        """As the network."""
        self.traces[f"{self.name} in {'training' if train else 'evaluation'}"] += 1
        return self.network.apply(variables, inputs, train=train, key=key, features=features)

    def split(self, variables: Any) -> tuple[Any, Any]:
        """As the network."""
        return self.network.split(variables)

    def merge(self, params: Any, state: Any) -> Any:
        """As the network."""
        return self.network.merge(params, state)


def test_nothing_is_traced_twice(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python sees each network once for each program that holds it, however many chunks and epochs run."""
    traces: Counter[str] = Counter()
    sizes = {"teacher": [36, 16, 3], "student": [36, 4, 3]}
    networks = tuple(Counted(name, mlp(own).network, traces) for name, own in sizes.items())
    monkeypatch.setattr(recipes, "networks", lambda config, dataset: networks)
    config = make_config(epochs=3, batch_size=8, seeds=2, learning_rate=0.01)
    experiment.run_experiment(config, small_dataset, progress.Silent())
    # Students: alone and distilled. The teacher's evaluation: on the test and on the training images.
    assert traces == {
        "teacher in training": 1,
        "student in training": 2,
        "teacher in evaluation": 2,
        "student in evaluation": 1,
    }


def test_students_learn_from_the_outputs_of_the_trained_teacher(
    small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits in evaluation mode, in the order of the training images, made from its parameters by NumPy."""
    seen = {}
    original = stage_loop.train_stage

    def watched(prepared: Any, data: Images, *arguments: Any, **named: Any) -> Any:
        seen[prepared.name.folder] = data.logits
        return original(prepared, data, *arguments, **named)

    monkeypatch.setattr(stage_loop, "train_stage", watched)
    config = make_config(teacher_hidden=(16,), student_hidden=(4,), epochs=2, batch_size=8, seeds=2, learning_rate=0.01)
    result = experiment.run_experiment(config, small_dataset, progress.Silent())
    params = jax.tree.map(lambda leaf: np.float64(leaf[0]), result.teacher.variables["params"])
    pixels = small_dataset.train_images.reshape(240, -1) / 255
    hidden = np.maximum(pixels @ params["hidden"][0]["kernel"] + params["hidden"][0]["bias"], 0)
    expected = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(seen["distilled"], expected, rtol=1e-4, atol=1e-4)
    assert seen["teacher"] is None
    assert seen["student"] is None


def test_parameters_that_end_up_not_finite_fail_the_run(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last update may ruin what the last loss could not show: here the only one."""
    arguments = ["--dataset", source, "--teacher-hidden", "4", "--student-hidden", "4", "4", "4", "4", "--epochs", "1"]
    out = tmp_path / "out"
    error = refused([*arguments, "--batch-size", "240", "--learning-rate", "1e30", "--out", str(out)], capsys, code=1)
    assert (
        "test images of the teacher with seed 42 is not finite after the last step, 1, at --teacher-learning-rate 1e+30"
        in error
    )
    assert not (out / RESULTS).exists()


def test_folders_of_runs_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [folder.new_folder("a") for _ in range(3)] == [Path("runs/a"), Path("runs/a-2"), Path("runs/a-3")]


def test_a_folder_that_fills_up_is_one_sentence(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "parameters" / "student-seed42.safetensors").mkdir(parents=True)
    error = refused(["--dataset", source, *SMALL, "--seeds", "2", "--out", str(out)], capsys, code=1)
    assert "the results cannot be written to" in error


@pytest.mark.parametrize(("name", "value"), [("JAX_PLATFORMS", "cuda"), ("JAX_DISABLE_JIT", "1")])
def test_what_the_environment_asks_jax_for_is_one_sentence(source: str, tmp_path: Path, name: str, value: str) -> None:
    arguments = [sys.executable, "-m", "kd_jax.run", "--dataset", source, *SMALL, "--out", str(tmp_path / "out")]
    environment = os.environ | {name: value}
    found = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.splitlines()[-1].startswith(f"kd_jax: {name} is ")
    assert "Traceback" not in found.stderr


def test_a_name_that_the_locale_cannot_hold_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(OutputError, match=r"--out '/tmp/.udcc3.udca9' has letters .* set PYTHONUTF8=1, or choose"):
        folder.claim(Path("/tmp/\udcc3\udca9"))


@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "more", all_but_first([["--shift", "1", "--seeds", "2"], ["--augment", "crop-flip", "--seeds", "1"]])
)
def test_a_run_that_streams_its_images_is_the_same(source: str, tmp_path: Path, more: list[str]) -> None:
    """With shifts and crops, too."""
    few = [*SMALL, "--epochs", "1", *more]
    given, streamed = tmp_path / "given", tmp_path / "streamed"
    run.main(["--dataset", source, *few, "--out", str(given)])
    run.main(["--dataset", source, *few, "--stream", "--out", str(streamed)])
    one, other = (json.loads((place / "results.json").read_text()) for place in (given, streamed))
    assert one["data"] == other["data"]
    for name, own in one["models"].items():
        for mine, its in zip(own["runs"], other["models"][name]["runs"], strict=True):
            assert mine["correct"] == its["correct"]
            np.testing.assert_allclose(mine["nll"], its["nll"], rtol=1e-5)


def test_only_the_images_of_the_next_steps_are_brought(small_dataset: Dataset, tmp_path: Path) -> None:
    """Each chunk has its own, and every example of it lies where its place says."""
    np.save(tmp_path / "images.npy", small_dataset.train_images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    data = Images(mapped, np.asarray(small_dataset.train_labels))
    rows = np.array([[[3, 9], [200, 3]]])
    for shift in (0, 2):
        found = of_images.of_steps(data, rows, shift)
        shapes = of_images.shapes_of_steps(data, rows.size, shift)
        assert found.images.shape == shapes.images.shape == (4, 6 + 2 * shift, 6 + 2 * shift, 1)
        for row in (3, 9, 200):
            image = np.asarray(found.images[found.places[row]])
            np.testing.assert_array_equal(image[shift : 6 + shift, shift : 6 + shift], small_dataset.train_images[row])
