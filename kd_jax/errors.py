"""Everything that kd_jax itself refuses or gives up on: each error is one sentence with value, bound and remedy.

No option of a command is named here. An error keeps its remedy apart, so that a command can say it in its options.
"""

from typing import Any

START_AGAIN = "start the run again, in another folder or in place of this one"
WAIT = "wait for it, or choose another folder"
MAKE_ROOM = "make room or give it back, and run it again"
MAKE_ROOM_AND_GO_ON = "make room or give it back, and go on from the checkpoint before"
SAME_VERSION = "go on with the version that wrote it, or start again"
SMALLER = "choose a smaller batch size or smaller networks"


class _WholeError(Exception):
    """One that is copied and unpickled whole, whatever its class is made of."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[_WholeError], args: tuple[Any, ...], own: dict[str, Any]) -> _WholeError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(own)
    return error


class _RemedyError(_WholeError):
    """problem: the sentence without its remedy, which is one of those above where a command has options for it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}: {remedy}" if remedy else problem)
        self.problem, self.remedy = problem, remedy


class DataError(ValueError):
    """Data that cannot be used."""

    def __init__(self, sentence: str):
        # Names in files may hold anything, and a terminal obeys some of it.
        super().__init__("".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in sentence))


class ShapeError(DataError):
    """Arrays that do not fit each other. Raised while tracing, so under `jit` and `vmap`, too."""


class ConfigError(_RemedyError, ValueError):
    """A setting out of its bounds, or one that does not fit the data or the memory."""


class FeatureError(ConfigError):
    """A feature that a model does not give. fault: of the feature, with the remedy. whose: of whom, in words."""

    def __init__(self, path: str, fault: str, whose: str = "") -> None:
        super().__init__(f"the feature {path!r}{f' of {whose}' if whose else ''} {fault}")
        self.path, self.fault, self.whose = path, fault, whose

    def of(self, whose: str) -> "FeatureError":
        """The same, with whose feature it is."""
        return self if self.whose else FeatureError(self.path, self.fault, whose)


class MethodError(ConfigError):
    """A method that lacks what it needs, such as a teacher, labels or features."""


class ArgumentError(MethodError, TypeError):
    """An argument that a method or a function does not take."""


class CheckpointError(_RemedyError, RuntimeError):
    """A checkpoint that cannot be written or read."""


class DamageError(Exception):
    """Why a checkpoint is not good: it is passed over for the one before."""


class MismatchError(ValueError):
    """A run that is not the one to be resumed; the sentence names the difference."""


class OutputError(OSError):
    """An output folder that cannot be used."""


class RunError(_WholeError, RuntimeError):
    """A training that failed: where, and what to change."""


class NotFiniteError(RunError):
    """A number of a training that is not finite."""


class SeedsNotFiniteError(NotFiniteError):
    """The same, of some of several trainings with different seeds.

    what: the number, in words. model: what a person calls that which was trained. seeds: in words, too. when: likewise.
    of_teacher: whether it is a teacher. temperature: None where the training has none.
    """

    def __init__(
        self,
        what: str,
        *,
        model: str,
        seeds: str,
        when: str,
        learning_rate: float,
        temperature: float | None = None,
        of_teacher: bool = False,
    ) -> None:
        self.what, self.model, self.seeds, self.when = what, model, seeds, when
        self.learning_rate, self.temperature, self.of_teacher = learning_rate, temperature, of_teacher
        super().__init__(self.sentence("a learning rate of", "a temperature of"))

    def sentence(self, learning_rate: str, temperature: str) -> str:
        """The error, with words for what stands before the two numbers."""
        soft = "" if self.temperature is None else f" and {temperature} {self.temperature:g}"
        return (
            f"{self.what} of the {self.model} with {self.seeds} is not finite {self.when} "
            f"at {learning_rate} {self.learning_rate:g}{soft}: "
            f"choose a smaller learning rate{' or another temperature' if soft else ''}"
        )


TOLD = (ConfigError, DataError, CheckpointError, MismatchError, RunError, OSError)
"""Errors with which a program may end in their own words, without a traceback; the system's own of files among them."""
