import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats as scipy_stats

from kd_jax import reproduce
from kd_jax.data import shifts
from kd_jax.data.dataset import Dataset
from kd_jax.errors import ConfigError, RunError
from kd_jax.experiments import images as of_images
from kd_jax.experiments import stage as stages
from kd_jax.experiments.hinton2015 import bias, contrasts, row_trials
from kd_jax.experiments.hinton2015 import plan as hinton
from kd_jax.experiments.hinton2015 import plots as hinton_plots
from kd_jax.experiments.hinton2015 import report as hinton_report
from kd_jax.experiments.hinton2015 import rows as hinton_rows
from kd_jax.experiments.hinton2015.plan import Plan, Width
from kd_jax.experiments.images import Images
from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.config import Training
from kd_jax.experiments.shell import progress
from kd_jax.experiments.shell.progress import Silent, StageName
from kd_jax.experiments.stage import Stage
from kd_jax.experiments.trials import Trials
from kd_jax.models import parameters
from kd_jax.train import memory
from kd_jax.train.checkpoint import CheckpointPolicy, Store

pytestmark = pytest.mark.usefixtures("quick_compiling")

_TRAINING = Training(2, 8, 0.01, "cosine", 0)
TINY = Plan(
    teacher_hidden=(16,),
    teacher_training=_TRAINING._replace(epochs=4, shift=1),
    widths=(
        Width(8, (8.0, 20.0), _TRAINING, _TRAINING),
        Width(4, (1.0, 2.5, 4.0, 20.0), _TRAINING, _TRAINING),
    ),
    alpha=0.1,
    shifted_alone=_TRAINING._replace(shift=1),
    shifted_distilled=_TRAINING._replace(shift=1),
    left_out=1,
    only=(1, 2),
    seeds=3,
)
PARTS = ["teacher", "alone-8", "distilled-8", "no3", "only78", "alone-4", "distilled-4", "temperature-8"]
OWN_PARTS = ["averaged", "alone-shifted", "distilled-shifted"]
FILES = ("results.json", "results.csv", "results.md", "rows.png", "temperature.png", "bias.png")


@pytest.fixture
def tiny(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The command does its work on few images with small networks."""
    monkeypatch.setattr(reproduce, "load", lambda source: small_dataset)
    monkeypatch.setattr(hinton, "PLAN", TINY)
    return small_dataset


def reproduced(*arguments: str) -> None:
    reproduce.main(["hinton2015", *arguments])


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr with which `arguments` are refused."""
    with pytest.raises(SystemExit) as caught:
        reproduce.main(arguments)
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.err.count("\n") == 1
    assert output.err.startswith("kd_jax: ")
    return output.err


@pytest.mark.parametrize("classes", [(3,), (7, 8), (0, 1, 2, 3, 4, 5, 6, 7, 8)])
def test_errors_for_every_offset_are_those_of_moved_logits(classes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(classes))
    labels = rng.integers(0, 10, 300)
    logits = (3 * rng.normal(size=(300, 10)) + 4 * np.eye(10)[labels]).astype(np.float32)
    logits[:, list(classes)] -= 3
    found = bias.errors(logits, labels, classes)
    offsets = np.linspace(-25, 25, 2001)

    def brute(offset: float) -> int:
        moved = logits.astype(np.float64)
        moved[:, list(classes)] += offset
        return int((moved.argmax(axis=1) != labels).sum())

    expected = [brute(offset) for offset in offsets]
    np.testing.assert_array_equal(bias.at(found, offsets), expected)
    assert brute(bias.best(found)) <= min(expected)
    assert brute(bias.best(found)) == found.counts.min()


def test_the_best_offset_is_in_the_middle_and_far_from_an_edge() -> None:
    """Two images of class 0, told as 1, need more than 1 and 2; one of class 1 allows at most 5."""
    logits = np.array([[0, 1], [0, 2], [0, 5]], np.float32)
    assert bias.best(bias.errors(logits, np.array([0, 0, 1]), (0,))) == 3.5
    assert bias.best(bias.errors(logits[:0], np.zeros(0, np.int64), (0,))) == 0


@pytest.mark.parametrize("classes", [(), (0, 1)])
def test_biases_of_all_or_no_classes_are_refused(classes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="all or none of 2: move the biases of some"):
        bias.errors(np.zeros((1, 2), np.float32), np.zeros(1, np.int64), classes)


def test_every_row_has_its_parts_and_the_papers_recipe() -> None:
    parts = hinton.all_trials(hinton.PLAN, 10)
    assert parts["distilled-800"].temperatures == (20,)
    assert parts["temperature-800"].temperatures == (8,)
    assert {part.name for part in parts.values() if part.averaged} == {"averaged"}
    assert parts["averaged"]._replace(name="distilled-800", averaged=0) == parts["distilled-800"]
    # The paper's transfer set has no translations.
    shifted = {name for name, part in parts.items() if part.training.shift}
    assert shifted == {"teacher", "alone-shifted", "distilled-shifted"}
    assert {parts[name].training.shift for name in shifted} == {2}
    assert parts["alone-shifted"].training.epochs == parts["distilled-shifted"].training.epochs
    assert parts["distilled-300"].temperatures == (2.5, 8, 20)
    assert parts["distilled-30"].temperatures == (1, 2.5, 4, 8, 20)
    assert parts["no3"].kept == (0, 1, 2, 4, 5, 6, 7, 8, 9)
    assert parts["only78"].kept == parts["only78"].moved == (7, 8)
    assert {name for row in hinton.ROWS for name in hinton.names_of(row, hinton.PLAN, 10)} == set(parts)
    assert [part.name for part in hinton.wanted(("distilled",), hinton.PLAN, 10)] == ["teacher", "distilled-800"]
    short = hinton.quick(hinton.PLAN)
    for name, part in hinton.all_trials(short, 10).items():
        share = 0.06 if name == "teacher" else 0.2
        assert part.training == parts[name].training._replace(epochs=round(share * parts[name].training.epochs))


@pytest.mark.parametrize("errors", [(68, 105), (69, 98), (67, 4730)])
def test_the_plot_of_the_rows_tells_numbers_on_its_axis(errors: tuple[int, int]) -> None:
    lines = [hinton_report.Line("row", "set-up", [one], None) for one in errors]
    figure = hinton_plots._rows(lines)
    FigureCanvasAgg(figure).draw()
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    ticks = (*axis.xaxis.get_major_ticks(), *axis.xaxis.get_minor_ticks())
    told = {t.label1.get_text() for t in ticks if low <= t.get_loc() <= high} - {""}
    assert 3 <= len(told) <= 8


def test_the_plot_of_temperatures_hides_no_interval_behind_its_legend() -> None:
    by_width: dict[int, dict[float | None, list[int]]] = {8: {None: [9, 7], 8.0: [5, 6], 20.0: [4, 8]}}
    figure = hinton_plots._temperature(by_width)
    FigureCanvasAgg(figure).draw()
    (axis,), (legend,) = figure.axes, figure.legends
    assert axis.get_legend() is None
    assert not legend.get_window_extent().overlaps(axis.get_window_extent())


def test_what_is_asked_without_rows_is_the_papers_table(tmp_path: Path) -> None:
    """Only that, also of a folder that has nothing yet."""
    for arguments in ([], ["--out", str(tmp_path), "--resume"]):
        options = reproduce._parser().parse(["hinton2015", *arguments])
        rows = reproduce._rows(options, Store(tmp_path))
        assert rows == hinton.PAPERS_ROWS
        assert set(rows) == {*hinton.PAPER, "temperature"}


@pytest.mark.slow
def test_the_transfer_set_lacks_the_class_and_keeps_the_teachers_rows(
    small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def watched(asked: Trials, data: Images, *arguments: Any, **named: Any) -> Any:
        seen[asked.name] = data
        return original(asked, data, *arguments, **named)

    original = row_trials.train_trials
    monkeypatch.setattr(row_trials, "train_trials", watched)
    rng = np.random.default_rng(0)
    taught = row_trials.Taught(*(rng.normal(size=(count, 3)).astype(np.float32) for count in (240, 60)))
    parts = hinton.all_trials(TINY, 3)
    for name, kept in (("no3", (0, 2)), ("only78", (1, 2)), ("distilled-8", (0, 1, 2))):
        found, _ = row_trials.train_row(parts[name], TINY, small_dataset, taught, Silent(), CheckpointPolicy())
        own = seen[name]
        assert tuple(np.unique(own.labels)) == kept
        rows = np.isin(small_dataset.train_labels, kept)
        np.testing.assert_array_equal(own.images, small_dataset.train_images[rows])
        np.testing.assert_array_equal(own.logits, taught.train[rows])
        assert found["examples"] == rows.sum()
        assert [run["seed"] for run in found["runs"]] == [42, 43, 44]
        for run in found["runs"]:
            assert sum(run["errors_by_class"]) == run["errors"]
            assert ("moved" in run) == (name != "distilled-8")
            if "moved" in run:
                at_zero = run["moved"]["curve"][list(hinton.CURVE).index(0)]
                assert at_zero == run["errors"]
                assert run["moved"]["test"]["errors"] <= min(*run["moved"]["curve"], run["moved"]["training"]["errors"])


def trained_rows(
    rows: tuple[str, ...], plan: Plan, dataset: Dataset, folder: Path
) -> tuple[dict[str, Any], hinton_rows.KeptRows]:
    """What rows gave, with what the folder holds of them, and its files."""
    store = Store(folder)
    identity = {"config": hinton.as_dict(plan), "table": "hinton2015"}
    if not store.started:
        store.start(identity)
    files = hinton_rows.KeptRows(folder, identity)
    return hinton_rows.run_rows(rows, plan, dataset, Silent(), CheckpointPolicy(store), files), files


@pytest.mark.slow
def test_the_averaged_row_is_taught_by_the_mean_of_the_teachers_logits(
    small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = TINY._replace(seeds=2), {}
    original = row_trials.train_row

    def watched(part: hinton.RowTrials, own: Plan, dataset: Dataset, taught: Any, *arguments: Any) -> Any:
        asked[part.name] = taught
        return original(part, own, dataset, taught, *arguments)

    monkeypatch.setattr(row_trials, "train_row", watched)
    found, files = trained_rows(("distilled", "averaged"), plan, small_dataset, tmp_path)
    assert asked["teacher"] is None
    network = row_trials.network(hinton.all_trials(plan, 3)["teacher"], plan, small_dataset)
    variables = network.merge(*parameters.load(files.teacher, network))
    for images, one_view, mean in (
        (small_dataset.train_images, asked["distilled-8"].train, asked["averaged"].train),
        (small_dataset.test_images, asked["averaged"].test, asked["averaged"].averaged),
    ):
        views = np.asarray(of_images.teacher_logits(variables, jnp.asarray(images), network=network, shift=1))
        np.testing.assert_allclose(one_view, views[4], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(mean, views.mean(axis=0), rtol=1e-5, atol=1e-5)
    for taught in asked["distilled-8"], asked["averaged"]:
        np.testing.assert_array_equal(taught.test, asked["distilled-8"].test)
    by_mean = asked["averaged"].averaged
    assert found["averaged"]["taught_by"]["errors"] == (by_mean.argmax(axis=1) != small_dataset.test_labels).sum()
    assert "taught_by" not in found["distilled-8"]


@pytest.mark.slow
def test_students_that_see_shifts_are_taught_by_the_logits_of_the_shifted_image(
    small_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked, seen = TINY._replace(seeds=2), {}, {}
    original, trained = row_trials.train_row, row_trials.train_trials

    def watched(part: hinton.RowTrials, own: Plan, dataset: Dataset, taught: Any, *arguments: Any) -> Any:
        asked[part.name] = taught
        return original(part, own, dataset, taught, *arguments)

    def given(own: Trials, data: Images, *arguments: Any, **named: Any) -> Any:
        seen[own.name] = own.setup, data
        return trained(own, data, *arguments, **named)

    monkeypatch.setattr(row_trials, "train_row", watched)
    monkeypatch.setattr(row_trials, "train_trials", given)
    found, files = trained_rows(("distilled", "shifted"), plan, small_dataset, tmp_path)
    assert list(found) == ["teacher", "distilled-8", "alone-shifted", "distilled-shifted"]
    network = row_trials.network(hinton.all_trials(plan, 3)["teacher"], plan, small_dataset)
    variables = network.merge(*parameters.load(files.teacher, network))
    images = jnp.asarray(small_dataset.train_images)
    views = np.asarray(of_images.teacher_logits(variables, images, network=network, shift=1))
    np.testing.assert_array_equal(asked["distilled-shifted"].train, views)
    np.testing.assert_allclose(asked["distilled-8"].train, views[4], rtol=1e-5, atol=1e-5)
    for name in OWN_PARTS[1:]:
        np.testing.assert_array_equal(asked[name].test, asked["distilled-8"].test)
        setup, data = seen[name]
        assert setup.shift == 1
        np.testing.assert_array_equal(data.images, shifts.pad(images, 1))
    assert seen["alone-shifted"][1].logits is None
    np.testing.assert_array_equal(seen["distilled-shifted"][1].logits, views)


def test_the_rule_that_never_sees_the_test_set_does_not(small_dataset: Dataset) -> None:
    rng = np.random.default_rng(0)
    logits = {part: rng.normal(size=(count, 3)).astype(np.float32) for part, count in (("test", 60), ("train", 240))}
    for classes in ((0,), (1, 2)):
        found = row_trials.moved(logits["test"], logits["train"], small_dataset, classes)
        expected = bias.best(bias.errors(logits["train"], small_dataset.train_labels, classes))
        assert found["training"]["offset"] == expected != found["test"]["offset"]
        others = small_dataset._replace(test_labels=np.roll(small_dataset.test_labels, 1))
        again = row_trials.moved(logits["test"][::-1], logits["train"], others, classes)
        assert again["training"]["offset"] == expected


def test_what_does_not_fit_into_memory_is_refused_before_anything_is_trained(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1000)
    error = refused(["hinton2015", "--out", str(tmp_path / "out")], capsys)
    assert "one training needs" in error
    assert "stop other programs, or use a machine with more memory" in error
    assert not (tmp_path / "out").exists()


def test_a_later_part_that_does_not_fit_is_refused_before_the_first_is_trained(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not asked for, or done already, need not fit."""
    fits, trained = row_trials.at_once, []

    def of_all_but_the_last(part: hinton.RowTrials, *others: Any) -> int:
        if part.name == PARTS[-1]:
            raise ConfigError("there is no room")
        return fits(part, *others)

    class Started(Silent):
        def start(self, stage: StageName, **others: Any) -> None:
            super().start(stage, **others)
            trained.append(stage.folder)

    monkeypatch.setattr(row_trials, "at_once", of_all_but_the_last)
    monkeypatch.setattr(progress, "Silent", Started)
    out = tmp_path / "out"
    assert "there is no room" in refused(["hinton2015", "--quiet", "--out", str(out)], capsys)
    assert not trained
    assert not out.exists()
    reproduced("--quiet", "--rows", "teacher", "--out", str(out))
    assert trained == ["teacher-0"]
    monkeypatch.setattr(memory, "available", lambda: 1000)
    reproduced("--quiet", "--resume", "--out", str(out))
    assert trained == ["teacher-0"]
    assert capsys.readouterr().out.count("16 hidden, dropout 0.3 (0.1 of the inputs)") == 2


def test_the_time_is_estimated_from_as_many_students_as_fit(
    small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, told = [], []

    class Told(Silent):
        def compiled(self, compile_s: float, expected_s: float) -> None:
            told.append(expected_s)

    def trial(prepared: Stage, data: Images) -> float:
        tried.append(prepared.seeds)
        return float(len(prepared.seeds))

    monkeypatch.setattr(stages, "time_an_epoch", trial)
    missing = list(hinton.all_trials(TINY, 3).values())
    for most in (100, 2):
        monkeypatch.setattr(row_trials, "at_once", lambda *arguments, most=most: most)
        hinton_rows._estimate(missing, TINY, small_dataset, Told())
    assert tried == [(42, 43, 44), (42, 43)]
    assert told[0] == pytest.approx(told[1])
    # Students that see nine views are trained as long as those that see one, and their teacher is asked for all.
    parts = hinton.all_trials(TINY, 3)
    for name in ("distilled-8", "distilled-shifted"):
        hinton_rows._estimate([parts[name]], TINY, small_dataset, Told())
    trained, asked = hinton_rows._work(parts["distilled-8"], TINY, small_dataset), 240 * (36 * 16 + 16 * 3 + 50_000) / 3
    assert told[3] / told[2] == pytest.approx((trained + 9 * asked) / (trained + asked))


@pytest.mark.slow
def test_every_row_is_reproduced_and_reported(
    tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    reproduced("--out", str(out), "--seeds", "3", "--rows", *hinton.ROWS)
    printed = capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    assert list(found["parts"]) == [*PARTS, *OWN_PARTS]
    assert list(found["rows"]) == list(hinton.ROWS)
    assert len(found["parts"]["distilled-4"]["runs"]) == 4 * 3
    assert [len(found["parts"][name]["runs"]) for name in ("teacher", "alone-8")] == [1, 3]
    assert found["rows"]["alone"]["paper"] == {"errors": 146}
    timing = found["parts"]["distilled-shifted"]["timing"]
    assert timing["total_s"] > timing["train_s"] + timing["teacher_outputs_s"] > timing["train_s"]
    assert found["data"]["sha256"] == tiny.digest()
    alone, distilled, averaged, alone_shifted, distilled_shifted = (
        [run["errors"] for run in found["parts"][name]["runs"]] for name in ("alone-8", "distilled-8", *OWN_PARTS)
    )
    assert len(found["comparisons"]) == 5 + 3
    of_8 = found["comparisons"][:5]
    compared = (
        ("8 units, T = 20 against alone", alone, distilled),
        ("8 units, mean logits over shifts against those of one view", distilled, averaged),
        ("8 units, T = 20 against alone, both with shifts", alone_shifted, distilled_shifted),
        ("8 units, T = 20, with shifts in the transfer set against without", distilled, distilled_shifted),
    )
    assert [one["what"] for one in of_8] == [*(what for what, *_ in compared), "8 units, T = 20 against T = 8"]
    for one, (_, before, after) in zip(of_8, compared, strict=False):
        assert one["mean_difference"] == pytest.approx(np.mean(after) - np.mean(before))
    # Three equal differences have no p-value.
    ordered = sorted((one for one in of_8 if one["p_value"] is not None), key=lambda one: one["p_value"])
    count = len(ordered)
    holm = np.maximum.accumulate([min(1, (count - place) * one["p_value"]) for place, one in enumerate(ordered)])
    np.testing.assert_allclose([one["p_corrected"] for one in ordered], holm)
    lines = [(line["row"], line["errors"]) for line in found["table"]]
    assert lines[3:7] == [
        ("averaged", averaged),
        ("averaged", [found["parts"]["averaged"]["taught_by"]["errors"]]),
        ("shifted", alone_shifted),
        ("shifted", distilled_shifted),
    ]
    own = [one for one in found["comparisons"] if one["what"].startswith("4 units")]
    assert len(own) == 3
    for one in own:
        # Differences that are too alike have neither.
        assert (one["p_corrected"] is None) == (one["p_value"] is None)
        assert one["p_value"] is None or one["p_corrected"] >= one["p_value"]
    assert "\n- teacher: 4 epochs of" in (out / "results.md").read_text()
    for text in (printed, (out / "results.md").read_text()):
        assert "chosen on the test set, as in the paper" in text
        assert "it never sees the test set" in text
        assert "The row averaged is not in the paper." in text
        assert "The row shifted is not in the paper" in text
        assert "Holm's method" in text
    assert "training will take about" in printed
    for name in FILES:
        assert (out / name).stat().st_size > 0
    assert len((out / "results.csv").read_text().splitlines()) == 1 + sum(
        len(p["runs"]) for p in found["parts"].values()
    )
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["teacher-0"]


def test_what_is_announced_is_what_will_be_trained(small_dataset: Dataset) -> None:
    shorter = TINY.widths[1]._replace(alone=_TRAINING._replace(epochs=1))
    plan = TINY._replace(widths=(TINY.widths[0], shorter))

    def announced(*rows: str) -> dict[str, str]:
        lines = hinton_report.header(rows, plan, small_dataset, Path("out")).splitlines()
        return {line.split()[0]: line.partition(" ")[2].strip() for line in lines}

    assert set(announced("teacher")) == {"data", "rows", "teacher", "device", "results"}
    assert set(announced("alone")) == {"data", "rows", "teacher", "alone", "students", "device", "results"}
    assert announced("alone")["alone"].startswith("2 epochs of 30 steps")
    both = announced("temperature")
    assert both["alone"].startswith("8 units: 2 epochs of 30 steps")
    assert "; 4 units: 1 epoch of 30 steps" in both["alone"]
    assert both["distilled"].startswith("alpha 0.1, T = 1, 2.5, 4, 8, 20; 2 epochs")
    assert announced("no3")["distilled"].startswith("alpha 0.1, T = 20; 2 epochs")
    shifted = announced("distilled", "shifted")
    assert shifted["alone"].startswith("2 epochs of 30 steps")
    plain, other = shifted["distilled"].removeprefix("alpha 0.1, T = 20; ").split("; ")
    assert plain.startswith("8 units: 2 epochs")
    assert other.startswith("8 units, shifted: 2 epochs")


def test_each_comparison_is_of_its_own_parts_seed_by_seed() -> None:
    rng = np.random.default_rng(0)
    plan = TINY._replace(seeds=5)
    names = ["alone-8", "distilled-8", "averaged", "alone-shifted", "distilled-shifted"]
    errors = {name: (rng.integers(0, 9, 5) + 7 * place).tolist() for place, name in enumerate(names)}
    found: dict[str, Any] = {name: {"runs": [{"errors": one} for one in own]} for name, own in errors.items()}
    pairs = (names[:2], names[1:3], names[3:5], [names[1], names[4]])
    given = contrasts.contrasts(found, plan)
    for one, (before, after) in zip(given, pairs, strict=True):
        assert one.mean_difference == pytest.approx(np.mean(errors[after]) - np.mean(errors[before]))
        assert one.p_value == pytest.approx(scipy_stats.ttest_rel(errors[before], errors[after]).pvalue)


def test_logits_of_all_views_have_their_room(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, room = hinton.all_trials(TINY, 3), 10**6
    monkeypatch.setattr(memory, "available", lambda: room)
    fits = {}
    for name in ("distilled-8", "distilled-shifted"):
        own = row_trials.network(parts[name], TINY, small_dataset)
        layers = recipes.layer_sizes(parts[name].hidden, small_dataset)
        one = memory.needed(own, layers, examples=240, test_examples=len(small_dataset.test_labels))
        fits[name] = row_trials.at_once(parts[name], small_dataset, own), one.total(8)
    logits = 240 * 3 * 4
    for name, views in (("distilled-8", 1), ("distilled-shifted", 9)):
        found, each = fits[name]
        assert found == (room - views * logits) // each
    assert fits["distilled-8"][0] != fits["distilled-shifted"][0]


def test_the_better_of_two_is_corrected_for_having_been_chosen() -> None:
    """Holm's method over all that either of the two might have been compared with: five pairs."""
    rng = np.random.default_rng(0)
    own: dict[float | None, list[int]] = {
        t: (rng.integers(0, 9, 6) + 3 * place).tolist() for place, t in enumerate((None, 4.0, 2.5, 1.0, 20.0))
    }
    pairs = [(4.0, 2.5), (4.0, 1.0), (4.0, 20.0), (2.5, 1.0), (2.5, 20.0)]
    plain = sorted(scipy_stats.ttest_rel(own[a], own[b]).pvalue for a, b in pairs)
    holm = dict(zip(plain, np.maximum.accumulate([min(1, (5 - i) * p) for i, p in enumerate(plain)]), strict=True))
    found = contrasts._better_against_others(4, own)
    assert [one.what.rpartition("against ")[2] for one in found] == ["T = 2.5", "T = 1", "T = 20"]
    for one, (a, b) in zip(found, pairs[:3], strict=True):
        assert one.mean_difference == pytest.approx(np.mean(own[a]) - np.mean(own[b]))
        nearest = min(plain, key=lambda p, one=one: abs(p - one.p_value))
        assert one.p_value == pytest.approx(nearest)
        assert one.p_corrected == pytest.approx(holm[nearest])


@pytest.mark.slow
def test_finished_rows_are_read_and_not_trained_again(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    reproduced("--out", str(out), "--rows", "alone", "--quiet", "--seeds", "2")
    kept = {path: path.read_bytes() for path in (out / "rows").glob("*-8.json")}
    assert len(kept) == 1
    trained = []
    original = row_trials.train_row

    def watched(part: hinton.RowTrials, *arguments: Any) -> Any:
        trained.append(part.name)
        return original(part, *arguments)

    monkeypatch.setattr(row_trials, "train_row", watched)
    reproduced("--out", str(out), "--rows", "distilled", "--quiet", "--resume")
    assert trained == ["distilled-8"]
    assert {path: path.read_bytes() for path in kept} == kept
    found = json.loads((out / "results.json").read_text())
    assert list(found["rows"]) == ["teacher", "alone", "distilled"]
    for row in hinton.ROWS[-2:]:
        assert f"The row {row}" not in (out / "results.md").read_text()
    reproduce.main(["--out", str(out), "--rows", "distilled,averaged", "--quiet", "--resume"])
    assert trained == ["distilled-8", "averaged"]
    assert "The row averaged" in (out / "results.md").read_text()
    before = (out / "results.json").read_bytes()
    capsys.readouterr()
    reproduced("--out", str(out), "--resume")
    assert "is finished" in capsys.readouterr().out
    assert trained == ["distilled-8", "averaged"]
    assert (out / "results.json").read_bytes() == before
    assert "--seeds is 3, and the run in" in refused(
        ["hinton2015", "--out", str(out), "--resume", "--seeds", "3"], capsys
    )
    assert "already holds results" in refused(["hinton2015", "--out", str(out)], capsys)
    reproduced("--out", str(out), "--rows", "teacher", "--quiet", "--overwrite")
    assert list(json.loads((out / "results.json").read_text())["parts"]) == ["teacher"]


def alone_and_no3(folder: Path, dataset: Dataset) -> dict[str, Any]:
    """The runs of two rows, with what the folder holds of them."""
    found, _ = trained_rows(("alone", "no3"), TINY._replace(seeds=2), dataset, folder)
    return {name: part["runs"] for name, part in found.items()}


@pytest.fixture(scope="module")
def in_one_go(small_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, quick_compiling: None) -> Any:
    return alone_and_no3(tmp_path_factory.mktemp("whole"), small_dataset)


@pytest.mark.parametrize("lost", ["nothing", "a part", "the teacher"])
def test_what_was_stopped_goes_on_and_loses_nothing(
    tiny: Dataset, in_one_go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Stopped between two parts, and with files damaged meanwhile, it ends with the numbers of a run in one go."""
    original = row_trials.train_row

    def stopping(part: hinton.RowTrials, *arguments: Any) -> Any:
        if part.name == "no3":
            raise KeyboardInterrupt
        return original(part, *arguments)

    folder = tmp_path / "stopped"
    folder.mkdir()
    monkeypatch.setattr(row_trials, "train_row", stopping)
    with pytest.raises(KeyboardInterrupt):
        alone_and_no3(folder, tiny)
    if lost == "a part":
        path = folder / "rows" / "alone-8.json"
        path.write_text(path.read_text().replace('"errors": ', '"errors": 1'))
    if lost == "the teacher":
        (folder / "parameters" / "teacher-seed42.safetensors").unlink()
    trained = []

    def watched(part: hinton.RowTrials, *arguments: Any) -> Any:
        trained.append(part.name)
        return original(part, *arguments)

    monkeypatch.setattr(row_trials, "train_row", watched)
    assert alone_and_no3(folder, tiny) == in_one_go
    # The teacher comes from its checkpoint, and what it taught is found again.
    assert trained == {"nothing": [], "a part": ["alone-8"], "the teacher": ["teacher"]}[lost] + ["no3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "rates"),
    [
        ("the teacher with seed 42", (1e30, 0.01, 0.01)),
        ("alone-8 with the seeds 42, 43", (0.01, 1e30, 0.01)),
        ("distilled-8 with the seeds 42, 43", (0.01, 0.01, 1e30)),
    ],
    ids=["teacher", "alone", "distilled"],
)
def test_a_part_that_diverges_is_told_in_words_of_the_table(
    who: str,
    rates: tuple[float, float, float],
    tiny: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The recipe's rates are no options of this command."""
    first, *others = TINY.widths
    own = {name: _TRAINING._replace(learning_rate=r) for name, r in zip(("alone", "distilled"), rates[1:], strict=True)}
    widths = (first._replace(**own), *others)
    plan = TINY._replace(teacher_training=TINY.teacher_training._replace(learning_rate=rates[0]), widths=widths)
    monkeypatch.setattr(hinton, "PLAN", plan)
    with pytest.raises(SystemExit) as caught:
        reproduced("--rows", "alone", "distilled", "--out", str(tmp_path / "out"), "--quiet")
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert f" of {who}" in error
    assert f" step 2{' at T = 20' * who.startswith('distilled')}: choose another --seed" in error
    assert "learning" not in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no table is given: use hinton2015"),
        (["hinton2015", "--rows"], "--rows is given without a row: use some of teacher, alone"),
        (["hinton2015", "--rows", "alone,no4"], "unknown row 'no4': use some of teacher, alone"),
        (["--rows", "hinton2015"], "--rows is given without a row: use some of teacher, alone"),
        (["--rows", "no4", "hinton2015"], "unknown row 'no4': use some of teacher, alone"),
        (["hinton2015", "--seeds", "1000000"], "--seeds is 1000000: the parameters of alone-800 need"),
        (["hinton2014"], "unknown table 'hinton2014': use hinton2015"),
        (["hinton2015", "--rows", "no4"], "unknown row 'no4': use some of teacher, alone"),
        (["hinton2015", "--rows", "no3", "alone", "no3"], "--rows has no3 twice: give each row once"),
        (["hinton2015", "--seeds", "0"], "--seeds is 0: it must be"),
        (["hinton2015", "--seed", "-1"], "--seed is -1: it must be"),
        (["hinton2015", "--seeds", "few"], "--seeds: 'few' is no whole number"),
        (["hinton2015", "--row", "no3"], "unknown option '--row': did you mean --rows?"),
        (["hinton2015", "--resume"], "--resume is given without --out"),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(arguments, capsys)


def test_help_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        reproduce.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert f"(default: {hinton.SEEDS})" in text
    assert f"(default: {hinton.SEED})" in text
    for option in (*hinton.ROWS, "--seeds", "--seed ", "--quick", "--out", "--resume", "--overwrite", "--quiet"):
        assert option in text


def test_a_failure_leaves_nothing_or_what_goes_on_with_the_rows_asked_for(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, original, failing = tmp_path / "out", row_trials.train_row, ["teacher", "distilled-8"]

    def train(part: hinton.RowTrials, *arguments: Any) -> Any:
        if part.name in failing:
            raise RunError("it failed")
        return original(part, *arguments)

    monkeypatch.setattr(row_trials, "train_row", train)
    arguments = ["--out", str(out), "--seeds", "2", "--quiet"]
    with pytest.raises(SystemExit) as caught:
        reproduced(*arguments, "--rows", "distilled")
    assert caught.value.code == 1
    assert not out.exists()
    failing.remove("teacher")
    with pytest.raises(SystemExit):
        reproduced(*arguments, "--rows", "distilled")
    assert "it failed, and start again with --overwrite" in capsys.readouterr().err
    assert not (out / "results.json").exists()
    failing.clear()
    reproduced("--out", str(out), "--resume", "--quiet")
    assert list(json.loads((out / "results.json").read_text())["rows"]) == ["teacher", "distilled"]


def test_notes_are_kept_beside_what_the_run_is_and_groups_are_forgotten_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.start({"seed": 1})
    for name in ("alone-3-0", "alone-30-0", "alone-30-1"):
        store.save(name, 1, {"x": np.zeros(2)}, {})
    store.note(rows=["alone"])
    store.note(more=1)
    assert store.notes == {"rows": ["alone"], "more": 1}
    assert store.identity() == {"seed": 1}
    store.forget("alone-3")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["alone-30-0", "alone-30-1"]
    assert store.newest("alone-30-1") is not None
    assert store.newest("alone-3-0") is None
    store.start({"seed": 2})
    assert store.notes == {}
    assert store.close() is None
