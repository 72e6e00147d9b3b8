"""Several trainings in a row, each of which teaches the next: born-again generations, and teacher assistants."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax

from kd_jax.data.batch import as_key, check_whole
from kd_jax.distill import Result, distill
from kd_jax.errors import ConfigError
from kd_jax.methods import CrossEntropy
from kd_jax.models import as_model
from kd_jax.models.doors import as_list


def generations(
    student: Any, data: Any, *, count: int, teacher: Any = None, key: Any = 0, checkpoint: Any = None, **how: Any
) -> list[Result]:
    """Born-again networks: Furlanello et al. (2018), https://arxiv.org/abs/1805.04770. Each one teaches the next.

    student: a class or constructor, or a model without variables, for every generation starts anew. count: how many
    generations. teacher: of the first; where it is None, the first learns from labels alone. how: all else that
    `kd.distill` takes, for each of them. Their models together are `kd.several([one.model for one in results])`. Raises
    `ConfigError`, and what `kd.distill` raises.
    """
    count = check_whole(count, "count")
    if as_model(student).variables is not None:
        raise ConfigError("the student has variables, and each generation starts anew: give its class or constructor")
    return _chain([student] * count, teacher, data, key, checkpoint, how)


def assistants(
    students: Sequence[Any], teacher: Any, data: Any, *, key: Any = 0, checkpoint: Any = None, **how: Any
) -> list[Result]:
    """Teacher assistants: Mirzadeh et al. (2020), https://arxiv.org/abs/1902.03393. The teacher teaches the first.

    students: models from the largest assistant to the student, each taught by the one before it. how: all else that
    `kd.distill` takes, for each of them. The last result is the student's. Raises `ConfigError`, and what `kd.distill`
    raises.
    """
    several = as_list(students, "the students")
    if not several:
        raise ConfigError("there are no students: give the assistants, and the student last")
    return _chain(several, teacher, data, key, checkpoint, how)


def _chain(
    students: list[Any], teacher: Any, data: Any, key: Any, checkpoint: Any, how: dict[str, Any]
) -> list[Result]:
    if checkpoint is not None and not isinstance(checkpoint, str | PathLike):
        raise ConfigError(f"checkpoint is {checkpoint!r}: give the name of a folder")
    results: list[Result] = []
    for place, student in enumerate(students):
        taught_by = results[-1].model if results else teacher
        own = dict(how) if taught_by is not None else {**how, "method": CrossEntropy()}
        if checkpoint is not None:
            own["checkpoint"] = Path(checkpoint).expanduser() / str(place + 1)
        results.append(distill(student, taught_by, data, key=jax.random.fold_in(as_key(key), place), **own))
    return results
