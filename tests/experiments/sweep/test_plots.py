import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweeps
from matplotlib.figure import Figure

from kd_jax.experiments.sweep import grid
from kd_jax.experiments.sweep import plots as sweep_plots
from kd_jax.experiments.sweep.search import SweepResult


def panels(found: SweepResult, axes: list[str] | None = None) -> dict[str, Any]:
    """The curves' panels by what is on their y axis."""
    figure = sweep_plots._curves(found, axes or sweep_plots._axes(found))
    figure.draw_without_rendering()
    return {panel.get_ylabel(): panel for panel in figure.axes}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1.0, 2.0, 4.0, 8.0, 20.0), ([1.0, 2.0, 4.0, 8.0, 20.0], True)),
        ((0.0, 0.1, 0.5, 0.9), ([0.0, 0.1, 0.5, 0.9], False)),
        ((0.0, 0.001, 0.01, 0.5), ([0.0, 1.0, 2.0, 3.0], False)),
        ((1.0, 2.5, 3.0, 100.0), ([0.0, 1.0, 2.0, 3.0], False)),
        (((20, 20), (4,)), ([0.0, 1.0], False)),
        (("constant", "cosine"), ([0.0, 1.0], False)),
        ((2.0,), ([2.0], False)),
        ((1e-310, 0.5), ([0.0, 1.0], False)),
        ((1.0, 1e30, 1e200), ([0.0, 1.0, 2.0], False)),
        ((-1e300, 1e300), ([0.0, 1.0], False)),
    ],
)
def test_values_stand_where_they_are_unless_they_crowd(values: Any, expected: Any) -> None:
    assert sweep_plots._places(values) == expected


def test_numbers_are_drawn_in_order_whatever_the_order_that_they_were_given_in() -> None:
    found = sweeps.made(temperature=(20.0, 1.0, 4.0), alpha=(0.5, 0.0))
    for panel in panels(found).values():
        lines = [np.float64(bars.lines[0].get_xdata()) for bars in panel.containers]
        assert len(lines) == 2
        # Each is a little beside its values, and their middle is at them.
        np.testing.assert_allclose(np.sqrt(lines[0] * lines[1]), [1.0, 4.0, 20.0], rtol=1e-12)
        assert [text.get_text() for text in panel.get_xticklabels()] == ["1", "4", "20"]
    heat_map = sweep_plots._heat_map(found, ["temperature", "alpha"]).axes[0]
    errors = np.asarray(heat_map.images[0].get_array())
    for setting in found.gains:
        place = [0.0, 0.5].index(setting.config.alpha), [1.0, 4.0, 20.0].index(setting.config.temperature)
        assert errors[place] == found.students[setting].errors.mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "values", "lines"),
    [
        ("temperature", (1.0, 4.0, 20.0), 6),
        ("temperature", (1.0, 2.0, 3.0), 6),
        ("temperature", tuple(1 + i / 20 for i in range(21)), 6),
        ("temperature", (1.0, *(1.001 + i / 1e4 for i in range(30))), 6),
        ("learning_rate", (0.01, 0.1, 1.0), 8),
        ("student_hidden", ((4,), (5, 5)), 8),
    ],
)
def test_bars_of_several_lines_stand_beside_each_other_and_at_their_values(
    option: str, values: tuple[Any, ...], lines: int
) -> None:
    """Baselines are lines, too, where the way of training is on the axis."""
    found = sweeps.made(**{option: values}, alpha=(0.0, 0.1, 0.3, 0.5, 0.7, 0.9))
    for name, panel in panels(found, [option, "alpha"]).items():
        bars = np.array([np.float64(bars.lines[0].get_xdata()) for bars in panel.containers])
        assert bars.shape == (6 if name.startswith("gain") else lines, len(values))
        assert (np.diff(bars, axis=0) > 0).all()
        # In the order of the values, and nearer to their own than to the next.
        assert (bars[-1, :-1] < bars[0, 1:]).all()
        where = np.asarray(sweep_plots._places(values)[0])
        log = panel.get_xscale() == "log"
        middle = np.exp(np.log(bars).mean(axis=0)) if log else bars.mean(axis=0)
        if not name.startswith("gain") or lines == 6:
            np.testing.assert_allclose(middle, where, rtol=1e-12, atol=1e-12)
        between = np.sqrt(where[1:] * where[:-1]) if log else (where[1:] + where[:-1]) / 2
        assert (bars[:, :-1] < between).all()
        assert (bars[:, 1:] > between).all()
        assert panel.get_xlim()[0] < bars.min() < bars.max() < panel.get_xlim()[1]


@pytest.mark.slow
def test_what_diverged_is_left_out_of_every_plot(tmp_path: Path) -> None:
    """One seed, no smoothed labels; a learning rate of one width is missing, and all of another width."""
    lists = {"learning_rate": (0.01, 1e20), "alpha": (0.0, 0.5), "student_hidden": ((3,), (4, 4, 4))}
    found = sweeps.made(**lists, label_smoothing=(), seeds=1)

    def without(lost: Callable[[Any], bool]) -> Any:
        students = {s: m for s, m in found.students.items() if not lost(s.config)}
        gains = {s: g for s, g in found.gains.items() if s in students}
        return found._replace(students=students, gains=gains, chosen=tuple(s for s in found.chosen if s in gains))

    large_rate = without(lambda config: config.learning_rate == 1e20)
    assert len(sweep_plots.write(large_rate, tmp_path)) == 5
    heat_map = sweep_plots._heat_map(sweep_plots._of(large_rate, (3,)), ["learning_rate", "alpha"]).axes[0]
    assert np.isnan(np.ma.filled(heat_map.images[0].get_array(), np.nan)).sum() == 2
    one_width = without(lambda config: config.student_hidden == (4, 4, 4))
    names = sweep_plots.write(one_width, tmp_path)
    assert "student-hidden.png" in names
    assert not any("4-4-4" in name for name in names)


def test_where_no_gain_is_known_the_axis_still_stands(tmp_path: Path) -> None:
    """Every student alone diverged; a logarithmic axis without limits of its own cannot be drawn."""
    found = sweeps.made(diverged=(grid.ALONE, grid.SMOOTHED), temperature=(1.0, 4.0, 20.0, 100.0))
    assert sweep_plots.write(found, tmp_path) == ["heat-map.png", "temperature.png"]
    gain = panels(found)["gain on alone (images)"]
    assert gain.get_xscale() == "log"
    assert gain.get_xlim()[0] < 1 < 100 < gain.get_xlim()[1]


def test_a_baseline_that_depends_on_the_axis_is_drawn_where_it_is_known() -> None:
    found = sweeps.made(learning_rate=(0.01, 0.1, 1.0))
    without = {s: m for s, m in found.students.items() if s.kind == grid.DISTILLED or s.config.learning_rate != 0.1}
    found = found._replace(students=without)
    lines = [line for line in panels(found)["errors"].get_lines() if line.get_linestyle() == "--"]
    alone = {s.config.learning_rate: m.errors.mean() for s, m in found.students.items() if s.kind == grid.ALONE}
    x, errors = lines[0].get_data()
    # Between the line of the distilled students and that of the smoothed labels.
    np.testing.assert_allclose(np.float64(x), list(alone), rtol=1e-12)
    assert list(errors) == list(alone.values())


def test_every_number_in_the_heat_map_can_be_read() -> None:
    """Students alone make so many more errors that all cells are light."""
    found = sweeps.made(temperature=(1.0, 2.0, 4.0), alpha=(0.0, 0.5))
    students = {s: sweeps.measured(m.errors + 40 * (s.kind == grid.ALONE)) for s, m in found.students.items()}
    heat_map = sweep_plots._heat_map(found._replace(students=students), ["temperature", "alpha"]).axes[0]
    image = heat_map.images[0]
    assert len(heat_map.texts) == 6
    title = heat_map.figure.get_suptitle()
    assert "alone" in title
    assert "(black)" in title
    assert ("▲" in title) == any("▲" in text.get_text() for text in heat_map.texts)
    for text in heat_map.texts:
        x, y = (round(place) for place in text.get_position())
        light = np.dot(image.cmap(image.norm(image.get_array()[y, x]))[:3], (0.299, 0.587, 0.114))
        assert abs(light - (text.get_color() == "white")) > 0.4


def test_no_interval_is_wider_than_what_is_possible() -> None:
    found = sweeps.made(seeds=2, temperature=(1.0, 2.0))
    share = np.array([0.1, 1.0])
    wide = sweeps.measured(np.array([0, 90]))._replace(teacher_agreement=share, ece=share)
    drawn = panels(found._replace(students=dict.fromkeys(found.students, wide)))
    for name in ("errors", "agrees with the teacher (%)", "calibration error (%)"):
        bars = [y for bars in drawn[name].containers for part in bars[2] for y in part.get_segments()]
        # Of baselines, which do not depend on the temperature.
        bands = [(band.get_y(), band.get_y() + band.get_height()) for band in drawn[name].patches]
        assert bands
        for ends in (np.concatenate(bars)[:, 1], np.concatenate(bands)):
            assert np.max(ends) <= 100
            assert np.min(ends) >= 0


@pytest.mark.parametrize("values", [(0.0, 0.1, 0.9), (1.0, 8.0, 100.0), (3.0,)])
def test_every_value_is_within_the_axis_and_clear_of_its_ends(values: tuple[float, ...]) -> None:
    figure = Figure()
    panel = figure.subplots()
    at, log = sweep_plots._places(values)
    sweep_plots._axis(panel, at, list(map(str, values)), log=log)
    shown = panel.transData.transform([(place, 0.0) for place in at])[:, 0]
    left, right = panel.bbox.x0, panel.bbox.x1
    margin = 0.03 * (right - left)
    assert left + margin < shown[0] <= shown[-1] < right - margin
    # Nothing of the width is wasted.
    assert len(values) == 1 or (shown[-1] - shown[0]) > 0.8 * (right - left)


def test_one_seed_has_no_intervals_and_none_is_promised() -> None:
    found = sweeps.made(seeds=1, temperature=(1.0, 2.0))
    axes = sweep_plots._axes(found)
    assert (
        sweep_plots._curves(found, axes).get_suptitle()
        == "Development split, students 20,20: 1 seed, without intervals"
    )
    assert "errors of 1 seed;" in sweep_plots._heat_map(found, axes).get_suptitle()


@pytest.mark.slow
def test_labels_of_many_values_do_not_overlap() -> None:
    found = sweeps.made(temperature=tuple(1 + 0.5 * i for i in range(40)))
    figure = sweep_plots._curves(found, ["temperature"])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].get_xticklabels()]
    assert 10 < len(boxes) <= 20
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_plots_of_an_earlier_sweep_go_and_others_stay(tmp_path: Path) -> None:
    ours = ("heat-map.png", "heat-map-20-20.png", "temperature.png", "learning-rate-4.png", "student-hidden.png")
    ours += ("heat-map-of-2.png",)
    theirs = ("heat-map-of-mine.png", "notes.png", "temperature.txt", "a-temperature.png", "seed-1.png", "dataset.png")
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    sweep_plots.remove_older(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)


def test_names_of_files_are_short_however_deep_a_student_is() -> None:
    widths = ((2,), (1,) * 131)
    assert [sweep_plots._name(width, widths) for width in widths] == ["-2", "-of-2"]
