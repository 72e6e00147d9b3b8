"""Three methods over the same seeds, with intervals and plots: `python examples/compare_methods.py`."""

import optax

import kd_jax as kd


def main(images: int = 2000, width: int = 300, folder: str = "runs/compare-methods") -> None:
    """Compares students of `width` units on `images` of MNIST. Prints a table; writes it and plots into `folder`."""
    data = kd.load("mnist")
    train = kd.Batch(data.train_images[:images] / 255.0, data.train_labels[:images])
    test = kd.Batch(data.test_images[: 2 * images] / 255.0, data.test_labels[: 2 * images])
    how = dict(optimizer=optax.adamw(1e-3), batch_size=64)

    # The teacher saw more images than its students will.
    seen = kd.Batch(data.train_images[: 5 * images] / 255.0, data.train_labels[: 5 * images])
    teacher = kd.distill(kd.mlp([784, width, width, 10]), None, seen, epochs=5, **how).student
    methods = {"alone": kd.CrossEntropy(), "kd": kd.KD(alpha=0.1, temperature=4.0), "dkd": kd.DKD(beta=2.0)}
    table = kd.compare(
        kd.mlp([784, width, width, 10]), teacher, train, test, methods=methods, epochs=10, seeds=5, **how
    )
    print(table)
    for path in table.save(folder):
        print(path)


if __name__ == "__main__":
    main()
