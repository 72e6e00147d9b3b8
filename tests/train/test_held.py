import numpy as np
import pytest

import kd_jax as kd
from kd_jax.errors import DataError
from kd_jax.teacher import as_teacher
from kd_jax.train.held import hold_out

X = np.arange(60.0, dtype=np.float32).reshape(30, 2)
Y = np.repeat(np.arange(3, dtype=np.int32), 10)


def test_a_sixth_of_the_examples_is_drawn_and_the_others_are_left() -> None:
    seen, teacher, held = hold_out(kd.Batch(X, Y), None, None)
    assert teacher is None
    assert len(held.inputs) == 5
    rows = np.concatenate([seen.inputs, held.inputs])[:, 0]
    np.testing.assert_array_equal(np.sort(rows), X[:, 0])
    np.testing.assert_array_equal(held.labels, Y[(np.asarray(held.inputs)[:, 0] / 2).astype(int)])
    again = hold_out(kd.Batch(X, Y), None, None)
    np.testing.assert_array_equal(again.held.inputs, held.inputs)


def test_data_that_lies_class_by_class_leaves_no_class_out() -> None:
    labels = np.repeat(np.arange(6, dtype=np.int32), 100)
    seen, _, held = hold_out(kd.Batch(np.zeros((600, 1), np.float32), labels), None, None)
    assert set(np.asarray(held.labels)) == set(np.asarray(seen.labels)) == set(range(6))


def test_a_cached_teacher_answers_those_that_are_left() -> None:
    seen, teacher, _ = hold_out(kd.Batch(X, Y), as_teacher(kd.cached(X)), None)
    assert teacher is not None
    np.testing.assert_array_equal(teacher.outputs(seen.inputs)[0].logits, seen.inputs)


def test_what_has_no_label_is_not_chosen_by() -> None:
    labels = np.where(np.arange(30) < 20, Y, -1)
    held = hold_out(kd.Batch(X, labels), None, None).held
    assert 0 < len(held.inputs) < 6
    assert (np.asarray(held.labels) >= 0).all()
    with pytest.raises(DataError, match="the 5 examples to choose by have no labels: give others with development="):
        hold_out(kd.Batch(X, np.full(30, -1, np.int32)), None, None)


def test_bad_development_data_is_one_sentence() -> None:
    with pytest.raises(DataError, match="there are 5 examples: choosing by a part of them needs at least 6"):
        hold_out(kd.Batch(X[:5], Y[:5]), None, None)
    with pytest.raises(DataError, match=r"development is a list of 2: give its examples as one kd\.Batch"):
        hold_out(kd.Batch(X, Y), None, [kd.Batch(X, Y)] * 2)
