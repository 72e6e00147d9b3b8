"""Safetensors files with a description, and the models that come back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import CNN, IMAGES, Residual, assert_same

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.export.described import example_shapes, from_safetensors, how_made, prepared_by, to_safetensors

pytestmark = pytest.mark.usefixtures("quick_compiling")

X = np.ones((2, 5), np.float32)
PIXELS = IMAGES.astype(np.float32)


@pytest.mark.parametrize(
    ("model", "made", "arguments", "inputs"),
    [
        (kd.mlp([5, 4, 3]).init(0), "kd_jax.models:mlp", {"sizes": [5, 4, 3]}, X),
        (kd.MLP([5, 4, 3], rngs=nnx.Rngs(0)), "kd_jax.models:MLP", {"sizes": [5, 4, 3]}, X),
        (kd.models.resnet8(num_classes=4, rngs=nnx.Rngs(0)), "kd_jax.models:resnet8", {"num_classes": 4}, PIXELS),
    ],
)
def test_a_model_of_kd_jax_comes_back_of_its_files_alone(model, made, arguments, inputs, tmp_path):
    path = to_safetensors(model, tmp_path / "a.safetensors", made=made, arguments=arguments, inputs=inputs)
    back = from_safetensors(path)
    assert_same(kd.predict(back, inputs), kd.predict(model, inputs))
    known = json.loads((tmp_path / "a.json").read_text())
    assert known["parameters"] == kd.models.count_parameters(kd.models.as_model(model))
    assert known["inputs"] == {"inputs": {"shape": ["batch", *inputs.shape[1:]], "dtype": "float32"}}
    assert example_shapes(path) == jax.ShapeDtypeStruct((1, *inputs.shape[1:]), jnp.float32)
    assert how_made(path) == {"made": made, "arguments": arguments}


@pytest.mark.parametrize("model", [CNN(rngs=nnx.Rngs(0)), kd.from_linen(Residual(), PIXELS).init(0)], ids=type)
def test_other_models_come_back_where_they_are_given(model, tmp_path):
    path = to_safetensors(model, tmp_path / "a.safetensors")
    assert_same(kd.predict(from_safetensors(path, model), PIXELS), kd.predict(model, PIXELS))
    assert how_made(path) == {}
    for read in (from_safetensors, example_shapes):
        with pytest.raises(ConfigError, match=r"a\.json does not say"):
            read(path)


def test_inputs_of_several_arrays_are_told_by_name(tmp_path):
    several = {"tokens": np.ones((2, 3), np.int32), "mask": np.ones((2, 3), bool)}
    for inputs in (several, tuple(several.values()), {"inputs": X}, {"inputs_0": X}, (X,)):
        path = to_safetensors(kd.mlp([5, 3]).init(0), tmp_path / "a.safetensors", inputs=inputs)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), inputs)
        assert example_shapes(path) == shapes


def test_inputs_whose_structure_the_file_does_not_hold_are_told(tmp_path):
    for inputs in ({"a": {"b": X}}, ((X,), X), {0: X}):
        path = to_safetensors(kd.mlp([5, 3]).init(0), tmp_path / "a.safetensors", inputs=inputs)
        with pytest.raises(ConfigError, match="does not hold the structure of its inputs"):
            example_shapes(path)


def test_arguments_that_cannot_be_written_leave_an_earlier_file_as_it_was(tmp_path):
    model, path = kd.mlp([5, 3]).init(0), tmp_path / "a.safetensors"
    to_safetensors(model, path)
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        to_safetensors(kd.mlp([5, 3]).init(1), path, made="kd_jax.models:mlp", arguments={"sizes": X})
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before


@pytest.mark.parametrize("content", ['{"models": {}}', "mine", "[" * 200_000], ids=["results", "text", "deep"])
def test_a_json_file_that_is_no_description_is_not_replaced(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json is there and is no description of a model"):
        to_safetensors(kd.mlp([5, 3]).init(0), tmp_path / "results.safetensors")
    assert [one.name for one in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == content


def test_what_prepared_the_inputs_is_told_by_name(tmp_path):
    path = to_safetensors(kd.mlp([5, 3]).init(0), tmp_path / "a.safetensors", prepare=kd.mlp)
    assert prepared_by(path) == "kd_jax.models.mlp:mlp"
    assert prepared_by(to_safetensors(kd.mlp([5, 3]).init(0), path)) is None


def test_only_functions_of_kd_jax_are_called_on_a_files_word(tmp_path):
    mark = tmp_path / "called"
    made = {"made": "os:system", "arguments": {"command": f"touch {mark}"}}
    path = to_safetensors(kd.mlp([5, 3]).init(0), tmp_path / "a.safetensors", **made)
    with pytest.raises(ConfigError, match=r"os:system, which is no function of kd_jax\.models and is not called"):
        from_safetensors(path)
    for name in ("kd_jax.models:restore", "kd_jax.models:no", "kd_jax.models:zoo"):
        known = json.loads(path.with_suffix(".json").read_text()) | {"made": {"by": name, "arguments": {}}}
        path.with_suffix(".json").write_text(json.dumps(known))
        with pytest.raises(DataError, match="makes no model"):
            from_safetensors(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "no description"),
        (b"[1]", "no description"),
        (b'{"sha256": "0"}', "is not the file that"),
        (None, "cannot be read"),
    ],
)
def test_a_description_that_is_damaged_or_of_another_file_is_refused(content, says, tmp_path):
    path = to_safetensors(kd.mlp([5, 3]).init(0), tmp_path / "a.safetensors")
    beside = path.with_suffix(".json")
    beside.unlink() if content is None else beside.write_bytes(content)
    with pytest.raises(DataError, match=says):
        from_safetensors(path)


def test_arguments_that_do_not_fit_are_one_sentence(tmp_path):
    model, path = kd.mlp([5, 3]).init(0), tmp_path / "a.safetensors"
    with pytest.raises(ConfigError, match="there is no such function"):
        to_safetensors(model, path, made="kd_jax.models:resnet9000")
    with pytest.raises(ConfigError, match="arguments are given without"):
        to_safetensors(model, path, arguments={"sizes": [5, 3]})
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        to_safetensors(model, path, made="kd_jax.models:mlp", arguments={"sizes": X})
    assert not path.exists()
    to_safetensors(model, path, made="kd_jax.models:mlp", arguments={"wide": 3})
    with pytest.raises(DataError, match=r"has arguments that kd_jax\.models:mlp does not take"):
        from_safetensors(path)
    to_safetensors(model, path, made="kd_jax.models:mlp", arguments={"sizes": [5, 4]})
    with pytest.raises(DataError, match="must have"):
        from_safetensors(path)
