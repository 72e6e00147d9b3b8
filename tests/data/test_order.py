"""Models and data in each other's places."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flax import nnx
from small import CNN, DATA, HOW, X, Y, net, teacher

import kd_jax as kd
from kd_jax.errors import ConfigError

# Without the run-time types of the tests, which users do not have.
DISTILL, FIT, COMPARE, EVALUATE, CACHED = map(inspect.unwrap, (kd.distill, kd.fit, kd.compare, kd.evaluate, kd.cached))
DISTILLED = r"the order is kd\.distill\(student, teacher, data\)$"
COMPARED = r"the order is kd\.compare\(student, teacher, train, test\)$"
METHODS: dict[str, Any] = {"methods": {"kd": kd.KD()}, "seeds": 1}

SWAPPED: list[tuple[str, Callable[[], Any]]] = [
    (f"teacher is a Batch: {DISTILLED}", lambda: DISTILL(net(), DATA, teacher(), **HOW)),
    (f"student is a Batch: {DISTILLED}", lambda: DISTILL(DATA, net(), teacher(), **HOW)),
    (f"data is a Model: {DISTILLED}", lambda: DISTILL(net(), (X, Y), teacher(), **HOW)),
    (f"data is a CNN: {DISTILLED}", lambda: DISTILL(net(), None, CNN(rngs=nnx.Rngs(0)), **HOW)),
    (f"data is the class CNN: {DISTILLED}", lambda: DISTILL(net(), None, CNN, **HOW)),
    (r"network is a Batch: the order is kd\.fit\(key, data, network\)$", lambda: FIT(0, net(), DATA, **HOW, method=1)),
    (f"teacher is a Batch: {COMPARED}", lambda: COMPARE(net(), DATA, DATA, teacher(), **METHODS, **HOW)),
    (f"test is a Model: {COMPARED}", lambda: COMPARE(net(), None, DATA, teacher(), **METHODS, **HOW)),
    (r"model is a Batch: the order is kd\.evaluate\(model, data\)$", lambda: EVALUATE(DATA, teacher())),
    (r"teacher is a Batch: the order is kd\.cached\(teacher, inputs\)$", lambda: CACHED(DATA, teacher())),
]


@pytest.mark.parametrize(("says", "call"), SWAPPED)
def test_swapped_arguments_are_told_with_the_order(says: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError, match=says):
        call()


UNKNOWN: list[tuple[str, Callable[[], Any]]] = [
    (r"^kd\.distill has no batchsize: did you mean batch_size\?$", lambda: kd.distill(net(), None, DATA, batchsize=4)),
    (
        r"^kd\.distill has no temperature, which is a number of the method: give it there, as kd\.KD\(temperature=…\)$",
        lambda: kd.distill(net(), None, DATA, temperature=4),
    ),
    (r"^kd\.compare has no method: did you mean methods\?$", lambda: kd.compare(net(), None, DATA, DATA, method=1)),
    (r"^kd\.distill was given 4 arguments without a name: call it as kd\.distill\(student, teacher, data\), with",
     lambda: kd.distill(net(), None, X, Y)),
    (r"^kd\.evaluate was given 3 arguments without a name", lambda: kd.evaluate(teacher(), X, Y)),
    (r"^kd\.fit was called wrongly \(missing a required .*\): call it as kd\.fit\(key, data, net", lambda: kd.fit(0)),
]  # fmt: skip


@pytest.mark.parametrize(("says", "call"), UNKNOWN)
def test_arguments_that_a_function_does_not_take_are_told(says: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=says) as error:
        call()
    assert isinstance(error.value, ConfigError)


def test_a_loader_that_keeps_its_state_is_no_model() -> None:
    class Loader(list):
        def state_dict(self) -> dict[str, int]:
            return {}

    result = kd.distill(net(), None, Loader([(X[:8], Y[:8])]), optimizer=HOW["optimizer"], epochs=1)
    assert np.isfinite(result.history["loss"]).all()
