"""StableHLO programs: the model's logits without its code."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import CNN, HOW, IMAGES, Residual, assert_close

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.export.stablehlo import from_stablehlo, to_stablehlo

pytestmark = pytest.mark.usefixtures("quick_compiling")

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
PIXELS = IMAGES.astype(np.float32)
TWO = kd.from_function(lambda params, a, b=None: a["one"] @ params + a["two"], jnp.ones((5, 2)))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (kd.mlp([5, 4, 3], dropout=0.5).init(0), X),
        (kd.from_nnx(CNN(rngs=nnx.Rngs(0))), PIXELS),
        (kd.from_linen(Residual(), PIXELS).init(0), PIXELS),
        (TWO, {"one": X, "two": X[:, :2]}),
    ],
    ids=["mlp", "nnx", "linen", "dict"],
)
def test_the_logits_are_the_models_for_any_number_of_examples(model, inputs, tmp_path):
    path = to_stablehlo(model, tmp_path / "a.stablehlo", inputs)
    back = from_stablehlo(path)
    for count in (6, 1):
        some = jax.tree.map(lambda leaf, n=count: leaf[:n], inputs)
        assert_close(back(some), model(some), rtol=1e-4, atol=1e-5)


def test_the_program_calls_nothing_outside_and_runs_on_every_platform(tmp_path):
    path = to_stablehlo(CNN(rngs=nnx.Rngs(0)), tmp_path / "a.stablehlo", PIXELS)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text
    assert set(re.findall(r"custom_call @(\w+)", text)) <= {"shape_assertion"}
    assert set(exported.platforms) == {"cpu", "cuda", "rocm", "tpu"}


def test_it_runs_where_kd_jax_is_not(tmp_path):
    model = kd.mlp([5, 4, 3]).init(0)
    path = to_stablehlo(model, tmp_path / "a.stablehlo", X)
    np.save(tmp_path / "x.npy", X)
    program = f"""
import sys; sys.modules["kd_jax"] = None
import jax, jax.export, numpy as np
called = jax.export.deserialize(bytearray(open({str(path)!r}, "rb").read())).call
np.save({str(tmp_path / "logits.npy")!r}, called(np.load({str(tmp_path / "x.npy")!r})))
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert_close(np.load(tmp_path / "logits.npy"), model(X))


def test_it_teaches(tmp_path):
    teacher = from_stablehlo(to_stablehlo(kd.mlp([5, 4, 3]).init(0), tmp_path / "a.stablehlo", X))
    result = kd.distill(kd.mlp([5, 2, 3]), teacher, kd.Batch(X), **HOW | {"method": kd.KD(alpha=0), "batch_size": 3})
    assert np.isfinite(result.history["loss"]).all()
    with pytest.raises(ConfigError, match=r"a\.stablehlo is an exported program and cannot be trained here"):
        kd.distill(teacher, None, kd.Batch(X, np.zeros(6, np.int32)), **HOW | {"batch_size": 3})


def test_what_cannot_be_read_or_exported_is_one_sentence(tmp_path):
    (tmp_path / "a.stablehlo").write_bytes(b"nothing")
    with pytest.raises(DataError, match="is no StableHLO program that this JAX reads"):
        from_stablehlo(tmp_path / "a.stablehlo")
    with pytest.raises(DataError, match=r"ends in \.stablehlo"):
        to_stablehlo(kd.mlp([5, 3]).init(0), tmp_path / "a.mlir", X)
    back = kd.from_function(
        lambda params, x: jax.pure_callback(lambda a: np.asarray(a), jax.ShapeDtypeStruct((6, 5), jnp.float32), x), {}
    )
    with pytest.raises(ConfigError, match=r"jax\.export cannot export the model"):
        to_stablehlo(back, tmp_path / "b.stablehlo", X, batch=6)
