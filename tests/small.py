"""Small models and data that the tests of the core share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import kd_jax as kd
from kd_jax.files.digests import digest
from kd_jax.models.host import Host, HostNetwork

RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 6)).astype(np.float32)
Y = RNG.integers(0, 4, 24).astype(np.int32)
DATA = kd.Batch(X, Y)
IMAGES = RNG.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
PICTURES = kd.Batch(IMAGES, RNG.integers(0, 4, 16).astype(np.int32))
SGD = optax.sgd(0.1)
HOW: dict[str, Any] = {"optimizer": SGD, "epochs": 1, "batch_size": 8}


def net(*layers: int) -> kd.Model:
    return kd.mlp(list(layers) or [6, 5, 4])


def teacher(*layers: int) -> kd.Model:
    return kd.mlp(list(layers) or [6, 7, 4]).init(1)


class CNN(nnx.Module):
    """Convolution, batch statistics, dropout, and a head."""

    def __init__(self, channels: int = 4, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, channels, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(channels, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(channels, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        maps = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(jnp.mean(maps, axis=(1, 2))))


class Residual(nn.Module):
    """A residual block with batch statistics, and `train` by keyword only."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=not train)(x)
        y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(y))
        return nn.Dense(4)(jnp.mean(x + y, axis=(1, 2)))


class Table(Host):
    """A model of another library: inputs times a matrix, computed by NumPy."""

    name, kind = "the table", "a table"

    def __init__(self, weights: Any):
        super().__init__()
        self.weights = np.asarray(weights, np.float32)

    @property
    def digest(self) -> str:
        return digest(self.weights)

    @property
    def network(self) -> HostNetwork:
        return HostNetwork(self)

    def asked(self, inputs: Any) -> np.ndarray:
        return np.asarray(inputs, np.float32) @ self.weights


def table(seed: int) -> kd.Model:
    """A teacher of `X`."""
    return kd.Model(Table(0.1 * np.random.default_rng(seed).normal(size=(6, 4))).network, {})


def scale(key: Any, images: jax.Array, train: bool) -> jax.Array:
    """Bytes to numbers."""
    return images.astype(jnp.float32) / 255


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(found: Any, wanted: Any) -> None:
    """To the bit."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(leaves(found), leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


def assert_close(found: Any, wanted: Any, *, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for one, other in zip(leaves(found), leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def of_module(module: nnx.Module) -> Any:
    return [nnx.to_pure_dict(nnx.state(module, kind)) for kind in (nnx.Param, nnx.BatchStat)]
