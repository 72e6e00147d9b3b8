"""Pools of Flax in ONNX files: as many axes as onnxruntime has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kd_jax as kd
from kd_jax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("quick_compiling")

pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")
onnx = pytest.importorskip("onnx")

RNG = np.random.default_rng(0)


def windows(pool, window, strides, **more):
    return lambda x: pool(x, window, strides=strides, **more)


def dilated(x):
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 2, 3, 1), (1, 1, 2, 1), ((0, 0), (1, 0), (1, 1), (0, 0)), None, (1, 2, 1, 1)
    )


POOLS = {
    "1-D": (windows(nnx.max_pool, (2,), (2,)), (8, 3)),
    "2-D": (windows(nnx.max_pool, (2, 2), (2, 2)), (6, 8, 3)),
    "a column": (windows(nnx.max_pool, (2, 1), (2, 1)), (8, 1, 3)),
    "same": (windows(nnx.max_pool, (3, 2), (2, 1), padding="SAME"), (7, 8, 3)),
    "3-D": (windows(nnx.max_pool, (2, 1, 2), (2, 1, 2)), (4, 3, 4, 2)),
    "dilated": (dilated, (7, 8, 3)),
    "least": (windows(nnx.min_pool, (2, 2), (1, 2)), (6, 8, 3)),
    "mean": (windows(nnx.avg_pool, (3, 3), (2, 2), padding="SAME", count_include_pad=False), (7, 8, 3)),
}


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_the_file_pools_as_the_model(name, one_by_one, tmp_path):
    pool, shape = POOLS[name]

    def apply(params, x):
        # len(x) is not known where any number of examples is: then jax.vmap adds an axis.
        return pool(x).reshape((len(x), -1) if one_by_one else (-1, params.shape[0])) @ params

    x = RNG.normal(size=(5, *shape)).astype(np.float32)
    width = pool(x).size // 5
    params = RNG.normal(size=(width, 3)).astype(np.float32) / width
    # to_onnx itself compares the logits, of all examples and of one.
    file = kd.export.to_onnx(kd.from_function(apply, params), tmp_path / "pool.onnx", x)
    kinds = [node.op_type for node in onnx.load(str(file)).graph.node]
    assert kinds.count("MaxPool") == (name != "mean")


def test_a_network_of_the_zoo_with_pools(tmp_path):
    network = kd.from_nnx(lambda rngs: kd.models.lenet(num_classes=4, rngs=rngs)).init(0)
    file = kd.export.to_onnx(network, tmp_path / "lenet.onnx", RNG.normal(size=(2, 28, 28, 1)).astype(np.float32))
    pools = [node for node in onnx.load(str(file)).graph.node if node.op_type == "MaxPool"]
    assert pools
    assert all(len(node.attribute[0].ints) == 2 for node in pools)


def test_a_pool_over_too_many_axes_is_one_sentence(tmp_path):
    model = kd.from_function(
        lambda params, x: jax.lax.reduce_window(
            x, -jnp.inf, jax.lax.max, (1, 2, 2, 2, 2, 1), (1, 2, 2, 2, 2, 1), "VALID"
        ).reshape(-1, 2) @ params,
        np.eye(2, dtype=np.float32),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="onnxruntime cannot run what jax2onnx made of the model"):
        kd.export.to_onnx(model, tmp_path / "pool.onnx", RNG.normal(size=(2, 2, 2, 2, 2, 2)).astype(np.float32))
