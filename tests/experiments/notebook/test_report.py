"""Numbers and lists of results.json: all that was measured, in no more text than that takes."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_jax.data.dataset import Dataset
from kd_jax.evaluate import Evaluation
from kd_jax.experiments.notebook.config import Training
from kd_jax.experiments.notebook.report import runs_json, training_line
from kd_jax.experiments.shell.text import json_text, plain

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text() | st.sampled_from(["[\n  1,\n  2\n]", "[1,  2]", "a ] b [\\n"])
contents = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner) | st.lists(numbers) | st.dictionaries(texts, inner),
)


@given(contents, st.sampled_from([None, 0, 1, 2]))
def test_text_says_all_of_its_content(content: Any, indent: int | None) -> None:
    assert json.loads(json_text(content, indent)) == content


def test_a_list_of_numbers_is_one_line() -> None:
    content = {"curve": [[0.25, -3e-20], [1, 2]], "names": ["a", "b"]}
    lines = ["{", ' "curve": [', "  [0.25, -3e-20],", "  [1, 2]", " ],", ' "names": [', '  "a",', '  "b"', " ]", "}"]
    assert json_text(content, indent=1).splitlines() == lines


@given(st.floats(width=32))
def test_no_digit_of_float32_is_lost(value: float) -> None:
    found = plain(np.float32(value))
    assert isinstance(found, float)
    np.testing.assert_array_equal(np.float32(found), np.float32(value), strict=True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([[0.9898, 0.1]]), "[[0.9898, 0.1]]"),
        (np.float64([1 / 3]), "[0.3333333333333333]"),
        (np.int32(3), "3"),
        (np.array([True]), "[True]"),
    ],
)
def test_plain_numbers(values: Any, expected: str) -> None:
    assert str(plain(values)) == expected


def test_the_measures_of_each_seed_are_one_row() -> None:
    measured = Evaluation(*np.arange(10).reshape(5, 2), teacher_agreement=None, kl_to_teacher=None)
    assert runs_json(measured) == [
        {"correct": 0, "errors": 2, "accuracy": 4, "nll": 6, "ece": 8},
        {"correct": 1, "errors": 3, "accuracy": 5, "nll": 7, "ece": 9},
    ]


def test_a_training_is_told_in_one_line(small_dataset: Dataset) -> None:
    training = Training(3, 10, 0.01, "cosine", 1)
    line = training_line(training, small_dataset)
    assert line.endswith(", batch 10, Adam 0.01, cosine decay, shifts of up to 1 pixel")
    warm = training_line(training._replace(warmup=0.25, schedule="constant"), small_dataset)
    assert warm.endswith("Adam 0.01, warm-up in 25 % of the steps, shifts of up to 1 pixel")
    some = training_line(training._replace(shift=2, shift_share=0.25), small_dataset)
    assert some.endswith("shifts of up to 2 pixels of 25 % of the images")
    assert "of the images" not in training_line(training._replace(shift=0, shift_share=0.25), small_dataset)
