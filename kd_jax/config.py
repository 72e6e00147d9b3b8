"""What one experiment is asked to do: `Config`, its presets and its bounds."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kd_jax.methods import KD, KD_AS_WRITTEN, KD_WITHOUT_T_SQUARED

METHODS = {"kd": KD, "kd-without-t2": KD_WITHOUT_T_SQUARED, "kd-as-written": KD_AS_WRITTEN}

PRESETS: dict[str, dict[str, Any]] = {
    "notebook": {},
    "notebook-as-written": {"method": "kd-as-written"},
}
"""By name, what differs from the defaults of `Config`, which are the reference notebook's set-up."""


class ConfigError(ValueError):
    """An option out of its bounds; one sentence that names the value, the bound and the remedy."""


@dataclass(frozen=True)
class Config:
    """One experiment: a teacher, students alone, distilled students. The defaults are the reference notebook's.

    Sizes are hidden layers only: the images and classes of the data set give the first and the last.
    """

    dataset: str = "mnist"
    preset: str = "notebook"
    method: str = "kd-without-t2"
    alpha: float = 0.5
    temperature: float = 20.0
    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 3e-4
    teacher_hidden: tuple[int, ...] = (1200, 1200)
    teacher_dropout: float = 0.5
    student_hidden: tuple[int, ...] = (20, 20)
    seeds: int = 5
    seed: int = 42

    def __post_init__(self) -> None:
        """Raises `ConfigError` where a value is out of its bounds."""
        _one_of("preset", self.preset, PRESETS)
        _one_of("method", self.method, METHODS)
        for name in ("epochs", "batch_size", "seeds"):
            _check(
                name,
                getattr(self, name),
                _is_count(getattr(self, name)),
                f"a whole number of at least 1 and at most {2**31 - 1}",
            )
        for name in ("teacher_hidden", "student_hidden"):
            for size in getattr(self, name):
                _check(name, size, _is_count(size), f"a whole number from 1 to {2**31 - 1}, for each layer")
        # Beyond the second bounds float32 has no such number, or no square of it.
        for name, largest in (("temperature", 1e15), ("learning_rate", 1e30)):
            value = getattr(self, name)
            _check(name, value, 0 < value < math.inf, "positive and finite")
            _check(name, value, 1 / largest <= value <= largest, f"from {1 / largest:g} to {largest:g}")
        _check("alpha", self.alpha, 0 <= self.alpha <= 1, "from 0 (soft loss alone) to 1 (hard loss alone)")
        _check("teacher_dropout", self.teacher_dropout, 0 <= self.teacher_dropout < 1, "at least 0 and below 1")
        _check(
            "seed",
            self.seed,
            isinstance(self.seed, int) and 0 <= self.seed <= 2**31 - self.seeds,
            f"from 0 to {2**31 - self.seeds}",
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON holds them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    def check_against(self, train_examples: int) -> None:
        """Raises `ConfigError` where the configuration does not fit a training set of that many examples."""
        bound = f"at most the {train_examples:,} training examples"
        _check("batch_size", self.batch_size, self.batch_size <= train_examples, bound)


def make_config(preset: str = "notebook", **given: Any) -> Config:
    """The `Config` of a preset, with what is given instead of the preset's own values. Raises `ConfigError`."""
    _one_of("preset", preset, PRESETS)
    return dataclasses.replace(Config(), preset=preset, **{**PRESETS[preset], **given})


def option(name: str) -> str:
    """The command-line option of a field of `Config`."""
    return "--" + name.replace("_", "-")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 1 <= value < 2**31


def _check(name: str, value: float | int, holds: bool, bound: str) -> None:
    if not holds:
        raise ConfigError(f"{option(name)} is {value}: it must be {bound}")


def _one_of(name: str, value: str, known: dict[str, Any]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name} {value!r}: use {' or '.join(known)}")
