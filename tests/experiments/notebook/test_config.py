import math

import pytest

from kd_jax.errors import ConfigError
from kd_jax.experiments.hinton2015 import plan as hinton
from kd_jax.experiments.notebook.config import LATER, METHODS, PRESETS, Config, Training, make_config
from kd_jax.methods import KD

OUT_OF_BOUNDS = [
    ("preset", "notebok", "unknown preset 'notebok': use notebook or"),
    ("method", "kl", "unknown method 'kl': use kd or"),
    ("epochs", 0, "--epochs is 0: it must be a whole number of at least 1"),
    ("batch_size", -3, "--batch-size is -3"),
    ("seeds", 0, "--seeds is 0"),
    ("teacher_hidden", (1200, 0), "--teacher-hidden is 0"),
    ("student_hidden", (-1,), "--student-hidden is -1"),
    ("temperature", 0.0, "--temperature is 0.0: it must be from 1e-15 to 1e+15"),
    ("temperature", math.nan, "--temperature is nan"),
    ("temperature", math.inf, "--temperature is inf"),
    ("learning_rate", -1e-3, "--learning-rate is -0.001"),
    ("learning_rate", math.inf, "--learning-rate is inf"),
    ("learning_rate", 1e39, "--learning-rate is 1e+39: it must be from 1e-30 to 1e+30"),
    ("temperature", 1e-50, "--temperature is 1e-50: it must be from 1e-15 to 1e+15"),
    ("alpha", 1.5, "--alpha is 1.5: it must be from 0"),
    ("alpha", -0.1, "--alpha is -0.1"),
    ("alpha", math.nan, "--alpha is nan"),
    ("teacher_dropout", 1.0, "--teacher-dropout is 1.0"),
    ("teacher_input_dropout", -0.1, "--teacher-input-dropout is -0.1"),
    ("teacher_max_norm", -1.0, "--teacher-max-norm is -1.0: it must be 0 (none), or from 1e-15 to 1e+15"),
    ("schedule", "linear", "unknown schedule 'linear': use constant or cosine or steps"),
    ("teacher_schedule", "linear", "unknown teacher schedule 'linear'"),
    ("warmup", 1.0, "--warmup is 1.0: it must be a share of the steps, at least 0 and below 1"),
    ("warmup", math.nan, "--warmup is nan"),
    ("teacher_warmup", -0.1, "--teacher-warmup is -0.1"),
    ("shift", -1, "--shift is -1: it must be a whole number of pixels from 0 to 8"),
    ("shift", 9, "--shift is 9"),
    ("shift_share", 0.0, "--shift-share is 0.0: it must be a share of the images, above 0 and at most 1"),
    ("shift_share", math.nan, "--shift-share is nan"),
    ("teacher_shift_share", 1.01, "--teacher-shift-share is 1.01"),
    ("teacher_epochs", 0, "--teacher-epochs is 0"),
    ("teacher_learning_rate", 0.0, "--teacher-learning-rate is 0.0"),
    ("optimizer", "adamw", "unknown optimizer 'adamw': use adam or sgd"),
    ("teacher_optimizer", "x", "unknown teacher optimizer 'x'"),
    ("momentum", 1.0, "--momentum is 1.0: it must be at least 0 and below 1"),
    ("weight_decay", -1e-4, "--weight-decay is -0.0001: it must be from 0 (none) to 1"),
    ("teacher_weight_decay", math.nan, "--teacher-weight-decay is nan"),
    ("milestones", (3, 3), "--milestones is 3,3: it must be whole numbers of epochs, each above the one before"),
    ("milestones", (0,), "--milestones is 0"),
    ("milestone_factor", 0.0, "--milestone-factor is 0.0"),
    ("augment", "flip", "unknown augment 'flip': use none or crop-flip"),
    ("teacher_augment", "flip", "unknown teacher augment 'flip'"),
    ("seed", -1, "--seed is -1: it must be from 0 to"),
    ("seed", 2**31, "--seed is 2147483648"),
    ("seeds", 2**31 - 1, "--seed is 42: it must be from 0 to 1, with 2,147,483,647 seeds"),
]


@pytest.mark.parametrize(("name", "value", "says"), OUT_OF_BOUNDS)
def test_values_out_of_bounds_are_named(name: str, value: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**{name: value})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_is_the_notebook() -> None:
    config = make_config()
    assert config == Config() == make_config("notebook")
    assert (config.alpha, config.temperature, config.epochs, config.batch_size) == (0.5, 20.0, 5, 32)
    assert (config.teacher_hidden, config.student_hidden) == ((1200, 1200), (20, 20))


def test_what_is_given_beats_the_preset() -> None:
    assert make_config("notebook-as-written").method == "kd-as-written"
    assert make_config("notebook-as-written", method="kd").method == "kd"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_within_bounds(preset: str) -> None:
    assert make_config(preset).method in METHODS


def test_a_batch_must_fit_the_data() -> None:
    make_config(batch_size=100).check_against(100)
    with pytest.raises(ConfigError, match="--batch-size is 101: it must be at most the 100 training examples"):
        make_config(batch_size=101).check_against(100)


def test_the_teacher_trains_as_the_students_where_nothing_else_is_said() -> None:
    config = make_config(epochs=7, learning_rate=0.1, teacher_epochs=3, teacher_shift=0, shift=2, warmup=0.3)
    assert config.teacher_training == config.training._replace(epochs=3, shift=0)
    kept = config.as_dict()
    assert kept["teacher_warmup"] == kept["warmup"] == 0.3
    assert make_config(warmup=0.3, teacher_warmup=0.0).teacher_training.warmup == 0.0
    shares = make_config(shift_share=0.3), make_config(shift_share=0.3, teacher_shift_share=1.0)
    assert [config.teacher_training.shift_share for config in shares] == [0.3, 1.0]
    assert (kept["teacher_epochs"], kept["teacher_learning_rate"], kept["teacher_schedule"]) == (3, 0.1, "constant")


def test_what_came_later_is_kept_where_it_is_used_and_nowhere_else() -> None:
    """Files of before stay as they are; and what is kept is the same configuration again."""
    assert not {name.removeprefix("teacher_") for name in make_config().as_dict()} & set(LATER)
    config = make_config(weight_decay=0.1, teacher_weight_decay=0.0, optimizer="sgd")
    kept = config.as_dict()
    assert (kept["weight_decay"], kept["teacher_weight_decay"], kept["teacher_optimizer"]) == (0.1, 0.0, "sgd")
    assert (kept["momentum"], kept["augment"], kept["teacher_milestones"]) == (0.9, "none", [])
    again = Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()})
    assert again.training == config.training
    assert again.teacher_training == config.teacher_training
    assert "augment" in config.as_dict(whole=True)
    assert set(hinton.as_dict(hinton.PLAN)["teacher_training"]) == set(Training._fields) - set(LATER)


def test_the_preset_of_cifar100_is_the_protocol_of_the_papers() -> None:
    config = make_config("cifar100")
    assert config.teacher_training == config.training
    assert config.training == Training(
        epochs=240, batch_size=64, learning_rate=0.05, schedule="steps", shift=0, optimizer="sgd", momentum=0.9,
        weight_decay=5e-4, milestones=(150, 180, 210), milestone_factor=0.1, augment="crop-flip",
    )  # fmt: skip
    assert (config.dataset, config.teacher, config.student) == ("tfds:cifar100", "resnet32x4", "resnet8x4")
    assert config.make_method() == KD(alpha=0.1, temperature=4.0)
