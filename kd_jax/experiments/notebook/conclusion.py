"""What a comparison of correct images shows, in one sentence."""

from kd_jax.stats import Comparison, digits_that_tell


def conclude(comparison: Comparison, *, of: int, against: str = "") -> str:
    """One sentence on a comparison of correct images, of `of`: what distillation changed, and whether that is real.

    against: the baseline, where it has to be said.
    """
    n, mean = comparison.n, comparison.mean_difference
    half = comparison.margin
    digits = digits_that_tell(comparison, 1 if half is not None and half < 9.5 else 0)
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
