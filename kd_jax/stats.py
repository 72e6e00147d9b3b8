"""Means, intervals and paired comparisons over seeds."""

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
    tell: fewer than two pairs, or the same difference, other than 0, in each. Where several comparisons were made,
    both are corrected for their number.
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
    return Summary(float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None, array.size)


def paired_comparison(baseline: ArrayLike, treatment: ArrayLike, *, metric: str, comparisons: int = 1) -> Comparison:
    """`treatment` minus `baseline`, pair by pair. Raises `ValueError` unless both hold the same number of values.

    comparisons: how many are made and looked at. By Bonferroni's inequality all of their intervals, each at the level
        1 - 0.05 / comparisons, hold at once with a probability of at least 95 %, however the comparisons depend on each
        other; a p-value is multiplied by their number (Dunn 1961, https://doi.org/10.2307/2282330).

    The interval is about other seeds of the same two trainings (and, here, the same teacher).
    """
    before, after = np.asarray(baseline, np.float64), np.asarray(treatment, np.float64)
    if before.shape != after.shape or before.ndim != 1 or before.size == 0:
        raise ValueError(f"{before.size} and {after.size} values cannot be paired: give one of each for every seed")
    differences = after - before
    mean, n = float(differences.mean()), differences.size
    if not differences.any() and n > 1:
        return Comparison(metric, n, 0.0, (0.0, 0.0), 1.0)
    if n < 2 or np.ptp(differences) == 0:
        return Comparison(metric, n, mean, None, None)
    from scipy import stats as scipy_stats

    test = scipy_stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(1 - 0.05 / comparisons)
    return Comparison(metric, n, mean, (float(low), float(high)), min(1.0, comparisons * float(test.pvalue)))


def conclude(comparison: Comparison, *, of: int, against: str = "") -> str:
    """One sentence on a comparison of correct images, of `of`: what distillation changed, and whether that is real.

    against: the baseline, where it has to be said.
    """
    n, mean = comparison.n, comparison.mean_difference
    half = comparison.margin
    digits = 1 if half is not None and half < 9.5 else 0
    who = f"Against {against}, distillation" if against else "Distillation"
    changed = f"{who} changed the number of correct images by {_signed(mean, digits)}"
    if n == 1:
        return f"{changed} of {of:,} with 1 seed: one run cannot tell a gain from noise, so use --seeds 5 or more."
    if comparison.ci95 is None:
        return f"{changed} of {of:,} with each of {n} seeds: too few or too alike to give an interval."
    low, high = comparison.ci95
    verdict = "no evidence of a gain"
    if low > 0:
        verdict = f"a gain (p = {_p(comparison.p_value)})"
    elif high < 0:
        verdict = f"a loss (p = {_p(comparison.p_value)})"
    return f"{changed} ± {half:.{digits}f} of {of:,} (95 % interval, {n} seeds): {verdict}."


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def _p(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2g}"


def half_width(values: ArrayLike) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t; 0 for one value."""
    array = np.asarray(values, np.float64)
    if array.size < 2:
        return 0.0
    from scipy import stats as scipy_stats

    return float(scipy_stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
