"""A Linen network with batch statistics and dropout as the student: `python examples/linen_batch_statistics.py`."""

import jax
import optax
from flax import linen as nn
from tabulate import tabulate

import kd_jax as kd


class Net(nn.Module):
    """Convolution, batch normalisation and dropout, which behave otherwise in training."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of images `[batch, 28, 28, 1]`."""
        x = nn.Conv(self.width, (3, 3), strides=2, use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(2 * self.width, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).reshape(len(images), -1)
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))


def main(images: int = 6000) -> None:
    """Trains both on the first `images` of MNIST, and prints a table."""
    data = kd.load("mnist")
    train = kd.Batch(data.train_images[:images] / 255.0, data.train_labels[:images])
    test = kd.Batch(data.test_images[:images] / 255.0, data.test_labels[:images])
    how = dict(optimizer=optax.adamw(2e-3), epochs=5, batch_size=64)

    # The example gives the shapes. `train` is given by name, as the signature has it.
    teacher = kd.distill(kd.from_linen(Net(16), train.inputs[:1]), None, train, **how).student
    result = kd.distill(kd.from_linen(Net(4), train.inputs[:1]), teacher, train, method=kd.KD(), **how)
    print("trained:", {name: len(jax.tree.leaves(tree)) for name, tree in result.student.variables.items()}, "arrays")

    found = {"teacher": kd.evaluate(teacher, test), "student": kd.evaluate(result.student, test, teacher=teacher)}
    print(tabulate([[name, *of.values()] for name, of in found.items()], ["", *found["student"]], floatfmt=".4f"))


if __name__ == "__main__":
    main()
