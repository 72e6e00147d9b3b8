import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kd_jax as kd
from kd_jax import seeds as of_seeds
from kd_jax.compare import size_of
from kd_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MethodError,
    MismatchError,
    NotFiniteError,
    OutputError,
)  # fmt: skip
from kd_jax.stats import paired_comparison
from kd_jax.teacher import as_teacher

pytestmark = pytest.mark.usefixtures("standard_promotion")

RNG = np.random.default_rng(3)
CENTRES = RNG.normal(size=(3, 6))


def examples(count: int) -> kd.Batch:
    labels = RNG.integers(0, 3, count)
    return kd.Batch((CENTRES[labels] + 0.7 * RNG.normal(size=(count, 6))).astype(np.float32), labels.astype(np.int32))


TRAIN, TEST = examples(96), examples(60)
STUDENT = kd.mlp([6, 4, 3])
HOW = {"optimizer": optax.adam(1e-2), "epochs": 2, "batch_size": 16, "seeds": 3}


@pytest.fixture(scope="module")
def teacher() -> kd.Model:
    with jax.numpy_dtype_promotion("standard"):
        return kd.distill(kd.mlp([6, 16, 3]), None, TRAIN, optimizer=optax.adam(1e-2), epochs=8, batch_size=16).model


@pytest.fixture(scope="module")
def table(teacher: kd.Model) -> kd.Table:
    methods = {"alone": kd.CrossEntropy(), "kd": kd.KD(alpha=0.2, temperature=3.0)}
    with jax.numpy_dtype_promotion("standard"):
        return kd.compare(STUDENT, teacher, TRAIN, TEST, methods=methods, **HOW)


def test_each_value_is_what_a_training_of_its_own_finds(table: kd.Table, teacher: kd.Model) -> None:
    for seed in table.seeds:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        state, _ = kd.fit(
            key, TRAIN, STUDENT, method=kd.KD(alpha=0.2, temperature=3.0), optimizer=HOW["optimizer"], epochs=2,
            batch_size=16, teacher=kd.cached(teacher, TRAIN),
        )  # fmt: skip
        found = kd.evaluate(kd.Model(STUDENT.network, state.variables), TEST)
        assert table.values["kd"]["accuracy"][seed] == pytest.approx(found["accuracy"])
        assert table.values["kd"]["nll"][seed] == pytest.approx(found["nll"], rel=1e-4)


def test_pairs_are_compared_with_the_first(table: kd.Table) -> None:
    before, after = (table.values[name]["accuracy"] for name in ("alone", "kd"))
    assert table.comparisons == {"kd": paired_comparison(before, after, metric="accuracy")}
    assert list(table.values) == ["alone", "kd"]
    assert "agreement" in table.values["kd"]


def test_pairs_start_alike_and_at_alpha_1_end_alike(teacher: kd.Model) -> None:
    methods = {"alone": kd.CrossEntropy(), "kd": kd.KD(alpha=1.0)}
    found = kd.compare(STUDENT, teacher, TRAIN, TEST, methods=methods, measure="nll", **HOW)
    np.testing.assert_allclose(found.values["kd"]["nll"], found.values["alone"]["nll"], rtol=1e-5)
    assert len(set(found.values["alone"]["nll"])) == 3


@pytest.mark.slow
def test_the_best_of_a_grid_is_chosen_on_other_data_than_it_is_tested_on(teacher: kd.Model) -> None:
    """A rate of learning that labels have no part in: alpha 1 with false labels loses on the development data."""
    false = kd.Batch(TRAIN.inputs, (TRAIN.labels + 1) % 3)
    grid = kd.grid(kd.KD, alpha=[1.0, 0.0], temperature=2.0)
    assert grid.labels == ("alpha 1", "alpha 0")
    methods = {"alone": kd.CrossEntropy(), "grid": grid}
    found = kd.compare(STUDENT, teacher, false, TEST, methods=methods, development=TEST, **HOW)
    assert found.chosen == {"grid": "alpha 0"}
    assert "grid (alpha 0)" in str(found)
    by_false = kd.compare(STUDENT, teacher, false, TEST, methods=methods, **HOW)
    assert by_false.chosen == {"grid": "alpha 1"}


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_to_the_same(
    teacher: kd.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(folder: str, **more: object) -> kd.Table:
        methods = {"alone": kd.CrossEntropy(), "kd": kd.KD()}
        return kd.compare(STUDENT, teacher, TRAIN, TEST, methods=methods, folder=tmp_path / folder, **HOW, **more)  # type: ignore[arg-type]

    whole = compared("whole")
    original, written = of_seeds.KeptTrainings.write, []

    def dies(self: object, name: str, *rest: object) -> None:
        if name == "kd-seed1":
            raise KeyboardInterrupt
        written.append(name)
        original(self, name, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(of_seeds.KeptTrainings, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            compared("killed")
    assert written == ["alone-seed0", "alone-seed1", "alone-seed2", "kd-seed0"]
    with pytest.raises(ConfigError, match="already holds a training: go on with resume=True"):
        compared("killed")
    resumed = compared("killed", resume=True)
    for name in ("alone", "kd"):
        for measure, values in whole.values[name].items():
            np.testing.assert_allclose(resumed.values[name][measure], values, rtol=1e-5)
    with pytest.raises(MismatchError, match="seeds"):
        kd.compare(
            STUDENT, teacher, TRAIN, TEST, methods={"alone": kd.CrossEntropy(), "kd": kd.KD()},
            folder=tmp_path / "killed", resume=True, **{**HOW, "seeds": 2},
        )  # fmt: skip


def test_convolutions_train_in_turn_and_find_the_same_measures() -> None:
    from flax import nnx

    class CNN(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv, self.out = nnx.Conv(1, 2, (3, 3), rngs=rngs), nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.out(nnx.relu(self.conv(x)).mean((1, 2)))

    data = kd.Batch(RNG.normal(size=(32, 6, 6, 1)).astype(np.float32), RNG.integers(0, 3, 32).astype(np.int32))
    found = kd.compare(
        CNN, None, data, data, methods={"alone": kd.CrossEntropy()}, measures={"top2": _top2},
        measure="top2", higher=True, **{**HOW, "seeds": (4, 5)},
    )  # fmt: skip
    assert found.seeds == (4, 5)
    assert (found.values["alone"]["top2"] >= found.values["alone"]["accuracy"]).all()
    assert found.comparisons == {}


def _top2(logits: jax.Array, labels: jax.Array) -> jax.Array:
    _, best = jax.lax.top_k(logits, 2)
    return jnp.any(best == jnp.asarray(labels)[:, None], axis=-1).astype(jnp.float32)


# Without the run-time types of the tests, which users do not have.
COMPARE = inspect.unwrap(kd.compare)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no methods": ({"methods": {}}, "methods is empty"),
    "values": ({"student": kd.mlp([6, 4, 3]).init(0)}, "has its values already"),
    "seeds": ({"seeds": 0}, "seeds is 0"),
    "measure": ({"measure": "f1", "higher": True}, "there is no measure f1: use one of accuracy"),
    "direction": ({"measures": {"f1": _top2}, "measure": "f1"}, "whether more of f1 is better"),
    "teacher": ({"methods": {"kd": kd.KD()}, "teacher": None}, "KD needs a teacher"),
    "a list of methods": ({"methods": [kd.KD()]}, "methods is a list: give a dict"),
    "a seed twice": ({"seeds": [1, 2, 1]}, "the seed 1 is there 2 times: give each seed once"),
    "seeds that are none": ({"seeds": "ab"}, "seeds is 'ab': give how many"),
    "a seed that no key has": ({"seeds": [1, 2**63]}, r"a seed is 9223372036854775808: it must be at most 2\*\*63 - 1"),
    "half a seed": ({"seeds": [0.5]}, r"a seed is 0\.5: it must be a whole number"),
    "epochs": ({"epochs": 1.9}, r"epochs is 1\.9: it must be a whole number"),
    "batch size": ({"batch_size": 16.7}, r"batch_size is 16\.7: it must be a whole number"),
    "a measure of no teacher": ({"measure": "agreement"}, "measure is 'agreement', and there is no such measure"),
    "a measure of other labels": ({"measure": "mse"}, "measure is 'mse', and there is no such measure"),
    "a second method out of bounds": (
        {"teacher": kd.mlp([6, 3]).init(0), "methods": {"a": kd.CrossEntropy(), "b": kd.grid(kd.KD, alpha=[0.1, 2])}},
        "the alpha of KD is 2: it must be 0 to 1",
    ),
    "texts in a grid": (
        {"teacher": kd.mlp([6, 3]).init(0), "methods": {"a": kd.grid(kd.JSD, convention=["paper", "public"])}},
        "convention 'public' is unknown",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_bad_input_is_one_sentence(mistake: str) -> None:
    changed, says = REFUSED[mistake]
    given = {"student": STUDENT, "teacher": None, "methods": {"alone": kd.CrossEntropy()}, **HOW} | changed
    with pytest.raises(ConfigError, match=says):
        COMPARE(given.pop("student"), given.pop("teacher"), TRAIN, TEST, **given)


@pytest.mark.slow
def test_a_grid_is_chosen_by_agreement_and_kept_under_any_name(teacher: kd.Model, tmp_path: Path) -> None:
    """Numbers may be NumPy's, and a slash in a name makes no folder."""
    how = {"optimizer": HOW["optimizer"], "epochs": np.int64(1), "batch_size": np.int32(16), "seeds": np.int64(1)}
    methods = {"kd/2": kd.grid(kd.KD, temperature=[1.0, 2.0])}
    first, again = (
        COMPARE(STUDENT, teacher, TRAIN, TEST, methods=methods, measure="agreement", folder=tmp_path, resume=r, **how)
        for r in (False, True)
    )
    assert first.chosen["kd/2"] in ("temperature 1", "temperature 2")
    assert first.values["kd/2"]["agreement"] == again.values["kd/2"]["agreement"]
    assert first.seconds == again.seconds
    assert json.loads(json.dumps(first.as_json()))["seeds"] == [0]


def test_a_grid_is_every_combination_and_refuses_what_it_cannot_make() -> None:
    grid = kd.grid(kd.KD, temperature=[1.0, 4.0], alpha=[0.1, 0.5])
    assert [(m.temperature, m.alpha) for m in grid.methods] == [(1.0, 0.1), (1.0, 0.5), (4.0, 0.1), (4.0, 0.5)]  # type: ignore[attr-defined]
    assert kd.grid(kd.JSD, convention=["paper", "continuous"]).labels == ("convention paper", "convention continuous")
    with pytest.raises(ConfigError, match="alpha is an empty list"):
        kd.grid(kd.KD, alpha=[])
    with pytest.raises(ConfigError, match="KD cannot be made of"):
        kd.grid(kd.KD, heat=[1.0])
    with pytest.raises(ConfigError, match=r"<lambda> cannot be made of \{'heat': 1.0\}"):
        kd.grid(lambda weight: weight * kd.KD(), heat=[1.0])


def test_grids_add_up_and_have_multiples() -> None:
    hints = kd.grid(kd.FitNet, hint=["a", "b"])
    assert (kd.KD() + hints).methods == (kd.KD() + kd.FitNet("a"), kd.KD() + kd.FitNet("b"))
    assert (hints * 2 + kd.KD()).methods == (2 * kd.FitNet("a") + kd.KD(), 2 * kd.FitNet("b") + kd.KD())
    both = kd.grid(kd.KD, alpha=[0.1, 0.5]) + hints
    assert both.labels == ("alpha 0.1, hint a", "alpha 0.1, hint b", "alpha 0.5, hint a", "alpha 0.5, hint b")
    assert both.methods[1] == kd.KD(alpha=0.1) + kd.FitNet("b")
    weights = kd.grid(lambda weight: kd.KD() + weight * kd.FitNet("a"), weight=[1, 100])
    assert weights.labels == ("weight 1", "weight 100")
    assert weights.methods[1] == kd.KD() + 100 * kd.FitNet("a")
    with pytest.raises(MethodError, match="method is"):
        sum([kd.KD(), (1, 2)])


def test_the_table_says_and_keeps_what_was_found(table: kd.Table, tmp_path: Path) -> None:
    text = str(table)
    assert "accuracy (%)" in text
    assert "kd changed accuracy by" in text
    assert table.conclusion("kd") in table._repr_html_()
    assert all(cell in table._repr_html_() for row in table.rows() for cell in row)
    assert table.figures()["size"]._repr_png_().startswith(b"\x89PNG")
    assert table.markdown().startswith("|")
    written = table.save(tmp_path / "mine")
    assert {path.name for path in written} == {
        "results.json", "results.md", "comparison.png", "learning-curves.png", "size.png",
    }  # fmt: skip
    kept = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert [run["seed"] for run in kept["methods"]["kd"]["runs"]] == [0, 1, 2]
    assert [run["accuracy"] for run in kept["methods"]["kd"]["runs"]] == list(table.values["kd"]["accuracy"])
    assert kept["comparisons"]["kd"]["n"] == 3
    assert "temperature" in str(kept["settings"]["methods"]["kd"])
    assert kept["settings"]["epochs"] >= 1
    assert kept["settings"]["versions"]["jax"] == jax.__version__
    assert (kept["parameters"], kept["teacher_parameters"]) == (6 * 4 + 4 + 4 * 3 + 3, 6 * 16 + 16 + 16 * 3 + 3)


def made_up(parameters: int, teacher_parameters: int | None, seeds: int = 3, measure: str = "score") -> kd.Table:
    values = {name: {measure: np.arange(seeds) + parameters / 10 + place} for place, name in enumerate("ab")}
    history = {name: {"loss": np.ones((seeds, 2))} for name in values}
    return kd.Table(
        measure, True, tuple(range(seeds)), values, history, {}, parameters, {"a": 1.0, "b": 1.0}, {measure: 50.0}, 1,
        teacher_parameters,
    )  # fmt: skip


def test_a_name_that_is_not_compared_is_told_with_those_that_are() -> None:
    with pytest.raises(kd.ConfigError, match="no method 'B' is compared with 'a': use one of b"):
        made_up(10, None).conclusion("B")


def test_the_measure_against_the_size_of_each_student() -> None:
    """In the order of the sizes; the mean of (0, 1, 2) + c is 1 + c, and t(0.975, 2) / √3 is 2.4841."""
    panel = kd.plot_sizes([made_up(200, 1000), made_up(10, 1000), made_up(20, 1000)]).axes[0]
    bars = {one.get_label(): one for one in panel.containers}
    assert list(bars) == ["a", "b"]
    for place, name in enumerate("ab"):
        line, _, (segments,) = bars[name].lines
        np.testing.assert_allclose(np.asarray(line.get_xdata(), float), [10, 20, 200], rtol=0.05)
        np.testing.assert_allclose(np.asarray(line.get_ydata(), float), np.array([2, 3, 21]) + place)
        np.testing.assert_allclose([np.ptp(one[:, 1]) for one in segments.get_segments()], 2 * 2.4841, rtol=1e-4)
    (star,) = [line for line in panel.lines if line.get_label() == "teacher"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (1000, 50.0)
    assert [label.get_text() for label in panel.get_xticklabels()] == ["10", "20", "200", "1,000"]


def test_a_teacher_of_unknown_size_is_a_line_and_one_seed_has_no_bar() -> None:
    panel = kd.plot_sizes([made_up(10, None, seeds=1)]).axes[0]
    (line,) = [line for line in panel.lines if line.get_label() == "teacher"]
    assert list(line.get_ydata()) == [50.0, 50.0]
    assert [one.lines[2] for one in panel.containers] == [(), ()]


def test_sizes_are_of_one_measure() -> None:
    for tables, says in (([], "nothing"), ([made_up(10, None), made_up(20, None, measure="nll")], "nll and score")):
        with pytest.raises(ConfigError, match=f"the tables compare {says}: give at least one"):
            kd.plot_sizes(tables)


def test_the_size_of_a_teacher_is_known_where_it_has_parameters(teacher: kd.Model) -> None:
    own = 6 * 16 + 16 + 16 * 3 + 3
    function = as_teacher(lambda x: x)
    assert [size_of(one) for one in (as_teacher(teacher), function, kd.cached(teacher, TRAIN))] == [own, None, None]
    assert size_of(kd.several([teacher, teacher])) == 2 * own
    assert size_of(kd.several([teacher, function])) is None


@pytest.mark.parametrize(
    ("differences", "higher", "says"),
    [
        ([0.10, 0.11, 0.12], True, "a gain"),
        ([0.10, 0.11, 0.12], False, "a loss"),
        ([-0.10, -0.11, -0.12], False, "a gain"),
        ([-0.10, 0.11, 0.0], True, "no evidence of a difference"),
        ([0.0, 0.0, 0.0], True, "too alike"),
    ],
)
def test_a_conclusion_follows_the_interval(differences: list[float], higher: bool, says: str) -> None:
    before = np.array([0.5, 0.6, 0.55])
    values = {"a": {"score": before}, "b": {"score": before + np.array(differences)}}
    history = {name: {"loss": np.ones((3, 2))} for name in values}
    found = kd.Table("score", higher, (0, 1, 2), values, history, {}, 10, {"a": 1.0, "b": 1.0}, {}, 1)
    assert says in found.conclusion("b")


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        # The interval begins at 4e-05: with four digits it would seem to begin at 0.
        ([0.07375, 0.1234135, 0.173077], r"by \+0\.12341 ± 0\.12337 against a .*: a loss"),
        ([0.0737, 0.1234135, 0.173127], r"by \+0\.1234 ± 0\.1235 against a .*: no evidence"),
        ([7374.9, 12341.3, 17307.7], r"by \+12341 ± 12337 against a .*: a loss"),
        ([10.0, 11.0, 12.0], r"by \+11 ± 2\.484 against a .*: a loss"),
    ],
)
def test_digits_of_any_measure_tell_where_0_lies(differences: list[float], says: str) -> None:
    values = {"a": {"nll": np.zeros(3)}, "b": {"nll": np.array(differences)}}
    history = {name: {"loss": np.ones((3, 2))} for name in values}
    found = kd.Table("nll", False, (0, 1, 2), values, history, {}, 10, {"a": 1.0, "b": 1.0}, {}, 1)
    assert re.search(says, found.conclusion("b")), found.conclusion("b")


def test_a_loss_function_is_given_the_teacher(teacher: kd.Model) -> None:
    def distance(student, taught, labels):
        assert taught is not None
        return jnp.sum((student - taught) ** 2, axis=-1)

    found = kd.compare(STUDENT, teacher, TRAIN, TEST, methods={"own": distance}, **{**HOW, "seeds": 1, "epochs": 1})
    assert np.isfinite(found.values["own"]["accuracy"]).all()


def test_weights_are_looked_at_where_seeds_train_together() -> None:
    wrong = TRAIN._replace(weights=-np.ones(96, np.float32))
    with pytest.raises(DataError, match="a weight is -1: every weight must be at least 0"):
        kd.compare(STUDENT, None, wrong, TEST, methods={"alone": kd.CrossEntropy()}, **HOW)


@pytest.mark.parametrize(
    ("other", "says"),
    [({"student": kd.mlp([6, 4, 3], dropout=0.5)}, "computation of a step"),
     ({"optimizer": optax.adam(2e-2)}, "optimizer")],
)  # fmt: skip
def test_another_comparison_is_not_resumed(other: dict, says: str, tmp_path: Path) -> None:
    named = {"methods": {"alone": kd.CrossEntropy()}, "folder": tmp_path, **HOW, "epochs": 1, "seeds": 1}
    kd.compare(STUDENT, None, TRAIN, TEST, **named)
    student = other.pop("student", STUDENT)
    with pytest.raises(MismatchError, match=f"has another {says}: go on with what it was started with"):
        kd.compare(student, None, TRAIN, TEST, **{**named, **other}, resume=True)


def test_trainings_of_an_unknown_comparison_are_not_read(tmp_path: Path) -> None:
    named = {"methods": {"alone": kd.CrossEntropy()}, "folder": tmp_path, **HOW, "epochs": 1, "seeds": 1}
    kd.compare(STUDENT, None, TRAIN, TEST, **named)
    (tmp_path / "run.json").unlink()
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"run\.json is gone, and .*trainings is not empty: restore it"):
            kd.compare(STUDENT, None, TRAIN, TEST, **named, resume=resume)
    assert len(list((tmp_path / "trainings").iterdir())) == 2


def test_a_choice_on_other_data_is_not_resumed(tmp_path: Path) -> None:
    grid = {"smooth": kd.grid(kd.LabelSmoothing, smoothing=[0.1, 0.2])}
    how = {"folder": tmp_path, **HOW, "epochs": 1, "seeds": 1}
    kd.compare(STUDENT, None, TRAIN, TEST, methods=grid, **how)
    kd.compare(STUDENT, None, TRAIN, TEST, methods=grid, **how, resume=True)
    with pytest.raises(MismatchError, match=r"settings\.development is [0-9a-f]+, and the training in .* has drawn"):
        kd.compare(STUDENT, None, TRAIN, TEST, methods=grid, **how, development=TEST, resume=True)


def test_a_training_that_is_kept_has_its_history_as_it_was(tmp_path: Path) -> None:
    kept, model = of_seeds.KeptTrainings(tmp_path), STUDENT.init(0)
    history = {"loss": np.array([0.1, 0.2]), "accuracy": np.array([0.1, 0.3], np.float32)}
    kept.write("a", of_seeds.Trained(model.variables, history, 1.0), model)
    found = kept.read("a", model)
    assert found is not None
    for name, values in history.items():
        assert found.history[name].dtype == values.dtype
        np.testing.assert_array_equal(found.history[name], values)
    # As earlier versions wrote it.
    facts = json.loads((tmp_path / "a.json").read_text())
    del facts["types"]
    (tmp_path / "a.json").write_text(json.dumps(facts))
    older = kept.read("a", model)
    assert older is not None
    assert older.history["loss"].dtype == np.float32


def test_files_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(10, None).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    original = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        original(self, content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        made_up(20, None).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_losses_of_another_size_are_drawn_on_a_logarithmic_axis(table: kd.Table) -> None:
    panel = table.figures()["learning-curves"].axes[0]
    assert panel.get_yscale() == "linear"
    history = {name: dict(own) for name, own in table.history.items()}
    last = list(history)[-1]
    history[last]["loss"] = history[last]["loss"] * 1000
    panel = dataclasses.replace(table, history=history).figures()["learning-curves"].axes[0]
    assert panel.get_yscale() == "log"


@pytest.mark.slow
def test_a_setting_that_diverges_is_not_chosen(teacher: kd.Model) -> None:
    """And ends nothing, unless every setting does."""
    weights = kd.grid(lambda weight: weight * kd.CrossEntropy(), weight=[1.0, 1e38])
    how = {**HOW, "seeds": 2}
    found = kd.compare(STUDENT, teacher, TRAIN, TEST, methods={"grid": weights}, development=TEST, **how)
    assert found.chosen == {"grid": "weight 1"}
    every = kd.grid(lambda weight: weight * kd.CrossEntropy(), weight=[2e38, 1e38])
    with pytest.raises(NotFiniteError, match="no training of the grid grid has a finite accuracy"):
        kd.compare(STUDENT, teacher, TRAIN, TEST, methods={"grid": every}, development=TEST, **how)


def test_values_that_are_not_finite_are_null_in_the_files(tmp_path: Path) -> None:
    values = {"a": {"nll": np.array([1.0, np.inf])}, "b": {"nll": np.array([2.0, np.nan])}}
    history = {name: {"loss": np.ones((2, 2))} for name in values}
    found = kd.Table("nll", False, (0, 1), values, history, {}, 10, {"a": 1.0, "b": 1.0}, {}, 1)
    assert "a seed's value is not finite" in found.conclusion("b")
    found.save(tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["methods"]["a"]["runs"][1] == {"seed": 1, "nll": None}


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_seed_alone_may_diverge_too_and_is_not_chosen(seeds: int) -> None:
    weights = kd.grid(lambda weight: weight * kd.CrossEntropy(), weight=[1e38, 1.0])
    how = {**HOW, "seeds": seeds}
    found = kd.compare(STUDENT, None, TRAIN, TEST, methods={"grid": weights}, development=TEST, **how)
    assert found.chosen == {"grid": "weight 1"}


@pytest.mark.parametrize("seeds", [1, 2])
def test_parameters_that_are_not_finite_after_the_last_step_are_told(seeds: int) -> None:
    last = optax.sgd(lambda count: jnp.where(count == 5, jnp.nan, 0.1))
    how = {**HOW, "seeds": seeds, "epochs": 1, "optimizer": last}
    with pytest.raises(NotFiniteError, match="a parameter of CrossEntropy with seed 0 is not finite after the last"):
        kd.compare(STUDENT, None, TRAIN, TEST, methods={"alone": kd.CrossEntropy()}, **how)


@pytest.mark.slow
def test_what_was_trained_by_another_choice_is_trained_again(tmp_path: Path) -> None:
    methods = {"grid": kd.grid(lambda weight: weight * kd.CrossEntropy(), weight=[0.01, 30.0])}
    how = {**HOW, "seeds": 2, "epochs": 1, "measures": {"size": lambda logits, labels: jnp.abs(logits).mean(-1)}}

    def run(higher: bool, **more: Any) -> kd.Table:
        return kd.compare(STUDENT, None, TRAIN, TEST, methods=methods, measure="size", higher=higher, **how, **more)

    large = run(True, folder=tmp_path / "kept")
    small = run(False, folder=tmp_path / "kept", resume=True)
    fresh = run(False)
    assert (large.chosen["grid"], small.chosen["grid"]) == ("weight 30", "weight 0.01")
    np.testing.assert_array_equal(small.values["grid"]["nll"], fresh.values["grid"]["nll"])
    kept = sorted((tmp_path / "kept" / "trainings").glob("grid-seed*.json"))
    before = [file.stat().st_mtime_ns for file in kept]
    assert run(False, folder=tmp_path / "kept", resume=True).chosen == small.chosen
    assert [file.stat().st_mtime_ns for file in kept] == before


@pytest.mark.slow
def test_a_teacher_of_other_classes_has_no_row_and_one_of_the_same_has_the_own_measures() -> None:
    features = kd.CrossEntropy() + kd.FitNet("hidden.0", "hidden.0")
    how = {**HOW, "seeds": 1, "epochs": 1, "measures": {"size": lambda logits, labels: jnp.abs(logits).mean(-1)}}
    for classes in (2, 7):
        other = kd.mlp([6, 4, classes]).init(0)
        assert kd.compare(STUDENT, other, TRAIN, TEST, methods={"features": features}, **how).teacher == {}
    same = kd.mlp([6, 4, 3]).init(0)
    found = kd.compare(STUDENT, same, TRAIN, TEST, methods={"kd": kd.KD()}, **how)
    expected = np.abs(kd.predict(same, TEST.inputs)).mean()
    assert found.teacher["size"] == pytest.approx(expected, rel=1e-5)


def test_numbers_that_are_predicted_have_no_accuracy_in_a_history() -> None:
    data = kd.Batch(TRAIN.inputs, np.zeros(96, np.int32))
    methods = {"a": lambda student, taught, labels: (student[..., 0] - labels) ** 2}
    found = kd.compare(kd.mlp([6, 1]), None, data, data, methods=methods, measure="mse", **{**HOW, "seeds": 1})
    assert set(found.history["a"]) == {"loss"}
