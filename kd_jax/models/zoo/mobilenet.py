"""MobileNets: V1 (Howard et al., 2017) for ImageNet, V2 (Sandler et al., 2018) with half the channels for CIFAR."""

from flax import nnx
from jaxtyping import Array, Float

from kd_jax.models.zoo.layers import (
    AveragePool,
    BatchNorm,
    Images,
    Sequential,
    conv,
    he,
    initialise,
    linear,
    small,
    units,
)

# Channels and stride of each depthwise separable convolution.
_V1 = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1),
    (1024, 2), (1024, 1),
)  # fmt: skip
# Expansion, channels, blocks and stride of each stage. The second does not stride, for small images.
_V2 = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_LAST = 1280


class MobileNetV1(nnx.Module):
    """A convolution that strides, and 13 that are depthwise and then pointwise.

    Features: `model.3`, `model.5`, `model.11`, `model.13` (the ends of the stages), `avgpool`. Initial values are
    PyTorch's own.
    """

    def __init__(self, *, num_classes: int, in_channels: int, rngs: nnx.Rngs):
        n_in = 32
        layers = [Sequential(*units(in_channels, n_in, 3, stride=2))]
        for n_out, stride in _V1:
            depthwise = units(n_in, n_in, 3, stride=stride, groups=n_in)
            layers.append(Sequential(*depthwise, *units(n_in, n_out, 1)))
            n_in = n_out
        self.model = Sequential(*layers)
        self.avgpool = AveragePool()
        self.fc = linear(n_in, num_classes)
        initialise(self, rngs)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.fc(self.avgpool(self.model(x)))


class InvertedResidual(nnx.Module):
    """Pointwise to more channels, depthwise, pointwise to fewer; and the image itself where the shape is the same."""

    def __init__(self, n_in: int, n_out: int, *, stride: int, expansion: int):
        inner = n_in * expansion
        self.is_residual = stride == 1 and n_in == n_out
        self.conv = Sequential(
            *units(n_in, inner, 1),
            *units(inner, inner, 3, stride=stride, groups=inner),
            conv(inner, n_out, 1),
            BatchNorm(n_out),
        )

    def __call__(self, x: Images) -> Images:
        """Feature maps, not activated."""
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetV2(nnx.Module):
    """Stages of inverted residuals with `width` times the paper's channels, for small images.

    Features: `blocks.1`, `blocks.2`, `blocks.4`, `blocks.6` (the ends of the stages), `avgpool`. Initial values: He's
    normal (fan out) of convolutions, normal with a deviation of 0.01 of the linear layer, biases 0.
    """

    def __init__(self, width: float, *, num_classes: int, in_channels: int, rngs: nnx.Rngs):
        n_in, stages = int(32 * width), []
        self.conv1 = Sequential(*units(in_channels, n_in, 3, stride=2))
        for expansion, channels, count, stride in _V2:
            layers, n_out = [], int(channels * width)
            for i in range(count):
                layers.append(InvertedResidual(n_in, n_out, stride=1 if i else stride, expansion=expansion))
                n_in = n_out
            stages.append(Sequential(*layers))
        self.blocks = Sequential(*stages)
        last = int(_LAST * max(width, 1))
        self.conv2 = Sequential(*units(n_in, last, 1))
        self.avgpool = AveragePool()
        self.classifier = Sequential(linear(last, num_classes))
        initialise(self, rngs, convs=he, linears=small)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits."""
        return self.classifier(self.avgpool(self.conv2(self.blocks(self.conv1(x)))))


def mobilenet_v1(num_classes: int = 1000, *, in_channels: int = 3, rngs: nnx.Rngs) -> MobileNetV1:
    """MobileNetV1 in ImageNet's form: 4,231,976 parameters with 1000 classes."""
    return MobileNetV1(num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def mobilenet_v2(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> MobileNetV2:
    """MobileNetV2 in CIFAR's form, with half the channels: 812,836 parameters with 100 classes."""
    return MobileNetV2(0.5, num_classes=num_classes, in_channels=in_channels, rngs=rngs)
