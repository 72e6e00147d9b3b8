"""A teacher that is why a training is not finite."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from small import DATA, HOW, X, Y, net, teacher

import kd_jax as kd
from kd_jax.errors import NotFiniteError
from kd_jax.teacher import as_teacher
from kd_jax.train.faults import check_schedules, check_teacher

pytestmark = pytest.mark.usefixtures("quick_compiling")
NAN = kd.Model(teacher().network, jax.tree.map(lambda leaf: leaf * np.nan, teacher().variables))
RENORMALISED = kd.from_top_k(np.tile([[0, 1]], (24, 1)), np.tile([[0.5, 0.3]], (24, 1)), classes=4, rest="renormalised")


@pytest.mark.parametrize(
    ("method", "taught", "says"),
    [
        (kd.KD(), NAN, "the teacher's logits are NaN on the training data"),
        (kd.LogitMSE(), RENORMALISED, 'the teacher rules classes out .*LogitMSE is not finite: .*rest="uniform"'),
        (kd.ReverseKL(), RENORMALISED, "the teacher rules classes out .*ReverseKL"),
    ],
)
def test_it_is_named(method: kd.Method, taught: Any, says: str) -> None:
    with pytest.raises(NotFiniteError, match=says):
        check_teacher(method, DATA, as_teacher(taught), None)


def test_what_is_no_fault_of_the_teacher_is_not_said_to_be() -> None:
    for method, taught in ((kd.KD(), RENORMALISED), (kd.ReverseKL(), as_teacher(teacher())), (kd.CrossEntropy(), None)):
        check_teacher(method, DATA, taught, None)
    logits = np.where(Y[:, None] == 0, np.nan, np.ones((24, 4), np.float32))
    some = kd.Batch(X, Y, (Y != 0) * 1.0)
    check_teacher(kd.KD(), some, kd.cached(lambda x: logits, some), None)


@pytest.mark.parametrize("stream", [False, True])
def test_distill_says_it(stream: bool) -> None:
    data, size = ([(X, Y)], None) if stream else (DATA, 8)
    with pytest.raises(NotFiniteError, match="the teacher's logits are NaN"):
        kd.distill(net(), NAN, data, **(HOW | {"batch_size": size}))


def test_fit_says_it() -> None:
    with pytest.raises(NotFiniteError, match="the teacher's logits are NaN"):
        kd.fit(0, DATA, net(), teacher=NAN, method=kd.KD(), **HOW)
    with pytest.raises(NotFiniteError, match="smaller learning rate"):
        kd.fit(0, DATA, net(), teacher=teacher(), method=kd.KD(), **(HOW | {"optimizer": optax.sgd(1e30)}))


ENDS_AT_0 = kd.scheduled(kd.KD(), temperature=optax.linear_schedule(8.0, 0.0, 4))


def test_a_number_out_of_its_bounds_is_that_of_its_schedule() -> None:
    check_schedules(ENDS_AT_0, range(4))
    with pytest.raises(NotFiniteError, match=r"^the temperature of KD is 0 by its schedule after 4 steps, .*: it"):
        check_schedules(kd.CrossEntropy() + 2 * ENDS_AT_0, range(9))
    check_schedules(kd.scheduled(2 * kd.KD(), factor=lambda done: -done), range(9))


def test_the_first_loss_is_no_matter_of_the_learning_rate() -> None:
    data = DATA._replace(inputs=np.full_like(DATA.inputs, 3e38))
    with pytest.raises(NotFiniteError, match="at step 1 of epoch 1: look for parameters, inputs, labels or numbers of"):
        kd.distill(net(), None, data, **HOW)
    with pytest.raises(NotFiniteError, match="the temperature of KD is 0 by its schedule after 4 steps"):
        kd.distill(net(), teacher(), DATA, method=ENDS_AT_0, **(HOW | {"epochs": 2}))


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_an_input_that_is_not_finite_is_the_reason_and_not_the_teacher(value: float, kind: str) -> None:
    inputs = np.array(DATA.inputs)
    inputs[3, 1] = value
    for taught in (None, teacher()):
        with pytest.raises(NotFiniteError, match=f"the inputs of example 3 are {kind}, and so is the loss: mend them"):
            check_teacher(kd.KD(), DATA._replace(inputs=inputs), as_teacher(taught), None)
    weights = np.ones(len(inputs), np.float32)
    weights[3] = 0
    check_teacher(kd.KD(), DATA._replace(inputs=inputs, weights=weights), None, None)
    # A mask of what is left out may be -inf.
    inputs[:, 1] = -np.inf
    check_teacher(kd.KD(), DATA._replace(inputs=inputs), None, None)
