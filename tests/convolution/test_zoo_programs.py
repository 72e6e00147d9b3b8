"""The zoo's networks in kd_jax's own compiled training loop: each convolution has a form with a fast kernel."""

import re

import jax
import numpy as np
import optax
import pytest
from slowly import all_but

import kd_jax as kd
from kd_jax.convolution import onednn
from kd_jax.models.zoo import mobilenet

pytestmark = pytest.mark.usefixtures("quick_compiling")


# A network of each kind of block and of first layers, and how many convolutions its step has at least: three for each
# layer, but two for the first one. ShuffleNets have depthwise ones and those of 1 × 1 alone, which are none in the end.
CONVOLUTIONS = {
    "resnet8": 21, "mobilenet_v2": 2, "wrn_16_1": 38, "vgg8": 14, "resnet18": 50, "resnet50": 50, "mobilenet_v1": 2,
    "shufflenet_v1": 0, "shufflenet_v2": 0, "lenet": 5,
}  # fmt: skip


@pytest.fixture
def without_onednn(monkeypatch):
    """Which takes many of them over: the forms are those of what XLA computes."""
    onednn._loaded.cache_clear()
    with monkeypatch.context() as here:
        here.setenv("KD_JAX_ONEDNN", "0")
        yield
    onednn._loaded.cache_clear()


@pytest.mark.parametrize("name", all_but(lambda name: name in ("resnet8", "mobilenet_v2"), [*CONVOLUTIONS]))
def test_no_convolution_of_a_zoos_network_is_left_without_a_fast_kernel(name, monkeypatch, without_onednn):
    # Two stages have every kind of layer, and compile quickly.
    monkeypatch.setattr(mobilenet, "_V2", (mobilenet._V2[0], mobilenet._V2[2]))
    # ImageNet's halve an image five times, and one of a single pixel is no image.
    side = {"lenet": 32, "vgg8": 32, "resnet18": 64, "resnet50": 64}.get(name, 12)
    model = kd.from_nnx(lambda rngs: getattr(kd.models, name)(num_classes=3, rngs=rngs))
    channels = 1 if name == "lenet" else 3
    data = kd.Batch(np.zeros((8, side, side, channels), np.float32), np.arange(8, dtype=np.int32) % 3)

    def train(key, data):
        return kd.fit(
            key, data, model.network, method=kd.CrossEntropy(), optimizer=optax.sgd(0.1), epochs=2, batch_size=4
        )

    text = jax.jit(train).lower(jax.random.key(0), data).compile().as_text()
    assert "while" in text
    found = re.findall(r"dim_labels=(\w+->\w+)", text)
    # Depthwise convolutions and those of 1 × 1 are none any more.
    assert len(found) >= CONVOLUTIONS[name]
    assert set(found) <= {"b01f_01io->b01f"}
    assert "feature_group_count" not in text
    assert not re.findall(r"\w+_reversal=\w+", text)
