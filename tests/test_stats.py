import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from kd_jax.stats import Comparison, digits_that_tell, half_width, paired_comparison, proportion_interval, summarise

counts = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), min_size=2, max_size=40)


def oracle(before: list[int], after: list[int]) -> tuple[float, float, float, float]:
    """Mean, interval and p-value from the formulas alone, with the t distribution as an incomplete beta function."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    quantile = special.stdtrit(n - 1, 0.975)
    t = mean / error
    p = special.betainc((n - 1) / 2, 0.5, (n - 1) / (n - 1 + t * t))
    return mean, mean - quantile * error, mean + quantile * error, p


@given(counts)
def test_paired_comparison_equals_the_formulas(pairs: list[tuple[int, int]]) -> None:
    before, after = [list(side) for side in zip(*pairs, strict=True)]
    found = paired_comparison(before, after, metric="correct")
    if len({b - a for a, b in pairs}) == 1:
        assert (found.ci95, found.p_value) == (None, None)
        return
    assert found.ci95 is not None
    mean, low, high, p = oracle(before, after)
    np.testing.assert_allclose([found.mean_difference, *found.ci95, found.p_value], [mean, low, high, p], rtol=1e-9)
    assert (found.p_value < 0.05) == (found.ci95[0] > 0 or found.ci95[1] < 0)


@given(counts)
def test_swapping_the_sides_changes_the_sign_alone(pairs: list[tuple[int, int]]) -> None:
    before, after = [list(side) for side in zip(*pairs, strict=True)]
    one, other = paired_comparison(before, after, metric="x"), paired_comparison(after, before, metric="x")
    assert one.mean_difference == -other.mean_difference
    assert one.p_value == pytest.approx(other.p_value)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    truth, trials = 3.0, 2000
    hits = 0
    for _ in range(trials):
        before = rng.normal(9300, 30, 5)
        found = paired_comparison(before, before + rng.normal(truth, 12, 5), metric="x")
        assert found.ci95 is not None
        hits += found.ci95[0] < truth < found.ci95[1]
    assert abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_one_seed_has_no_interval() -> None:
    assert paired_comparison([1], [3], metric="x") == Comparison("x", 1, 2.0, None, None)
    assert summarise([4.0]) == (4.0, None, 1)


def test_two_values_have_a_spread() -> None:
    assert summarise([1.0, 3.0]).sd == pytest.approx(2**0.5)
    assert summarise([1.0]).sd is None


def test_summary_is_of_a_sample() -> None:
    assert summarise([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)), 3)


@pytest.mark.parametrize(("before", "after"), [([1, 2], [1]), ([], []), ([[1.0]], [[1.0]])])
def test_what_cannot_be_paired_is_refused(before: list, after: list) -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_comparison(np.array(before).reshape(-1) if np.ndim(before) < 2 else np.array(before), after, metric="x")


@pytest.mark.parametrize("comparisons", [0, -1])
def test_a_number_of_comparisons_is_whole(comparisons) -> None:
    with pytest.raises(ValueError, match=f"comparisons is {comparisons}: it must be a whole number of at least 1"):
        paired_comparison([1.0, 2.0], [2.0, 2.0], metric="x", comparisons=comparisons)


def test_nothing_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        summarise([])


def test_a_correction_for_many_comparisons_widens_the_interval_and_multiplies_the_p_value() -> None:
    before, after = [3, 5, 4, 9, 6], [9, 8, 10, 13, 9]
    one, many = (paired_comparison(before, after, metric="correct", comparisons=k) for k in (1, 7))
    error = np.std(np.subtract(after, before), ddof=1) / math.sqrt(5)
    half = special.stdtrit(4, 1 - 0.025 / 7) * error
    assert many.ci95 == pytest.approx((many.mean_difference - half, many.mean_difference + half))
    assert many.p_value == pytest.approx(7 * one.p_value)
    assert paired_comparison(before, after, metric="correct", comparisons=1000).p_value == 1.0


@pytest.mark.slow
def test_all_corrected_intervals_hold_at_once() -> None:
    """Ten comparisons of noise with the same baseline: in at most about 5 % of trials does any find a difference."""
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        baseline = rng.normal(size=6)
        found = [paired_comparison(baseline, rng.normal(size=6), metric="correct", comparisons=10) for _ in range(10)]
        wrong += any(f.ci95 is not None and not f.ci95[0] <= 0 <= f.ci95[1] for f in found)
    assert wrong <= 32


def test_half_the_width_of_an_interval() -> None:
    values = [3.0, 5.0, 4.0, 9.0]
    expected = special.stdtrit(3, 0.975) * np.std(values, ddof=1) / 2
    assert half_width(values) == pytest.approx(expected)
    assert half_width([3.0]) == 0


def test_the_margin_is_half_the_interval() -> None:
    compared = paired_comparison([1, 2, 3], [2, 4, 3], metric="correct")
    assert compared.ci95 is not None
    assert compared.margin == pytest.approx(compared.ci95[1] - compared.mean_difference)
    assert paired_comparison([1], [2], metric="correct").margin is None


@pytest.mark.parametrize(
    ("mean", "low", "high", "digits"),
    [(10.4, 0.6, 20.2, 1), (12.0, 2.0, 22.0, 0), (10.0, -1.0, 21.0, 0), (-10.4, -20.2, -0.6, 1),
     (5.0, -0.5, 10.5, 0), (10.0, 0.0, 20.0, 0)],
)  # fmt: skip
def test_rounding_hides_no_zero(mean: float, low: float, high: float, digits: int) -> None:
    """+10.4 ± 9.8 is no +10 ± 10."""
    found = Comparison("correct", 5, mean, (low, high), 0.04)
    assert digits_that_tell(found, 0) == digits


def test_the_interval_of_a_proportion_is_wilsons() -> None:
    for count, n in [(0, 1), (1, 1), (7, 10), (0, 50), (9793, 10000)]:
        expected = stats.binomtest(count, n).proportion_ci(method="wilson")
        assert proportion_interval(count, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    for count, n in [(1, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="is no proportion"):
            proportion_interval(count, n)


def test_differences_that_are_alike_up_to_the_rounding_of_float32_have_no_interval() -> None:
    """Pairs of accuracies that differ by 110 of 10,000 examples each; a single example more is a spread."""
    before, after = np.float32([0.855, 0.821]), np.float32([0.866, 0.832])
    found = paired_comparison(before.astype(float), after.astype(float), metric="accuracy")
    assert (found.ci95, found.p_value) == (None, None)
    one_more = paired_comparison(before, after + np.float32([0, 1e-4]), metric="accuracy")
    assert one_more.ci95 is not None
    assert paired_comparison([0.1, 0.2], [0.2, 0.3 + 1e-9], metric="x").ci95 is not None, "float64 has its own digits"


def test_values_that_are_not_finite_have_no_interval() -> None:
    found = paired_comparison([np.inf, 1.0], [np.inf, 2.0], metric="nll")
    assert (found.ci95, found.p_value) == (None, None)
    assert summarise([np.inf, np.inf]).mean == np.inf
