"""The networks of the distillation papers, by their names: `resnet20(num_classes=100, rngs=rngs)`.

Each has `num_classes`, `in_channels` and `rngs` by name, takes images `[batch, height, width, channels]` of any size
that its strides leave something of, and has the paths of its PyTorch counterpart, so that `load_state_dict` reads the
weights of that one, and `to_state_dict` gives them back. The counterparts are RepDistiller's and mdistiller's networks
for CIFAR, torchvision's and timm's ResNets, and mdistiller's MobileNetV1.

In training mode, which a new module is in, batch normalisation uses the batch's statistics; in evaluation mode
(`module.eval()`, and wherever kd_jax evaluates) the running ones.
"""

from kd_jax.models.zoo.resnet import (
    resnet8,
    resnet8x4,
    resnet14,
    resnet18,
    resnet20,
    resnet32,
    resnet32x4,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet110,
)

__all__ = [
    "resnet8", "resnet8x4", "resnet14", "resnet18", "resnet20", "resnet32", "resnet32x4", "resnet34", "resnet44",
    "resnet50", "resnet56", "resnet110",
]  # fmt: skip
