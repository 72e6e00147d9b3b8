"""Teacher and student of the table: the same three convolutions, of other widths, with named places for features."""

from flax import nnx
from jaxtyping import Array, Float

from kd_jax.models.mlp import ReLU
from kd_jax.models.zoo.layers import AveragePool, BatchNorm, Images, conv, he, initialise

STAGES = ("stage1", "stage2", "stage3")
"""Maps after each convolution, its normalisation and ReLU."""
BEFORE_RELU = "stage3.norm"
"""The last map before its ReLU."""
POOLED = "pool"
"""The mean of the last map over its positions."""
CLASS_MAPS = "classes"
"""Class activation maps, whose mean over the positions the logits are."""


class Stage(nnx.Module):
    """A convolution of 3 × 3, batch normalisation and a ReLU."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        self.conv, self.norm, self.relu = conv(n_in, n_out, 3, stride=stride), BatchNorm(n_out), ReLU()

    def __call__(self, x: Images) -> Images:
        """Its map."""
        return self.relu(self.norm(self.conv(x)))


class Classifier(nnx.Module):
    """Three stages, of which the first two halve the image, and a linear classifier of the pooled last map.

    The classifier is a convolution of 1 × 1 before the pooling, which is the same, and gives class activation maps.
    """

    def __init__(self, widths: tuple[int, ...], channels: int, classes: int, rngs: nnx.Rngs):
        first, second, third = widths
        self.stage1, self.stage2 = Stage(channels, first, 2), Stage(first, second, 2)
        self.stage3 = Stage(second, third, 1)
        self.classes = conv(third, classes, 1, bias=True)
        self.pool, self.mean = AveragePool(), AveragePool()
        initialise(self, rngs, convs=he)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits."""
        x = self.stage3(self.stage2(self.stage1(x)))
        # For methods that compare it; a step that does not read it does not compute it.
        self.pool(x)
        return self.mean(self.classes(x))
