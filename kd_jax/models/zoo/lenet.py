"""LeNet-5 (LeCun et al., 1998), as it is used today: with ReLU and max-pools."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kd_jax.errors import ShapeError
from kd_jax.models.zoo.layers import Images, MaxPool, conv, initialise, linear

_SIZE = 32


class LeNet(nnx.Module):
    """Two convolutions of 5 × 5 with max-pools, and three linear layers.

    Images stand in the middle of 32 × 32 pixels, as the paper has it; those of 28 × 28 get 2 pixels of 0 on each side.
    Features: `conv1`, `conv2`, `fc1`, `fc2`, not activated. Initial values are PyTorch's own.
    """

    def __init__(self, *, num_classes: int, in_channels: int, rngs: nnx.Rngs):
        self.conv1 = conv(in_channels, 6, 5, padding=0, bias=True)
        self.conv2 = conv(6, 16, 5, padding=0, bias=True)
        self.pool = MaxPool(2, stride=2)
        self.fc1 = linear(400, 120)
        self.fc2 = linear(120, 84)
        self.fc3 = linear(84, num_classes)
        initialise(self, rngs)

    def __call__(self, x: Images) -> Float[Array, "batch classes"]:
        """Logits. Raises `ShapeError` for images above 32 × 32 pixels, and for what has other axes."""
        if x.ndim != 4:
            raise ShapeError(
                f"the images have the shape {list(x.shape)}, and LeNet takes [examples, height, width, channels]: give "
                "inputs[..., None] where the axis of channels is missing"
            )
        height, width = x.shape[1:3]
        if max(height, width) > _SIZE:
            raise ShapeError(
                f"an image has {height} × {width} pixels, and LeNet takes up to {_SIZE} × {_SIZE}: make them smaller"
            )
        above, left = (_SIZE - height) // 2, (_SIZE - width) // 2
        x = jnp.pad(x, ((0, 0), (above, _SIZE - height - above), (left, _SIZE - width - left), (0, 0)))
        x = self.pool(nnx.relu(self.conv1(x)))
        x = self.pool(nnx.relu(self.conv2(x)))
        # In PyTorch's order, for weights from there.
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        return self.fc3(nnx.relu(self.fc2(nnx.relu(self.fc1(x)))))


def lenet(num_classes: int = 10, *, in_channels: int = 1, rngs: nnx.Rngs) -> LeNet:
    """LeNet-5: 61,706 parameters with 10 classes and 1 channel."""
    return LeNet(num_classes=num_classes, in_channels=in_channels, rngs=rngs)
