"""The report of teacher against student, and the folder with its model card."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from small import DATA, X, Y

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.export import folder, latency
from kd_jax.export.program import input_names, traced
from kd_jax.export.reporting import Report, Row

pytestmark = pytest.mark.usefixtures("quick_compiling")

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

TEACHER, STUDENT = kd.mlp([6, 64, 4]).init(1), kd.mlp([6, 8, 4]).init(2)
MODELS = {"teacher": TEACHER, "student": STUDENT}


@pytest.fixture(scope="module")
def found(quick_compiling):
    return kd.export.report(MODELS, DATA, rounds=4)


def test_the_measures_are_those_of_evaluate_and_the_interval_holds_the_accuracy(found):
    assert list(found.rows) == ["teacher", "student", "student, int8"]
    own = kd.evaluate(STUDENT, DATA, teacher=TEACHER)
    row = found.rows["student"]
    assert {name: row.measures[name] for name in own} == pytest.approx(own, rel=1e-5)
    assert row.interval[0] < own["accuracy"] < row.interval[1]
    assert row.interval == kd.stats.proportion_interval(own["correct"], len(Y))
    assert "agreement" not in found.rows["teacher"].measures
    assert found.rows["student, int8"].measures["kl_to_teacher"] != row.measures["kl_to_teacher"]


def test_sizes_and_operations(found, tmp_path):
    assert found.rows["teacher"].parameters == 6 * 64 + 64 + 64 * 4 + 4
    # Twice the multiplications, and a little for biases and activations.
    multiplied = 6 * 8 + 8 * 4
    assert 2 * multiplied <= found.rows["student"].operations <= 2 * multiplied + 4 * (8 + 4)
    written = kd.export.to_onnx(STUDENT, tmp_path / "a.onnx", X)
    assert found.rows["student"].size == written.stat().st_size


def test_latencies_are_in_order_and_of_every_runtime(found):
    for name, row in found.rows.items():
        wanted = [("onnxruntime", 1), ("onnxruntime", 32)] + [("XLA", 1), ("XLA", 32)] * ("int8" not in name)
        assert list(row.seconds) == wanted
        assert all(0 < one.first <= one.median <= one.third < 1 for one in row.seconds.values())


def test_every_call_has_its_turn_in_every_round():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(latency, "_SHORTEST_S", 0.0)
        times = latency.interleaved(calls, rounds=5)
    assert set(times) == set("abc")
    rounds = [order[6:][start : start + 3] for start in range(0, 15, 3)]
    assert len(order) == 6 + 15
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_the_table_and_the_files_say_the_same(found, tmp_path):
    text = str(found)
    assert [line.split()[0] for line in text.splitlines()[2:6]] == ["parameters", "ONNX", "operations", "accuracy"]
    assert "student, int8" in text.splitlines()[0]
    assert "4 rounds" in text
    written = found.save(tmp_path)
    assert [path.name for path in written] == ["report.json", "report.md", "report.png"]
    known = json.loads(written[0].read_text())
    assert known["models"]["student"]["parameters"] == found.rows["student"].parameters
    assert len(known["models"]["student"]["seconds"]) == 4
    assert known["examples"] == len(Y)
    assert written[1].read_text() == found.markdown() + "\n"
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_without_labels_there_is_agreement_and_no_accuracy():
    found = kd.export.report(MODELS, kd.Batch(X), rounds=1, int8=False)
    assert list(found.rows) == ["teacher", "student"]
    assert found.rows["student"].interval is None
    assert "accuracy" not in str(found).partition("\n\n")[0]
    assert found.plot().axes[0].get_ylabel() == "agrees with the teacher (%)"


def drawn(measure: str, *rows: dict[str, float]) -> list[float]:
    """Heights of the points in a figure of that measure, which is in the table, too."""
    made = {
        name: Row(1, None, None, measures, None, {("XLA", 1): latency.Quartiles(1e-6, 2e-6, 3e-6)})
        for name, measures in zip(("teacher", "student"), rows, strict=False)
    }
    found = Report(made, 8, 1, {})
    panel = found.plot().axes[0]
    assert panel.get_ylabel() == measure
    assert measure in str(found)
    return [float(bar.lines[0].get_ydata()[0]) for bar in panel.containers]


def test_what_has_no_classes_is_drawn_by_its_losses():
    assert drawn("mean squared error", {"mse": 0.5}, {"mse": 0.75}) == [0.5, 0.75]
    assert drawn("negative log-likelihood (nats)", {"nll": 0.5, "mse": 1}, {"nll": 2.0, "mse": 3}) == [0.5, 2.0]
    both = [{"nll": 0.5}, {"nll": 2.0, "agreement": 0.25}]
    assert drawn("agrees with the teacher (%)", *both) == [100.0, 25.0]
    assert drawn("negative log-likelihood (nats)", both[0]) == [0.5]


def test_models_without_a_measure_have_a_line_each():
    row = Row(1, None, None, {}, None, {("XLA", 1): latency.Quartiles(1e-6, 2e-6, 3e-6)})
    panel = Report({"teacher": row, "student": row}, 8, 1, {}).plot().axes[0]
    assert [float(bar.lines[0].get_ydata()[0]) for bar in panel.containers] == [0, 1]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["teacher", "student"]


@pytest.mark.parametrize(
    ("inputs", "wanted"),
    [
        (X, '{"inputs": inputs}'),
        ((X, X), '{"inputs_0": inputs[0], "inputs_1": inputs[1]}'),
        ({"b": X, "a": (X, X)}, """{"a_0": inputs['a'][0], "a_1": inputs['a'][1], "b": inputs['b']}"""),
    ],
)
def test_a_card_names_every_input(inputs, wanted):
    text = folder.card(
        None, formats=("onnx", "int8"), name="s", inputs=inputs, settings=None, license=None, made=None, prepare=None,
        distilled=None,
    )  # fmt: skip
    assert text.count(f'.run(["logits"], {wanted})') == 2
    assert list(eval(wanted, {"inputs": inputs})) == list(input_names(inputs))


def test_a_teacher_may_be_a_file_or_a_cache(tmp_path):
    path = kd.export.to_onnx(TEACHER, tmp_path / "teacher.onnx", X)
    wanted = kd.evaluate(STUDENT, DATA, teacher=TEACHER)
    for teacher in (kd.from_onnx(path), kd.cached(TEACHER, DATA)):
        found = kd.export.report({"teacher": teacher, "student": STUDENT}, DATA, rounds=1, onnx=False)
        assert list(found.rows) == ["teacher", "student"]
        assert found.rows["student"].measures["agreement"] == pytest.approx(wanted["agreement"])
        assert found.rows["teacher"].measures["accuracy"] == pytest.approx(kd.evaluate(TEACHER, DATA)["accuracy"])
        assert found.rows["teacher"].parameters is None
        assert list(found.rows["student"].seconds) == [("XLA", 1), ("XLA", 32)]
        assert found.rows["student"].size is None
        assert json.loads(found.save(tmp_path)[0].read_text())["models"]["teacher"]["operations"] is None
        file = isinstance(teacher, kd.Model)
        assert found.rows["teacher"].size == (path.stat().st_size if file else None)
        assert list(found.rows["teacher"].seconds) == ([("onnxruntime", 1), ("onnxruntime", 32)] if file else [])


def test_without_onnx_no_other_package_is_needed(monkeypatch):
    for name in ("jax2onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    found = kd.export.report(MODELS, DATA, rounds=1, onnx=False)
    assert "onnxruntime" not in found.environment
    assert "ONNX file" not in str(found)
    with pytest.raises(ConfigError, match="jax2onnx is needed for ONNX"):
        kd.export.report(MODELS, DATA, rounds=1)


def test_an_interval_is_of_examples_that_count_alike():
    several = kd.from_function(lambda params, x: jnp.stack([x[:, :4], x[:, 2:]], 1), {})
    weights = np.where(np.arange(len(Y)) % 2, 1.0, 0.01).astype(np.float32)
    for model, data in (
        (STUDENT, kd.Batch(X, Y, weights)),
        (several, kd.Batch(X, np.stack([Y, Y], 1))),
    ):
        found = kd.export.report({"model": model}, data, rounds=1, onnx=False)
        assert found.rows["model"].interval is None
        assert "accuracy" in found.rows["model"].measures
        assert "without an interval: an example has several labels, or a weight of its own" in str(found)
        assert found.plot().axes[0].get_ylabel() == "accuracy (%)"
    half = kd.Batch(X, Y, np.where(weights == 1, np.float32(0.5), np.float32(0)))
    row = kd.export.report({"model": STUDENT}, half, rounds=1, onnx=False).rows["model"]
    assert row.interval == kd.stats.proportion_interval(row.measures["correct"], int((weights == 1).sum()))
    assert row.measures["accuracy"] == pytest.approx(row.measures["correct"] / (weights == 1).sum())


def test_int8_is_measured_so_many_examples_at_a_time_as_the_note_says(found):
    assert "With int8 all examples of a call share a scale: they were measured 32 in a call." in str(found)
    assert "int8" not in str(kd.export.report(MODELS, DATA, rounds=1, onnx=False))


def test_a_folder_has_every_format_and_a_card_with_the_numbers(tmp_path):
    report = kd.export.to_folder(
        STUDENT, tmp_path / "out", DATA, teacher=TEACHER, made="kd_jax.models:mlp", arguments={"sizes": [6, 8, 4]},
        settings={"temperature": 4.0}, license="apache-2.0", rounds=1,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "report.json", "report.md", "report.png", "student-int8.onnx", "student.json", "student.onnx",
        "student.safetensors", "student.stablehlo",
    ]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    _, header, body = card.split("---\n", 2)
    assert "license: apache-2.0\nlibrary_name: kd_jax\n" in header
    assert f"value: {report.rows['student'].measures['accuracy']:.6g}" in header
    assert report.markdown() in body
    assert "- temperature: 4.0" in body
    (code,) = [part.partition("```")[0] for part in body.split("```python\n")[1:]]
    *before, last = code.strip().splitlines()
    wholly, names = "\n".join(before), {"inputs": X}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path / "out")
        for end in ("logits = jax.export.deserialize(program).call(inputs)", before[-1]):
            exec(wholly[: wholly.index(end) + len(end)], names)
            np.testing.assert_allclose(names["logits"], STUDENT(X), atol=1e-5)
        exec(last, names)
    np.testing.assert_allclose(names["logits"], STUDENT(X), atol=0.1)
    np.testing.assert_array_equal(names["student"](X), STUDENT(X))


def test_some_formats_alone(tmp_path):
    assert kd.export.to_folder(STUDENT, tmp_path, kd.Batch(X), formats=["int8"], name="small") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "small-int8.onnx"]


def test_files_that_are_there_are_not_lost(tmp_path):
    for name in ("README.md", "student.onnx", "student.json", "report.md"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("mine")
        formats = {"student.onnx": ["onnx"], "student.json": ["safetensors"]}.get(name, ["stablehlo"])
        with pytest.raises(ConfigError, match=rf"already holds {name}: choose another folder, or .*overwrite"):
            kd.export.to_folder(STUDENT, folder, DATA, formats=formats)
        assert [(one.name, one.read_text()) for one in folder.iterdir()] == [(name, "mine")]
    assert kd.export.to_folder(STUDENT, tmp_path / "student-onnx", DATA, formats=["int8"]) is None
    assert (tmp_path / "student-onnx" / "student.onnx").read_text() == "mine"
    kd.export.to_folder(STUDENT, tmp_path / "README-md", DATA, formats=["stablehlo"], overwrite=True)
    assert "# student" in (tmp_path / "README-md" / "README.md").read_text()
    with pytest.raises(DataError, match="is no description of a model"):
        kd.export.to_folder(STUDENT, tmp_path / "student-json", DATA, formats=["safetensors"], overwrite=True)


def test_a_report_of_another_model_does_not_stay(tmp_path):
    kd.export.to_folder(STUDENT, tmp_path, DATA, formats=["stablehlo"], teacher=TEACHER, rounds=1, distilled=True)
    card = (tmp_path / "README.md").read_text()
    assert "A distilled model, exported" in card
    assert "- knowledge-distillation" in card
    assert "onnxruntime, 1 in a call" not in card
    kd.export.to_folder(TEACHER, tmp_path, DATA, formats=["stablehlo"], name="wide", overwrite=True)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["README.md", "student.stablehlo", "wide.stablehlo"]
    card = (tmp_path / "README.md").read_text()
    assert "A model, exported" in card
    assert "distil" not in card
    for name in ("teacher", "report", "README", "", "a/b"):
        with pytest.raises(ConfigError, match=r"name is .* give a file's name other than teacher"):
            kd.export.to_folder(STUDENT, tmp_path / "new", DATA, name=name, teacher=TEACHER)
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_behind_where_a_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ConfigError, match="jax2onnx is needed for ONNX"):
        kd.export.to_folder(STUDENT, tmp_path / "out", DATA, teacher=TEACHER)
    assert not (tmp_path / "out").exists()
    assert kd.export.to_folder(STUDENT, tmp_path / "out", DATA, formats=["stablehlo"], teacher=TEACHER, rounds=1)


def test_what_does_not_fit_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="'tflite' is no format: use safetensors, stablehlo, onnx, int8 or litert"):
        kd.export.to_folder(STUDENT, tmp_path, DATA, formats=["tflite"])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be made"):
        kd.export.to_folder(STUDENT, tmp_path / "file" / "in", DATA)
    with pytest.raises(ConfigError, match="needs models by name"):
        kd.export.report([TEACHER], DATA)
    with pytest.raises(ConfigError, match="rounds"):
        kd.export.report(MODELS, DATA, rounds=0)
    with pytest.raises(ConfigError, match="no examples"):
        kd.export.report(MODELS, kd.Batch(X[:0], Y[:0]))


def test_operations_grow_with_the_width():
    few, many = (latency.operations(traced(kd.mlp([6, n, 4]).init(0), X, batch=1)) for n in (10, 1000))
    assert 90 < many / few < 110
    assert latency.operations(traced(kd.from_function(lambda p, x: jnp.tanh(x), {}), X, batch=1)) < 1000


def test_a_pair_is_data_for_a_folder(tmp_path):
    kd.export.to_folder(STUDENT, tmp_path, (X, Y), formats=["safetensors"])
    assert (tmp_path / "student.safetensors").is_file()


def test_what_is_not_finite_is_null_in_the_files(tmp_path):
    row = Row(3, None, None, {"accuracy": 0.5, "nll": float("inf"), "ece": float("nan")}, None, {})
    report = Report({"teacher": row, "student": row}, 2, 1, {})
    written, *_ = report.save(tmp_path)
    assert json.loads(written.read_text())["models"]["student"]["measures"] == {
        "accuracy": 0.5,
        "nll": None,
        "ece": None,
    }
