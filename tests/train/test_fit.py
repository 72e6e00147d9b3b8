"""`fit`: pure in its key, a grid of it is a `vmap`, and it trains as `distill` does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import DATA, HOW, SGD, X, Y, assert_close, assert_same, leaves, net, teacher

import kd_jax as kd
from kd_jax.data.dataset import Dataset
from kd_jax.errors import DataError, NotFiniteError
from kd_jax.optimizers import adam

KEY = jax.random.key(7)
KD = kd.KD(0.5, 3.0)


@pytest.fixture
def examples(small_dataset: Dataset) -> kd.Batch:
    pixels = np.float32(small_dataset.train_images.reshape(240, -1)) / 255
    return kd.Batch(jnp.asarray(pixels), jnp.asarray(small_dataset.train_labels))


def fit(key: Any = KEY, data: Any = DATA, network: Any = None, method: Any = KD, **more: Any) -> tuple[Any, Any]:
    named = {"teacher": teacher() if method is KD else None, **HOW, "epochs": 2} | more
    return kd.fit(key, data, net() if network is None else network, method=method, **named)


def test_a_student_learns(examples: kd.Batch) -> None:
    _, history = fit(
        data=examples, network=net(36, 16, 3), method=kd.CrossEntropy(), optimizer=adam(1e-2), epochs=6,
        measures={"accuracy": lambda s, b, t: (jnp.argmax(s.logits, -1) == b.labels).astype(jnp.float32)},
    )  # fmt: skip
    assert history["loss"].shape == (6,)
    assert history["accuracy"][-1] > 0.95
    assert history["loss"][-1] < history["loss"][0] / 2


def test_steps_see_the_teachers_logits_of_their_own_examples() -> None:
    """Every example carries its number, and its teacher's logits the same number."""
    numbers = np.arange(24, dtype=np.float32)
    taught = np.stack([numbers, -numbers, 0 * numbers], axis=1) / 100
    network = kd.from_function(
        lambda params, x: jnp.stack([x[:, 0], params * x[:, 0], 0 * x[:, 0]], axis=1), jnp.zeros(())
    )

    def mismatch(student: jax.Array, teacher: jax.Array) -> jax.Array:
        return jnp.abs(jnp.round(student[:, 0]) - jnp.round(teacher[:, 0] * 100))

    _, history = jax.vmap(
        lambda key: fit(key, kd.Batch(numbers[:, None]), network, mismatch, teacher=taught)
    )(jax.random.split(KEY, 3))  # fmt: skip
    np.testing.assert_array_equal(history["loss"], np.zeros((3, 2)))


def test_alpha_1_trains_as_labels_alone_to_the_bit() -> None:
    """A student and its distilled twin are paired: same parameters, same order, same dropout."""
    network = kd.mlp([6, 8, 4], dropout=0.5)
    alone, _ = fit(network=network, method=kd.CrossEntropy())
    distilled, _ = fit(network=network, method=kd.KD(1.0), teacher=teacher())
    assert_same(distilled.variables, alone.variables)


@pytest.mark.parametrize("layers", [(6, 8, 4), (36, 4, 4)])
def test_a_seed_gives_the_same_bits_again_and_inside_a_vmap(layers: tuple[int, ...]) -> None:
    """Kernels of 36 inputs and 4 units train transposed."""
    data = kd.Batch(np.tile(X, (1, layers[0] // 6)), Y)
    network = kd.mlp(list(layers), dropout=0.5)
    one = jax.jit(lambda key: fit(key, data, network, teacher=teacher(layers[0], 4))[0].variables)
    keys = jax.random.split(KEY, 3)
    alone = one(keys[1])
    assert_same(one(keys[1]), alone)
    together = jax.vmap(one)(keys)
    assert_same(jax.tree.map(lambda leaf: leaf[1], together), alone)
    assert any((leaf[0] != leaf[1]).any() for leaf in leaves(together))


def test_the_numbers_of_a_method_are_a_grid_without_another_trace() -> None:
    traces = []

    def loss(temperature: jax.Array) -> jax.Array:
        traces.append(1)
        return fit(method=kd.KD(0.5, temperature), teacher=teacher(), epochs=1)[1]["loss"]

    grid = jax.jit(jax.vmap(loss))
    losses = grid(jnp.array([1.0, 4.0, 20.0]))
    grid(jnp.array([2.0, 3.0, 5.0]))
    assert len(traces) == 1
    assert len(np.unique(losses)) == 3


def test_distill_trains_as_fit_does() -> None:
    state, history = fit(0)
    result = kd.distill(net(), teacher(), DATA, method=KD, **(HOW | {"epochs": 2}))
    assert_close(result.model.variables, state.variables, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.history["loss"], history["loss"], rtol=1e-5)


def test_a_start_is_where_it_starts() -> None:
    """Given, or the model's own; it is not changed."""
    model = net().init(3)
    before = jax.tree.map(np.array, model.variables)
    own, _ = fit(network=model)
    given, _ = fit(start=model.variables)
    assert_same(own.variables, given.variables)
    assert_same(model.variables, before)
    assert any((a != b).any() for a, b in zip(leaves(own.variables), leaves(fit()[0].variables), strict=True))


@pytest.mark.slow
def test_the_schedule_of_an_optimizer_is_followed(standard_promotion: None) -> None:
    """A rate of 0 after the first of three steps of an epoch: the second epoch changes nothing."""
    schedule = optax.schedules.piecewise_constant_schedule(0.1, {1: 0.0})
    first, _ = fit(optimizer=optax.sgd(schedule), epochs=1)
    second, _ = fit(optimizer=optax.sgd(schedule), epochs=2)
    assert_same(second.variables, first.variables)
    injected = optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
    assert_close(fit(optimizer=injected, epochs=2)[0].variables, second.variables)


def test_numbers_that_are_not_finite_are_told() -> None:
    for more in ({}, {"method": kd.CrossEntropy(), "teacher": None}):
        with pytest.raises(NotFiniteError, match="the inputs of example 0 are NaN, and so is the loss"):
            fit(data=kd.Batch(X * np.nan, Y), **more)
    with pytest.raises(NotFiniteError, match="a parameter is not finite after the last step"):
        fit(optimizer=optax.sgd(float("inf")), epochs=1, batch_size=24)


def test_data_that_is_no_batch_is_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"the data is a list_iterator, which gives batches, and all examples are needed together: give kd\.Batch",
    ):
        kd.fit(0, iter([(X, Y)]), net(), method=kd.CrossEntropy(), optimizer=SGD, epochs=1, batch_size=8)
