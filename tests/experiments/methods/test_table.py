"""The table of methods: its rows, its trainings, its statistics, and its command."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from kd_jax import reproduce, stats
from kd_jax.data.batch import Batch
from kd_jax.data.dataset import Dataset
from kd_jax.errors import ConfigError, DataError
from kd_jax.experiments.methods import door, files, plots, report, rows, search
from kd_jax.experiments.methods import plan as table
from kd_jax.experiments.methods.networks import CLASS_MAPS, POOLED
from kd_jax.experiments.methods.plan import Plan
from kd_jax.experiments.methods.search import Results, RowResult
from kd_jax.experiments.notebook import methods as known_methods
from kd_jax.experiments.notebook.config import Training
from kd_jax.methods.base import as_parts, terms_of
from kd_jax.models import Model, Output

pytestmark = pytest.mark.usefixtures("quick_compiling")

_TRAINING = Training(2, 8, 0.01, "cosine", 0)
TINY = Plan((2, 4, 4), _TRAINING, (2, 2, 3), _TRAINING, examples=24, trial_seeds=1)
THREE = ("crossentropy", "kd", "at")


@pytest.fixture
def tiny(small_dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The command does its work on few images with small networks, and two numbers of each method."""
    fewer = {name: row._replace(values=row.values[:2]) for name, row in rows.ROWS.items()}
    monkeypatch.setattr(door, "load", lambda source: small_dataset)
    monkeypatch.setattr(table, "PLAN", TINY)
    for module in (search, report, files, table, plots, door):
        monkeypatch.setattr(module, "ROWS", fewer, raising=False)
    return small_dataset


def made(*arguments: str) -> None:
    reproduce.main(["methods", *arguments])


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr with which `arguments` are refused."""
    with pytest.raises(SystemExit) as caught:
        reproduce.main(arguments)
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.err.count("\n") == 1
    return output.err


def test_every_method_has_a_row_or_a_reason() -> None:
    named = set(known_methods.known())
    assert named | set(rows.OF_KD) == set(rows.ROWS) | set(rows.LEFT_OUT)
    assert not set(rows.ROWS) & set(rows.LEFT_OUT)


def test_every_method_has_as_many_trials_and_its_default_among_them() -> None:
    for name, row in rows.ROWS.items():
        assert len(set(row.values)) == (0 if name == rows.ALONE else 4)
        if name not in known_methods.known() or not row.number:
            continue
        default = getattr(known_methods.known()[name], row.number, None)
        assert default is None or name == "simkd" or default in row.values, name


def test_every_row_has_a_loss_with_the_plans_networks() -> None:
    plan, size = table.PLAN, table.PLAN.training.batch_size
    teacher, student = table.network(plan.teacher_widths, 1, 10).init(0), table.network(plan.widths, 1, 10)
    images, labels = jnp.zeros((size, 28, 28, 1)), jnp.arange(size, dtype=jnp.int32) % 10
    batch, key = Batch(images, labels, indices=labels), jax.random.key(0)
    setting = search.setting_of(plan, teacher, batch)
    taught = _said(teacher, images, search.FEATURES)
    assert taught.features[CLASS_MAPS].shape == (size, 7, 7, 10)
    assert taught.features[POOLED].shape == (size, plan.teacher_widths[-1])
    plain = _said(student, images, search.FEATURES)
    for name, row in rows.ROWS.items():
        method = row.make(row.values[-1] if row.values else 0.0, setting)
        own = plain
        if row.student:
            own = _said(search.student_of(row, student, teacher, batch), images, method.student_features)

        def loss(own: Output, taught: Output, batch: Batch, method: Any = method) -> Any:
            parts = as_parts(method.init(key, own, taught), method)
            return terms_of(method, parts, own, taught, batch, jnp.int32(0))[0]

        terms = jax.eval_shape(loss, own, taught, batch)
        assert all(values.shape in ((), (size,), (size, 7, 7)) for values in terms.values()), name


def _said(model: Model, images: Any, features: tuple[str, ...]) -> Any:
    """The shapes of a model's output."""

    def ask(images: Any) -> Output:
        variables = model.network.init(jax.random.key(0)) if model.variables is None else model.variables
        return model.network.apply(variables, images, features=features)[0]

    return jax.eval_shape(ask, images)


def test_the_class_maps_have_the_logits_as_their_mean() -> None:
    model = table.network((2, 4, 4), 1, 5).init(3)
    images = np.random.default_rng(1).random((4, 9, 9, 1), np.float32)
    said = model(images, features=(CLASS_MAPS, POOLED))
    maps, pooled = (np.asarray(said.features[path], np.float64) for path in (CLASS_MAPS, POOLED))
    np.testing.assert_allclose(said.logits, maps.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    kernel, bias = search.classifier_of(model)
    np.testing.assert_allclose(said.logits, pooled @ np.asarray(kernel) + np.asarray(bias), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.01, None, 0.02], [0.03, None, 0.04]),
        ([], []),
    ],
)
def test_holm_is_as_by_hand(given: list[float | None], expected: list[float | None]) -> None:
    found = stats.holm(given)
    assert [one is None for one in found] == [one is None for one in expected]
    np.testing.assert_allclose([p for p in found if p is not None], [p for p in expected if p is not None], rtol=1e-12)


def test_holm_is_between_none_and_bonferroni() -> None:
    p_values = np.random.default_rng(0).random(20) ** 3
    found = np.asarray(stats.holm(p_values.tolist()), np.float64)
    assert (found >= p_values).all()
    assert (found <= np.minimum(1, 20 * p_values)).all()
    assert found.min() == pytest.approx(min(1, 20 * p_values.min()))
    assert (np.diff(found[np.argsort(p_values)]) >= 0).all()


def _trial(number: float, errors: float, finite: bool = True, nll: float = 1.0) -> dict[str, Any]:
    return {"number": number, "errors": errors, "finite": finite, "nll": nll}


def test_the_fewest_errors_choose_and_what_is_not_finite_is_passed_over() -> None:
    row = rows.ROWS["kd"]._replace(values=(0.1, 0.2, 0.3))
    trials = [_trial(0.1, 5), _trial(0.1, 9), _trial(0.2, 1), _trial(0.2, 2, finite=False), _trial(0.3, 7, nll=0.5)]
    assert search.choose(row, [*trials, _trial(0.3, 7, nll=0.5)]) == 0.3
    assert search.choose(row, [_trial(number, 1, finite=False) for number in row.values]) is None
    assert search.choose(rows.ROWS["crossentropy"], []) is None


def _row(accuracies: Sequence[float], seconds: float = 1.0, finite: bool = True) -> RowResult:
    runs: list[dict[str, Any]] = [
        {"seed": seed, "accuracy": value, "agreement": 0.9, "cost_s": seconds, "finite": True, "temp_bytes": 2**20}
        for seed, value in enumerate(accuracies)
    ]
    if not finite:
        runs[-1] = {"seed": len(runs) - 1, "finite": False, "cost_s": seconds, "temp_bytes": 2**20}
    return RowResult(0.1, [], runs)


def _found(**others: RowResult) -> Results:
    rng = np.random.default_rng(5)
    alone = 0.8 + 0.002 * rng.normal(size=6)
    kd = _row(alone + 0.03 + 0.001 * rng.normal(size=6))
    own = {"crossentropy": _row(alone)._replace(chosen=None), "kd": kd, **others}
    return Results({part: {"accuracy": 0.9} for part in ("train", "test")}, own)


def test_comparisons_are_corrected_together_and_shown_plainly(small_dataset: Dataset) -> None:
    rng = np.random.default_rng(6)
    good, bad = 0.86 + 0.001 * rng.normal(size=6), 0.5 + 0.001 * rng.normal(size=6)
    found = _found(dkd=_row(good, 3.0), at=_row(bad), fitnet=_row(good, finite=False), crd=RowResult(None, [], []))
    made = report.lines(found)
    assert [line.name for line in made] == ["dkd", "kd", "crossentropy", "at", "fitnet", "crd"]
    number = 2 * 6 - 3
    told = made[0].against["kd"]
    kd = np.asarray([run["accuracy"] for run in found.rows["kd"].runs])
    expected = scipy_stats.ttest_rel(good, kd)
    np.testing.assert_allclose(told.ci95, expected.confidence_interval(1 - 0.05 / number), rtol=1e-9)
    pairs = [line.against[one] for line in made for one in line.against]
    assert len(pairs) == 5
    assert told.p_value is not None
    assert expected.pvalue * (number - 4) <= told.p_value <= expected.pvalue * number
    assert made[0].step == 3
    text = report.text(found, TINY, small_dataset)
    assert "better 1 (dkd); worse 2 (crossentropy, at)" not in text
    assert "Against kd, beyond chance after the correction: better 1 (dkd); worse 1 (at)" in text
    assert "not finite: 5 of 6 seeds" in text
    assert "not finite in any trial" in text
    assert "Not finite: fitnet, crd." in text
    assert "binarykd, as" in text


def test_the_temperature_of_each_row_of_logits_is_told() -> None:
    told = report._temperatures(["kd", "kd-at-1", "wttm", "mlkd", "ctkd", "logitmse", "crd"])
    wanted = "4 for kd; 1 for kd-at-1; 2, 3, 4, 5, 6 for mlkd; 10 for wttm."
    assert told == f"Temperatures of the softmaxes: learned for ctkd; {wanted}"


@pytest.mark.parametrize(("seconds", "scale"), [(1.5, "linear"), (5.0, "log"), (50.0, "log")])
def test_costs_have_numbers_on_their_axis_however_far_apart_they_are(seconds: float, scale: str) -> None:
    """Two at least, of which a reader can tell the scale."""
    made = report.lines(_found(dkd=_row([0.8] * 6, seconds)))
    figure = plots._cost(made)
    figure.draw_without_rendering()
    times, memory = figure.axes
    assert times.get_xscale() == scale
    assert memory.get_xscale() == "linear"
    low, high = times.get_xlim()
    ticks = [(tick.get_loc(), tick.label1.get_text()) for minor in (False, True) for tick in _ticks(times.xaxis, minor)]
    assert len([text for place, text in ticks if text and low <= place <= high]) >= 2


def _ticks(axis: Any, minor: bool) -> Any:
    return axis.get_minor_ticks() if minor else axis.get_major_ticks()


@pytest.mark.slow
def test_a_killed_table_goes_on_to_the_same_results(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--methods", "at", "--seeds", "2", "--quiet"]
    with monkeypatch.context() as without_plots:
        without_plots.setattr(plots, "write", lambda *given: [])
        made(*arguments, "--out", str(tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())
    calls: list[str] = []
    train = search._Students._train

    def dies(self: Any, job: Any) -> Any:
        if len(calls) in (2, 6):
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append(job.name)
        return train(self, job)

    monkeypatch.setattr(search._Students, "_train", dies)
    folder = tmp_path / "killed"

    def stopped(*more: str) -> None:
        with pytest.raises(KeyboardInterrupt):
            search_only(folder, *more)

    def search_only(folder: Path, *more: str) -> None:
        """What the command does, but for its way to end the process."""
        monkeypatch.setattr(reproduce.command, "run_command", _unguarded)
        made(*arguments, "--out", str(folder), *more)

    stopped()
    stopped("--resume")
    search_only(folder, "--resume")
    again = json.loads((folder / "results.json").read_text())
    trained = [name for name in calls if name != "killed"]
    assert len(trained) == len(set(trained)) == 4 + 3 * 2
    assert _without_times(again) == _without_times(whole)
    assert again["table"][0]["accuracy"] is not None
    lines = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert len(lines) == 10
    assert {line["part"] for line in lines} == {"development", "test"}
    for name in ("results.md", "differences.png", "cost.png"):
        assert (folder / name).stat().st_size > 500
    # A file that is damaged is trained again, and a method may be added.
    damaged = folder / "trainings" / f"{trained[0]}.json"
    damaged.write_text(damaged.read_text().replace('"finite": true', '"finite": false'))
    calls[:] = ["none"] * 10
    monkeypatch.setattr(plots, "write", lambda *given: [])
    made("--out", str(folder), "--resume", "--methods", "labelsmoothing", "--quiet")
    assert trained[0] in calls[10:]
    assert len(calls) == 10 + 1 + 2 + 2
    assert set(json.loads((folder / "results.json").read_text())["rows"]) == {*THREE, "labelsmoothing"}
    # Stopped behind the last training of another method, before its table is written.
    with monkeypatch.context() as late:
        late.setattr(files, "write", _killed)
        with pytest.raises(KeyboardInterrupt):
            made("--out", str(folder), "--resume", "--methods", "virtualteacher", "--quiet")
    done = len(calls)
    made("--out", str(folder), "--resume", "--quiet")
    assert len(calls) == done
    assert "virtualteacher" in json.loads((folder / "results.json").read_text())["rows"]
    made("--out", str(folder), "--resume")
    assert "is finished" in capsys.readouterr().out


def _killed(*given: Any) -> None:
    raise KeyboardInterrupt


def _unguarded(parser: Any, arguments: Any, body: Any) -> None:
    from kd_jax.experiments.shell.signals import Interrupt

    body(parser.parse(arguments), Interrupt())


def _without_times(found: dict[str, Any]) -> Any:
    """All but how long it took."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: plain(own)
                for name, own in value.items()
                if name not in ("seconds", "cost_s", "compile_s", "step")
            }
        return [plain(own) for own in value] if isinstance(value, list) else value

    return plain({name: found[name] for name in ("teacher", "rows", "table", "conclusions")})


def test_names_are_found_and_two_rows_are_always_there() -> None:
    assert table.find(["AT", "reverse-kl"]) == ("crossentropy", "kd", "reversekl", "at")
    with pytest.raises(ConfigError, match="unknown method 'fitnett': use fitnet or another"):
        table.find(["fitnett"])
    with pytest.raises(ConfigError, match=r"--methods has minilm, which the table leaves out \(it compares queries"):
        table.find(["minilm"])
    with pytest.raises(ConfigError, match="--methods has at twice"):
        table.find(["at", "AT"])


def test_trials_have_other_seeds_and_the_quick_plan_fewer_epochs() -> None:
    plan = table.PLAN
    assert not set(plan.all_seeds) & set(plan.all_trial_seeds)
    quick = table.quick(plan)
    assert quick.training.epochs < plan.training.epochs
    assert quick.training._replace(epochs=plan.training.epochs) == plan.training


def test_students_and_their_choice_share_no_image(small_dataset: Dataset) -> None:
    parts = table.parts(TINY, small_dataset)
    assert len(parts.train.labels) == 24
    assert len(parts.taught.train_labels) + len(parts.development.labels) == len(small_dataset.train_labels)
    np.testing.assert_array_equal(parts.train.labels, small_dataset.train_labels[:24])
    np.testing.assert_array_equal(
        parts.development.labels, small_dataset.train_labels[-len(parts.development.labels) :]
    )
    with pytest.raises(DataError, match="has 24 examples to train on: the table's batches need at least 64"):
        table.parts(TINY._replace(training=TINY.training._replace(batch_size=64)), small_dataset)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["methods", "--rows", "alone"], "--rows is of another table"),
        (["methods", "--methods"], "--methods is given without a method"),
        (["methods", "--methods", "crf"], "unknown method 'crf': use c"),
        (["hinton2015", "--methods", "kd"], "--methods is of the table cifar100, and of methods"),
        (["hinton2015", "--dataset", "mnist"], "--dataset is of the table cifar100, and of methods"),
        (["methods", "--seeds", "0"], "--seeds is 0"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], sentence: str, tiny: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(arguments, capsys)


def test_a_folder_goes_on_with_its_methods_or_those_asked_for() -> None:
    done = {"at", "dkd"}.__contains__
    assert door._rows(None, (), done) == tuple(rows.ROWS)
    assert door._rows(None, ("kd", "sp"), done) == ("kd", "sp")
    assert door._rows(("kd", "sp"), ("at", "cc"), done) == ("kd", "at", "sp")
