import copy
import inspect
import pickle

import pytest

from kd_jax import errors
from kd_jax.errors import CheckpointError, ConfigError, DataError, FeatureError, MethodError, SeedsNotFiniteError

PUBLIC = [each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__]


@pytest.mark.parametrize("error", PUBLIC, ids=lambda error: error.__name__)
def test_whoever_catches_pythons_own_errors_catches_ours(error: type[Exception]) -> None:
    if error.__name__ not in ("_WholeError", "_RemedyError", "DamageError"):
        assert issubclass(error, ValueError | RuntimeError | OSError)


def test_a_remedy_is_told_and_known_apart() -> None:
    error = CheckpointError("the folder is gone", errors.WAIT)
    assert str(error) == "the folder is gone: wait for it, or choose another folder"
    assert (error.problem, error.remedy) == ("the folder is gone", errors.WAIT)
    assert str(ConfigError("alpha is 2: it must be at most 1")) == "alpha is 2: it must be at most 1"
    assert str(MethodError("there is no teacher: give one")) == "there is no teacher: give one"


@pytest.mark.parametrize(
    "error",
    [
        FeatureError("conv3", "does not exist", "the teacher"), ConfigError("alpha is 2", "it must be 1"),
        SeedsNotFiniteError("the loss", model="teacher", seeds="seed 3", when="at step 2", learning_rate=0.5),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_reaches_another_process_whole(error: Exception) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert (str(again), vars(again)) == (str(error), vars(error))


def test_what_a_file_holds_reaches_no_terminal() -> None:
    assert str(DataError("the name \x1b[2J is none")) == "the name \\x1b[2J is none"


def test_a_number_that_is_not_finite_is_told_with_its_seeds_and_rates() -> None:
    facts = {"model": "teacher", "seeds": "seed 3", "when": "at step 2", "learning_rate": 0.5}
    assert str(SeedsNotFiniteError("the loss", **facts)) == (
        "the loss of the teacher with seed 3 is not finite at step 2 at a learning rate of 0.5: "
        "choose a smaller learning rate"
    )
    assert str(SeedsNotFiniteError("the loss", **facts, temperature=4.0)).endswith(
        "at a learning rate of 0.5 and a temperature of 4: choose a smaller learning rate or another temperature"
    )
