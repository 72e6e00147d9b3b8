"""Wide residual networks (Zagoruyko and Komodakis, 2016), of 6n + 4 layers."""

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
    of_pytorch_without_bias,
)


class WideBlock(nnx.Module):
    """Batch normalisation and ReLU before each of two convolutions, and a shortcut around them."""

    def __init__(self, n_in: int, n_out: int, *, stride: int):
        self.bn1 = BatchNorm(n_in)
        self.conv1 = conv(n_in, n_out, 3, stride=stride)
        self.bn2 = BatchNorm(n_out)
        self.conv2 = conv(n_out, n_out, 3)
        self.convShortcut = None if n_in == n_out else conv(n_in, n_out, 1, stride=stride)

    def __call__(self, x: Images) -> Images:
        """Feature maps. A shortcut with a convolution starts behind the first ReLU."""
        activated = nnx.relu(self.bn1(x))
        y = self.conv2(nnx.relu(self.bn2(self.conv1(activated))))
        return y + (x if self.convShortcut is None else self.convShortcut(activated))


class WideStage(nnx.Module):
    """Blocks, of which the first strides."""

    def __init__(self, count: int, n_in: int, n_out: int, *, stride: int):
        self.layer = Sequential(*(
            WideBlock(n_out if i else n_in, n_out, stride=1 if i else stride) for i in range(count)
        ))  # fmt: skip

    def __call__(self, x: Images) -> Images:
        """Feature maps, not activated."""
        return self.layer(x)


class WideResNet(nnx.Module):
    """A network of `depth` = 6n + 4 layers with `width` times ResNet's channels.

    Features: `block1`, `block2`, `block3` (not activated; normalised, as some papers take them, `block2.layer.0.bn1`,
    `block3.layer.0.bn1`, `bn1`), `avgpool`. Initial values: He's normal (fan out) of convolutions, PyTorch's own of the
    linear layer, whose biases are 0.
    """

    def __init__(self, depth: int, width: int, *, num_classes: int, in_channels: int, rngs: nnx.Rngs):
        count, widths = (depth - 4) // 6, (16 * width, 32 * width, 64 * width)
        self.conv1 = conv(in_channels, 16, 3)
        self.block1 = WideStage(count, 16, widths[0], stride=1)
        self.block2 = WideStage(count, widths[0], widths[1], stride=2)
        self.block3 = WideStage(count, widths[1], widths[2], stride=2)
        self.bn1 = BatchNorm(widths[2])
        self.avgpool = AveragePool()
        self.fc = linear(widths[2], num_classes)
        initialise(self, rngs, convs=he, linears=of_pytorch_without_bias)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.avgpool(nnx.relu(self.bn1(x))))


def wrn_16_1(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> WideResNet:
    """WRN-16-1: 180,916 parameters with 100 classes."""
    return WideResNet(16, 1, num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def wrn_16_2(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> WideResNet:
    """WRN-16-2: 703,284 parameters with 100 classes."""
    return WideResNet(16, 2, num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def wrn_40_1(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> WideResNet:
    """WRN-40-1: 569,780 parameters with 100 classes."""
    return WideResNet(40, 1, num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def wrn_40_2(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> WideResNet:
    """WRN-40-2: 2,255,156 parameters with 100 classes."""
    return WideResNet(40, 2, num_classes=num_classes, in_channels=in_channels, rngs=rngs)
