"""The operations of `benchmarks.operations` in eager PyTorch, channels last."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


class Function(nn.Module):
    """A function without parameters."""

    def __init__(self, fun: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fun = fun

    def forward(self, x: Tensor) -> Tensor:
        """The function's value."""
        return self.fun(x)


class First(nn.Module):
    """A recurrent layer's outputs, without its last state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """[batch, time, features]."""
        return self.layer(x)[0]


class Block(nn.Module):
    """Two convolutions, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, outputs, …]."""
        return functional.relu(self.main(x) + self.shortcut(x))


def resnet8() -> nn.Module:
    """As `benchmarks.operations.ResNet8`."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Block(*sizes) for sizes in ((16, 16, 1), (16, 32, 2), (32, 64, 2))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _attention(x: Tensor) -> Tensor:
    heads = x.transpose(1, 2)
    return functional.scaled_dot_product_attention(heads, heads, heads)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "ResNet-8": resnet8,
    "conv 3 × 3": lambda: nn.Conv2d(16, 16, 3, padding=1),
    "conv 3 × 3, bfloat16": lambda: nn.Conv2d(16, 16, 3, padding=1, dtype=torch.bfloat16),
    "conv 3 × 3, stride 2": lambda: nn.Conv2d(16, 32, 3, 2, 1),
    "conv 3 × 3, dilation 2": lambda: nn.Conv2d(16, 16, 3, padding=2, dilation=2),
    "conv 3 × 3, 4 groups": lambda: nn.Conv2d(64, 64, 3, padding=1, groups=4),
    "depthwise 3 × 3": lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
    "depthwise 3 × 3, 128 features": lambda: nn.Conv2d(128, 128, 3, padding=1, groups=128),
    "depthwise 3 × 3, bfloat16": lambda: nn.Conv2d(128, 128, 3, padding=1, groups=128, dtype=torch.bfloat16),
    "conv 1 × 1": lambda: nn.Conv2d(16, 64, 1),
    "conv_transpose 3 × 3, stride 2": lambda: nn.ConvTranspose2d(16, 16, 3, 2, 1, 1),
    "conv 1-D, 5": lambda: nn.Conv1d(32, 64, 5, padding=2),
    "conv 512 × 1, stride 4": lambda: nn.Conv2d(1, 128, (512, 1), (4, 1), (254, 0)),
    "conv 64 × 1": lambda: nn.Sequential(nn.ZeroPad2d((0, 0, 31, 32)), nn.Conv2d(128, 16, (64, 1))),
    "conv 3-D, 3 × 3 × 3": lambda: nn.Conv3d(8, 8, 3, padding=1),
    "average pool 3 × 3, padded": lambda: nn.AvgPool2d(3, 2, 1),
    "max pool 2 × 2": lambda: nn.MaxPool2d(2),
    "batch norm": lambda: nn.BatchNorm2d(16),
    "layer norm": lambda: nn.LayerNorm(128),
    "group norm": lambda: nn.GroupNorm(4, 16),
    "attention": lambda: Function(_attention),
    "GRU": lambda: First(nn.GRU(32, 64, batch_first=True)),
    "LSTM": lambda: First(nn.LSTM(32, 64, batch_first=True)),
    "embedding": lambda: nn.Embedding(1000, 64),
    "GELU": lambda: nn.GELU(approximate="tanh"),
    "sort": lambda: Function(lambda x: x.sort(-1).values),
}
# Features are the last axis in PyTorch, too.
_FEATURES_LAST = {"layer norm", "attention", "GRU", "LSTM", "embedding", "GELU", "sort"}


def step(name: str, shape: tuple[int, ...]) -> Callable[[], None]:
    """One training step of the operation `name`; `shape` has the features last."""
    module, rng = MODULES[name](), np.random.default_rng(0)
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    if name == "embedding":
        inputs = torch.as_tensor(rng.integers(0, 1000, shape))
    else:
        inputs = torch.as_tensor(rng.normal(size=shape), dtype=dtype)
    if name not in _FEATURES_LAST:
        # The memory stays as it is: channels last.
        inputs = inputs.movedim(-1, 1)
    if inputs.ndim == 4 and name not in _FEATURES_LAST:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained: list[Tensor] = list(module.parameters())
    if inputs.is_floating_point():
        trained.append(inputs.requires_grad_())
    optimizer = torch.optim.SGD(trained, lr=0.01)

    def train() -> None:
        optimizer.zero_grad()
        module(inputs).float().square().mean().backward()
        optimizer.step()

    return train
