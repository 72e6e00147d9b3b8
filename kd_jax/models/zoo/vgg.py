"""VGG (Simonyan and Zisserman, 2015) for CIFAR: with batch normalisation, and one linear layer."""

from flax import nnx
from jaxtyping import Array, Float

from kd_jax.models.mlp import ReLU
from kd_jax.models.zoo.layers import (
    AveragePool,
    BatchNorm,
    Images,
    MaxPool,
    Sequential,
    conv,
    he,
    initialise,
    linear,
    small,
)

_WIDTHS = (64, 128, 256, 512, 512)
_LARGE = 64


class VGG(nnx.Module):
    """Five blocks of convolutions of 3 × 3, and max-pools between them.

    counts: convolutions of each block. The pool before the last block is for images of 64 pixels and more alone.

    Features: `block0` to `block4` (after the ReLU), `avgpool`; before the last ReLU of a block is its batch
    normalisation, `block0.1` in VGG-8 and -11, `block0.4` in the others. Initial values: He's normal (fan out) of
    convolutions, normal with a deviation of 0.01 of the linear layer, biases 0.
    """

    def __init__(self, counts: tuple[int, ...], *, num_classes: int, in_channels: int, rngs: nnx.Rngs):
        n_in = in_channels
        for block, (count, width) in enumerate(zip(counts, _WIDTHS, strict=True)):
            layers: list[nnx.Module] = []
            for _ in range(count):
                layers += [conv(n_in, width, 3, bias=True), BatchNorm(width), ReLU()]
                n_in = width
            setattr(self, f"block{block}", Sequential(*layers))
        self.pool = MaxPool(2, stride=2)
        self.avgpool = AveragePool()
        self.classifier = linear(n_in, num_classes)
        initialise(self, rngs, convs=he, linears=small)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits."""
        large = x.shape[1] >= _LARGE
        for block in range(len(_WIDTHS)):
            if 1 <= block <= 3 or (block == 4 and large):
                x = self.pool(x)
            x = getattr(self, f"block{block}")(x)
        return self.classifier(self.avgpool(x))


def vgg8(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> VGG:
    """VGG-8: 3,965,028 parameters with 100 classes."""
    return VGG((1, 1, 1, 1, 1), num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def vgg11(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> VGG:
    """VGG-11: 9,277,284 parameters with 100 classes."""
    return VGG((1, 1, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def vgg13(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> VGG:
    """VGG-13: 9,462,180 parameters with 100 classes."""
    return VGG((2, 2, 2, 2, 2), num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def vgg16(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> VGG:
    """VGG-16: 14,774,436 parameters with 100 classes."""
    return VGG((2, 2, 3, 3, 3), num_classes=num_classes, in_channels=in_channels, rngs=rngs)


def vgg19(num_classes: int = 100, *, in_channels: int = 3, rngs: nnx.Rngs) -> VGG:
    """VGG-19: 20,086,692 parameters with 100 classes."""
    return VGG((2, 2, 4, 4, 4), num_classes=num_classes, in_channels=in_channels, rngs=rngs)
