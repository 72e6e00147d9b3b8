"""The check of a file's logits beside the model's own."""

import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.errors import ConfigError
from kd_jax.export.compared import check_logits, check_names, wanted
from kd_jax.export.program import traced

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
MODEL = kd.from_function(lambda params, x: x @ params, jnp.ones((5, 2)))
PROGRAM, OWN = traced(MODEL, X), wanted(MODEL, X, prepare=None, batch=None)


def check(run, program=PROGRAM, own=OWN):
    check_logits(run, program, own, 1e-5, "the file", "leave it")


def test_all_examples_at_once_and_one_are_compared():
    asked = []

    def run(arrays):
        asked.append(len(arrays[0]))
        return arrays[0] @ np.ones((5, 2), np.float32)

    check(run)
    assert sorted(asked) == [1, 6]
    asked.clear()
    check(run, traced(MODEL, X, batch=3), wanted(MODEL, X, prepare=None, batch=3))
    assert asked == [3]


@pytest.mark.parametrize("wrong", [1, 6])
def test_wrong_logits_of_one_number_of_examples_are_enough(wrong):
    def run(arrays):
        return arrays[0] @ np.ones((5, 2), np.float32) + (len(arrays[0]) == wrong)

    with pytest.raises(ConfigError, match=r"of the file differ from the model's by .*: leave it, or allow more"):
        check(run)


def test_another_shape_is_refused():
    with pytest.raises(ConfigError, match=r"gives logits of \(1, 2\) where the model's are \(6, 2\): leave it"):
        check(lambda arrays: OWN.logits[:1])


def test_one_example_is_compared_beside_itself():
    (inputs,), logits = wanted(MODEL, X[:1], prepare=None, batch=None)
    np.testing.assert_array_equal(inputs, X[[0, 0]])
    assert logits.shape == (2, 2)
    assert wanted(MODEL, X[:1], prepare=None, batch=1).logits.shape == (1, 2)


def test_a_fixed_number_of_examples_is_compared_whole():
    (inputs,), logits = wanted(MODEL, X[:3], prepare=None, batch=8)
    np.testing.assert_array_equal(inputs, X[[0, 1, 2, 0, 1, 2, 0, 1]])
    assert logits.shape == (8, 2)


def test_names():
    check_names((X, X), "a file")
    with pytest.raises(ConfigError, match="the inputs have the names logits, and in a file each has its own"):
        check_names({"logits": X}, "a file")
