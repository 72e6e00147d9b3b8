"""Relation losses: absent and weighted examples, and what each has of its own. See also `test_feature_oracles`."""

import os
import subprocess
import sys
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import feature_oracles as oracles
from losses.feature_cases import COUPLING, assert_close, assert_is_oracle, draw, floats
from programs import compiled

from kd_jax.losses import relations, vectors

names = pytest.mark.parametrize("name", COUPLING)


@cache
def weighted(name: str) -> Any:
    """Values, and the gradients of a random sum of them, `[batch]` weights given."""
    loss = getattr(relations, name)

    def mixed(student: Any, teacher: Any, weights: Any) -> tuple[Any, Any]:
        values = loss(student, teacher, weights=weights)
        return jnp.sum(values * jnp.arange(1.0, len(values) + 1, dtype=values.dtype)), values

    return jax.jit(jax.value_and_grad(mixed, (0, 1), has_aux=True))


@names
@pytest.mark.parametrize("present", [[0, 2, 3, 5], [1, 4], [3], []])
def test_an_example_of_weight_0_is_absent(name: str, present: list[int]) -> None:
    """Values are the oracle's of the others, and what is there, NaN or large, moves neither values nor gradients."""
    student, teacher = draw(name, batch=6)
    weights = np.isin(np.arange(6), present).astype(float)
    other = [array.copy() for array in (student, teacher)]
    for array in other:
        array[weights == 0] = np.nan
        array[weights == 0, ..., 0] = 1e30
    with jax.enable_x64(True):
        (_, values), gradients = weighted(name)(*map(jnp.asarray, (student, teacher, weights)))
        (_, again), gradients_again = weighted(name)(*map(jnp.asarray, (*other, weights)))
    np.testing.assert_array_equal(values, again)
    np.testing.assert_array_equal(np.asarray(values)[weights == 0], 0)
    for gradient, other_gradient in zip(gradients, gradients_again, strict=True):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient, other_gradient)
        np.testing.assert_array_equal(np.asarray(gradient)[weights == 0], 0)
    if len(present) > 1:
        expected = getattr(oracles, name)(*oracles.long(student[present], teacher[present]))
        assert_close(np.asarray(values)[present], expected, rtol=1e-12)


@names
def test_equal_weights_of_any_size_are_the_same(name: str) -> None:
    student, teacher = floats(name, batch=6)
    loss, weights = getattr(relations, name), np.array([3.0, 0, 3, 3, 0, 3], np.float32)
    weighing = compiled(loss)
    found = weighing(student, teacher, weights=jnp.asarray(weights))
    assert_close(found, weighing(student, teacher, weights=jnp.asarray(weights > 0, jnp.int32)), rtol=1e-6)
    assert_close(weighing(student, teacher, weights=jnp.full(6, 0.2)), loss(student, teacher), rtol=1e-6)


# By how much the loss of a batch with each example n times is more, where n is the same for all.
GROWTH = {
    "sp": lambda found, n: found / n,
    "rkd_distance": None,
    "rkd_angle": None,
    "pkt": lambda found, n: found / n,
    "cc_gaussian": lambda found, n: found,
    "srd": lambda found, n: found + np.log(n),
}


@pytest.mark.parametrize("name", GROWTH)
def test_a_weight_is_how_often_an_example_counts(name: str) -> None:
    """A batch with some examples twice or three times, against whole-number weights."""
    times = np.array([1, 3, 2, 1])
    student, teacher = draw(name, batch=4)
    small = {"pkt": {"epsilon": 0.0}, "srd": {"epsilon": 0.0}}.get(name, {})
    with jax.enable_x64(True):
        loss = jax.jit(lambda s, t, w: jnp.sum(w * getattr(relations, name)(s, t, weights=w, **small)) / jnp.sum(w))
        found = float(loss(*map(jnp.asarray, (student, teacher, times.astype(float)))))
        repeated = [jnp.asarray(np.repeat(array, times, axis=0)) for array in (student, teacher)]
        expected = float(loss(*repeated, jnp.ones(times.sum())))
    if grows := GROWTH[name]:
        found = grows(found, times.sum() / len(times))
    assert found == pytest.approx(expected, rel=1e-12)


def test_cc_weighs_its_pairs_by_both() -> None:
    student, teacher = draw("cc")
    weights = np.array([1.0, 2.0, 0.5, 3.0])
    pairs = oracles.cc(student, teacher)[:-1] * 3 / 4
    of_pairs = weights[:-1] * weights[1:]
    with jax.enable_x64(True):
        values = compiled(relations.cc)(jnp.asarray(student), jnp.asarray(teacher), weights=jnp.asarray(weights))
    found = np.sum(weights * np.asarray(values)) / weights.sum()
    assert found == pytest.approx(np.sum(of_pairs * pairs) / of_pairs.sum(), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in COUPLING if name != "srd"])
def test_a_batch_of_one_has_no_relations(name: str) -> None:
    np.testing.assert_allclose(compiled(getattr(relations, name))(*floats(name, batch=1)), 0, atol=1e-7)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_equal_examples_are_at_no_distance(name: str) -> None:
    """And are not among the positive distances, compiled or not, though the batch lies far from the origin."""
    student, teacher = draw(name, batch=5)
    student[3], teacher[1] = student[0], teacher[4]
    student, teacher = (np.asarray(array, np.float32) + np.float32(10) for array in (student, teacher))
    expected = getattr(oracles, name)(*oracles.long(student, teacher))
    for loss in (getattr(relations, name), jax.jit(getattr(relations, name))):
        assert_close(loss(jnp.asarray(student), jnp.asarray(teacher)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
@pytest.mark.parametrize("block", [1, 150])
def test_large_batches_are_taken_in_blocks(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One example at a time, or five of six, which leaves one over."""
    student, teacher = floats(name, batch=6)

    def values_and_gradients() -> Any:
        loss = getattr(relations, name)
        return jax.jit(jax.value_and_grad(lambda s: loss(s, teacher).sum()))(student)

    value, gradient = values_and_gradients()
    monkeypatch.setattr(vectors, "BLOCK", block)
    in_blocks, gradient_in_blocks = values_and_gradients()
    assert_close(in_blocks, value, rtol=1e-6)
    assert_close(gradient_in_blocks, gradient, rtol=1e-5)


def test_the_kernel_of_a_long_series_is_gaussian() -> None:
    student, teacher = draw("cc_gaussian", batch=3)
    with jax.enable_x64(True):
        found = relations.cc_gaussian(jnp.asarray(student), jnp.asarray(teacher), gamma=0.7, order=30)
    kernels = []
    for batch in (student, teacher):
        units = [x.ravel() / np.linalg.norm(x) for x in batch]
        kernels.append(np.array([[np.exp(-0.7 * np.sum((a - b) ** 2)) for b in units] for a in units]))
    assert_close(found, np.mean((kernels[0] - kernels[1]) ** 2, axis=1), rtol=1e-12)


@pytest.mark.parametrize("numbers", [{"gamma": 1.5, "order": 1}, {"gamma": 0.1, "order": 4}])
def test_cc_gaussian_has_numbers(numbers: dict[str, Any]) -> None:
    assert_is_oracle(
        lambda s, t: relations.cc_gaussian(s, t, **numbers),
        lambda s, t: oracles.cc_gaussian(s, t, **numbers),
        *draw("cc_gaussian", batch=3),
    )


def test_srd_has_numbers() -> None:
    numbers = {"exponent": 3, "epsilon": 0.5, "variance_epsilon": 0.2}
    assert_is_oracle(
        lambda s, t: relations.srd(s, t, **numbers), lambda s, t: oracles.srd(s, t, **numbers), *draw("srd")
    )


def test_srd_of_equals_without_an_epsilon_is_finite() -> None:
    student, _ = floats("srd")
    value, gradient = jax.value_and_grad(lambda s: relations.srd(s, student, epsilon=0.0).mean())(student)
    assert float(value) == pytest.approx(float(np.log(np.finfo(np.float32).tiny)))
    np.testing.assert_array_equal(gradient, 0)


def test_pkt_has_an_epsilon() -> None:
    assert_is_oracle(
        lambda s, t: relations.pkt(s, t, epsilon=0.1),
        lambda s, t: oracles.pkt(s, t, epsilon=0.1),
        *draw("pkt", batch=3),
    )


@names
def test_weights_of_another_length_are_refused(name: str) -> None:
    student, teacher = floats(name)
    with pytest.raises(
        ValueError, match=r"weights \[3\] do not fit features \[4, 5\]: give one for each example, \[4\]"
    ):
        getattr(relations, name)(student, teacher, weights=jnp.ones(3))


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kd_jax.losses import relations
mesh = Mesh(np.array(jax.devices()), "data")
assert mesh.size == 4
rng = np.random.default_rng(0)
student, teacher = (jnp.asarray(rng.normal(size=(8, 5)), jnp.float32) for _ in range(2))
weights = jnp.asarray([1, 0, 1, 1, 1, 1, 0, 1], jnp.float32)
shard = lambda array: jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))
for name in NAMES:
    loss = getattr(relations, name)
    both = jax.jit(jax.value_and_grad(lambda s, t, w: jnp.sum(w * loss(s, t, weights=w))))
    one, many = both(student, teacher, weights), both(*map(shard, (student, teacher, weights)))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
"""


def test_sharded_batches_are_seen_whole() -> None:
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    flags = {**os.environ, "XLA_FLAGS": xla, "JAX_PLATFORMS": "cpu"}
    program = PROGRAM.replace("NAMES", repr(COUPLING))
    subprocess.run([sys.executable, "-c", program], check=True, env=flags)
