import pytest

from kd_jax.errors import ConfigError
from kd_jax.experiments.notebook.config import make_config
from kd_jax.experiments.sweep import grid
from kd_jax.experiments.sweep.grid import ALONE, DISTILLED, SMOOTHED, make_grid

LISTS = {"temperature": (1.0, 4.0), "alpha": (0.0, 0.5, 1.0), "student_hidden": ((4,), (8, 8))}
GRID = make_grid(make_config(seeds=3), LISTS, (0.1, 0.2))


def test_every_combination_once() -> None:
    settings = grid.distilled(GRID)
    assert len(set(settings)) == len(settings) == 12
    assert {(s.config.temperature, s.config.alpha, s.config.student_hidden) for s in settings} == {
        (t, a, h) for t in (1.0, 4.0) for a in (0.0, 0.5, 1.0) for h in ((4,), (8, 8))
    }


def test_baselines_are_as_many_as_there_are_trainings_without_a_teacher() -> None:
    """They do not depend on temperature and alpha, and do on the width."""
    found = grid.baselines(GRID)
    assert [s.kind for s in found] == [ALONE] * 2 + [SMOOTHED] * 4
    assert {s.config.student_hidden for s in found} == {(4,), (8, 8)}
    assert {(s.config.student_hidden, s.smoothing) for s in found[2:]} == {
        (h, e) for h in ((4,), (8, 8)) for e in (0.1, 0.2)
    }


def test_a_setting_is_paired_with_the_baselines_that_were_trained_as_it_was() -> None:
    known = grid.baselines(GRID)
    for setting in grid.distilled(GRID):
        pair = [grid.alone_of(setting, GRID), *grid.smoothed_of(setting, GRID)]
        assert all(one in known for one in pair)
        assert {one.config.student_hidden for one in pair} == {setting.config.student_hidden}


def test_settings_that_differ_in_arrays_alone_share_a_program() -> None:
    programs = {grid.program_of(setting, GRID) for setting in grid.distilled(GRID)}
    assert len(programs) == 2
    rates = make_grid(make_config(), {"learning_rate": (1e-3, 1e-2), "batch_size": (16, 32)}, ())
    assert len({grid.program_of(setting, rates) for setting in grid.distilled(rates)}) == 2
    assert len(grid.baselines(rates)) == 4


def test_one_teacher_serves_all_settings_unless_its_own_options_are_listed() -> None:
    rates = make_grid(make_config(teacher_epochs=2), {"learning_rate": (1e-3, 1e-2), "epochs": (1, 9)}, ())
    teachers = {grid.teacher_of(setting, rates) for setting in grid.distilled(rates)}
    assert len(teachers) == 1
    training = teachers.pop().teacher_training
    assert (training.epochs, training.learning_rate) == (2, 3e-4)
    widths = make_grid(make_config(), {"teacher_hidden": ((8,), (16,)), "alpha": (0.0, 1.0)}, (0.1,))
    assert len({grid.teacher_of(setting, widths) for setting in grid.distilled(widths)}) == 2
    assert len(grid.baselines(widths)) == 2


@pytest.mark.parametrize(("name", "words"), [("warmup", "warm-up"), ("shift_share", "shift share")])
def test_such_a_share_is_a_program_and_a_baseline_of_its_own_and_leaves_the_teacher_alone(
    name: str, words: str
) -> None:
    asked = make_grid(make_config(**{name: 0.3}), {name: (0.2, 0.1)}, (0.1,))
    settings = grid.distilled(asked)
    assert len({grid.program_of(setting, asked) for setting in settings}) == 2
    assert [getattr(one.config.training, name) for one in grid.baselines(asked)] == [0.2, 0.1, 0.2, 0.1]
    assert {getattr(grid.teacher_of(setting, asked).teacher_training, name) for setting in settings} == {0.3}
    assert grid.label(settings[1], asked) == f"distilled, {words} 0.1"


def test_settings_are_described_by_what_they_depend_on() -> None:
    setting = grid.distilled(GRID)[0]
    assert grid.describe(setting, GRID) == {"alpha": 0.0, "temperature": 1.0, "student_hidden": (4,)}
    assert grid.describe(grid.alone_of(setting, GRID), GRID) == {"student_hidden": (4,)}
    assert grid.label(setting, GRID) == "distilled, alpha 0, temperature 1, student hidden 4"
    assert grid.label(grid.smoothed_of(setting, GRID)[1], GRID) == "with labels smoothed by 0.2, student hidden 4"
    assert setting.kind == DISTILLED


def test_settings_come_in_one_order_whatever_that_of_the_options() -> None:
    """A resumed sweep knows its trainings by their place."""
    other = make_grid(make_config(seeds=3), dict(reversed(LISTS.items())), (0.1, 0.2))
    assert grid.distilled(other) == grid.distilled(GRID)


@pytest.mark.parametrize(
    ("lists", "smoothing", "says"),
    [
        ({"temperature": (1.0, 4.0, 1.0)}, (), "--temperature has 1 twice: give each value once"),
        ({"student_hidden": ((20,), (20,))}, (), "--student-hidden has 20 twice: .* joined|join the layers"),
        ({"alpha": (0.5, 2.0)}, (), "--alpha is 2.0: it must be from 0"),
        ({}, (0.0,), "--label-smoothing is 0.0: it must be above 0 and at most 1"),
        ({}, (1.5,), "--label-smoothing is 1.5"),
    ],
)
def test_bad_lists_are_one_sentence(lists: dict, smoothing: tuple, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_grid(make_config(), lists, smoothing)
