"""ShuffleNets for CIFAR: V1 (Zhang et al., 2018) with three groups, V2 (Ma et al., 2018)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kd_jax.models.zoo.layers import (
    AveragePool,
    BatchNorm,
    Identity,
    Images,
    Sequential,
    average_pool,
    conv,
    initialise,
    linear,
    shuffled,
)

_STEM = 24


class ShuffleUnitV1(nnx.Module):
    """A bottleneck of grouped convolutions with a shuffle of channels; a stride joins the pooled image to it.

    The result before the ReLU is the feature `preact`. From the stem the first convolution has no groups.
    """

    def __init__(self, n_in: int, n_out: int, *, stride: int, groups: int):
        added = n_out - n_in if stride == 2 else n_out
        inner, self.stride, self.groups = added // 4, stride, 1 if n_in == _STEM else groups
        self.conv1 = conv(n_in, inner, 1, groups=self.groups)
        self.bn1 = BatchNorm(inner)
        self.conv2 = conv(inner, inner, 3, stride=stride, groups=inner)
        self.bn2 = BatchNorm(inner)
        self.conv3 = conv(inner, added, 1, groups=groups)
        self.bn3 = BatchNorm(added)
        self.preact = Identity()

    def __call__(self, x: Images) -> Images:
        """Feature maps."""
        y = shuffled(nnx.relu(self.bn1(self.conv1(x))), self.groups)
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.stride == 1:
            return nnx.relu(self.preact(x + y))
        return nnx.relu(self.preact(jnp.concatenate([y, average_pool(x)], axis=-1)))


class ShuffleNetV1(nnx.Module):
    """Three stages of units, of which the first strides.

    Features: `layer1`, `layer2`, `layer3` (after the ReLU), `layer1.0.preact` (before it), `avgpool`. Initial values
    are PyTorch's own.
    """

    def __init__(self, *, num_classes: int, in_channels: int, rngs: nnx.Rngs):
        self.conv1 = conv(in_channels, _STEM, 1)
        self.bn1 = BatchNorm(_STEM)
        n_in = _STEM
        for stage, (n_out, count) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
            units = []
            for i in range(count):
                units.append(ShuffleUnitV1(n_in, n_out, stride=1 if i else 2, groups=3))
                n_in = n_out
            setattr(self, f"layer{stage}", Sequential(*units))
        self.avgpool = AveragePool()
        self.linear = linear(n_in, num_classes)
        initialise(self, rngs)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(self.avgpool(x))


class ShuffleUnitV2(nnx.Module):
    """Half of the channels through three convolutions, the others as they are, and a shuffle of both."""

    def __init__(self, channels: int):
        half = channels // 2
        self.conv1 = conv(half, half, 1)
        self.bn1 = BatchNorm(half)
        self.conv2 = conv(half, half, 3, groups=half)
        self.bn2 = BatchNorm(half)
        self.conv3 = conv(half, half, 1)
        self.bn3 = BatchNorm(half)

    def __call__(self, x: Images) -> Images:
        """Feature maps."""
        kept, y = jnp.split(x, 2, axis=-1)
        y = nnx.relu(self.bn1(self.conv1(y)))
        y = nnx.relu(self.bn3(self.conv3(self.bn2(self.conv2(y)))))
        return shuffled(jnp.concatenate([kept, y], axis=-1), 2)


class ShuffleDownV2(nnx.Module):
    """All channels through two branches that stride, and a shuffle of both."""

    def __init__(self, n_in: int, n_out: int):
        half = n_out // 2
        self.conv1 = conv(n_in, n_in, 3, stride=2, groups=n_in)
        self.bn1 = BatchNorm(n_in)
        self.conv2 = conv(n_in, half, 1)
        self.bn2 = BatchNorm(half)
        self.conv3 = conv(n_in, half, 1)
        self.bn3 = BatchNorm(half)
        self.conv4 = conv(half, half, 3, stride=2, groups=half)
        self.bn4 = BatchNorm(half)
        self.conv5 = conv(half, half, 1)
        self.bn5 = BatchNorm(half)

    def __call__(self, x: Images) -> Images:
        """Feature maps."""
        left = nnx.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = nnx.relu(self.bn3(self.conv3(x)))
        right = nnx.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffled(jnp.concatenate([left, right], axis=-1), 2)


class ShuffleNetV2(nnx.Module):
    """Three stages, of which the first unit strides, and a pointwise convolution.

    Features: `layer1`, `layer2`, `layer3`, `avgpool`. Initial values are PyTorch's own.
    """

    def __init__(self, *, num_classes: int, in_channels: int, rngs: nnx.Rngs):
        self.conv1 = conv(in_channels, _STEM, 1)
        self.bn1 = BatchNorm(_STEM)
        n_in = _STEM
        for stage, (n_out, count) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
            units = [ShuffleUnitV2(n_out) for _ in range(count)]
            setattr(self, f"layer{stage}", Sequential(ShuffleDownV2(n_in, n_out), *units))
            n_in = n_out
        self.conv2 = conv(n_in, 1024, 1)
        self.bn2 = BatchNorm(1024)
        self.avgpool = AveragePool()
        self.linear = linear(1024, num_classes)
        initialise(self, rngs)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(self.avgpool(nnx.relu(self.bn2(self.conv2(x)))))


def shufflenet_v1(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ShuffleNetV1:
    """ShuffleNetV1 in CIFAR's form: 949,258 parameters with 100 classes."""
    return ShuffleNetV1(num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def shufflenet_v2(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> ShuffleNetV2:
    """ShuffleNetV2 in CIFAR's form: 1,355,528 parameters with 100 classes."""
    return ShuffleNetV2(num_classes=num_classes, in_channels=in_channels, rngs=rngs)
