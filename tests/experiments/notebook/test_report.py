"""A run's measures and settings as they are told."""

import numpy as np

from kd_jax.data.dataset import Dataset
from kd_jax.evaluate import Evaluation
from kd_jax.experiments.notebook.config import Training
from kd_jax.experiments.notebook.report import runs_json, training_line


def test_the_measures_of_each_seed_are_one_row() -> None:
    measured = Evaluation(*np.arange(10).reshape(5, 2), teacher_agreement=None, kl_to_teacher=None)
    assert runs_json(measured) == [
        {"correct": 0, "errors": 2, "accuracy": 4, "nll": 6, "ece": 8},
        {"correct": 1, "errors": 3, "accuracy": 5, "nll": 7, "ece": 9},
    ]


def test_a_training_is_told_in_one_line(small_dataset: Dataset) -> None:
    training = Training(3, 10, 0.01, "cosine", 1)
    line = training_line(training, small_dataset)
    assert line.endswith(", batch 10, Adam 0.01, cosine decay, shifts of up to 1 pixel")
    warm = training_line(training._replace(warmup=0.25, schedule="constant"), small_dataset)
    assert warm.endswith("Adam 0.01, warm-up in 25 % of the steps, shifts of up to 1 pixel")
    some = training_line(training._replace(shift=2, shift_share=0.25), small_dataset)
    assert some.endswith("shifts of up to 2 pixels of 25 % of the images")
    assert "of the images" not in training_line(training._replace(shift=0, shift_share=0.25), small_dataset)
