import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import augment, methods, teacher, train
from kd_jax.data import Dataset
from kd_jax.models import Output, from_function, mlp
from kd_jax.train import Examples, Hyperparameters, Recipe

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


def test_a_step_sees_the_teachers_logits_of_the_very_view(small_dataset: Dataset) -> None:
    """A teacher that says what the image's first pixels are, and a student that says the same of what it sees."""

    def first_pixels(params: object, images: jax.Array) -> jax.Array:
        return images[:, :3, 0, 0]

    network = from_function(lambda key: jnp.zeros(()), first_pixels)
    images = jnp.asarray(small_dataset.train_images)
    outputs = teacher.outputs(jnp.zeros(()), {}, images, network=network, shift=2)
    assert outputs.logits.shape == (25, 240, 3)

    def mismatch(weights: object, learned: object, student: Output, taught: Output, labels: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(student.logits - taught.logits), axis=-1)

    recipe = Recipe(network, methods.Method(lambda key: (), mismatch), batch_size=16, shift=2)
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
