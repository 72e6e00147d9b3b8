"""The networks of the distillation papers, by their names: `resnet20(num_classes=100, rngs=rngs)`.

Each has `num_classes`, `in_channels` and `rngs` by name, takes images `[batch, height, width, channels]` of any size
that its strides leave something of, and has the paths of its PyTorch counterpart, so that `load_state_dict` reads the
weights of that one, and `to_state_dict` gives them back. The counterparts are RepDistiller's and mdistiller's networks
for CIFAR, torchvision's and timm's ResNets, and mdistiller's MobileNetV1.

In training mode, which a new module is in, batch normalisation uses the batch's statistics; in evaluation mode
(`module.eval()`, and wherever kd_jax evaluates) the running ones.
"""

from kd_jax.models.zoo.lenet import lenet
from kd_jax.models.zoo.mobilenet import mobilenet_v1, mobilenet_v2
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
from kd_jax.models.zoo.shufflenet import shufflenet_v1, shufflenet_v2
from kd_jax.models.zoo.vgg import (
    vgg8,
    vgg11,
    vgg13,
    vgg16,
    vgg19,
)
from kd_jax.models.zoo.wrn import (
    wrn_16_1,
    wrn_16_2,
    wrn_40_1,
    wrn_40_2,
)

__all__ = [
    "lenet", "mobilenet_v1", "mobilenet_v2", "resnet8", "resnet8x4", "resnet14", "resnet18", "resnet20", "resnet32",
    "resnet32x4", "resnet34", "resnet44", "resnet50", "resnet56", "resnet110", "shufflenet_v1", "shufflenet_v2",
    "vgg8", "vgg11", "vgg13", "vgg16", "vgg19", "wrn_16_1", "wrn_16_2", "wrn_40_1", "wrn_40_2",
]  # fmt: skip
