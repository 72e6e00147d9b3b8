"""The experiments' trainings on bytes: views that move, with the teacher's logits of the very view."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from slowly import all_but_first

import kd_jax as kd
from kd_jax.data.batch import epoch_order
from kd_jax.data.dataset import Dataset
from kd_jax.errors import ConfigError, ShapeError
from kd_jax.experiments import images as train
from kd_jax.experiments.images import Images, Settings, Setup, scan_steps

KEY = jax.random.key(3)
NETWORK = kd.mlp([36, 4, 3]).network
ALONE = Settings(jnp.float32(0.1), kd.CrossEntropy())


@pytest.fixture
def images(small_dataset: Dataset) -> Images:
    return Images(jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels))


def run(given: Images, setup: Setup, settings: Settings = ALONE, epochs: int = 2) -> tuple[Any, np.ndarray]:
    """The last state and the loss of every step."""
    state, found = train.init(KEY, settings, setup=setup), []
    data = train.padded(given, setup.shift)
    epoch = jax.jit(lambda state, order: scan_steps(state, KEY, data, order, settings, setup=setup))
    for number in range(epochs):
        order = epoch_order(KEY, number, examples=240, batch_size=setup.batch_size)
        state, metrics = epoch(state, order)
        found.append(np.asarray(metrics.loss))
    return state, np.concatenate(found)


def first_pixels() -> kd.Model:
    return kd.from_function(lambda params, x: x[:, :3, 0, 0] + 0 * params, init=lambda key: jnp.zeros(()))


def mismatch(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(student - teacher), axis=-1)


def test_bytes_are_scaled_and_others_refused() -> None:
    np.testing.assert_allclose(train.scale(jnp.array([0, 255, 51], jnp.uint8)), np.float32([0, 1, 0.2]), rtol=1e-6)
    for wrong in (jnp.ones(3), jnp.ones(3, jnp.int32)):
        # By the jaxtyping of `scale`, too, which users do not have.
        with pytest.raises((ValueError, TypeError), match=r"type|dtype"):
            train.scale(wrong)


@pytest.mark.parametrize("share", all_but_first([1.0, 0.5]))
def test_a_step_sees_the_teachers_logits_of_the_very_view(share: float, images: Images) -> None:
    """A teacher that says what the image's first pixels are, and a student that says the same of what it sees."""
    model = first_pixels()
    logits = train.teacher_logits(jnp.zeros(()), images.images, network=model.network, shift=2)
    assert logits.shape == (25, 240, 3)
    setup = Setup(model.network, optax.sgd, batch_size=16, shift=2, shift_share=share)
    settings = Settings(jnp.float32(0.0), kd.methods.as_method(mismatch))
    _, loss = run(images._replace(logits=logits), setup, settings, epochs=1)
    # The division by 255 may be a product in one of the two programs.
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    _, other = run(images._replace(logits=logits[::-1]), setup, settings, epochs=1)
    assert other.mean() > 0.01


def test_shifts_are_drawn_with_another_key_in_each_step(images: Images) -> None:
    """The same rows in every step, and nothing learned: only the views differ."""
    model = first_pixels()
    setup = Setup(model.network, optax.sgd, batch_size=16, shift=2)
    settings = Settings(jnp.float32(0.0), kd.methods.as_method(lambda student, teacher: jnp.mean(student, axis=-1)))
    data = train.padded(images, 2)
    order = jnp.broadcast_to(jnp.arange(16), (4, 16))
    loop = jax.jit(
        lambda key: scan_steps(train.init(key, settings, setup=setup), key, data, order, settings, setup=setup)[1]
    )
    loss = np.asarray(loop(KEY).loss)
    assert len(np.unique(loss)) == 4
    np.testing.assert_array_equal(loop(KEY).loss, loss)
    assert not np.isin(np.asarray(loop(jax.random.key(4)).loss), loss).any()


def test_who_is_moved_is_drawn_anew_in_each_step(images: Images) -> None:
    model = first_pixels()
    setup = Setup(model.network, optax.sgd, batch_size=16, shift=2, shift_share=0.3)
    settings = Settings(jnp.float32(0.0), kd.methods.as_method(lambda student, teacher: jnp.mean(student, axis=-1)))
    order = jnp.broadcast_to(jnp.arange(16), (4, 16))
    data = train.padded(images, 2)
    state = train.init(KEY, settings, setup=setup)
    loss = jax.jit(lambda s: scan_steps(s, KEY, data, order, settings, setup=setup)[1].loss)(state)
    assert len(np.unique(loss)) == 4


@pytest.mark.slow
def test_a_training_with_a_share_is_between_those_without_and_with_all(images: Images) -> None:
    def loss(share: float, shift: int = 2) -> np.ndarray:
        return run(images, Setup(NETWORK, optax.sgd, batch_size=16, shift=shift, shift_share=share))[1]

    assert not np.allclose(loss(1.0), loss(0.5), atol=1e-3)
    np.testing.assert_allclose(loss(1e-9), loss(1.0, shift=0), rtol=1e-5)


def test_the_dropout_mask_differs_from_step_to_step(images: Images) -> None:
    network = kd.mlp([36, 50, 3], dropout=0.5).network
    settings = Settings(jnp.float32(0.0), kd.CrossEntropy())
    setup = Setup(network, optax.sgd, batch_size=16)
    order = jnp.broadcast_to(jnp.arange(16), (4, 16))
    state = train.init(KEY, settings, setup=setup)
    loss = jax.jit(lambda s: scan_steps(s, KEY, images, order, settings, setup=setup)[1].loss)(state)
    assert len(np.unique(loss)) == 4


def test_a_schedule_is_a_factor_of_the_rate(images: Images) -> None:
    """0 from the second step on: one step and no more."""
    setup = Setup(NETWORK, optax.sgd, batch_size=240, schedule=lambda done: jnp.where(done < 1, 1.0, 0.0))
    once, _ = run(images, setup, epochs=1)
    twice, _ = run(images, setup, epochs=2)
    jax.tree.map(np.testing.assert_array_equal, twice.variables, once.variables)


def test_rates_and_temperatures_are_a_grid_without_another_trace(images: Images) -> None:
    given, traces = images._replace(logits=jnp.zeros((240, 3))), []
    setup = Setup(NETWORK, optax.sgd, batch_size=16)
    order = epoch_order(KEY, 0, examples=240, batch_size=16)

    def loss(rate: jax.Array, temperature: jax.Array) -> jax.Array:
        traces.append(1)
        settings = Settings(rate, kd.KD(0.5, temperature))
        return scan_steps(train.init(KEY, settings, setup=setup), KEY, given, order, settings, setup=setup)[1].loss[-1]

    grid = jax.jit(jax.vmap(loss))
    found = grid(jnp.array([0.1, 0.2]), jnp.array([1.0, 4.0]))
    grid(jnp.array([0.3, 0.4]), jnp.array([2.0, 5.0]))
    assert len(traces) == 1
    assert len(np.unique(found)) == 2


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize(("batch_size", "dtype"), [(4, "float32"), (1000, "float64")])
def test_logits_are_averaged_over_every_shift(shift: int, batch_size: int, dtype: str) -> None:
    rng = np.random.default_rng(shift)
    images = rng.integers(0, 256, (9, 5, 4, 2)).astype(np.uint8)
    network = kd.mlp([40, 7, 3]).network
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    with jax.enable_x64(dtype == "float64"):
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), network.init(jax.random.key(0)))
        how = {"network": network, "dtype": jnp.dtype(dtype)}
        expected = np.zeros((9, 3))
        for down in range(2 * shift + 1):
            for right in range(2 * shift + 1):
                view = jnp.asarray(padded[:, down : down + 5, right : right + 4])
                expected += np.asarray(train.predict(variables, view, **how))
        expected /= (2 * shift + 1) ** 2
        found = train.predict(variables, jnp.asarray(images), batch_size=batch_size, shift=shift, **how)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shift", [-1, 2])
def test_a_shift_out_of_sight_is_refused(shift: int) -> None:
    network = kd.mlp([6, 3]).network
    variables = network.init(jax.random.key(0))
    with pytest.raises(ValueError, match=f"shift is {shift}: it must be from 0 to 1, less than the images' 2 pixels"):
        train.predict(variables, jnp.zeros((1, 3, 2, 1), jnp.uint8), network=network, shift=shift)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_other_numbers_than_shares_are_refused(share: float, images: Images) -> None:
    with pytest.raises(ConfigError, match=f"shift_share is {share}: it must be above 0 and at most 1"):
        run(images, Setup(NETWORK, optax.sgd, batch_size=16, shift=1, shift_share=share))


def test_logits_of_one_view_are_refused_for_many(images: Images) -> None:
    given, settings = images._replace(logits=jnp.zeros((240, 3))), Settings(jnp.float32(0.1), kd.KD())
    with pytest.raises(ShapeError, match=r"\(240, 3\): images that are shifted need them of every view, \(9, 240\)"):
        run(given, Setup(NETWORK, optax.sgd, batch_size=16, shift=1), settings)
    with pytest.raises(ShapeError, match=r"\(100, 3\): images that are not shifted need them once, \(240,\)"):
        run(images._replace(logits=jnp.zeros((100, 3))), Setup(NETWORK, optax.sgd, batch_size=16), settings)
