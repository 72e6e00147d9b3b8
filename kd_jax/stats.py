"""Means, intervals and paired comparisons over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Summary(NamedTuple):
    """mean and sd (the sample's, with n - 1; None for one value) of n values."""

    mean: float
    sd: float | None
    n: int


class Comparison(NamedTuple):
    """A paired comparison: the differences, seed by seed, of `metric` between two ways to train.

    n: number of pairs. mean_difference: in the unit of the metric. ci95: two-sided 95 % interval of the mean
    difference, by Student's t. p_value: two-sided, of the paired t-test. Both are None where the differences cannot
    tell: fewer than two pairs, the same difference in each, up to rounding, or one that is no number. Where several
    comparisons were made, both are corrected for their number.
    """

    metric: str
    n: int
    mean_difference: float
    ci95: tuple[float, float] | None
    p_value: float | None

    @property
    def margin(self) -> float | None:
        """Half the width of the interval; None without one."""
        return None if self.ci95 is None else (self.ci95[1] - self.ci95[0]) / 2


def summarise(values: ArrayLike) -> Summary:
    """The `Summary` of at least one value. Raises `ValueError` for none."""
    array = np.asarray(values, np.float64)
    if array.size == 0:
        raise ValueError("no values to summarise: at least 1 is needed")
    with np.errstate(invalid="ignore"):
        return Summary(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size)


def paired_comparison(baseline: ArrayLike, treatment: ArrayLike, *, metric: str, comparisons: int = 1) -> Comparison:
    """`treatment` minus `baseline`, pair by pair. Raises `ValueError` unless both hold the same number of values.

    comparisons: how many are made and looked at. By Bonferroni's inequality all of their intervals, each at the level
        1 - 0.05 / comparisons, hold at once with a probability of at least 95 %, however the comparisons depend on each
        other; a p-value is multiplied by their number (Dunn 1961, https://doi.org/10.2307/2282330).
        Raises `ValueError` below 1.

    The interval is about other seeds of the same two trainings (and, here, the same teacher).
    """
    if isinstance(comparisons, bool) or not isinstance(comparisons, int | np.integer) or comparisons < 1:
        raise ValueError(f"comparisons is {comparisons!r}: it must be a whole number of at least 1")
    before, after = np.asarray(baseline, np.float64), np.asarray(treatment, np.float64)
    if before.shape != after.shape or before.ndim != 1 or before.size == 0:
        raise ValueError(f"{before.size} and {after.size} values cannot be paired: give one of each for every seed")
    with np.errstate(invalid="ignore"):
        differences = after - before
    mean, n = float(differences.mean()), differences.size
    # What is the same up to rounding has no spread to be judged by, and neither has what is no number. Measures in
    # float32 are rounded once each, two of them in each difference.
    narrow = all(np.array_equal(side, side.astype(np.float32)) for side in (before, after))
    digits = 2 * np.finfo(np.float32).eps if narrow else 8 * np.finfo(np.float64).eps
    rounding = float(digits) * max(np.abs(before).max(), np.abs(after).max())
    if n < 2 or not np.isfinite(differences).all() or np.ptp(differences) <= rounding:
        return Comparison(metric, n, mean, None, None)
    from scipy import stats as scipy_stats

    test = scipy_stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(1 - 0.05 / comparisons)
    return Comparison(metric, n, mean, (float(low), float(high)), min(1.0, comparisons * float(test.pvalue)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number, however they depend on each other: Holm (1979).

    https://www.jstor.org/stable/4615733. In rising order the i-th of m is multiplied by m − i + 1, and is no less than
    those before it; at most 1. Less severe than Bonferroni's correction, at the same guarantee. None, of a comparison
    that cannot tell, stays, and counts as the largest.
    """
    known = sorted((value, place) for place, value in enumerate(p_values) if value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (value, place) in enumerate(known):
        least = max(least, min(1.0, (len(p_values) - rank) * value))
        corrected[place] = least
    return corrected


def half_width(values: ArrayLike) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t; 0 for one value."""
    array = np.asarray(values, np.float64)
    if array.size < 2:
        return 0.0
    from scipy import stats as scipy_stats

    with np.errstate(invalid="ignore"):
        return float(scipy_stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))


def digits_that_tell(found: Comparison, fewest: int, factor: float = 1.0) -> int:
    """Decimals, `fewest` at least, with which "mean ± half-width", times `factor`, still tells where 0 lies.

    Rounded to whole numbers, +10.4 ± 9.8 would look as if 0 were in the interval.
    """
    if found.ci95 is None or found.margin is None:
        return fewest
    outside = found.ci95[0] > 0 or found.ci95[1] < 0
    for digits in range(fewest, fewest + 4):
        if (round(abs(found.mean_difference) * factor, digits) > round(found.margin * factor, digits)) == outside:
            return digits
    return fewest + 4


def proportion_interval(count: int, n: int) -> tuple[float, float]:
    """Two-sided 95 % interval of a proportion, `count` of `n` independent examples: Wilson's score interval (1927).

    https://doi.org/10.2307/2276774. It is about other examples of the same kind. Raises `ValueError` for n below 1.
    """
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"{count} of {n} is no proportion: at least 1 example is needed, and no more may count")
    z, share = 1.959963984540054, count / n
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))
