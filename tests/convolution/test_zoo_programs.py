"""The zoo's networks in kd_jax's own compiled training loop: each convolution has a form with a fast kernel."""

import re

import jax
import numpy as np
import optax
import pytest

import kd_jax as kd
from kd_jax.models.zoo import mobilenet

pytestmark = pytest.mark.usefixtures("quick_compiling")


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2"])
def test_no_convolution_of_a_zoos_network_is_left_without_a_fast_kernel(name, monkeypatch):
    # Two stages have every kind of layer, and compile quickly.
    monkeypatch.setattr(mobilenet, "_V2", (mobilenet._V2[0], mobilenet._V2[2]))
    model = kd.from_nnx(lambda rngs: getattr(kd.models, name)(num_classes=3, rngs=rngs))
    data = kd.Batch(np.zeros((8, 12, 12, 3), np.float32), np.arange(8, dtype=np.int32) % 3)

    def train(key, data):
        return kd.fit(
            key, data, model.network, method=kd.CrossEntropy(), optimizer=optax.sgd(0.1), epochs=2, batch_size=4
        )

    text = jax.jit(train).lower(jax.random.key(0), data).compile().as_text()
    assert "while" in text
    found = re.findall(r"dim_labels=(\w+->\w+)", text)
    # Depthwise convolutions and those of 1 × 1 are none any more.
    assert len(found) >= {"resnet8": 21, "mobilenet_v2": 2}[name]
    assert set(found) == {"b01f_01io->b01f"}
    assert "feature_group_count" not in text
    assert not re.findall(r"\w+_reversal=\w+", text)
