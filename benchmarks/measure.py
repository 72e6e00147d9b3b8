"""How everything here is timed: contestants take turns, and what they took is kept round by round in a `Table`."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    # What runs PyTorch alone, as a process, must not import JAX.
    import kd_jax


Key = TypeVar("Key")
_ORDER = ("notebook", "tuned PyTorch", "Keras 3", "PyTorch, stacked", "kd_jax", "limit")
Figures = dict[str, dict[str, list[float]]]


class Contestant(NamedTuple):
    """`run()` does `units` units of the same work and waits for them."""

    run: Callable[[], object]
    units: int = 1


class Setting(NamedTuple):
    """What every section is given.

    rounds: turns of each contestant in the sections that time single steps. whole_rounds: those of whole runs.
    quick: everything in small. torch_python: whose PyTorch runs in processes of its own, else this one's.
    """

    data: "kd_jax.Dataset"
    rounds: int
    whole_rounds: int
    quick: bool
    torch_python: str | None = None


class Table(NamedTuple):
    """Figures of one kind, all in `unit`.

    figures: row → column → one value for each round. notes: what is left out of the figures, and what was skipped.
    rate: more is better. baseline: the column that the others are compared with. turned: columns are printed as rows.
    details: more for the JSON.
    """

    name: str
    title: str
    unit: str
    figures: Figures
    notes: tuple[str, ...] = ()
    rate: bool = False
    baseline: str = "kd_jax"
    turned: bool = False
    details: Mapping[str, object] = {}

    def columns(self) -> list[str]:
        """The columns of all rows, the usual ones in their usual order."""
        there = dict.fromkeys(column for by_column in self.figures.values() for column in by_column)
        return sorted(there, key=lambda column: _ORDER.index(column) if column in _ORDER else -1)


def take_turns(
    contestants: Mapping[Key, Contestant], rounds: int, *, label: str, warm: bool = True
) -> dict[Key, list[float]]:
    """Seconds for one unit, by contestant, one value for each round.

    Each contestant runs once beforehand, if `warm`, which compiles and fills caches. The order changes from round to
    round, so that nobody always follows the same neighbour.
    """
    if warm:
        for contestant in contestants.values():
            contestant.run()
    seconds: dict[Key, list[float]] = {key: [] for key in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    for _ in tqdm(range(rounds), desc=label, leave=False, disable=None):
        shuffle(order)
        for key in order:
            started = time.perf_counter()
            contestants[key].run()
            seconds[key].append((time.perf_counter() - started) / contestants[key].units)
    return seconds


def as_figures(seconds: Mapping[tuple[str, str], list[float]], convert: Callable[[str, float], float]) -> Figures:
    """What `take_turns` gave for (row, column), each value converted by `convert(row, seconds)`."""
    figures: Figures = {}
    for (row, column), values in seconds.items():
        figures.setdefault(row, {})[column] = [convert(row, value) for value in values]
    return figures


def with_best(
    figures: Figures, name: str, ways: tuple[str, ...], *, rate: bool = False
) -> tuple[Figures, dict[str, str]]:
    """The figures with the best of the columns `ways`, by its median, as the column `name` in their place.

    Also returns which of them that is, by row.
    """
    best: dict[str, str] = {}
    chosen: Figures = {}
    for row, by_column in figures.items():
        there = [way for way in ways if way in by_column]
        chosen[row] = {column: values for column, values in by_column.items() if column not in ways}
        if there:
            pick = max if rate else min
            best[row] = pick(there, key=lambda way: statistics.median(by_column[way]))
            chosen[row][name] = by_column[best[row]]
    return chosen, best


def ratios(other: list[float], baseline: list[float], *, rate: bool = False) -> list[float]:
    """How many times better the baseline is, round by round."""
    pairs = zip(other, baseline, strict=True)
    return [b / a for a, b in pairs] if rate else [a / b for a, b in pairs]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
