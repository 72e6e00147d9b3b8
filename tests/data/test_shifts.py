import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import teacher
from kd_jax.data import shifts as augment
from kd_jax.data.dataset import Dataset
from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.config import Training
from kd_jax.methods import logits as methods
from kd_jax.models.network import Output, from_function, mlp
from kd_jax.train import step as train
from kd_jax.train.step import Examples, Hyperparameters, Recipe

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3, 2)).astype(np.uint8)


def moved(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """The same image elsewhere, pixel by pixel, with 0 where there was none."""
    height, width, _ = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + down < height and 0 <= x + right < width:
                result[y, x] = image[y + down, x + right]
    return result


@pytest.mark.parametrize("shift", [1, 2, 5])
def test_a_view_is_the_image_moved(shift: int) -> None:
    padded = augment.pad(jnp.asarray(IMAGES), shift)
    rows = jnp.asarray([4, 0, 2])
    views = list(augment.all_views(padded, shift=shift))
    assert len(views) == augment.view_count(shift) == (2 * shift + 1) ** 2
    for view, whole in enumerate(views):
        down, right = view // (2 * shift + 1) - shift, view % (2 * shift + 1) - shift
        expected = np.stack([moved(image, down, right) for image in IMAGES])
        np.testing.assert_array_equal(whole, expected)
        found = augment.views(padded, rows, jnp.full(3, view), shift=shift)
        np.testing.assert_array_equal(found, expected[np.asarray(rows)])


def test_every_view_is_as_likely_as_any_other() -> None:
    drawn = np.bincount(np.asarray(augment.draw(KEY, 90_000, 1)), minlength=9)
    assert len(drawn) == 9
    # 9,980 of 10,000 samples of a multinomial stay within 4 standard deviations in all of nine counts.
    assert np.abs(drawn - 10_000).max() < 4 * np.sqrt(90_000 / 9 * 8 / 9)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_share_of_the_images_that_are_moved(share: float) -> None:
    """The middle of the views is the image in its place."""
    drawn = augment.draw(KEY, 90_000, 2)
    moved = np.asarray(augment.some(jax.random.key(4), drawn, 2, share))
    assert ((moved == drawn) | (moved == 12)).all()
    expected = np.full(25, share / 25)
    expected[12] += 1 - share
    # As above: 25 counts within 4.2 standard deviations.
    found = np.bincount(moved, minlength=25)
    assert (np.abs(found - 90_000 * expected) <= 4.2 * np.sqrt(90_000 * expected * (1 - expected))).all()


def test_a_recipe_trains_with_the_share_of_its_training(small_dataset: Dataset) -> None:
    """Of students that see the same shifts as often, and of others."""
    examples = Examples(jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels))
    training, network = Training(2, 16, 0.1, "constant", 2), mlp([36, 4, 3])

    def loss(share: float) -> np.ndarray:
        recipe = recipes.make_recipe(network, training._replace(shift_share=share), 240)
        return np.asarray(train.fit(KEY, examples, Hyperparameters(jnp.float32(0.1)), recipe=recipe, epochs=2)[1].loss)

    still = train.fit(
        KEY, examples, Hyperparameters(jnp.float32(0.1)), recipe=Recipe(network, batch_size=16), epochs=2
    )[1].loss
    assert not np.allclose(loss(1.0), loss(0.5), atol=1e-3)
    np.testing.assert_allclose(loss(1e-9), still, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_other_numbers_than_shares_are_refused(share: float, small_dataset: Dataset) -> None:
    examples = Examples(jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels))
    recipe = Recipe(mlp([36, 4, 3]), batch_size=16, shift=1, shift_share=share)
    with pytest.raises(ValueError, match=f"shift_share is {share}: it must be above 0 and at most 1"):
        train.fit(KEY, examples, Hyperparameters(jnp.float32(0.1)), recipe=recipe, epochs=1)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_step_sees_the_teachers_logits_of_the_very_view(share: float, small_dataset: Dataset) -> None:
    """A teacher that says what the image's first pixels are, and a student that says the same of what it sees."""

    def first_pixels(params: object, images: jax.Array) -> jax.Array:
        return images[:, :3, 0, 0]

    network = from_function(lambda key: jnp.zeros(()), first_pixels)
    images = jnp.asarray(small_dataset.train_images)
    outputs = teacher.outputs(jnp.zeros(()), {}, images, network=network, shift=2)
    assert outputs.logits.shape == (25, 240, 3)

    def mismatch(weights: object, learned: object, student: Output, taught: Output, labels: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(student.logits - taught.logits), axis=-1)

    recipe = Recipe(network, methods.Method(lambda key: (), mismatch), batch_size=16, shift=2, shift_share=share)
    examples = Examples(images, jnp.asarray(small_dataset.train_labels), outputs)
    _, metrics = train.fit(KEY, examples, Hyperparameters(jnp.float32(0.1)), recipe=recipe, epochs=3)
    # The division by 255 may be a product in one of the two programs.
    np.testing.assert_allclose(metrics.loss, np.zeros(3), atol=1e-6)
    shuffled = examples._replace(teacher=Output(outputs.logits[::-1]))
    _, metrics = train.fit(KEY, shuffled, Hyperparameters(jnp.float32(0.1)), recipe=recipe, epochs=1)
    assert metrics.loss[0] > 0.01


def test_logits_of_one_view_are_refused_for_many(small_dataset: Dataset) -> None:
    examples = Examples(
        jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels), Output(jnp.zeros((240, 3)))
    )
    recipe = Recipe(mlp([36, 4, 3]), methods.KD, batch_size=16, shift=1)
    weights = methods.KDWeights(jnp.float32(0.5), jnp.float32(2))
    with pytest.raises(ValueError, match=r"\(240, 3\): images that are shifted need them of every view, \(9, 240\)"):
        train.fit(KEY, examples, Hyperparameters(jnp.float32(0.1), weights), recipe=recipe, epochs=1)
