"""The zoo's counterparts in PyTorch, written from the papers, with the names of layers that published weights have."""

import torch
from torch import nn


def conv(n_in, n_out, window, stride=1, groups=1, bias=False):
    return nn.Conv2d(n_in, n_out, window, stride, (window - 1) // 2, groups=groups, bias=bias)


class Residual(nn.Module):
    """He et al. (2016): `windows` of the convolutions, which number `stride_at` strides; a shortcut where needed."""

    def __init__(self, n_in, widths, windows, stride, stride_at):
        super().__init__()
        sizes = [n_in, *widths]
        self.depth = len(widths)
        for i, window in enumerate(windows):
            setattr(self, f"conv{i + 1}", conv(sizes[i], sizes[i + 1], window, stride if i == stride_at else 1))
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(sizes[i + 1]))
        self.downsample = None
        if stride > 1 or n_in != widths[-1]:
            self.downsample = nn.Sequential(conv(n_in, widths[-1], 1, stride), nn.BatchNorm2d(widths[-1]))

    def forward(self, x):
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = torch.relu(y) if i < self.depth else y
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, blocks, widths, stem, classes, channels=3, *, imagenet=False, bottleneck=False):
        super().__init__()
        self.conv1 = conv(channels, stem, 7 if imagenet else 3, 2 if imagenet else 1)
        self.bn1 = nn.BatchNorm2d(stem)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        n_in, self.stages = stem, len(blocks)
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            layers = []
            for i in range(count):
                stride = 2 if i == 0 and stage > 0 else 1
                sizes, windows = ([width, width, 4 * width], (1, 3, 1)) if bottleneck else ([width, width], (3, 3))
                layers.append(Residual(n_in, sizes, windows, stride, 1 if bottleneck else 0))
                n_in = sizes[-1]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(n_in, classes)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean(dim=(2, 3)))
