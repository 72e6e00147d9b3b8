"""What a sweep might have found, made without training."""

from collections.abc import Collection
from typing import Any

import numpy as np

from kd_jax import sweep
from kd_jax.evaluate import Evaluation
from kd_jax.experiments.sweep import grid, search
from kd_jax.experiments.sweep.grid import Setting
from kd_jax.experiments.sweep.search import SweepResult

IMAGES, SEEDS = 100, 4


def measured(errors: np.ndarray) -> Evaluation:
    part = np.full(len(errors), 0.1)
    return Evaluation(IMAGES - errors, errors, 1 - errors / IMAGES, part, part, part, part)


def made(diverged: Collection[str] = (), seeds: int = SEEDS, **lists: tuple[Any, ...]) -> SweepResult:
    """Of every setting of the lists some errors, students alone the most. diverged: kinds of students without any."""
    asked = sweep._grid(lists | {"seeds": (seeds,)})
    rng = np.random.default_rng(0)
    students: dict[Setting, Evaluation] = {}
    for setting in [*grid.baselines(asked), *grid.distilled(asked)]:
        if setting.kind not in diverged:
            students[setting] = measured(rng.integers(20, 30, seeds) + 20 * (setting.kind == grid.ALONE))
    gains, number = search._gains(asked, students)
    chosen = search._best_of_each_width(students)
    teachers = {asked.base: measured(np.array([3]))}
    sizes = {setting.config.student_hidden: 1 for setting in students}
    return SweepResult(
        asked, teachers, students, [], gains, number, chosen, students, [], {}, {}, sizes, (400, IMAGES, 9), 0, 0
    )
