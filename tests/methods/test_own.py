"""Methods that change logits, labels or the temperature: standardisation, sigmoids, a virtual teacher, CTKD."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from slowly import all_but_first

import kd_jax as kd
from kd_jax import losses
from kd_jax.errors import DataError, MethodError
from kd_jax.methods.base import as_parts, terms_of

pytestmark = pytest.mark.usefixtures("quick_compiling")
RNG = np.random.default_rng(8)
STUDENT, TEACHER = (kd.Output(jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)) for _ in range(2))
LABELS = jnp.asarray(RNG.integers(0, 4, 6), jnp.int32)
BATCH = kd.Batch(jnp.zeros((6, 1)), LABELS)
Z, T = STUDENT.logits, TEACHER.logits
KEY, SGD = jax.random.key(0), optax.sgd(0.1)


def terms(
    method: kd.Method, student: kd.Output = STUDENT, teacher: Any = TEACHER, batch: kd.Batch = BATCH, step: int = 0,
    learned: Any = None,
) -> Any:  # fmt: skip
    parts = as_parts(method.init(KEY, student, teacher), method)
    parts = parts if learned is None else parts._replace(learned=learned)
    return terms_of(method, parts, student, teacher, batch, jnp.int32(step))[0]


def standard(z: np.ndarray) -> np.ndarray:
    return (z - z.mean(-1, keepdims=True)) / (1e-7 + z.std(-1, ddof=1, keepdims=True))


def test_standardisation_is_of_the_soft_loss_alone() -> None:
    found = terms(kd.standardised(kd.KD(0.3, 2.0)))
    ours, theirs = (standard(np.float64(z)) / 2 for z in (Z, T))
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (theirs, ours))
    np.testing.assert_allclose(found["soft"], 0.7 * 4 * (p * np.log(p / q)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(found["hard"], 0.3 * losses.cross_entropy(Z, LABELS), rtol=1e-5)


@pytest.mark.parametrize(
    "method", all_but_first([kd.DKD(), kd.DIST(), kd.MLKD(), kd.SampledKL(hard=1.0), 9 * kd.KD(), kd.PLD()])
)
def test_any_method_of_logits_can_be_standardised(method: kd.Method) -> None:
    """Its soft loss does not see a scale of the teacher's logits."""
    wrapped = kd.standardised(method)
    first, second = (terms(wrapped, teacher=kd.Output(scale * T)) for scale in (1.0, 5.0))
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=2e-4, atol=1e-6)
    assert not np.allclose(terms(method)["soft"], terms(method, teacher=kd.Output(5 * T))["soft"])
    assert wrapped.needs_labels == method.needs_labels
    assert len(jax.tree.leaves(wrapped)) == len(jax.tree.leaves(method))


def test_a_standardised_sum_keeps_its_hard_terms() -> None:
    found = terms(kd.standardised(kd.CrossEntropy() + kd.KD(0.5)))
    assert set(found) == {"hard", "hard_2", "soft"}
    for name, share in (("hard", 1.0), ("hard_2", 0.5)):
        np.testing.assert_allclose(found[name], share * losses.cross_entropy(Z, LABELS), rtol=1e-5)


def test_sigmoids_have_their_own_hard_loss() -> None:
    labels = jnp.asarray(RNG.integers(0, 2, (6, 4)), jnp.float32)
    found = terms(kd.BinaryKD(0.3, 2.0), batch=kd.Batch(jnp.zeros((6, 1)), labels))
    np.testing.assert_allclose(found["hard"], 0.3 * losses.binary_cross_entropy(Z, labels), rtol=1e-6)
    np.testing.assert_allclose(found["soft"], 0.7 * losses.binary_kd(Z, T, temperature=2.0), rtol=1e-6)
    alone = terms(kd.BinaryKD(0), batch=kd.Batch(jnp.zeros((6, 1))))
    np.testing.assert_allclose(alone["soft"], losses.binary_kd(Z, T, temperature=4.0), rtol=1e-6)
    assert not kd.BinaryKD(0).needs_labels
    # In a step the weight is traced.
    traced = jax.jit(lambda alpha: terms(kd.BinaryKD(alpha), batch=kd.Batch(jnp.zeros((6, 1)))))
    assert set(traced(0.0)) == {"soft"}
    with pytest.raises(MethodError, match="labels of BinaryKD are int32"):
        terms(kd.BinaryKD())


def test_one_output_is_trained_from_floats() -> None:
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    data = kd.Batch(x, (x[:, 0] > 0).astype(np.float32))
    teacher = lambda inputs: 4 * inputs[:, :1]  # noqa: E731
    result = kd.distill(kd.mlp([3, 1]), teacher, data, method=kd.BinaryKD(), epochs=2, batch_size=8, optimizer=SGD)
    assert np.isfinite(result.history["loss"]).all()
    with pytest.raises(MethodError, match=r"labels of BinaryKD are .*, as labels\.astype\(float\)"):
        kd.distill(
            kd.mlp([3, 1]),
            teacher,
            kd.Batch(x, np.ones(16, np.int32)),
            method=kd.BinaryKD(),
            batch_size=8,
            optimizer=SGD,
        )


@pytest.mark.parametrize("stream", all_but_first([False, True]))
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([[0.0, 2.0]] * 8, "a label is 2: labels of sigmoids are floats, 0 to 1 for each, or have the weight 0"),
        ([[0.0, -1.0]] * 8, "a label is -1: labels of sigmoids"),
        ([[0.0, np.nan]] * 8, "a label is nan: labels of sigmoids"),
        (
            [[0, 1]] * 8,
            r"the labels are int32, one for each output, .*: give BinaryKD floats, as labels\.astype\(float\)$",
        ),
    ],
)
def test_several_labels_are_0_to_1_each(labels: Any, says: str, stream: bool) -> None:
    """Where they do not count they may be anything."""
    x = RNG.normal(size=(8, 2)).astype(np.float32)
    values = np.asarray(labels)
    data = kd.Batch(x, values.astype(np.int32 if values.dtype.kind == "i" else np.float32))
    how: dict[str, Any] = {"method": kd.BinaryKD(), "batch_size": None if stream else 8, "optimizer": SGD}
    with pytest.raises((MethodError, DataError), match=says):
        kd.distill(kd.mlp([2, 2]), lambda inputs: 4 * inputs, [data] if stream else data, **how)
    if data.labels.dtype.kind == "f":
        data = data._replace(
            labels=np.concatenate([data.labels[:4], np.ones((4, 2), np.float32)]),
            weights=np.repeat([0.0, 1.0], 4).astype(np.float32),
        )
        result = kd.distill(kd.mlp([2, 2]), lambda inputs: 4 * inputs, [data] if stream else data, **how)
        assert np.isfinite(result.history["loss"]).all()


@pytest.mark.slow
def test_truth_values_are_labels_of_0_and_1() -> None:
    x = RNG.normal(size=(8, 2)).astype(np.float32)
    first, second = (
        kd.distill(
            kd.mlp([2, 2]),
            lambda inputs: 4 * inputs,
            kd.Batch(x, labels),
            method=kd.BinaryKD(0.5),
            batch_size=8,
            optimizer=SGD,
        )
        for labels in (x > 0, (x > 0).astype(np.float32))
    )
    np.testing.assert_array_equal(first.history["loss"], second.history["loss"])


def test_a_virtual_teacher_needs_no_other() -> None:
    method = kd.VirtualTeacher(0.3, 0.9, 5.0)
    assert not method.needs_teacher
    found = terms(method, teacher=None)
    soft = losses.virtual_teacher(Z, LABELS, probability=0.9, temperature=5.0)
    np.testing.assert_allclose(found["soft"], 0.7 * soft, rtol=1e-6)
    np.testing.assert_allclose(found["hard"], 0.3 * losses.cross_entropy(Z, LABELS), rtol=1e-6)


@pytest.mark.parametrize(("step", "warmup", "strength"), [(0, 0, 0.8), (0, 4, 0.0), (2, 4, 0.4), (9, 4, 0.8)])
def test_the_temperature_is_learned_against_the_student(step: int, warmup: int, strength: float) -> None:
    """By a gradient that is reversed, and rises as half a cosine; the student's is that of `KD`."""
    method = kd.CTKD(0.3, start=1.0, span=6.0, reversal=0.8, warmup=warmup)
    theta = jnp.asarray(0.5, jnp.float32)
    temperature = 1 + 6 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(method.temperature_of(theta), temperature, rtol=1e-6)

    value, (by_theta, by_logits) = with_a_learned_temperature(theta, Z, method, step)
    wanted, (by_temperature, logits) = with_a_temperature(jnp.float32(temperature), Z)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(by_logits, logits, rtol=1e-4, atol=1e-6)
    slope = (temperature - 1) * (1 - (temperature - 1) / 6)
    np.testing.assert_allclose(by_theta, -strength * by_temperature * slope, rtol=1e-4, atol=1e-7)


@jax.jit
@partial(jax.value_and_grad, argnums=(0, 1))
def with_a_learned_temperature(theta: Any, logits: Any, method: kd.Method, step: Any) -> Any:
    found = terms(method, student=kd.Output(logits), step=step, learned=theta)
    return jnp.sum(found["hard"] + found["soft"])


@jax.jit
@partial(jax.value_and_grad, argnums=(0, 1))
def with_a_temperature(temperature: Any, logits: Any) -> Any:
    found = terms(kd.KD(0.3, temperature), student=kd.Output(logits))
    return jnp.sum(found["hard"] + found["soft"])


@pytest.mark.slow
def test_the_temperature_rises_in_a_training_where_the_loss_does_with_it() -> None:
    data = kd.Batch(np.float32(RNG.normal(size=(32, 3))), RNG.integers(0, 4, 32).astype(np.int32))
    method = kd.CTKD()
    result = kd.distill(
        kd.mlp([3, 4]), kd.mlp([3, 4]).init(1), data, method=method, epochs=2, batch_size=8, optimizer=SGD
    )
    assert result.state.learned.shape == ()
    assert method.temperature_of(result.state.learned) != method.temperature_of(jnp.float32(1.0))


def test_a_name_that_a_method_does_not_take_is_told_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"^KD has no temprature: it takes temperature, alpha$"):
        kd.KD(temprature=2.0)  # type: ignore[call-arg]
    with pytest.raises(kd.MethodError, match="DKD has no gamma: it takes"):
        kd.DKD(gamma=1.0)  # type: ignore[call-arg]
    assert dataclasses.replace(kd.KD(), temperature=3.0) == kd.KD(temperature=3.0)

    class Forgotten(kd.Method):
        temperature: float = 4.0

    for given, named in (((3.0,), {}), ((), {"temperature": 3.0})):
        with pytest.raises(TypeError, match=r"Forgotten takes no arguments: write @dataclass\(frozen=True\) above"):
            Forgotten(*given, **named)
    assert Forgotten().temperature == 4

    @dataclasses.dataclass(frozen=True)
    class Named(kd.Method):
        cls: float = 1.0

    assert Named(cls=2.0).cls == 2


def test_a_number_that_shapes_of_init_depend_on_is_asked_for_as_static() -> None:
    @dataclasses.dataclass(frozen=True)
    class Projected(kd.Method):
        width: int = 3

        def init(self, key: Any, student: kd.Output, teacher: kd.Output | None) -> kd.Parts:
            return kd.Parts(jnp.zeros((student.logits.shape[-1], self.width)))

        def loss(self, parts: kd.Parts, student: kd.Output, teacher: Any, batch: kd.Batch, step: Any) -> Any:
            return {"projected": jnp.sum(student.logits @ parts.learned, axis=-1)}

    with pytest.raises(kd.MethodError, match=r"width: int = kd.static\(128\)"):
        kd.distill(
            nnx.Linear(1, 4, rngs=nnx.Rngs(0)),
            kd.mlp([1, 4]).init(1),
            BATCH,
            method=Projected(),
            optimizer=SGD,
            epochs=1,
            batch_size=3,
        )
