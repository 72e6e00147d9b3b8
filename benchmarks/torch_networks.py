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


class WideBlock(nn.Module):
    """Zagoruyko and Komodakis (2016): what is activated goes into both branches where channels change."""

    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(n_in), conv(n_in, n_out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(n_out), conv(n_out, n_out, 3)
        if n_in != n_out:
            self.convShortcut = conv(n_in, n_out, 1, stride)

    def forward(self, x):
        y = torch.relu(self.bn1(x))
        shortcut = self.convShortcut(y) if hasattr(self, "convShortcut") else x
        return shortcut + self.conv2(torch.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    def __init__(self, depth, times, classes, channels=3):
        super().__init__()
        self.conv1, n_in = conv(channels, 16, 3), 16
        for stage in range(3):
            n_out = 16 * times * 2**stage
            layers = [WideBlock(n_in, n_out, 1 if stage == 0 else 2)]
            layers += [WideBlock(n_out, n_out, 1) for _ in range((depth - 4) // 6 - 1)]
            setattr(self, f"block{stage + 1}", nn.ModuleDict({"layer": nn.Sequential(*layers)}))
            n_in = n_out
        self.bn1, self.fc = nn.BatchNorm2d(n_in), nn.Linear(n_in, classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in (self.block1, self.block2, self.block3):
            x = stage["layer"](x)
        return self.fc(torch.relu(self.bn1(x)).mean(dim=(2, 3)))


class VGG(nn.Module):
    """Simonyan and Zisserman (2015), with batch normalisation and the mean of the last maps; small images."""

    def __init__(self, counts, classes, channels=3):
        super().__init__()
        for i, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
            layers = []
            for _ in range(count):
                layers += [conv(channels, width, 3, bias=True), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            setattr(self, f"block{i}", nn.Sequential(*layers))
        self.classifier = nn.Linear(512, classes)

    def forward(self, x):
        small = x.shape[2] < 64
        for i in range(4):
            x = getattr(self, f"block{i}")(x)
            x = x if i == 3 and small else nn.functional.max_pool2d(x, 2)
        return self.classifier(self.block4(x).mean(dim=(2, 3)))


def units(n_in, n_out, window, stride=1, groups=1):
    return conv(n_in, n_out, window, stride, groups), nn.BatchNorm2d(n_out), nn.ReLU()


class MobileNetV1(nn.Module):
    """Howard et al. (2017), table 1."""

    def __init__(self, classes, channels=3):
        super().__init__()
        layers, n_in = [nn.Sequential(*units(channels, 32, 3, 2))], 32
        for i, n_out in enumerate([64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]):
            stride = 2 if i in (1, 3, 5, 11) else 1
            layers.append(nn.Sequential(*units(n_in, n_in, 3, stride, n_in), *units(n_in, n_out, 1)))
            n_in = n_out
        self.model, self.fc = nn.Sequential(*layers), nn.Linear(1024, classes)

    def forward(self, x):
        return self.fc(self.model(x).mean(dim=(2, 3)))


class Inverted(nn.Module):
    def __init__(self, n_in, n_out, stride, times):
        super().__init__()
        inner, self.keeps = times * n_in, stride == 1 and n_in == n_out
        last = conv(inner, n_out, 1), nn.BatchNorm2d(n_out)
        self.conv = nn.Sequential(*units(n_in, inner, 1), *units(inner, inner, 3, stride, inner), *last)

    def forward(self, x):
        return self.conv(x) + x if self.keeps else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al. (2018), table 2, with half the channels; the second stage does not stride."""

    def __init__(self, classes, channels=3):
        super().__init__()
        n_in, stages = 16, []
        self.conv1 = nn.Sequential(*units(channels, 16, 3, 2))
        for i, (n_out, count) in enumerate([(8, 1), (12, 2), (16, 3), (32, 4), (48, 3), (80, 3), (160, 1)]):
            blocks = []
            for number in range(count):
                stride = 2 if number == 0 and i in (2, 3, 5) else 1
                blocks.append(Inverted(n_in, n_out, stride, 6 if i else 1))
                n_in = n_out
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.ModuleList(stages)
        self.conv2 = nn.Sequential(*units(160, 1280, 1))
        self.classifier = nn.Sequential(nn.Linear(1280, classes))

    def forward(self, x):
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        return self.classifier(self.conv2(x).mean(dim=(2, 3)))


class Convolutions(nn.Module):
    """conv1, bn1, conv2, bn2, …: `(inputs, outputs, window, stride, groups)` of each."""

    def __init__(self, *shapes):
        super().__init__()
        for i, (n_in, n_out, window, stride, groups) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", conv(n_in, n_out, window, stride, groups))
            setattr(self, f"bn{i}", nn.BatchNorm2d(n_out))

    def unit(self, number, x):
        return getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x))


class ShuffleV1(Convolutions):
    """Zhang et al. (2018), figure 2; the first convolution behind the stem, of 24 channels, has no groups."""

    def __init__(self, n_in, n_out, stride):
        new, self.strides, self.groups = (n_out - n_in if stride == 2 else n_out), stride == 2, 1 if n_in == 24 else 3
        inner = new // 4
        super().__init__((n_in, inner, 1, 1, self.groups), (inner, inner, 3, stride, inner), (inner, new, 1, 1, 3))

    def forward(self, x):
        y = nn.functional.channel_shuffle(torch.relu(self.unit(1, x)), self.groups)
        y = self.unit(3, torch.relu(self.unit(2, y)))
        return torch.relu(torch.cat([y, nn.functional.avg_pool2d(x, 3, 2, 1)], 1) if self.strides else x + y)


class ShuffleV2(Convolutions):
    """Ma et al. (2018), figure 3 (c)."""

    def __init__(self, n):
        super().__init__((n, n, 1, 1, 1), (n, n, 3, 1, n), (n, n, 1, 1, 1))

    def forward(self, x):
        kept, y = x.chunk(2, dim=1)
        y = torch.relu(self.unit(3, self.unit(2, torch.relu(self.unit(1, y)))))
        return nn.functional.channel_shuffle(torch.cat([kept, y], 1), 2)


class ShuffleV2Down(Convolutions):
    """Ma et al. (2018), figure 3 (d): the left branch has the first two convolutions."""

    def __init__(self, n_in, n):
        left = (n_in, n_in, 3, 2, n_in), (n_in, n, 1, 1, 1)
        super().__init__(*left, (n_in, n, 1, 1, 1), (n, n, 3, 2, n), (n, n, 1, 1, 1))

    def forward(self, x):
        left = torch.relu(self.unit(2, self.unit(1, x)))
        right = torch.relu(self.unit(5, self.unit(4, torch.relu(self.unit(3, x)))))
        return nn.functional.channel_shuffle(torch.cat([left, right], 1), 2)


class ShuffleNet(Convolutions):
    """Of either version, with a stem of 1 × 1 that does not stride."""

    def __init__(self, version, classes, channels=3):
        last = [(464, 1024, 1, 1, 1)] if version == 2 else []
        super().__init__((channels, 24, 1, 1, 1), *last)
        self.has_last, n_in = bool(last), 24
        for stage, count in enumerate((3, 7, 3)):
            if version == 1:
                n_out = 240 * 2**stage
                units = [ShuffleV1(n_in, n_out, 2), *(ShuffleV1(n_out, n_out, 1) for _ in range(count))]
            else:
                n_out = 116 * 2**stage
                units = [ShuffleV2Down(n_in, n_out // 2), *(ShuffleV2(n_out // 2) for _ in range(count))]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*units))
            n_in = n_out
        self.linear = nn.Linear(1024 if last else n_in, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.unit(1, x)))))
        return self.linear((torch.relu(self.unit(2, x)) if self.has_last else x).mean(dim=(2, 3)))


class LeNet(nn.Module):
    """LeCun et al. (1998), figure 2, with ReLU and max-pools."""

    def __init__(self, classes, channels, padding):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 6, 5, padding=padding), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, classes)

    def forward(self, x):
        for layer in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(torch.relu(layer(x)), 2)
        x = torch.relu(self.fc2(torch.relu(self.fc1(x.flatten(1)))))
        return self.fc3(x)
