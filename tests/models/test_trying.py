"""What a model of anybody's raises is told in one sentence."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen, nnx
from small import CNN, Residual, net

import kd_jax as kd
from kd_jax.errors import ConfigError, DataError
from kd_jax.models.trying import told

WIDE = np.zeros((3, 7), np.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda: net().init(0)(WIDE),
        lambda: kd.feature_names(net(), WIDE),
        lambda: kd.from_linen(Residual(), np.zeros((1, 8, 8, 3), np.float32)).init(0)(
            np.zeros((2, 8, 8, 4), np.float32)
        ),
        lambda: kd.from_function(lambda p, x: x @ p, np.ones((6, 4)))(WIDE),
    ],
)
def test_inputs_of_another_shape(call: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=r"the model cannot be called with inputs of float32\[.*call=$") as error:
        call()
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("error", [ConfigError("a: b"), DataError("a: b"), MemoryError(), jax.errors.JaxRuntimeError()])
def test_what_is_no_fault_of_the_call_passes(error: Exception) -> None:
    with pytest.raises(type(error)) as found, told("the model", WIDE):
        raise error
    assert found.value is error


@pytest.mark.parametrize("flax", ["nnx", "linen"])
def test_what_a_layer_takes_is_told(flax: str) -> None:
    """With what makes it of images: channels first, no channels, flat ones."""
    images = np.zeros((2, 3, 8, 8), np.float32)
    wanted = r"where Conv takes \[examples, height, width, 3\] .*: "
    three = kd.from_nnx(CNN(rngs=nnx.Rngs(0)))
    if flax == "linen":
        three = kd.from_linen(Residual(), np.zeros((1, 8, 8, 3), np.float32)).init(0)
    assert three(images.transpose(0, 2, 3, 1)).shape == (2, 4)
    with pytest.raises(ConfigError, match=wanted + r"channels come last, so give inputs.transpose\(0, 2, 3, 1\)$"):
        three(images)
    for other in (images[:, 0], images.reshape(2, -1), images[:, :2].transpose(0, 2, 3, 1)):
        with pytest.raises(ConfigError, match=rf"{re.escape(str(list(other.shape)))}, {wanted}give inputs as"):
            three(other)
    grey = kd.from_nnx(nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0)))
    if flax == "linen":
        grey = kd.from_linen(linen.Conv(4, (3, 3)), np.zeros((1, 8, 8, 1), np.float32)).init(0)
    with pytest.raises(ConfigError, match=r"an axis of channels comes last, so give inputs\[..., None\]"):
        kd.predict(grey, images[:, 0])


def test_lenet_says_itself_what_it_takes() -> None:
    network = kd.models.lenet(rngs=nnx.Rngs(0))
    with pytest.raises(DataError, match=r"the shape \[2, 8, 8\], and LeNet takes .*give inputs\[..., None\]"):
        # Without the run-time types of the tests, which users do not have.
        inspect.unwrap(type(network).__call__)(network, np.zeros((2, 8, 8)))


def test_a_linear_layer_and_prepare_are_told_apart() -> None:
    with pytest.raises(ConfigError, match=r"where Dense takes \[examples, …, 6\] "):
        kd.from_linen(linen.Dense(4), np.zeros((1, 6), np.float32)).init(0)(WIDE)
    layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"prepare cannot be called with inputs of float32\[3, 7\] \(") as error:
        kd.predict(net().init(0), WIDE, prepare=lambda key, inputs, train: layer(inputs))
    assert "Linear takes" not in str(error.value)
