"""`kd.compare` and the command find the same."""

import jax
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.data.dataset import Dataset
from kd_jax.experiments import images
from kd_jax.experiments.notebook import experiment, recipes
from kd_jax.experiments.notebook.config import make_config
from kd_jax.experiments.shell.progress import Silent
from kd_jax.models import Model
from kd_jax.optimizers import adam


@pytest.mark.usefixtures("quick_compiling")
def test_compare_finds_what_run_finds_seed_by_seed(small_dataset: Dataset) -> None:
    config = make_config(teacher_hidden=(16,), student_hidden=(4,), epochs=2, batch_size=8, seeds=3, learning_rate=0.01)
    result = experiment.run_experiment(config, small_dataset, Silent())
    teacher, student = recipes.networks(config, small_dataset)
    taught_by = Model(teacher, jax.tree.map(lambda leaf: leaf[0], result.teacher.variables))
    table = kd.compare(
        Model(student, None), taught_by,
        kd.Batch(small_dataset.train_images, small_dataset.train_labels),
        kd.Batch(small_dataset.test_images, small_dataset.test_labels),
        methods={"alone": kd.CrossEntropy(), "distilled": kd.KDWithoutTSquared(config.alpha, config.temperature)},
        optimizer=adam(0.01), epochs=2, batch_size=8, seeds=list(result.student.seeds), prepare=images.prepare,
    )  # fmt: skip
    count = len(small_dataset.test_labels)
    for name, trained in {"alone": result.student, "distilled": result.distilled}.items():
        correct = np.round(table.values[name]["accuracy"] * count).astype(int)
        np.testing.assert_array_equal(correct, trained.evaluations.correct)
        assert len(set(correct)) > 1
    found, ran = table.comparisons["distilled"], result.comparison
    np.testing.assert_allclose(found.mean_difference * count, ran.mean_difference, rtol=1e-5)
    assert found.p_value == pytest.approx(ran.p_value)
