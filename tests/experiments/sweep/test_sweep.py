import contextlib
import csv
import io
import json
import shlex
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sweeps
from PIL import Image

from kd_jax import run, stats, sweep
from kd_jax.data.batch import Batch
from kd_jax.data.dataset import Dataset, development
from kd_jax.data.load import load
from kd_jax.evaluate import predict
from kd_jax.experiments import images as of_images
from kd_jax.experiments import trials
from kd_jax.experiments.images import Images
from kd_jax.experiments.shell.folder import RESULTS
from kd_jax.experiments.stage import Role, Stage
from kd_jax.experiments.sweep import grid, plan, search
from kd_jax.experiments.sweep import report as sweep_report
from kd_jax.experiments.trials import TrainedTrials, Trials
from kd_jax.methods import CrossEntropy
from kd_jax.models import Model, mlp
from kd_jax.optimizers import adam
from kd_jax.train.checkpoint import CheckpointPolicy, Store
from kd_jax.train.fit import fit

pytestmark = pytest.mark.usefixtures("quick_compiling")

SMALL = ["--teacher-hidden", "16", "--student-hidden", "4", "--epochs", "2", "--batch-size", "8"]
SMALL += ["--learning-rate", "0.01", "--method", "kd", "--seeds", "3"]
OLDER = "temperature-8-8.png"  # Of an earlier sweep.
LISTED = ["--temperature", "1", "4", "--alpha", "0", "0.5", "--label-smoothing", "0.1", "0.3"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, small_dataset: Dataset) -> str:
    file = tmp_path_factory.mktemp("source") / "small.npz"
    np.savez(
        file,
        x_train=small_dataset.train_images,
        y_train=small_dataset.train_labels,
        x_test=small_dataset.test_images,
        y_test=small_dataset.test_labels,
    )
    return f"npz:{file}"


@pytest.fixture(scope="module")
def swept(source: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished sweep, and what it printed. Not to be changed."""
    out = tmp_path_factory.mktemp("swept") / "out"
    out.mkdir()
    (out / OLDER).touch()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sweep.main(["--dataset", source, *SMALL, *LISTED, "--out", str(out)])
    return out, printed.getvalue()


def runs(one: dict[str, Any], name: str) -> np.ndarray:
    return np.asarray([run[name] for run in one["runs"]])


def test_a_sweep_leaves_what_it_promises(swept: tuple[Path, str], small_dataset: Dataset) -> None:
    out, printed = swept
    found = json.loads((out / "results.json").read_text())
    assert found["data"]["sha256"] == small_dataset.digest()
    assert (found["data"]["train"], found["data"]["development"], found["data"]["test"]) == (200, 40, 60)
    settings = found["development"]["settings"]
    assert [s["setting"]["kind"] for s in settings].count("distilled") == 4
    assert [s["setting"]["kind"] for s in settings].count("label smoothing") == 2
    assert [s["setting"]["kind"] for s in settings].count("alone") == 1
    for one in settings:
        assert [run["seed"] for run in one["runs"]] == [42, 43, 44]
        assert set(one["runs"][0]) == {
            "seed", "correct", "errors", "accuracy", "nll", "ece", "teacher_agreement", "kl_to_teacher",
        }  # fmt: skip
        assert (runs(one, "correct") + runs(one, "errors") == 40).all()

    distilled = [s for s in settings if s["setting"]["kind"] == "distilled"]
    best = min(distilled, key=lambda s: (runs(s, "errors").mean(), runs(s, "nll").mean()))
    assert found["chosen"] == best["setting"] == found["test"]["settings"][0]["setting"]
    assert [one["correct"] + one["errors"] for one in found["test"]["teachers"]] == [60]
    for one in found["test"]["settings"]:
        assert [run["seed"] for run in one["runs"]] == [45, 46, 47]
        assert (runs(one, "correct") + runs(one, "errors") == 60).all()
    for sentence in found["test"]["conclusions"]:
        assert sentence in printed
        assert sentence in (out / "results.md").read_text()
    compared = len(found["test"]["conclusions"])
    teachers = [line for line in printed.splitlines() if line.startswith("teacher ") and "% of all" not in line]
    assert len(teachers) == 2
    assert compared > 1
    assert "These intervals and p-values are corrected for their number, too. Intervals of so few seeds" in printed
    assert "the teacher is the same (seed 42)" in printed
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == 3 * (7 + len(found["test"]["settings"]))
    for part in ("development", "test"):
        written = [(int(row["seed"]), int(row["errors"]), float(row["nll"])) for row in rows if row["part"] == part]
        every = [run for one in found[part]["settings"] for run in one["runs"]]
        assert written == [(run["seed"], run["errors"], run["nll"]) for run in every]
    assert not (out / OLDER).exists()
    for name in ("heat-map.png", "temperature.png"):
        image = np.asarray(Image.open(out / name).convert("RGB"))
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_gains_are_paired_by_seed_and_corrected_for_all_of_them(swept: tuple[Path, str]) -> None:
    settings = json.loads((swept[0] / "results.json").read_text())["development"]["settings"]
    by_setting = {json.dumps(s["setting"]): s for s in settings}
    smoothed = [s for s in settings if s["setting"]["kind"] == "label smoothing"]
    best = min(smoothed, key=lambda s: (runs(s, "errors").mean(), runs(s, "nll").mean()))
    for one in settings:
        if one["setting"]["kind"] != "distilled":
            assert one["gains"] == []
            continue
        assert [gain["baseline"] for gain in one["gains"]] == [{"kind": "alone"}, best["setting"]]
        for gain in one["gains"]:
            before = runs(by_setting[json.dumps(gain["baseline"])], "correct")
            expected = stats.paired_comparison(before, runs(one, "correct"), metric="correct", comparisons=12)
            assert gain["mean_difference"] == pytest.approx(expected.mean_difference)
            assert gain["p_value"] == expected.p_value
            # Of two smoothings the better counts, and both were looked at.
            assert gain["corrected_for_comparisons"] == 12
    assert "12 were looked at (with each of 2 smoothings, of which the best counts)" in swept[1]


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
@pytest.mark.parametrize(
    "preset",
    [
        "--preset notebook",
        "--preset notebook-as-written --method kd-as-written --teacher-epochs 2",
        "--preset tuned --learning-rate 0.00031622776 0.01 --teacher-batch-size 8 --teacher-epochs 3",
    ],
    ids=["notebook", "as-written", "tuned"],
)
def test_the_printed_command_trains_the_chosen_setting_with_other_seeds(
    source: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.main(["--dataset", source, *SMALL, *LISTED, *preset.split(), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert f"\n    {found['command']}\n" in printed
    words = shlex.split(found["command"])
    # What was chosen is said even where it is the default.
    assert {f"--{name.replace('_', '-')}" for name in found["lists"]} <= set(words)
    assert not set(found["lists"]) & set(found["config"])
    assert words[:3] == ["python", "-m", "kd_jax.run"]
    run.main([*words[3:], "--quiet", "--out", str(tmp_path / "again")])
    config = json.loads((tmp_path / "again" / "results.json").read_text())["config"]
    chosen = {name: value for name, value in found["chosen"].items() if name != "kind"}
    assert config == found["config"] | chosen | {"seed": 48}


def test_the_students_that_are_tested_are_trained_anew_with_other_seeds(
    swept: tuple[Path, str], small_dataset: Dataset
) -> None:
    """The student alone, trained here by `kd.fit` on the development split's training part."""
    found = json.loads((swept[0] / "results.json").read_text())
    (alone,) = (s for s in found["test"]["settings"] if s["setting"]["kind"] == "alone")
    split = development(small_dataset)
    data, network = Batch(split.train_images, split.train_labels), mlp([36, 4, 3]).network
    for one in alone["runs"]:
        key = jax.random.fold_in(jax.random.key(one["seed"]), int(Role.STUDENT))
        state, _ = fit(
            key, data, network, method=CrossEntropy(), optimizer=adam(0.01), epochs=2, batch_size=8,
            prepare=of_images.prepare,
        )  # fmt: skip
        model = Model(network, state.variables)
        answers = predict(model, small_dataset.test_images, prepare=of_images.prepare).argmax(-1)
        assert one["correct"] == (np.asarray(answers) == small_dataset.test_labels).sum()


@pytest.mark.usefixtures("without_plots")
def test_the_test_set_has_no_say_in_the_choice(source: str, tmp_path: Path, small_dataset: Dataset) -> None:
    """With other test labels, everything but the test's own numbers is the same."""
    found = []
    for name, labels in (("one", small_dataset.test_labels), ("two", (small_dataset.test_labels + 1) % 3)):
        np.savez(
            tmp_path / "other.npz",
            x_train=small_dataset.train_images,
            y_train=small_dataset.train_labels,
            x_test=small_dataset.test_images,
            y_test=labels,
        )
        arguments = ["--dataset", f"npz:{tmp_path / 'other.npz'}", *SMALL, *LISTED, "--quiet"]
        sweep.main([*arguments, "--out", str(tmp_path / name)])
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
    assert found[0]["development"] == found[1]["development"]
    assert found[0]["chosen"] == found[1]["chosen"]
    assert found[0]["test"]["settings"] != found[1]["test"]["settings"]


@pytest.mark.usefixtures("without_plots")
def test_the_development_split_is_the_end_of_the_training_set_and_nothing_is_trained_on_it(
    source: str, small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = development(small_dataset)
    np.testing.assert_array_equal(split.train_images, small_dataset.train_images[:200])
    np.testing.assert_array_equal(split.test_labels, small_dataset.train_labels[200:])
    original, names = search.train_trials, []

    def watched(one: Trials, data: Images, *rest: Any, **named: Any) -> TrainedTrials:
        names.append(one.name)
        np.testing.assert_array_equal(data.images, split.train_images)
        np.testing.assert_array_equal(data.labels, split.train_labels)
        return original(one, data, *rest, **named)

    monkeypatch.setattr(search, "train_trials", watched)
    sweep.main(["--dataset", source, *SMALL, "--epochs", "1", "--seeds", "1", "--quiet", "--out", str(tmp_path / "o")])
    assert [name.rstrip("-0123456789") for name in names] == [
        "teacher", "alone", "label-smoothing", "distilled", "test-alone", "test-label-smoothing", "test-distilled",
    ]  # fmt: skip


def test_a_sweep_that_was_stopped_goes_on_to_the_same_result(
    source: str,
    swept: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = trials.train_stage

    def dies(prepared: Stage, *rest: Any, **named: Any) -> Any:
        if prepared.name.trials.startswith("distilled"):
            raise RuntimeError("died")
        return original(prepared, *rest, **named)

    monkeypatch.setattr(trials, "train_stage", dies)
    out = str(tmp_path / "stopped")
    with pytest.raises(RuntimeError, match="died"):
        sweep.main(["--dataset", source, *SMALL, *LISTED, "--quiet", "--out", out])
    trained: list[str] = []

    def watched(prepared: Stage, data: Images, progress: Any, policy: Any, restored: Any = None, **named: Any) -> Any:
        if restored is None:
            trained.append(prepared.name.folder)
        return original(prepared, data, progress, policy, restored, **named)

    monkeypatch.setattr(trials, "train_stage", watched)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sweep.main(["--out", out, "--resume", "--temperature", "1", "8"])
    assert "--temperature is 1.0 8.0, and the sweep in" in capsys.readouterr().err
    sweep.main(["--out", out, "--resume"])
    assert " s since it was resumed." in capsys.readouterr().out
    assert " s in all." in swept[1]
    assert trained[0].startswith("distilled")
    assert all(name.startswith("test-") for name in trained[1:])
    found = []
    for folder in (swept[0], Path(out)):
        content = json.loads((folder / "results.json").read_text())
        del content["timing"]
        found.append(content)
    assert found[0] == found[1]
    assert (swept[0] / "results.csv").read_bytes() == (Path(out) / "results.csv").read_bytes()
    capsys.readouterr()
    sweep.main(["--out", out, "--resume"])
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_everything_that_is_a_number_can_be_listed(source: str, tmp_path: Path) -> None:
    """Two teachers, two batch sizes and two learning rates, one seed, no label smoothing."""
    arguments = ["--dataset", source, "--epochs", "1", "--seeds", "1", "--quiet", "--label-smoothing"]
    arguments += ["--teacher-hidden", "8", "9", "--student-hidden", "4"]
    arguments += ["--batch-size", "8", "10", "--learning-rate", "0.01", "0.1", "--shift", "1"]
    sweep.main([*arguments, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert len(found["teachers"]) == 2
    kinds = [s["setting"]["kind"] for s in found["development"]["settings"]]
    assert (kinds.count("distilled"), kinds.count("alone"), kinds.count("label smoothing")) == (8, 4, 0)


@pytest.mark.slow
def test_every_width_is_tested_against_its_own_baselines(source: str, tmp_path: Path) -> None:
    arguments = ["--dataset", source, *SMALL, "--student-hidden", "3", "8", "--alpha", "0", "0.5", "--quiet"]
    sweep.main([*arguments, "--label-smoothing", "0.1", "0.2", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / RESULTS).read_text())
    settings = found["development"]["settings"]
    assert sorted(one["student_hidden"] for one in found["chosen_of_each_student"]) == [[3], [8]]
    assert found["chosen"] == found["chosen_of_each_student"][0]
    for one in found["chosen_of_each_student"]:
        width = [s for s in settings if s["setting"]["student_hidden"] == one["student_hidden"]]
        distilled = [s for s in width if s["setting"]["kind"] == "distilled"]
        best = min(distilled, key=lambda s: (runs(s, "errors").mean(), runs(s, "nll").mean()))
        assert best["setting"] == one
        against = [gain["baseline"] for gain in found["test"]["gains"] if gain["setting"] == one]
        assert {"kind": "alone", "student_hidden": one["student_hidden"]} in against
        assert all(baseline["student_hidden"] == one["student_hidden"] for baseline in against)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "alpha-3.png", "alpha-8.png", "heat-map-3.png", "heat-map-8.png", "student-hidden.png",
    ]  # fmt: skip
    table = (tmp_path / "out" / "results.md").read_text()
    for units in (3, 8):
        assert f" {36 * units + units + 3 * units + 3} |" in table
    gains = found["test"]["gains"]
    tested = {json.dumps(s["setting"]): s for s in found["test"]["settings"]}
    for gain in gains:
        before, after = (runs(tested[json.dumps(gain[n])], "correct") for n in ("baseline", "setting"))
        expected = stats.paired_comparison(before, after, metric="correct", comparisons=len(gains))
        assert gain["p_value"] == expected.p_value
        assert gain["corrected_for_comparisons"] == len(gains)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_what_is_shown_while_many_programs_train_ends_at_the_whole(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several epochs and teachers; the students diverge at the larger rate."""
    arguments = ["--dataset", source, *SMALL, "--student-hidden", "3", "--epochs", "1", "2"]
    arguments += ["--teacher-learning-rate", "0.01", "0.02", "--learning-rate", "0.01", "1e20"]
    sweep.main([*arguments, "--label-smoothing", "0.1", "--out", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "% of all" in line]
    shares = [int(line.split("%")[0].split()[-1]) for line in lines]
    assert shares == sorted(shares)
    assert 90 <= shares[-1] <= 100
    assert lines[-1].startswith("test: ")


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_student_that_diverges_in_the_test_costs_the_others_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = search.train_trials

    def fails(one: Trials, *rest: Any, **named: Any) -> TrainedTrials:
        found = original(one, *rest, **named)
        if not one.name.startswith("test-alone"):
            return found
        return found._replace(variables=jax.tree.map(lambda leaf: leaf * np.nan, found.variables))

    monkeypatch.setattr(search, "train_trials", fails)
    sweep.main(["--dataset", source, *SMALL, *LISTED, "--quiet", "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert found["test"]["diverged"] == [{"kind": "alone"}]
    assert {gain["baseline"]["kind"] for gain in found["test"]["gains"]} == {"label smoothing"}
    printed = capsys.readouterr().out
    assert "1 left out, since a number of one of their seeds, or of their teacher, is not finite: alone." in printed


def test_checkpoints_of_another_choice_are_not_gone_on_with(source: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.start({})
    asked = sweep._grid({"temperature": (1.0, 2.0), "batch_size": (8,)})
    entries = plan.student_entries(asked, development(load(source)))
    one, other = grid.distilled(asked)
    for choice, kept in ((one, []), (one, ["checkpoint"]), (other, [])):
        search._keep_the_choice(CheckpointPolicy(store), plan.entries_of_the_test(entries, [choice], asked), asked)
        folder = tmp_path / "checkpoints" / "test-distilled-2-0"
        assert [path.name for path in folder.glob("*")] == kept
        (folder / "checkpoint").mkdir(parents=True, exist_ok=True)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_a_setting_that_diverges_costs_the_others_nothing(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", source, *SMALL, "--student-hidden", "4,4,4", "--alpha", "0", "0.5", "--quiet"]
    arguments += ["--teacher-learning-rate", "0.01"]
    sweep.main([*arguments, "--out", str(tmp_path / "good")])
    sweep.main([*arguments, "--learning-rate", "0.01", "1e20", "--out", str(tmp_path / "both")])
    assert "left out, since a number of one of their seeds, or of their teacher, is not" in capsys.readouterr().out
    good, both = (json.loads((tmp_path / name / RESULTS).read_text()) for name in ("good", "both"))
    assert {one["learning_rate"] for one in both["diverged"]} == {1e20}
    assert [one["kind"] for one in both["diverged"]].count("distilled") == 2
    known = [s for s in both["development"]["settings"] if s["setting"]["learning_rate"] == 0.01]
    assert len(known) == len(good["development"]["settings"]) == len(both["development"]["settings"])
    for one, other in zip(known, good["development"]["settings"], strict=True):
        np.testing.assert_allclose(runs(one, "nll"), runs(other, "nll"), rtol=1e-4)
    assert both["chosen"]["learning_rate"] == 0.01


@pytest.mark.usefixtures("without_plots")
def test_a_teacher_that_diverges_costs_the_others_nothing(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", source, *SMALL, "--seeds", "2", "--label-smoothing", "--quiet"]
    rates = ["--teacher-learning-rate", "1e20", "0.01", "0.02"]
    sweep.main([*arguments, *rates, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert found["diverged"] == [{"kind": "distilled", "teacher_learning_rate": 1e20}]
    assert [one["config"] for one in found["teachers"]] == [{"teacher_learning_rate": rate} for rate in (0.01, 0.02)]
    assert len(found["development"]["settings"]) == 3
    assert "or of their teacher, is not finite: distilled, teacher learning rate 1e+20." in printed
    assert "Here baselines are compared with the first teacher (teacher learning rate 0.01)." in printed
    sweep.main([*arguments, "--teacher-learning-rate", "0.01", "--out", str(tmp_path / "first")])
    alone = json.loads((tmp_path / "first" / RESULTS).read_text())["development"]["settings"][0]
    assert alone["setting"] == {"kind": "alone"}
    assert alone in found["development"]["settings"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        sweep.main([*arguments, "--teacher-learning-rate", "1e20", "1e25", "--out", str(tmp_path / "none")])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "the loss of the teacher with seed 42 is not finite at step 2 at --teacher-learning-rate 1e+20" in error


def test_every_gain_that_is_shown_has_its_baseline_in_the_table() -> None:
    """With more baselines than are shown: six trainings, each with two smoothings."""
    lists = {"learning_rate": (0.1, 0.2, 0.3), "epochs": (1, 2), "temperature": (1.0, 2.0)}
    found = sweeps.made(**lists, label_smoothing=(0.1, 0.2))
    assert found.looked_at == 12 * 3
    table = sweep_report._development_table(found, "pipe").split("\n")
    heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)
    shown = [dict(zip(heads, row, strict=True)) for row in rows]
    known = {(row[""].split()[0], row["learning rate"], row["epochs"]) for row in shown}
    distilled = [row for row in shown if row[""] == "distilled"]
    assert len(distilled) == 10
    for row in distilled:
        assert row["gain on alone"]
        assert row["gain on smoothed"]
        assert {(kind, row["learning rate"], row["epochs"]) for kind in ("alone", "smoothed")} <= known
    words = sweep_report.text(found, markdown=True)
    assert "the best 10 of 12 distilled settings, their baselines, the best baseline of all and the teacher):" in words


def test_the_chosen_setting_of_every_width_is_in_the_table() -> None:
    found = sweeps.made(student_hidden=((4,), (8,)), temperature=tuple(float(t) for t in range(1, 14)))
    (worst,) = (s for s in found.chosen if s != found.chosen[0])
    slow = {s: sweeps.measured(m.errors + 50) for s, m in found.students.items() if s.config == worst.config}
    found = found._replace(students=found.students | slow)
    rows = sweep_report._development_table(found, "pipe").split("\n")
    own = [row for row in rows if row.startswith("| distilled") and f" {worst.config.student_hidden[0]} |" in row]
    assert any(f"{np.mean(found.students[worst].errors):.1f} ±" in row for row in own)
    words = sweep_report.text(found, markdown=True)
    assert "the best 10 of 26 distilled settings and the best of each student, the baselines and the teacher):" in words


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_what_a_diverged_teacher_leaves_undone_is_no_time_that_is_left(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", source, *SMALL, "--seeds", "2", "--label-smoothing", "--temperature", "1", "2"]
    rates = ["--teacher-learning-rate", "1e20", "1e21", "0.01"]
    sweep.main([*arguments, *rates, "--out", str(tmp_path / "out")])
    told = (line.partition("% of all") for line in capsys.readouterr().out.split("\n"))
    shares = [int(before.split()[-1]) for before, found, _ in told if found]
    assert shares == sorted(shares)
    assert shares[-1] == 100


@pytest.mark.parametrize("kind", [grid.ALONE, grid.SMOOTHED, grid.DISTILLED])
def test_it_is_said_where_a_baseline_is_the_best(kind: str) -> None:
    found = sweeps.made(temperature=(1.0, 2.0))
    students = {s: sweeps.measured(m.errors + 50 * (s.kind != kind)) for s, m in found.students.items()}
    words = sweep_report.text(found._replace(students=students))
    whose = {grid.ALONE: "alone", grid.SMOOTHED: "with labels smoothed by 0.1"}
    assert ("Here no distilled setting is better than the student" in words) == (kind != grid.DISTILLED)
    assert kind == grid.DISTILLED or f"better than the student {whose[kind]}" in words


def test_one_seed_is_said_to_be_too_few_before_anything_is_trained(small_dataset: Dataset) -> None:
    for seeds, too_few in ((1, True), (2, False)):
        asked = sweep._grid({"seeds": (seeds,), "temperature": (1.0, 2.0)})
        words = sweep_report.header(asked, development(small_dataset), Path("out"))
        assert ("cannot tell a gain from noise: see --seeds" in words) == too_few


def test_the_header_tells_how_the_teachers_are_trained(small_dataset: Dataset) -> None:
    split, more = development(small_dataset), {"shift": (1,), "shift_share": (0.5,), "teacher_dropout": (0.25,)}
    lines = {
        name: dict(line.split(None, 1) for line in sweep_report.header(asked, split, Path("out")).splitlines())
        for name, asked in {
            "plain": sweep._grid({"warmup": (0.0, 0.1)}),
            "more": sweep._grid(more | {"teacher_max_norm": (1.0, 2.0)}),
        }.items()
    }
    assert lines["plain"]["grid"].startswith("warm-up 0 0.1: 2 settings")
    assert lines["plain"]["teachers"].endswith("Adam 0.0003, dropout 0.5")
    assert "share" not in lines["plain"]["fixed"]
    assert "share of the images shifted 0.5" in lines["more"]["fixed"]
    of_teachers = "shifts of up to 1 pixel of 50 % of the images, dropout 0.25, but for what is listed"
    assert lines["more"]["teachers"].endswith(of_teachers)


def test_numbers_of_students_that_all_but_diverged_are_short() -> None:
    huge = sweeps.measured(np.array([3, 4]))._replace(nll=np.array([9.6e38, 1e30]))
    assert sweep_report._measures(huge)[1] == "4.8e+38 ± 6.79e+38"


def test_where_everything_diverges_there_is_one_sentence(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["--teacher-learning-rate", "0.01", "--learning-rate", "1e25", "1e20"]
    with pytest.raises(SystemExit) as caught:
        sweep.main(["--dataset", source, *SMALL, *rates, "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    assert "no distilled student has a finite loss to its end" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "1", "1"], "--temperature has 1 twice"),
        (["--temperature", "4", "4.0000001"], "--temperature has 4.0000001 twice"),
        (["--learning-rate", "1e39", "1e40"], "--learning-rate is 1e+39: it must be from 1e-30 to 1e+30"),
        (
            ["--teacher-max-norm", "1", "1e300"],
            "--teacher-max-norm is 1e+300: it must be 0 (none), or from 1e-15 to 1e+15",
        ),
        (["--temperature", "-inf", "2"], "--temperature is -inf: it must be from 1e-15"),
        (["--alpha", "-1e-3"], "--alpha is -0.001: it must be from 0"),
        (["--student-hidden", "20", "20"], "--student-hidden has 20 twice: give each value once, and join the layers"),
        (["--alpha", "0", "2"], "--alpha is 2.0"),
        (["--label-smoothing", "2"], "--label-smoothing is 2.0"),
        (["--temperatures", "1"], "unknown option '--temperatures': did you mean --temperature?"),
        (["--seeds", "3", "4"], "'4' belongs to no option: give an option's name before it (--dataset, --preset, --s"),
        (["--shift", "7"], "--shift is 7: it must be below the 6 pixels"),
        (["--batch-size", "8", "300"], "--batch-size is 300: it must be at most the 200 training examples"),
        (["--seeds", "2000000000"], "--seeds is 2000000000: the parameters of 2,000,000,000 students"),
        (
            ["--seed", "2147483640"],
            "--seed is 2147483640: it must be at most 2147483633, as the test takes 5 seeds more",
        ),
        (["--resume"], "--resume is given without --out"),
    ],
)
def test_bad_options_are_one_sentence(
    source: str, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        sweep.main(
            ["--dataset", source, *arguments, *([] if "--resume" in arguments else ["--out", str(tmp_path / "o")])]
        )
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_help_says_how_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main(["--help"])
    text = capsys.readouterr().out
    for word in ("--temperature X [X ...]", "--label-smoothing", "development split", "read once", "--resume"):
        assert word in text


def test_costs_count_every_training(source: str) -> None:
    dataset = load(source)
    asked = sweep._grid({"temperature": (1.0, 2.0), "seeds": (4,), "epochs": (3,), "batch_size": (8,)})
    each, total = plan.costs(asked, development(dataset))
    steps = 3 * (200 // 8)
    assert total == pytest.approx(steps * sum(each.values()))
    assert 2 * each["test-distilled-2"] == pytest.approx(each["distilled-2"])
    kinds = ("alone-0", "label-smoothing-1", "distilled-2")
    assert set(each) == {"teacher-0", *kinds, *(f"test-{kind}" for kind in kinds)}
    assert each["distilled-2"] == pytest.approx(2 * each["alone-0"]) == pytest.approx(2 * each["label-smoothing-1"])


def test_trainings_are_told_apart_by_words(source: str) -> None:
    split = development(load(source))
    asked = sweep._grid({"alpha": (0.0, 0.5), "epochs": (3, 4), "batch_size": (8,), "label_smoothing": (0.1,)})
    words = plan.words(asked, split)
    assert set(words) == set(plan.costs(asked, split)[0])
    assert sorted(words.values()) == [
        "alone 1 of 2", "alone 2 of 2", "distilled 1 of 2", "distilled 2 of 2", "label smoothing 1 of 2",
        "label smoothing 2 of 2", "teacher", "test: alone", "test: alone", "test: distilled", "test: distilled",
        "test: label smoothing", "test: label smoothing",
    ]  # fmt: skip
    assert plan.words(sweep._grid({"batch_size": (8,)}), split)["distilled-2"] == "distilled"


def test_a_run_does_not_go_on_in_the_folder_of_a_sweep(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it is asked for may be the sweep's own configuration."""
    original = trials.train_stage

    def dies(prepared: Stage, *rest: Any, **named: Any) -> Any:
        if prepared.name.trials.startswith("alone"):
            raise RuntimeError("died")
        return original(prepared, *rest, **named)

    monkeypatch.setattr(trials, "train_stage", dies)
    out = str(tmp_path / "out")
    with pytest.raises(RuntimeError, match="died"):
        sweep.main(["--dataset", source, *SMALL, "--quiet", "--out", out])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run.main(["--out", out, "--resume", "--quiet"])
    assert caught.value.code == 2
    assert "has what another command started" in capsys.readouterr().err


def test_measures_that_are_no_numbers_fail_in_one_sentence(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After one step of such a length every parameter is finite, and no logit."""
    arguments = ["--dataset", source, *SMALL, "--batch-size", "200", "--epochs", "1", "--teacher-learning-rate", "0.01"]
    with pytest.raises(SystemExit) as caught:
        sweep.main([*arguments, "--learning-rate", "1e20", "--quiet", "--out", str(tmp_path / "out")])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no distilled student has a finite loss to its end: choose smaller learning rates" in error


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_one_teachers_outputs_are_kept_at_a_time_and_computed_once(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, int]] = []
    held: list[Any] = []
    original = of_images.teacher_logits

    def watched(variables: Any, images: Any, *, network: Any, shift: int) -> Any:
        assert [kept() for kept in held if kept() is not None] == []
        asked.append((float(jax.tree.leaves(variables)[-1].sum()), shift))
        found = original(variables, images, network=network, shift=shift)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(of_images, "teacher_logits", watched)
    arguments = ["--dataset", source, "--epochs", "1", "--seeds", "1", "--quiet", "--label-smoothing"]
    arguments += ["--shift", "0", "1", "--batch-size", "40"]
    arguments += ["--teacher-hidden", "8", "--teacher-epochs", "1", "2", "--student-hidden", "4"]
    sweep.main([*arguments, "--out", str(tmp_path / "out")])
    # The students of the test ask for those of their setting again.
    assert len(set(asked)) == len(set(asked[:4])) == 4
    assert len(asked) <= 5


def test_students_of_one_width_are_one_network_and_so_measured_by_one_program(source: str) -> None:
    asked = sweep._grid({"temperature": (1.0, 2.0), "student_hidden": ((4,), (5,)), "batch_size": (8,)})
    entries = plan.student_entries(asked, development(load(source)))
    assert len(entries) == 6
    assert len({entry.network for entry in entries}) == 2
