import pytest

from kd_jax.experiments.notebook.conclusion import conclude
from kd_jax.stats import Comparison


@pytest.mark.parametrize(
    ("comparison", "says"),
    [
        (Comparison("correct", 5, -3.0, (-17.0, 11.0), 0.6), "by −3 ± 14 of 10,000 (95 % interval, 5 seeds): no"),
        (Comparison("correct", 5, 0.2, (-13.8, 14.2), 0.9), "by 0 ± 14 "),
        (Comparison("correct", 8, 0.875, (0.58, 1.17), 2.1e-4), "+0.9 ± 0.3 of 10,000 (95 % interval, 8 seeds): a"),
        (Comparison("correct", 8, -0.01, (-0.3, 0.28), 0.9), "by 0.0 ± 0.3 "),
        (Comparison("correct", 20, 30.0, (20.0, 40.0), 1.2e-4), "+30 ± 10 of 10,000 (95 % interval, 20 seeds): a gain"),
        (Comparison("correct", 20, -30.0, (-40.0, -20.0), 0.001), "a loss (p = 0.001)"),
        (Comparison("correct", 1, 10.0, None, None), "+10 of 10,000 with 1 seed: one run cannot tell"),
        (Comparison("correct", 2, 10.0, None, None), "too alike"),
    ],
)  # fmt: skip
def test_the_conclusion_says_what_the_interval_says(comparison: Comparison, says: str) -> None:
    assert says in conclude(comparison, of=10_000)


def test_the_conclusion_names_the_baseline() -> None:
    said = conclude(Comparison("correct", 3, 5.0, (1.0, 9.0), 0.02), of=100, against="the student alone")
    assert said.startswith("Against the student alone, distillation changed the number of correct images by +5.0 ± 4.0")
