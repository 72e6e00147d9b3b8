"""The same steps in Keras 3 on JAX, with `keras.distillation`."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import kd_jax

_DROPOUT, _LEARNING_RATE, _ALPHA, _TEMPERATURE = 0.5, 3e-4, 0.5, 20.0

# Steps that Keras compiles into one call: its own remedy against the time between steps.
_STEPS_PER_EXECUTION = 20


def why_not() -> str | None:
    """Why Keras cannot take part; None where it can."""
    if importlib.util.find_spec("keras") is None:
        return "Keras 3 is not installed (the extra `peers` has it)"
    os.environ["KERAS_BACKEND"] = "jax"
    keras = importlib.import_module("keras")
    if keras.backend.backend() != "jax":
        return f"Keras was imported with the backend {keras.backend.backend()}, not jax"
    return None if hasattr(keras, "distillation") else f"Keras {keras.__version__} has no keras.distillation"


def trainer(row: str, data: kd_jax.Dataset, steps: int, batch_size: int = 32) -> Callable[[], float]:
    """A function that trains `steps` steps by `fit`, with images in memory, and returns the mean loss of them.

    `Distiller` runs the teacher in every step, and its KL has the factor T². `steps` is a multiple of 20.
    """
    keras = importlib.import_module("keras")
    student, teacher = _mlp(keras, (20, 20), 0.0), _mlp(keras, (1200, 1200), _DROPOUT)
    model = {"teacher": teacher, "student": student}.get(row) or keras.distillation.Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=keras.distillation.LogitsDistillation(
            temperature=_TEMPERATURE, loss=keras.losses.KLDivergence()
        ),
        student_loss_weight=_ALPHA,
    )
    model.compile(
        optimizer=keras.optimizers.Adam(_LEARNING_RATE, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=_STEPS_PER_EXECUTION,
    )
    count = steps * batch_size
    images = data.train_images[:count].reshape(count, -1).astype("float32") / 255
    labels = data.train_labels[:count]

    def train() -> float:
        history = model.fit(images, labels, batch_size=batch_size, epochs=1, verbose=0)
        return float(history.history["loss"][-1])

    return train


def _mlp(keras: Any, hidden: tuple[int, ...], dropout: float) -> Any:
    layers = [keras.Input((784,))]
    for units in hidden:
        layers.append(keras.layers.Dense(units))
        if dropout:
            layers.append(keras.layers.Dropout(dropout))
        layers.append(keras.layers.ReLU())
    return keras.Sequential([*layers, keras.layers.Dense(10)])
