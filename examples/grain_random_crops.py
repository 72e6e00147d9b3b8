"""A Grain pipeline with random crops; the teacher sees the student's view: `python examples/grain_random_crops.py`.

Needs `pip install grain`.
"""

from typing import Any

import grain
import jax
import numpy as np
import optax
from flax import nnx
from tabulate import tabulate

import kd_jax as kd


class CNN(nnx.Module):
    """Two convolutions and a linear layer."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, width, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(width, 2 * width, (3, 3), strides=2, rngs=rngs)
        self.output = nnx.Linear(2 * width * 7 * 7, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of images `[batch, 28, 28, 1]`."""
        maps = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        return self.output(maps.reshape(len(images), -1))


def cropped(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A window of 28 × 28 of the image with a margin of two pixels, as floats."""
    row, column = rng.integers(0, 5, 2)
    wide = np.pad(example["image"], ((2, 2), (2, 2), (0, 0)))
    return example | {"image": wide[row : row + 28, column : column + 28].astype(np.float32) / 255}


def pipeline(images: np.ndarray, labels: np.ndarray, batch_size: int) -> grain.IterDataset:
    """Endless batches, in a new order in each pass."""
    source = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    found = grain.MapDataset.source(source).seed(0).shuffle().repeat().random_map(cropped)
    return found.batch(batch_size, drop_remainder=True).to_iter_dataset()


def main(images: int = 6000) -> None:
    """Trains on crops of the first `images` of MNIST, and prints a table."""
    data, size = kd.load("mnist"), 64
    batches = pipeline(data.train_images[:images], data.train_labels[:images], size)
    test = kd.Batch(data.test_images[:images] / 255.0, data.test_labels[:images])
    how = dict(optimizer=optax.adamw(2e-3), epochs=5, steps=images // size)

    teacher = kd.distill(CNN(32, nnx.Rngs(0)), None, batches, **how).student
    # The teacher answers in each step, on the batch that the student gets.
    student = kd.distill(CNN(4, nnx.Rngs(1)), teacher, batches, method=kd.KD(), **how).student
    found = {"teacher": kd.evaluate(teacher, test), "student": kd.evaluate(student, test, teacher=teacher)}
    print(tabulate([[name, *of.values()] for name, of in found.items()], ["", *found["student"]], floatfmt=".4f"))


if __name__ == "__main__":
    main()
