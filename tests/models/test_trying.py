"""What a model of anybody's raises is told in one sentence."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from small import Residual, net

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
