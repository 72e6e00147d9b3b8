"""An ONNX file as a teacher, in compiled programs."""

import builtins
import sys

import jax
import numpy as np
import pytest
from small import HOW

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("quick_compiling")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5)).astype(np.float32)
W = RNG.normal(size=(5, 3)).astype(np.float32)


def file(path, *, outputs=("logits",), kind="FLOAT", softmax=False):
    """`inputs @ W`, or its softmax, made by hand; every output is the same."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    kind = getattr(onnx.TensorProto, kind)
    nodes = [
        helper.make_node("Cast", ["inputs"], ["cast"], to=floats),
        helper.make_node("MatMul", ["cast", "w"], ["z"]),
    ]
    nodes += [helper.make_node("Softmax" if softmax else "Identity", ["z"], [name]) for name in outputs]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("inputs", kind, ["n", 5])],
        [helper.make_tensor_value_info(name, floats, ["n", 3]) for name in outputs],
        [onnx.numpy_helper.from_array(W, "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def test_the_logits_are_the_files_in_compiled_programs(tmp_path):
    model = kd.from_onnx(file(tmp_path / "a.onnx"), threads=1)
    np.testing.assert_allclose(model(X), X @ W, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(model)({"inputs": X}), X @ W, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(model)(X[None]), (X @ W)[None], rtol=1e-5, atol=1e-6)
    assert kd.models.count_parameters(model) == 0


def test_probabilities_become_logits(tmp_path):
    model = kd.from_onnx(file(tmp_path / "a.onnx", softmax=True), probabilities=True)
    np.testing.assert_allclose(model(X), jax.nn.log_softmax(X @ W), rtol=1e-4, atol=1e-5)
    assert np.isfinite(model(1000 * X)).all()


def test_inputs_come_in_the_type_of_the_file(tmp_path):
    model = kd.from_onnx(file(tmp_path / "a.onnx", kind="INT64"))
    whole = RNG.integers(0, 5, (4, 5)).astype(np.int32)
    np.testing.assert_allclose(model(whole), whole @ W, rtol=1e-5)


def test_it_teaches_live_and_cached(tmp_path):
    teacher = kd.from_onnx(file(tmp_path / "a.onnx"))
    found = [
        kd.distill(kd.mlp([5, 4, 3]), one, kd.Batch(X), **HOW | {"method": kd.KD(alpha=0), "batch_size": 3}).history[
            "loss"
        ]
        for one in (teacher, kd.cached(teacher, X))
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def test_there_is_neither_a_gradient_nor_a_training(tmp_path):
    model = kd.from_onnx(file(tmp_path / "a.onnx"))
    with pytest.raises(ConfigError, match="is an ONNX file and has no gradient here"):
        jax.grad(lambda x: model(x).sum())(X)
    with pytest.raises(ConfigError, match="cannot be trained here"):
        model(X, train=True)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((X, X), "has 1 inputs \\(inputs\\), and 2 are given"),
        ({"x": X}, "has the inputs inputs, and x are given"),
        (X[:, :2], r"cannot be run with inputs float32\[6, 2\]"),
        (X.astype(np.complex64), "cannot be run with inputs complex64"),
    ],
)
def test_inputs_that_do_not_fit_are_one_sentence(inputs, says, tmp_path):
    model = kd.from_onnx(file(tmp_path / "a.onnx"))
    with pytest.raises(ConfigError, match=says) as caught:
        model(inputs)
    assert "\n" not in str(caught.value)


def test_outputs_are_chosen_by_name(tmp_path):
    path = file(tmp_path / "a.onnx", outputs=("a", "b"))
    with pytest.raises(ConfigError, match="has the outputs a, b: say which"):
        kd.from_onnx(path)
    with pytest.raises(ConfigError, match="has no output 'c': name one of a, b"):
        kd.from_onnx(path, output="c")
    np.testing.assert_allclose(kd.from_onnx(path, output="b")(X), X @ W, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(kd.from_onnx(file(path, outputs=("a", "logits")))(X), X @ W, rtol=1e-5, atol=1e-6)


def test_a_file_that_is_none(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be read"):
        kd.from_onnx(tmp_path / "none.onnx")
    (tmp_path / "a.onnx").write_bytes(b"\x00nothing")
    with pytest.raises(DataError, match="onnxruntime cannot open") as caught:
        kd.from_onnx(tmp_path / "a.onnx")
    assert "\n" not in str(caught.value)
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "onnxruntime":
            raise ImportError("no onnxruntime")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    with pytest.raises(ConfigError, match="pip install onnxruntime"):
        kd.from_onnx(tmp_path / "a.onnx")


def test_the_digest_tells_files_apart(tmp_path):
    """Also by arrays in a file beside it."""
    path, names = (
        file(tmp_path / "a.onnx", outputs=("logits", "b")),
        {"save_as_external_data": True, "size_threshold": 0},
    )

    def digest(**how):
        return kd.from_onnx(path, **how).network.host.digest

    found = {digest(), digest(output="b"), digest(probabilities=True)}
    assert digest(threads=1) in found
    onnx.save(onnx.load(path), str(path), location="w.bin", **names)
    found.add(digest())
    (tmp_path / "w.bin").write_bytes((2 * W).tobytes())
    found.add(digest())
    np.testing.assert_allclose(kd.from_onnx(path)(X), X @ (2 * W), rtol=1e-5, atol=1e-6)
    assert len(found) == 5
