"""ONNX files: the model's logits in onnxruntime, with any number of examples."""

import builtins
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import MODELS, PIXELS, RNG, X, assert_logits_of_any_number, network
from small import IMAGES

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.export.onnx import to_int8, to_onnx
from kd_jax.export.program import difference

pytestmark = pytest.mark.usefixtures("quick_compiling")

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")


def run(path, inputs):
    """Without kd_jax."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], inputs)[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_the_models_for_any_number_of_examples(name, tmp_path):
    model, inputs = MODELS[name]
    assert_logits_of_any_number(run, to_onnx(model, tmp_path / "student.onnx", inputs), model, inputs)


def test_what_prepares_the_inputs_is_in_the_file(tmp_path):
    model, _ = MODELS["nnx"]
    path = to_onnx(
        model, tmp_path / "a.onnx", IMAGES, prepare=lambda key, images, train: images.astype(jnp.float32) / 255
    )
    np.testing.assert_allclose(run(path, {"inputs": IMAGES}), model(PIXELS / 255), atol=1e-5)


def test_a_file_for_one_number_of_examples(tmp_path):
    model = kd.from_function(lambda params, x: 2 * x if x.shape[0] > 3 else x + 1, {})
    path = to_onnx(model, tmp_path / "a.onnx", X, batch=2)
    np.testing.assert_array_equal(run(path, {"inputs": X[:2]}), X[:2] + 1)
    path = to_onnx(model, tmp_path / "b.onnx", jax.ShapeDtypeStruct((9, 5), jnp.float32), batch=5)
    assert onnxruntime.InferenceSession(str(path)).get_inputs()[0].shape == [5, 5]


def test_logits_that_differ_are_refused_and_no_file_is_left(tmp_path):
    """A model that says something else when it is asked again."""
    asked = iter(range(100))
    model = kd.from_function(lambda params, x: x + next(asked), {})
    with pytest.raises(ConfigError, match=r"differ from the model's by [0-9.]+, and may by .*tolerance="):
        to_onnx(model, tmp_path / "a.onnx", X)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [-np.inf, -1e9, float(np.finfo(np.float32).min), np.nan])
def test_logits_beside_masked_ones_are_compared_as_others(mask, tmp_path):
    """Of a model that says something else when it is asked again, beside a class that is ruled out."""
    asked = iter(range(100))

    def masked(more):
        apply = lambda params, x: jnp.concatenate([x + more(), jnp.full((x.shape[0], 1), mask)], 1)  # noqa: E731
        return kd.from_function(apply, {})

    with pytest.raises(ConfigError, match="differ from the model's by"):
        to_onnx(masked(lambda: 0.01 * next(asked)), tmp_path / "a.onnx", X)
    assert list(tmp_path.iterdir()) == []
    to_onnx(masked(lambda: 0.5), tmp_path / "a.onnx", X)


def test_types_that_onnxruntime_lacks_are_one_sentence(tmp_path):
    model = kd.from_function(lambda params, x: x.astype(jnp.bfloat16) @ params, jnp.ones((5, 3), jnp.bfloat16))
    with pytest.raises(ConfigError, match=r"onnxruntime cannot run what jax2onnx made .*export it as StableHLO$"):
        to_onnx(model, tmp_path / "a.onnx", X)
    assert list(tmp_path.iterdir()) == []


def test_differences_of_logits():
    wanted = np.array([1.0, -20.0, -1e9, -np.inf, np.nan], np.float32)
    assert difference(wanted, wanted) == 0
    assert difference(wanted + np.float32([0.5, 0, 0, 0, 0]), wanted) == pytest.approx(0.025)
    assert difference(np.where(wanted == -1e9, np.float32(-1.1e9), wanted), wanted) == pytest.approx(0.1, rel=1e-4)
    assert difference(np.where(wanted == -np.inf, np.float32(-1e9), wanted), wanted) == np.inf
    assert not difference(np.nan_to_num(wanted, neginf=-np.inf), wanted) < np.inf


@pytest.mark.parametrize("inputs", [{"logits": X}, {"a": {"b": X}, "a_b": X}], ids=["output", "twice"])
def test_inputs_without_names_of_their_own_are_refused(inputs, tmp_path):
    model = kd.from_function(lambda params, given: jax.tree.leaves(given)[0], {})
    with pytest.raises(ConfigError, match="give a dict with other names"):
        to_onnx(model, tmp_path / "a.onnx", inputs)


def test_what_the_converter_lacks_is_one_sentence(tmp_path):
    model = kd.from_function(lambda params, x: x + jax.random.normal(jax.random.key(x.astype(jnp.int32)[0, 0])), {})
    with pytest.raises(ConfigError, match=r"jax2onnx cannot convert the model .*export it as StableHLO") as caught:
        to_onnx(model, tmp_path / "a.onnx", X)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_none_and_a_folder_that_is_not_there(tmp_path):
    model = MODELS["mlp"][0]
    with pytest.raises(DataError, match=r"ends in \.onnx"):
        to_onnx(model, tmp_path / "a.pb", X)
    with pytest.raises(DataError, match="cannot be written"):
        to_onnx(model, tmp_path / "none" / "a.onnx", X)


def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.startswith("onnxruntime"):
            raise ImportError("no onnxruntime")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    with pytest.raises(ConfigError, match="pip install onnxruntime"):
        to_onnx(MODELS["mlp"][0], tmp_path / "a.onnx", X)


@pytest.mark.slow
def test_int8_weights_make_a_file_a_third_as_large_and_nearly_the_same_logits(tmp_path):
    images = RNG.normal(size=(4, 8, 8, 3)).astype(np.float32)
    for place, (model, inputs) in enumerate(
        [(network("resnet8"), images), (kd.mlp([5, 200, 200, 3]).init(0), X)]
    ):  # fmt: skip
        plain = to_onnx(model, tmp_path / f"{place}.onnx", inputs)
        small = to_int8(plain, tmp_path / f"{place}-int8.onnx")
        assert small.stat().st_size < 0.35 * plain.stat().st_size
        wanted = np.asarray(model(inputs))
        error = np.abs(run(small, {"inputs": inputs}) - wanted).max() / np.abs(wanted).max()
        assert 1e-6 < error < 0.1


def test_a_damaged_file_is_not_quantised(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(DataError, match="onnxruntime cannot open"):
        to_int8(tmp_path / "a.onnx", tmp_path / "b.onnx")
