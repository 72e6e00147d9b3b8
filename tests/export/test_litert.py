"""LiteRT files: the model's logits in its interpreter, with any number of examples."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import MODELS, PIXELS, X, assert_logits_of_any_number, network
from flax import nnx
from small import IMAGES

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.export import litert
from kd_jax.export.litert import to_litert

MISSING = [one for one in ("litert_converter", "ai_edge_litert") if importlib.util.find_spec(one) is None]
needs_litert = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: pip install 'kd-jax[litert]'")

pytestmark = pytest.mark.usefixtures("quick_compiling")

SERIES = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)


def run(path, inputs):
    """Without kd_jax."""
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(str(path)).get_signature_runner()(**inputs)["logits"]


@needs_litert
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_the_models_for_any_number_of_examples(name, tmp_path):
    model, inputs = MODELS[name]
    assert_logits_of_any_number(run, to_litert(model, tmp_path / "student.tflite", inputs), model, inputs)


@needs_litert
def test_series_step_by_step(tmp_path):
    """Loops of a known length, what they leave of every step, and the last step alone."""
    last = nnx.Sequential(nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))), lambda x: x[:, -1])

    def kept(params, x):
        step = lambda state, one: (jnp.tanh(state + one @ params), state * one[:, :2])  # noqa: E731
        return jax.lax.scan(step, jnp.zeros((x.shape[0], 2)), x.swapaxes(0, 1), reverse=True)[1].swapaxes(0, 1)

    # to_litert compares the logits; those of the second are only the model's where biases are written out.
    for name, model in {"last": kd.from_nnx(last), "kept": kd.from_function(kept, jnp.ones((3, 2)))}.items():
        assert to_litert(model, tmp_path / f"{name}.tflite", SERIES).is_file()


@needs_litert
def test_what_prepares_the_inputs_is_in_the_file(tmp_path):
    model, _ = MODELS["nnx"]
    path = to_litert(
        model, tmp_path / "a.tflite", IMAGES, prepare=lambda key, images, train: images.astype(jnp.float32) / 255
    )
    np.testing.assert_allclose(run(path, {"inputs": IMAGES}), model(PIXELS / 255), atol=1e-5)


@needs_litert
def test_a_file_for_one_number_of_examples(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model = kd.from_function(lambda params, x: 2 * x if x.shape[0] > 3 else x + 1, {})
    path = to_litert(model, tmp_path / "a.tflite", X, batch=2)
    np.testing.assert_array_equal(run(path, {"inputs": X[:2]}), X[:2] + 1)
    path = to_litert(model, tmp_path / "b.tflite", jax.ShapeDtypeStruct((9, 5), jnp.float32), batch=5)
    assert Interpreter(str(path)).get_input_details()[0]["shape_signature"].tolist() == [5, 5]


@needs_litert
def test_an_input_that_no_logit_needs_and_infinities_are_in_the_file(tmp_path):
    masked = lambda params, x: jnp.concatenate([x["a"] @ params, jnp.full((x["a"].shape[0], 1), -jnp.inf)], 1)  # noqa: E731
    path = to_litert(kd.from_function(masked, jnp.ones((5, 2))), tmp_path / "a.tflite", {"a": X, "b": X}, batch=6)
    found = run(path, {"a": X, "b": X})
    np.testing.assert_allclose(found[:, :2], X @ np.ones((5, 2), np.float32), atol=1e-5)
    assert (found[:, 2] == -np.inf).all()


@needs_litert
def test_logits_that_differ_are_refused_and_no_file_is_left(tmp_path):
    """A model that says something else when it is asked again."""
    asked = iter(range(100))
    model = kd.from_function(lambda params, x: x + next(asked), {})
    with pytest.raises(ConfigError, match=r"LiteRT file differ from the model's by [0-9.]+, and may by .*tolerance="):
        to_litert(model, tmp_path / "a.tflite", X)
    assert list(tmp_path.iterdir()) == []
    to_litert(model, tmp_path / "a.tflite", X, tolerance=10.0)


@needs_litert
@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda params, x: jnp.abs(jnp.fft.fft(x)), "has nothing for stablehlo.fft.*give it a number of examples"),
        (
            lambda params, x: jax.lax.while_loop(lambda one: jnp.any(one < 3), lambda one: one + 1, x),
            "has nothing for tfl.while",
        ),
        (lambda params, x: jnp.sort(x, 1), "LiteRT cannot run what litert-converter made .*SORT"),
        (lambda params, x: jax.pure_callback(np.asarray, x, x), r"jax\.export cannot export the model"),
    ],
    ids=["fft", "while", "sort", "callback"],
)
def test_what_the_converter_or_the_interpreter_lacks_is_one_sentence(apply, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        to_litert(kd.from_function(apply, {}), tmp_path / "a.tflite", X)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs_litert
def test_a_folder_with_a_card_whose_code_runs(tmp_path, monkeypatch):
    model = kd.mlp([5, 4, 3]).init(0)
    assert kd.export.to_folder(model, tmp_path, (X, np.zeros(6, np.int32)), formats=["litert"]) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "student.tflite"]
    card = (tmp_path / "README.md").read_text()
    assert "- litert\n" in card
    names = {"inputs": X}
    monkeypatch.chdir(tmp_path)
    exec(card.split("```python\n")[1].partition("```")[0], names)
    np.testing.assert_allclose(names["logits"], model(X), atol=1e-5)


@pytest.mark.parametrize("missing", ["litert_converter.mlir.ir", "ai_edge_litert.interpreter"])
def test_a_missing_package_is_one_sentence_before_anything_is_made(missing, monkeypatch, tmp_path):
    package = missing.partition(".")[0].replace("_", "-")
    monkeypatch.setitem(sys.modules, missing, None)
    if package == "ai-edge-litert":
        monkeypatch.setattr(litert, "_converter", lambda: None)
    for ask in (
        lambda: to_litert(MODELS["mlp"][0], tmp_path / "a.tflite", X),
        lambda: kd.export.to_folder(MODELS["mlp"][0], tmp_path / "out", (X, X), formats=["litert"]),
    ):
        with pytest.raises(ConfigError, match=f"^{package} is needed for LiteRT, and cannot be imported") as caught:
            ask()
        assert str(caught.value).endswith(": pip install 'kd-jax[litert]'")
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_none_and_inputs_without_names_of_their_own(tmp_path):
    with pytest.raises(DataError, match=r"ends in \.tflite"):
        to_litert(MODELS["mlp"][0], tmp_path / "a.lite", X)
    model = kd.from_function(lambda params, given: given["logits"], {})
    with pytest.raises(ConfigError, match=r"in a LiteRT file each has its own.*give a dict with other names"):
        to_litert(model, tmp_path / "a.tflite", {"logits": X})


def test_importing_says_nothing_of_kernels_and_leaves_the_environment(monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    with litert._quiet():
        assert litert.os.environ["TF_ENABLE_ONEDNN_OPTS"] == "0"
    assert "TF_ENABLE_ONEDNN_OPTS" not in litert.os.environ
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "1")
    with litert._quiet():
        assert litert.os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"
    assert litert.os.environ["TF_ENABLE_ONEDNN_OPTS"] == "1"


@needs_litert
def test_a_small_network_of_the_zoo_is_as_small_as_its_parameters(tmp_path):
    model = network("resnet8")
    path = to_litert(model, tmp_path / "a.tflite", PIXELS)
    assert path.stat().st_size < 1.2 * 4 * kd.models.count_parameters(model.variables["params"])
