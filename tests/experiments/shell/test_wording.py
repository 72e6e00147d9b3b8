import re

import pytest

from kd_jax import errors
from kd_jax.errors import CheckpointError, ConfigError, RunError, SeedsNotFiniteError
from kd_jax.experiments.shell.wording import in_options

REMEDIES = {name: text for name, text in vars(errors).items() if isinstance(text, str) and name.isupper()}


@pytest.mark.parametrize("remedy", REMEDIES.values(), ids=REMEDIES.keys())
def test_the_library_names_no_option_and_the_command_does(remedy: str) -> None:
    """But where there is nothing to do by an option."""
    assert "--" not in remedy
    told = in_options(CheckpointError("it failed", remedy))
    assert told.startswith("it failed: ")
    assert bool(re.search(r"--[a-z]", told)) == (remedy != errors.MAKE_ROOM)
    assert told == in_options(ConfigError("it failed", remedy))


@pytest.mark.parametrize("of_teacher", [False, True])
def test_what_is_not_finite_is_told_with_the_options_of_whom_it_is(of_teacher: bool) -> None:
    error = SeedsNotFiniteError(
        "the loss", model="x", seeds="seed 1", when="at step 2", learning_rate=1e30, temperature=4.0,
        of_teacher=of_teacher,
    )  # fmt: skip
    option = "--teacher-learning-rate" if of_teacher else "--learning-rate"
    assert f" at {option} 1e+30 and --temperature 4: " in in_options(error)


def test_other_errors_are_told_as_they_are() -> None:
    assert in_options(RunError("no: try again")) == "no: try again"
    assert in_options(CheckpointError("damaged", "call a friend")) == "damaged: call a friend"
