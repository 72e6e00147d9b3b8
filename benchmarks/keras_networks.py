"""Networks of the section `networks` in Keras 3, with the zoo's numbers of parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any


def _convolved(keras: Any, x: Any, width: int, window: int = 3, stride: int = 1) -> Any:
    return keras.layers.Conv2D(width, window, strides=stride, padding="same", use_bias=False)(x)


def _normalised(keras: Any, x: Any) -> Any:
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def _classified(keras: Any, inputs: Any, x: Any, classes: int) -> Any:
    return keras.Model(inputs, keras.layers.Dense(classes)(keras.layers.GlobalAveragePooling2D()(x)))


def _resnet(keras: Any, classes: int, *, blocks: int) -> Any:
    """In the form for CIFAR."""
    layers = keras.layers

    def unit(x: Any, width: int, window: int, stride: int) -> Any:
        return _normalised(keras, _convolved(keras, x, width, window, stride))

    inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(unit(inputs, 16, 3, 1))
    for stage, width in enumerate((16, 32, 64)):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = unit(layers.ReLU()(unit(x, width, 3, stride)), width, 3, 1)
            shortcut = unit(x, width, 1, stride) if stride > 1 else x
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    return _classified(keras, inputs, x, classes)


def _wide_resnet(keras: Any, classes: int, *, blocks: int, times: int) -> Any:
    """What is activated goes into both branches where channels change."""
    layers = keras.layers
    inputs = keras.Input((32, 32, 3))
    x = _convolved(keras, inputs, 16)
    for stage in range(3):
        width = 16 * times * 2**stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = layers.ReLU()(_normalised(keras, x))
            shortcut = x if block else _convolved(keras, y, width, 1, stride)
            y = layers.ReLU()(_normalised(keras, _convolved(keras, y, width, 3, stride)))
            x = layers.Add()([_convolved(keras, y, width), shortcut])
    return _classified(keras, inputs, layers.ReLU()(_normalised(keras, x)), classes)


def _mobilenet_v2(keras: Any, classes: int) -> Any:
    """With half the channels; the second stage does not stride."""
    layers = keras.layers

    def unit(x: Any) -> Any:
        return layers.ReLU()(_normalised(keras, x))

    inputs = keras.Input((32, 32, 3))
    x = unit(_convolved(keras, inputs, 16, 3, 2))
    for stage, (width, count) in enumerate([(8, 1), (12, 2), (16, 3), (32, 4), (48, 3), (80, 3), (160, 1)]):
        for block in range(count):
            stride = 2 if not block and stage in (2, 3, 5) else 1
            y = unit(_convolved(keras, x, (6 if stage else 1) * x.shape[-1], 1))
            y = unit(layers.DepthwiseConv2D(3, strides=stride, padding="same", use_bias=False)(y))
            y = _normalised(keras, _convolved(keras, y, width, 1))
            x = layers.Add()([x, y]) if stride == 1 and x.shape[-1] == width else y
    return _classified(keras, inputs, unit(_convolved(keras, x, 1280, 1)), classes)


MADE: dict[str, Callable[[Any, int], Any]] = {
    "resnet8": partial(_resnet, blocks=1),
    "resnet20": partial(_resnet, blocks=3),
    "wrn_16_2": partial(_wide_resnet, blocks=2, times=2),
    "mobilenet_v2": _mobilenet_v2,
}
