"""A PyTorch network teaches a JAX student: `python examples/pytorch_teacher.py`. Needs `pip install torch`."""

import numpy as np
import optax
import torch
from tabulate import tabulate

import kd_jax as kd


def trained(images: np.ndarray, labels: np.ndarray) -> torch.nn.Module:
    """A PyTorch network, trained in PyTorch: yours would come from a checkpoint."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(1, 16, 5, stride=2, padding=2)
    module = torch.nn.Sequential(
        convolution, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 14 * 14, 64), torch.nn.ReLU(),
        torch.nn.Dropout(0.2), torch.nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32))
    targets = torch.from_numpy(labels.astype(np.int64))
    for _ in range(2):
        for rows in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    return module


def main(images: int = 6000) -> None:
    """Trains on the first `images` of MNIST, and prints a table."""
    data = kd.load("mnist")
    train = kd.Batch(data.train_images[:images] / 255.0, data.train_labels[:images])
    test = kd.Batch(data.test_images[:images] / 255.0, data.test_labels[:images])
    module = trained(np.asarray(train.inputs), np.asarray(train.labels))

    # PyTorch wants the channels first. Dropout is off: a teacher is always in evaluation mode.
    teacher = kd.from_torch(module, call=lambda module, inputs, train: module(inputs.permute(0, 3, 1, 2)))
    how = dict(optimizer=optax.adamw(2e-3), epochs=10, batch_size=64)
    # Asked once about all training images, and not in each step.
    result = kd.distill(kd.mlp([784, 50, 10]), kd.cached(teacher, train), train, method=kd.KD(alpha=0.1), **how)
    found = {"teacher": kd.evaluate(teacher, test), "student": kd.evaluate(result.student, test, teacher=teacher)}
    print(tabulate([[name, *of.values()] for name, of in found.items()], ["", *found["student"]], floatfmt=".4f"))


if __name__ == "__main__":
    main()
