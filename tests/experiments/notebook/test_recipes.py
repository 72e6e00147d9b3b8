import math

import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.config import make_config


def _oracle(name: str, steps: int, rising: int, step: int) -> float:
    """In float64."""
    if step < rising:
        return step / rising
    return 1.0 if name == "constant" else (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


@pytest.mark.parametrize("name", ["constant", "cosine"])
@pytest.mark.parametrize(
    ("steps", "warmup", "rising"), [(100, 0.29, 29), (100, 0.0, 0), (7, 0.5, 4), (3, 0.99, 2), (1, 0.9, 0), (4, 0.1, 0)]
)
def test_the_learning_rate_rises_in_a_line_and_then_falls(name: str, steps: int, warmup: float, rising: int) -> None:
    schedule = recipes.schedule(name, steps, warmup)
    found = [1.0 if schedule is None else float(schedule(jnp.float32(step))) for step in range(steps)]
    np.testing.assert_allclose(found, [_oracle(name, steps, rising, step) for step in range(steps)], atol=1e-6)


def test_without_a_schedule_none_is_compiled() -> None:
    assert recipes.schedule("constant", 100) is None
    assert recipes.schedule("constant", 4, 0.1) is None


def test_a_recipe_has_the_warmup_of_its_training() -> None:
    config = make_config(epochs=2, batch_size=10, warmup=0.5, teacher_warmup=0.0)
    network = recipes.mlp((4, 3, 2))
    student = recipes.make_recipe(network, config.training, 100).schedule
    assert student is not None
    assert float(student(jnp.float32(5))) == pytest.approx(0.5)
    assert recipes.make_recipe(network, config.teacher_training, 100).schedule is None
