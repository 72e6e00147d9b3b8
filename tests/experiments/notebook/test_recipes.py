import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax import optimizers
from kd_jax.experiments import images as of_images
from kd_jax.experiments.images import Settings
from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.config import make_config
from kd_jax.methods import CrossEntropy
from kd_jax.models import mlp


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


def test_a_setup_has_the_warmup_of_its_training() -> None:
    config = make_config(epochs=2, batch_size=10, warmup=0.5, teacher_warmup=0.0)
    network = mlp((4, 3, 2)).network
    student = recipes.make_setup(network, config.training, 100).schedule
    assert student is not None
    assert float(student(jnp.float32(5))) == pytest.approx(0.5)
    assert recipes.make_setup(network, config.teacher_training, 100).schedule is None


@pytest.mark.parametrize("rising", [0, 3])
def test_steps_fall_after_their_milestones(rising: int) -> None:
    schedule = recipes.schedule("steps", 30, rising / 30, (10, 12, 40), 0.3)
    assert schedule is not None
    found = [float(schedule(jnp.float32(step))) for step in range(30)]
    wanted = [0.3 ** sum(step >= one for one in (10, 12)) if step >= rising else step / rising for step in range(30)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


OF_EPOCH = 3


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": "sgd", "weight_decay": 0.01},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "adam", "weight_decay": 0.1},
    ],
)
def test_optimizers_and_steps_are_those_of_pytorch(given: dict[str, Any]) -> None:
    """In float64, with the same gradients: five epochs of three steps."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'kd-jax[parity]'")
    config = make_config(
        schedule="steps", milestones=(2, 3), learning_rate=0.05, epochs=5, batch_size=10, milestone_factor=0.2, **given
    )
    with jax.enable_x64(True):
        setup = recipes.make_setup(mlp((4, 2)).network, config.training, OF_EPOCH * 10)
        optimizer = of_images._training(Settings(config.learning_rate, CrossEntropy()), setup).optimizer
        rng = np.random.default_rng(0)
        start = {"kernel": rng.normal(size=(4, 2)), "bias": rng.normal(size=2)}
        params = {name: jnp.asarray(value) for name, value in start.items()}
        state = optimizer.init(params)
        theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
        training = config.training
        if training.optimizer == "sgd":
            other = torch.optim.SGD(
                theirs.values(), lr=0.05, momentum=training.momentum, weight_decay=training.weight_decay
            )
        else:
            other = torch.optim.AdamW(theirs.values(), lr=0.05, weight_decay=training.weight_decay)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(other, milestones=[2, 3], gamma=0.2)
        for step in range(5 * OF_EPOCH):
            gradients = {name: rng.normal(size=value.shape) for name, value in start.items()}
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, gradients), state, params)
            params = optax.apply_updates(params, updates)
            for name, value in gradients.items():
                theirs[name].grad = torch.tensor(value)
            other.step()
            if (step + 1) % OF_EPOCH == 0:
                scheduler.step()
            for name, value in params.items():
                np.testing.assert_allclose(value, theirs[name].detach().numpy(), rtol=1e-9, atol=1e-12)


def test_what_differs_in_nothing_new_compiles_the_same() -> None:
    network, training = mlp((4, 3, 2)).network, make_config().training
    assert recipes.make_setup(network, training, 100).optimizer is optimizers.adam
    assert recipes.make_setup(network, training, 100).prepare is None
    assert recipes.make_setup(network, training, 100, max_norm=2.0) == recipes.make_setup(
        network, training, 100, max_norm=2.0
    )
