"""A convolutional network of your own, and a smaller one that learns from it: `python examples/own_cnn.py`."""

import jax
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


def main(images: int = 6000) -> None:
    """Trains both on the first `images` of MNIST, and prints a table."""
    data = kd.load("mnist")
    train = kd.Batch(data.train_images[:images] / 255.0, data.train_labels[:images])
    test = kd.Batch(data.test_images[:images] / 255.0, data.test_labels[:images])
    how = dict(optimizer=optax.adamw(2e-3), epochs=5, batch_size=64)

    teacher = kd.distill(CNN(32, nnx.Rngs(0)), None, train, **how).student
    alone = kd.distill(CNN(4, nnx.Rngs(1)), None, train, **how).student
    # The student learns from the teacher's answers, and from its maps after the second convolution.
    method = kd.KD(alpha=0.1, temperature=4.0) + 10 * kd.FitNet("conv2")
    result = kd.distill(CNN(4, nnx.Rngs(1)), teacher, train, method=method, **how)

    rows = {"teacher": teacher, "student alone": alone, "student distilled": result.student}
    measures = ("accuracy", "nll", "ece", "agreement", "kl_to_teacher")
    found = {name: kd.evaluate(model, test, teacher=teacher) for name, model in rows.items()}
    print(
        tabulate(
            [[name, *(of[one] for one in measures)] for name, of in found.items()], ["", *measures], floatfmt=".4f"
        )
    )


if __name__ == "__main__":
    main()
