"""Bounds of a method's numbers, told by the types of its fields."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax import methods
from kd_jax.errors import MethodError
from kd_jax.methods.bounds import Bounds, check_numbers, walk

NAMED = [
    one for one in vars(methods).values()
    if isinstance(one, type) and issubclass(one, kd.Method) and dataclasses.is_dataclass(one)
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Listed(kd.Method):
    names: Any


def untyped(method: Any, **values: Any) -> Any:
    """With values that the tests' run-time types refuse; those of users do not exist."""
    for name, value in values.items():
        object.__setattr__(method, name, value)
    return method


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (kd.KD(temperature=0), "the temperature of KD is 0: it must be above 0, and finite"),
        (kd.KD(temperature=float("inf")), "the temperature of KD is inf: it must be above 0"),
        (kd.KD(alpha=3), "the alpha of KD is 3: it must be 0 to 1"),
        (kd.KD(alpha=jnp.float32(-0.5)), r"the alpha of KD is -0\.5"),
        (kd.KD(alpha=np.float64("nan")), "the alpha of KD is nan"),
        (kd.LabelSmoothing(5), "the smoothing of LabelSmoothing is 5: it must be 0 to 1"),
        (kd.TopKKL(k=0), "the k of TopKKL is 0: it must be at least 1"),
        (kd.OFA(gamma=0.5), r"the gamma of OFA is 0\.5: it must be at least 1"),
        (kd.AlphaBeta(beta=float("nan")), "the beta of AlphaBeta is nan: it must be finite"),
        (kd.CrossEntropy() + 2 * kd.KD(temperature=-2), "the temperature of KD is -2"),
        (kd.SampledKL(power=-1.0), "the power of SampledKL is -1: it must be above 0"),
        (kd.SampledKL(samples=0), "the samples of SampledKL is 0: it must be at least 1"),
        (kd.MLKD(temperature=-2.0), "the temperature of MLKD is -2: it must be above 0"),
        (kd.MLKD(temperature=(2.0, 0.0)), "the temperature of MLKD is 0: it must be above 0"),
        (kd.CTKD(start=-30.0), "the start of CTKD is -30: it must be above 0"),
        (kd.CTKD(span=-2.0), "the span of CTKD is -2: it must be at least 0"),
        (kd.MGD("a", ratio=2.0), "the ratio of MGD is 2: it must be 0 to 1"),
        (kd.FT("a", rate=2.0), "the rate of FT is 2: it must be 0 to 1"),
        (kd.TAID(0), "the steps of TAID is 0: it must be above 0"),
        (kd.AT("a", exponent=0.0), "the exponent of AT is 0: it must be above 0"),
        (kd.ReviewKD("a", levels=(4, 0)), "the levels of ReviewKD is 0: it must be at least 1"),
        (untyped(kd.TopKKL(), k=2.0), r"the k of TopKKL is 2\.0: it must be a whole number"),
        (untyped(kd.SemCKD("a"), width="32"), "the width of SemCKD is the text '32': it must be a number"),
        (untyped(kd.CRD("a"), examples=True), "the examples of CRD is True: it must be a whole number"),
        (Listed({"a": "b"}), "the names of Listed is {'a': 'b'}"),
    ],
)
def test_a_number_out_of_its_bounds_is_told(method: kd.Method, says: str) -> None:
    with pytest.raises(MethodError, match=says):
        check_numbers(method)


@pytest.mark.parametrize("cls", NAMED)
def test_what_comes_with_kd_jax_is_within_its_bounds(cls: Any) -> None:
    missing = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    if set(missing) <= {"feature", "hint"}:
        check_numbers(cls(**dict.fromkeys(missing, "path")))


def test_grids_and_what_is_traced_are_left_alone() -> None:
    check_numbers(kd.KD(temperature=jnp.array([-1.0, 2.0])))
    jax.eval_shape(lambda method: check_numbers(method), kd.KD(temperature=jnp.float32(-1)))
    jax.eval_shape(lambda method: check_numbers(method), kd.MLKD())
    check_numbers(Listed(("a", "b")))


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "text"),
    [
        (Bounds(0, 1), (0, 0.5, 1), (-1e-9, 1.1), "0 to 1"),
        (Bounds(0, above=True), (1e-9, 1e9), (0, -1), "above 0, and finite"),
        (Bounds(2), (2, 3), (1.9,), "at least 2, and finite"),
        (Bounds(), (-1e9, 0), (), "finite"),
    ],
)
def test_bounds(bounds: Bounds, inside: Any, outside: Any, text: str) -> None:
    assert str(bounds) == text
    assert all(bounds.hold(float(value)) for value in inside)
    assert not any(bounds.hold(float(value)) for value in (*outside, "nan", "inf", "-inf"))


def test_walk_finds_every_method_once() -> None:
    found = list(walk(kd.CrossEntropy() + 2 * (kd.KD() + 3 * kd.LogitMSE())))
    assert [type(one).__name__ for one in found] == [
        "Sum", "CrossEntropy", "Scaled", "Sum", "KD", "Scaled", "LogitMSE"
    ]  # fmt: skip


@pytest.mark.parametrize("method", [kd.KD(), kd.LogitMSE(), kd.DIST(), kd.ULD(), kd.SampledKL(), kd.VirtualTeacher()])
def test_methods_say_that_they_take_classes(method: kd.Method) -> None:
    assert method.of_classes
    assert not kd.LogitMSE(alpha=0).of_classes
    assert not kd.BinaryKD().of_classes


def test_a_list_of_texts_is_a_tuple_of_them() -> None:
    method = kd.ReviewKD(["a", "b"], ["c", "d"])
    assert method == kd.ReviewKD(("a", "b"), ("c", "d"))
    check_numbers(method)


@pytest.mark.parametrize("factor", ["3", None, [1, 2]])
def test_a_method_is_multiplied_by_numbers_alone(factor: Any) -> None:
    with pytest.raises(MethodError, match=r"^AT is multiplied by .*: give a number, its weight$"):
        factor * kd.AT("w")


def test_a_number_given_as_text_is_told() -> None:
    method = untyped(kd.KD(), temperature="4")
    with pytest.raises(MethodError, match=r"the temperature of KD is the text '4': it must be a number, above 0, and"):
        check_numbers(method)
