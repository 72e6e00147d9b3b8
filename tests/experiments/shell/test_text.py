"""Numbers and lists as results are written: all that was measured, in no more text than that takes."""

import contextlib
import json
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_jax.experiments.shell import text
from kd_jax.experiments.shell.text import counted, json_text, listed, plain, spread

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


def test_a_mean_has_its_deviation_and_one_value_none() -> None:
    assert spread([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"
    assert spread([0.5], ".1f", per_cent=True) == "50.0"
    assert spread([-1.0, -3.0], "+.1f") == "-2.0 ± 1.4"


def test_words_are_counted_and_lines_without_text_left_out() -> None:
    assert [counted(1, "seed"), counted(2_000, "seed")] == ["1 seed", "2,000 seeds"]
    assert listed({"data": "mnist", "nothing": "", "method": "kd"}) == "- data: mnist\n- method: kd"


def test_an_output_that_cannot_be_written_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text, "_told", [])
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        for line in ("one", "two"):
            text.say(line)
        monkeypatch.undo()
        # What is left in its buffer cannot be written either.
        with contextlib.suppress(OSError):
            full.close()
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "kd_jax: the output cannot be printed (No space left on device): the run goes on, and its results will be in "
        "its folder"
    ]
