"""What one experiment is asked to do: `Config`, its presets and its bounds."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kd_jax.errors import ConfigError
from kd_jax.experiments.notebook import methods
from kd_jax.experiments.notebook.methods import METHODS
from kd_jax.experiments.shell.options import option
from kd_jax.methods import Method, catalogue

SCHEDULES = ("constant", "cosine", "steps")
OPTIMIZERS = ("adam", "sgd")
AUGMENTATIONS = ("none", "crop-flip", "mixup", "cutmix", "crop-flip+mixup", "crop-flip+cutmix")

PRESETS: dict[str, dict[str, Any]] = {
    "notebook": {},
    "notebook-as-written": {"method": "kd-as-written"},
    # Chosen on the development split (results/tuned/README.md).
    "tuned": {
        "method": "kd",
        "alpha": 0.0,
        "temperature": 2.0,
        "epochs": 300,
        "batch_size": 128,
        "learning_rate": 0.01,
        "schedule": "cosine",
        "warmup": 0.1,
        "shift": 1,
        "shift_share": 0.5,
        "teacher_shift_share": 1.0,
        "teacher_hidden": (400, 400),
        "teacher_dropout": 0.1,
        "teacher_max_norm": 2.0,
        "teacher_epochs": 100,
        "teacher_batch_size": 256,
        "teacher_learning_rate": 0.001,
    },
    # Likewise; here the students do not see the shifts that the teacher has learned from.
    "tuned-without-shifts": {
        "method": "kd",
        "alpha": 0.1,
        "temperature": 3.0,
        "epochs": 100,
        "batch_size": 128,
        "learning_rate": 0.005,
        "schedule": "cosine",
        "teacher_epochs": 40,
        "teacher_batch_size": 256,
        "teacher_learning_rate": 0.001,
        "teacher_shift": 2,
    },
    "cifar100": {
        "dataset": "tfds:cifar100",
        "teacher": "resnet32x4",
        "student": "resnet8x4",
        "method": "kd",
        "alpha": 0.1,
        "temperature": 4.0,
        "epochs": 240,
        "batch_size": 64,
        "learning_rate": 0.05,
        "optimizer": "sgd",
        "weight_decay": 5e-4,
        "schedule": "steps",
        "milestones": (150, 180, 210),
        "augment": "crop-flip",
    },
}
"""By name, what differs from the defaults of `Config`, which are the reference notebook's set-up.

tuned: the best recipe that was found for the notebook's student, 784-20-20-10. tuned-without-shifts: the best for those
whose own images are not shifted, where distillation gains most. cifar100: the protocol of Tian, Krishnan and Isola
(2020), https://arxiv.org/abs/1910.10699, and of the papers that compare with it, for its first pair of networks.
"""

LARGEST_SHIFT = 8
"""Pixels."""


class Training(NamedTuple):
    """How one kind of model is trained; the fields are those of `Config`."""

    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str
    shift: int
    warmup: float = 0.0
    shift_share: float = 1.0
    optimizer: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1
    augment: str = "none"

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, without those of `LATER` where all of them have their defaults."""
        known = self._asdict()
        later = any(known[name] != value for name, value in LATER.items())
        return known if later else {name: value for name, value in known.items() if name not in LATER}


LATER = {name: Training._field_defaults[name] for name in Training._fields[7:]}
"""Fields that came later and their defaults, which no file has: what was kept before them stays as it is."""


@dataclass(frozen=True)
class Config:
    """One experiment: a teacher, students alone, distilled students. The defaults are the reference notebook's.

    Sizes are hidden layers only: the images and classes of the data set give the first and the last. What is None of
    the teacher's training is as the students'. A max-norm of 0 is none. student, teacher: networks of one's own, in
    place of fully connected ones, as `own.load` takes them. method_option: texts `name=value` for the methods that have
    other numbers than alpha and temperature, which are of those in `METHODS` alone. milestones: epochs after which
    `schedule="steps"` multiplies the learning rate by milestone_factor.
    """

    dataset: str = "mnist"
    preset: str = "notebook"
    method: str = "kd-without-t2"
    alpha: float = 0.5
    temperature: float = 20.0
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 3e-4
    schedule: str = "constant"
    shift: int = 0
    shift_share: float = 1.0
    warmup: float = 0.0
    optimizer: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1
    augment: str = "none"
    teacher_hidden: tuple[int, ...] = (1200, 1200)
    teacher_dropout: float = 0.5
    teacher_input_dropout: float = 0.0
    teacher_max_norm: float = 0.0
    teacher_epochs: int | None = None
    teacher_batch_size: int | None = None
    teacher_learning_rate: float | None = None
    teacher_schedule: str | None = None
    teacher_shift: int | None = None
    teacher_shift_share: float | None = None
    teacher_warmup: float | None = None
    teacher_optimizer: str | None = None
    teacher_momentum: float | None = None
    teacher_weight_decay: float | None = None
    teacher_milestones: tuple[int, ...] | None = None
    teacher_milestone_factor: float | None = None
    teacher_augment: str | None = None
    student_hidden: tuple[int, ...] = (20, 20)
    seeds: int = 5
    seed: int = 42
    student: str | None = None
    teacher: str | None = None
    method_option: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Raises `ConfigError` where a value is out of its bounds."""
        _one_of("preset", self.preset, PRESETS)
        object.__setattr__(self, "method", catalogue.find(self.method, methods.known()))
        self.make_method()
        _check("seeds", self.seeds, _is_count(self.seeds), f"a whole number of at least 1 and at most {2**31 - 1}")
        self._check_training("", self.training)
        self._check_training("teacher_", self.teacher_training)
        for name in ("teacher_hidden", "student_hidden"):
            for size in getattr(self, name):
                _check(name, size, _is_count(size), f"a whole number from 1 to {2**31 - 1}, for each layer")
        _check_positive("temperature", self.temperature, 1e15)
        _check("alpha", self.alpha, 0 <= self.alpha <= 1, "from 0 (soft loss alone) to 1 (hard loss alone)")
        for name in ("teacher_dropout", "teacher_input_dropout"):
            value = getattr(self, name)
            _check(name, value, 0 <= value < 1, "at least 0 and below 1")
        # Beyond these float32 has no square of it.
        holds = self.teacher_max_norm == 0 or 1e-15 <= self.teacher_max_norm <= 1e15
        _check("teacher_max_norm", self.teacher_max_norm, holds, "0 (none), or from 1e-15 to 1e+15")
        most = 2**31 - self.seeds
        holds = isinstance(self.seed, int) and 0 <= self.seed <= most
        _check("seed", self.seed, holds, f"from 0 to {most}" + f", with {self.seeds:,} seeds" * (self.seeds > 1))

    @property
    def training(self) -> Training:
        """The students'."""
        return Training(*(getattr(self, name) for name in Training._fields))

    @property
    def teacher_training(self) -> Training:
        """The teacher's, with the students' values where it has none of its own."""
        own = {name: getattr(self, f"teacher_{name}") for name in Training._fields}
        return self.training._replace(**{name: value for name, value in own.items() if value is not None})

    def make_method(self) -> Method:
        """What the distilled students minimise. Raises `ConfigError`."""
        return methods.make(self.method, self.alpha, self.temperature, self.method_option or ())

    def as_dict(self, *, whole: bool = False) -> dict[str, Any]:
        """The fields by name, all resolved, as JSON holds them; alpha and temperature where the method has them.

        whole: also those of `LATER` where all of them have their defaults.
        """
        resolved = dataclasses.asdict(self)
        if self.method not in METHODS:
            del resolved["alpha"], resolved["temperature"]
        resolved |= {f"teacher_{name}": value for name, value in self.teacher_training._asdict().items()}
        if not whole and not set(LATER) & {*self.training.as_dict(), *self.teacher_training.as_dict()}:
            resolved = {n: v for n, v in resolved.items() if n.removeprefix("teacher_") not in LATER}
        given = {name: v for name, v in resolved.items() if v is not None}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}

    def check_against(self, train_examples: int) -> None:
        """Raises `ConfigError` where the configuration does not fit a training set of that many examples."""
        bound = f"at most the {train_examples:,} training examples"
        _check("batch_size", self.batch_size, self.batch_size <= train_examples, bound)
        batch_size = self.teacher_training.batch_size
        _check("teacher_batch_size", batch_size, batch_size <= train_examples, bound)

    @staticmethod
    def _check_training(prefix: str, training: Training) -> None:
        for name in ("epochs", "batch_size"):
            value = getattr(training, name)
            _check(prefix + name, value, _is_count(value), f"a whole number of at least 1 and at most {2**31 - 1}")
        _check_positive(f"{prefix}learning_rate", training.learning_rate, 1e30)
        _one_of(f"{prefix}schedule", training.schedule, SCHEDULES)
        bound = "a share of the steps, at least 0 and below 1"
        _check(f"{prefix}warmup", training.warmup, 0 <= training.warmup < 1, bound)
        holds = isinstance(training.shift, int) and 0 <= training.shift <= LARGEST_SHIFT
        _check(f"{prefix}shift", training.shift, holds, f"a whole number of pixels from 0 to {LARGEST_SHIFT}")
        bound = "a share of the images, above 0 and at most 1"
        _check(f"{prefix}shift_share", training.shift_share, 0 < training.shift_share <= 1, bound)
        _one_of(f"{prefix}optimizer", training.optimizer, OPTIMIZERS)
        _check(f"{prefix}momentum", training.momentum, 0 <= training.momentum < 1, "at least 0 and below 1")
        _check(f"{prefix}weight_decay", training.weight_decay, 0 <= training.weight_decay <= 1, "from 0 (none) to 1")
        _one_of(f"{prefix}augment", training.augment, AUGMENTATIONS)
        if training.augment != "none" and training.shift:
            raise ConfigError(
                f"{option(prefix + 'augment')} is {training.augment} and {option(prefix + 'shift')} {training.shift}: "
                "both change images, so leave one of them out"
            )
        _check_milestones(prefix, training)


def make_config(preset: str = "notebook", **given: Any) -> Config:
    """The `Config` of a preset, with what is given instead of the preset's own values. Raises `ConfigError`."""
    _one_of("preset", preset, PRESETS)
    check_numbers([given.get("method", PRESETS[preset].get("method", Config.method))], given)
    return dataclasses.replace(Config(), preset=preset, **{**PRESETS[preset], **given})


def check_numbers(names: Iterable[str], given: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for an alpha or a temperature that is given to a method that does not take it so."""
    own = [one for one in (catalogue.find(name, methods.known()) for name in names) if one not in METHODS]
    for name in ("alpha", "temperature"):
        if own and name in given:
            raise ConfigError(
                f"{option(name)} is of {', '.join(METHODS)}, and --method is {own[0]}: give its numbers as "
                f"--method-option {name}=…, where --method list shows that it has such a one"
            )


def _check_milestones(prefix: str, training: Training) -> None:
    epochs, name = training.milestones, f"{prefix}milestones"
    shown = ",".join(map(str, epochs))
    rising = all(one < other for one, other in itertools.pairwise(epochs))
    _check(name, shown, all(map(_is_count, epochs)) and rising, "whole numbers of epochs, each above the one before")
    _check_positive(f"{prefix}milestone_factor", training.milestone_factor, 1e15)


def check_steps(training: Training, prefix: str = "") -> None:
    """Raises `ConfigError` for a learning rate that falls in steps, which nobody named."""
    if training.schedule == "steps" and not training.milestones:
        raise ConfigError(
            f"{option(prefix + 'schedule')} is steps, without {option(prefix + 'milestones')}: give epochs, such as "
            "150,180,210"
        )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 1 <= value < 2**31


def _check(name: str, value: object, holds: bool, bound: str) -> None:
    if not holds:
        raise ConfigError(f"{option(name)} is {value}: it must be {bound}")


def _check_positive(name: str, value: float, largest: float) -> None:
    """Beyond the bounds float32 has no such number, or no square of it."""
    _check(name, value, 1 / largest <= value <= largest, f"from {1 / largest:g} to {largest:g}")


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name.replace('_', ' ')} {value!r}: use {' or '.join(known)}")
