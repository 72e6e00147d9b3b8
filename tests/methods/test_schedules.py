"""Numbers that follow the steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kd_jax as kd
from kd_jax import losses
from kd_jax.errors import MethodError
from kd_jax.methods.base import as_parts, terms_of
from kd_jax.methods.sparse import Sparse, check_sparse

pytestmark = pytest.mark.usefixtures("quick_compiling")
RNG = np.random.default_rng(9)
STUDENT, TEACHER = (kd.Output(jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)) for _ in range(2))
BATCH = kd.Batch(jnp.zeros((6, 1)), jnp.asarray(RNG.integers(0, 4, 6), jnp.int32))
Z, T = STUDENT.logits, TEACHER.logits


def terms(method: kd.Method, step: int, carried: Any = (), batch: kd.Batch = BATCH) -> Any:
    return terms_of(method, kd.Parts((), carried), STUDENT, TEACHER, batch, jnp.int32(step))


def test_any_number_of_a_method_follows_its_schedule() -> None:
    method = kd.scheduled(kd.KD(), temperature=optax.linear_schedule(8.0, 2.0, 10), alpha=lambda step: step / 20)
    for step, temperature, alpha in ((0, 8.0, 0.0), (5, 5.0, 0.25), (30, 2.0, 1.5)):
        found, wanted = terms(method, step)[0], terms(kd.KD(alpha, temperature), 0)[0]
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-7)


def test_a_weight_warms_up_by_its_factor() -> None:
    method = kd.scheduled(3.0 * kd.DKD(), factor=optax.linear_schedule(0.0, 3.0, 4))
    for step, share in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        found, wanted = (terms(one, step)[0]["soft"] for one in (method, 3.0 * kd.DKD()))
        np.testing.assert_allclose(found, share * wanted, rtol=1e-5)


def test_labels_are_needed_where_their_weight_may_come() -> None:
    assert kd.scheduled(kd.KD(0.0), alpha=optax.linear_schedule(0.0, 1.0, 5)).needs_labels
    assert not kd.scheduled(kd.KD(0.0), temperature=optax.constant_schedule(3.0)).needs_labels


@pytest.mark.parametrize(
    ("method", "schedules", "match"),
    [
        (kd.KD(), {"temprature": optax.constant_schedule(1.0)}, "did you mean temperature"),
        (kd.TopKKL(), {"k": optax.constant_schedule(1.0)}, "k is no number of TopKKL"),
        (kd.TopKKL(), {"rest": optax.constant_schedule(1.0)}, "rest is no number"),
        (kd.CrossEntropy(), {"beta": optax.constant_schedule(1.0)}, "it has none"),
        (kd.KD(), {"alpha": 0.5}, "the schedule of alpha is 0.5: give a function of the steps done"),
    ],
)
def test_what_cannot_follow_a_schedule_is_told(method: kd.Method, schedules: Any, match: str) -> None:
    with pytest.raises(MethodError, match=match):
        kd.scheduled(method, **schedules)


def test_a_part_of_the_classes_is_known_at_one_temperature() -> None:
    constant = optax.constant_schedule(1.0)
    for method, sparse in ((kd.TopKKL(k=2), Sparse("top-k", 2)), (kd.SampledKL(), Sparse("samples", 50))):
        check_sparse(kd.scheduled(method, alpha=constant) if hasattr(method, "alpha") else method, sparse)
        with pytest.raises(MethodError, match=r"the temperature of \w+ follows a schedule, and the teacher knows"):
            check_sparse(kd.CrossEntropy() + kd.scheduled(method, temperature=constant), sparse)
    with pytest.raises(MethodError, match="the power of SampledKL follows a schedule"):
        check_sparse(kd.scheduled(kd.SampledKL(), power=constant), Sparse("samples", 50))
    # Of the most probable alone any temperature is known.
    check_sparse(kd.scheduled(kd.TopKKL(k=2, rest="renormalised"), temperature=constant), Sparse("top-k", 2))
    with pytest.raises(MethodError, match="Standardised needs the logits of all classes"):
        check_sparse(kd.standardised(kd.TopKKL(k=2)), Sparse("top-k", 2))


def test_schedules_count_the_steps_of_a_training() -> None:
    x = RNG.normal(size=(16, 3)).astype(np.float32)
    data = kd.Batch(x, RNG.integers(0, 4, 16).astype(np.int32))
    method = kd.CrossEntropy() + kd.scheduled(1.0 * kd.KD(0.0), factor=lambda step: jnp.where(step < 4, 0.0, 1.0))
    result = kd.distill(
        kd.mlp([3, 4]), kd.mlp([3, 4]).init(1), data, method=method, epochs=2, batch_size=4, optimizer=optax.sgd(0.1)
    )
    assert result.history["soft"][0] == 0
    assert result.history["soft"][1] > 0


def test_taids_target_moves_to_the_teacher() -> None:
    method = kd.TAID(100.0, start=0.2, rate=0.1, momentum=0.5, temperature=2.0, hard=0.3)
    known = as_parts(method.init(jax.random.key(0), STUDENT, TEACHER), method).carried
    t, momentum, before = 0.2, 0.0, np.inf
    step = jax.jit(lambda carried, number: terms_of(
        method, kd.Parts((), carried), STUDENT, TEACHER, BATCH, number
    ))  # fmt: skip
    for number in range(4):
        found, known = step(known, jnp.int32(number))
        mixed = (1 - t) * np.float64(Z) + t * np.float64(T)
        wanted = losses.kd(Z, jnp.asarray(mixed, jnp.float32), temperature=2.0)
        np.testing.assert_allclose(found["soft"], wanted, rtol=1e-4)
        now = float(jnp.mean(wanted))
        rise = 0.0
        if np.isfinite(before):
            momentum = 0.5 * momentum + 0.5 * (before - now) / before
            rise = 0.1 / (1 + np.exp(-momentum)) * (1 - t)
        t, before = min(1.0, max(0.2 + 0.8 * (number + 1) / 100, t + rise)), now
        np.testing.assert_allclose(known["t"], t, rtol=1e-5)
        np.testing.assert_allclose(known["momentum"], momentum, rtol=1e-3, atol=1e-6)
    # On the line where the loss does not let it go ahead.
    behind = step({**known, "t": jnp.float32(0.2)}, jnp.int32(79))[1]
    np.testing.assert_allclose(behind["t"], 0.2 + 0.8 * 80 / 100, rtol=1e-5)
    late = {**known, "t": jnp.float32(1.0)}
    np.testing.assert_allclose(step(late, jnp.int32(20))[0]["soft"], losses.kd(Z, T, temperature=2.0), rtol=1e-5)
    assert step(late, jnp.int32(20))[1]["t"] == 1


def test_taids_student_has_the_gradient_of_kl_alone() -> None:
    """Not through its share of the target; and examples without a weight do not count for t."""
    method = kd.TAID(10.0)
    known = as_parts(method.init(jax.random.key(0), STUDENT, TEACHER), method).carried
    mixed = 0.6 * Z + 0.4 * T

    @jax.jit
    def both(z: jax.Array) -> Any:
        def own(z: jax.Array) -> jax.Array:
            return jnp.sum(terms_of(method, kd.Parts((), known), kd.Output(z), TEACHER, BATCH, jnp.int32(0))[0]["soft"])

        return jax.grad(own)(z), jax.grad(lambda z: jnp.sum(losses.kd(z, mixed, temperature=1.0)))(z)

    np.testing.assert_allclose(*both(Z), rtol=1e-4, atol=1e-6)
    some = BATCH._replace(weights=jnp.asarray([1, 1, 0, 0, 0, 1], jnp.float32))
    found, after = terms(method, 0, known, some)
    np.testing.assert_allclose(after["loss"], np.mean(np.asarray(found["soft"])[[0, 1, 5]]), rtol=1e-5)
