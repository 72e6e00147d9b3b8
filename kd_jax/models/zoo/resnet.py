"""ResNets (He et al., 2016): those of CIFAR with 6n + 2 layers, and ImageNet's with 18, 34 and 50."""

from flax import nnx
from jaxtyping import Array, Float

from kd_jax.models.mlp import ReLU
from kd_jax.models.zoo.layers import (
    AveragePool,
    BatchNorm,
    Identity,
    Images,
    MaxPool,
    Sequential,
    conv,
    he,
    initialise,
    linear,
)


class BasicBlock(nnx.Module):
    """Two convolutions of 3 × 3 and a shortcut. Their sum, before the ReLU, is the feature `preact`."""

    expansion = 1

    def __init__(self, n_in: int, width: int, *, stride: int):
        self.conv1 = conv(n_in, width, 3, stride=stride)
        self.bn1 = BatchNorm(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = BatchNorm(width)
        self.downsample = _downsample(n_in, width, stride)
        self.preact = Identity()

    def __call__(self, x: Images) -> Images:
        """Feature maps."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(self.preact(y + (x if self.downsample is None else self.downsample(x))))


class Bottleneck(nnx.Module):
    """Convolutions of 1 × 1, 3 × 3 (which strides) and 1 × 1, and a shortcut; features as of `BasicBlock`."""

    expansion = 4

    def __init__(self, n_in: int, width: int, *, stride: int):
        n_out = self.expansion * width
        self.conv1 = conv(n_in, width, 1)
        self.bn1 = BatchNorm(width)
        self.conv2 = conv(width, width, 3, stride=stride)
        self.bn2 = BatchNorm(width)
        self.conv3 = conv(width, n_out, 1)
        self.bn3 = BatchNorm(n_out)
        self.downsample = _downsample(n_in, n_out, stride)
        self.preact = Identity()

    def __call__(self, x: Images) -> Images:
        """Feature maps."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(self.preact(y + (x if self.downsample is None else self.downsample(x))))


class ResNet(nnx.Module):
    """Stages of residual blocks, of which each but the first halves the image.

    blocks, widths: of each stage. stem: the first convolution's channels; its window is 3 × 3, or with `imagenet`
    7 × 7 with a stride of 2 and a max-pool behind it.

    Features: `layer1`, `layer2`, … (after the ReLU), `layer1.0.preact` (before it), `avgpool`. Initial values are those
    of the authors: He's normal (fan out) of convolutions, PyTorch's own of the linear layer.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...], widths: tuple[int, ...], *,
        stem: int, num_classes: int, in_channels: int, imagenet: bool = False, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.conv1 = conv(in_channels, stem, 7 if imagenet else 3, stride=2 if imagenet else 1)
        self.bn1 = BatchNorm(stem)
        self.relu = ReLU()
        self.maxpool = MaxPool(3, stride=2, padding=1) if imagenet else None
        n_in, self.stages = stem, len(blocks)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), 1):
            layers = []
            for number in range(count):
                layers.append(block(n_in, width, stride=2 if stage > 1 and number == 0 else 1))
                n_in = block.expansion * width
            setattr(self, f"layer{stage}", Sequential(*layers))
        self.avgpool = AveragePool()
        self.fc = linear(n_in, num_classes)
        initialise(self, rngs, convs=he)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.fc(self.avgpool(x))


def _downsample(n_in: int, n_out: int, stride: int) -> Sequential | None:
    """A shortcut where the block changes the shape."""
    if stride == 1 and n_in == n_out:
        return None
    return Sequential(conv(n_in, n_out, 1, stride=stride), BatchNorm(n_out))


def _cifar(depth: int, num_classes: int, in_channels: int, rngs: nnx.Rngs, *, times: int = 1) -> ResNet:
    """A network of 6n + 2 layers. times: 4 makes the stem twice as wide, and the stages four times."""
    blocks, stem = (((depth - 2) // 6,) * 3), 16 if times == 1 else 32
    widths = (16 * times, 32 * times, 64 * times)
    return ResNet(BasicBlock, blocks, widths, stem=stem, num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def resnet8(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-8 in CIFAR's form: 83,892 parameters with 100 classes."""
    return _cifar(8, num_classes, in_channels, rngs)


def resnet14(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-14 in CIFAR's form: 181,108 parameters with 100 classes."""
    return _cifar(14, num_classes, in_channels, rngs)


def resnet20(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-20 in CIFAR's form: 278,324 parameters with 100 classes."""
    return _cifar(20, num_classes, in_channels, rngs)


def resnet32(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-32 in CIFAR's form: 472,756 parameters with 100 classes."""
    return _cifar(32, num_classes, in_channels, rngs)


def resnet44(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-44 in CIFAR's form: 667,188 parameters with 100 classes."""
    return _cifar(44, num_classes, in_channels, rngs)


def resnet56(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-56 in CIFAR's form: 861,620 parameters with 100 classes."""
    return _cifar(56, num_classes, in_channels, rngs)


def resnet110(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-110 in CIFAR's form: 1,736,564 parameters with 100 classes."""
    return _cifar(110, num_classes, in_channels, rngs)


def resnet8x4(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-8 with four times the channels: 1,233,540 parameters with 100 classes."""
    return _cifar(8, num_classes, in_channels, rngs, times=4)


def resnet32x4(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-32 with four times the channels: 7,433,860 parameters with 100 classes."""
    return _cifar(32, num_classes, in_channels, rngs, times=4)


def _imagenet(
    block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...], num_classes: int, in_channels: int,
    rngs: nnx.Rngs,
) -> ResNet:  # fmt: skip
    return ResNet(
        block, blocks, (64, 128, 256, 512), stem=64, num_classes=num_classes, in_channels=in_channels, imagenet=True,
        rngs=rngs,
    )  # fmt: skip


def resnet18(num_classes: int = 1000, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-18 in ImageNet's form: 11,689,512 parameters with 1000 classes."""
    return _imagenet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, rngs)


def resnet34(num_classes: int = 1000, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-34 in ImageNet's form: 21,797,672 parameters with 1000 classes."""
    return _imagenet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, rngs)


def resnet50(num_classes: int = 1000, *, in_channels: int = 3, rngs: nnx.Rngs) -> ResNet:
    """ResNet-50 in ImageNet's form: 25,557,032 parameters with 1000 classes."""
    return _imagenet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, rngs)
