from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.data import shifts
from kd_jax.data.batch import Batch, epoch_order
from kd_jax.data.dataset import Dataset
from kd_jax.experiments import images as of_images
from kd_jax.experiments.images import Images, Metrics, Settings, Setup
from kd_jax.experiments.notebook import recipes
from kd_jax.experiments.notebook.config import Training
from kd_jax.methods import KD, CrossEntropy, Method, Parts
from kd_jax.models import Output, from_function, mlp

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
    padded = shifts.pad(jnp.asarray(IMAGES), shift)
    rows = jnp.asarray([4, 0, 2])
    views = list(shifts.all_views(padded, shift=shift))
    assert len(views) == shifts.view_count(shift) == (2 * shift + 1) ** 2
    for view, whole in enumerate(views):
        down, right = view // (2 * shift + 1) - shift, view % (2 * shift + 1) - shift
        expected = np.stack([moved(image, down, right) for image in IMAGES])
        np.testing.assert_array_equal(whole, expected)
        found = shifts.views(padded, rows, jnp.full(3, view), shift=shift)
        np.testing.assert_array_equal(found, expected[np.asarray(rows)])


def test_every_view_is_as_likely_as_any_other() -> None:
    drawn = np.bincount(np.asarray(shifts.draw(KEY, 90_000, 1)), minlength=9)
    assert len(drawn) == 9
    # 9,980 of 10,000 samples of a multinomial stay within 4 standard deviations in all of nine counts.
    assert np.abs(drawn - 10_000).max() < 4 * np.sqrt(90_000 / 9 * 8 / 9)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_the_share_of_the_images_that_are_moved(share: float) -> None:
    """The middle of the views is the image in its place."""
    drawn = shifts.draw(KEY, 90_000, 2)
    moved = np.asarray(shifts.some(jax.random.key(4), drawn, 2, share))
    assert ((moved == drawn) | (moved == 12)).all()
    expected = np.full(25, share / 25)
    expected[12] += 1 - share
    # As above: 25 counts within 4.2 standard deviations.
    found = np.bincount(moved, minlength=25)
    assert (np.abs(found - 90_000 * expected) <= 4.2 * np.sqrt(90_000 * expected * (1 - expected))).all()


def trained(data: Images, setup: Setup, *, method: Method = CrossEntropy(), epochs: int = 2) -> Metrics:  # noqa: B008
    """The metrics of every step of a training; the images are not padded yet."""
    settings = Settings(jnp.float32(0.1), method)
    state = of_images.init(KEY, settings, setup=setup)
    order = partial(epoch_order, KEY, examples=len(data.images), batch_size=setup.batch_size)
    rows = jnp.concatenate([order(epoch) for epoch in range(epochs)])
    return of_images.scan_steps(state, KEY, of_images.padded(data, setup.shift), rows, settings, setup=setup)[1]


@pytest.fixture
def data(small_dataset: Dataset) -> Images:
    return Images(jnp.asarray(small_dataset.train_images), jnp.asarray(small_dataset.train_labels))


def test_a_setup_trains_with_the_share_of_its_training(data: Images) -> None:
    """Of students that see the same shifts as often, and of others."""
    training, network = Training(2, 16, 0.1, "constant", 2), mlp([36, 4, 3]).network

    def loss(share: float) -> np.ndarray:
        setup = recipes.make_setup(network, training._replace(shift_share=share), 240)
        return np.asarray(trained(data, setup).loss)

    still = trained(data, Setup(network, batch_size=16)).loss
    assert not np.allclose(loss(1.0), loss(0.5), atol=1e-3)
    np.testing.assert_allclose(loss(1e-9), still, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_other_numbers_than_shares_are_refused(share: float, data: Images) -> None:
    setup = Setup(mlp([36, 4, 3]).network, batch_size=16, shift=1, shift_share=share)
    with pytest.raises(ValueError, match=f"shift_share is {share}: it must be above 0 and at most 1"):
        trained(data, setup)


def first_pixels(params: object, images: jax.Array) -> jax.Array:
    return images[:, :3, 0, 0]


@dataclass(frozen=True)
class Mismatch(Method):
    """How far the student's logits are from the teacher's."""

    needs_labels: ClassVar[bool] = False

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: jax.Array
    ) -> dict[str, jax.Array]:
        assert teacher is not None
        return {"mismatch": jnp.max(jnp.abs(student.logits - teacher.logits), axis=-1)}


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_step_sees_the_teachers_logits_of_the_very_view(share: float, data: Images) -> None:
    """A teacher that says what the image's first pixels are, and a student that says the same of what it sees."""
    network = from_function(first_pixels, init=lambda key: jnp.zeros(())).network
    logits = of_images.teacher_logits(jnp.zeros(()), data.images, network=network, shift=2)
    assert logits.shape == (25, 240, 3)
    setup = Setup(network, batch_size=16, shift=2, shift_share=share)
    metrics = trained(data._replace(logits=logits), setup, method=Mismatch(), epochs=3)
    # The division by 255 may be a product in one of the two programs.
    np.testing.assert_allclose(metrics.loss, np.zeros(45), atol=1e-6)
    shuffled = trained(data._replace(logits=logits[::-1]), setup, method=Mismatch(), epochs=1)
    assert jnp.mean(shuffled.loss) > 0.01


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_every_step_draws_its_own_views(share: float, data: Images) -> None:
    """A student without parameters that tells what it sees: the same rows at every step are other images."""
    network = from_function(first_pixels, init=lambda key: jnp.zeros(())).network
    setup = Setup(network, batch_size=16, shift=2, shift_share=share)
    settings, rows = Settings(jnp.float32(0.1), CrossEntropy()), jnp.tile(jnp.arange(16), (20, 1))
    state = of_images.init(KEY, settings, setup=setup)
    seen = of_images.scan_steps(state, KEY, of_images.padded(data, 2), rows, settings, setup=setup)[1].cross_entropy
    assert len(np.unique(np.asarray(seen))) == 20


def test_who_is_moved_is_drawn_anew_at_every_step_and_apart_from_the_views(data: Images) -> None:
    """Bits of one key in both would move only images of some views: here all views must be met among the moved."""
    network = from_function(first_pixels, init=lambda key: jnp.zeros(())).network
    # The teacher's answer is the number of the view, so that the loss tells which was drawn.
    numbers = jnp.broadcast_to(jnp.arange(9.0)[:, None, None], (9, 240, 3))
    setup = Setup(network, batch_size=1, shift=1, shift_share=0.5)
    settings, rows = Settings(jnp.float32(0.1), Mismatch()), jnp.zeros((400, 1), jnp.int32)
    state = of_images.init(KEY, settings, setup=setup)
    black = data._replace(images=jnp.zeros_like(data.images), logits=numbers)
    drawn = of_images.scan_steps(state, KEY, of_images.padded(black, 1), rows, settings, setup=setup)[1].loss
    counts = np.bincount(np.asarray(drawn).round().astype(int), minlength=9)
    # In 400 steps 222 stay in their place; each other view is met 22 times, ± 4.6.
    assert abs(counts[4] - 222) < 50
    assert (np.abs(np.delete(counts, 4) - 22) < 19).all()


def test_logits_of_one_view_are_refused_for_many(data: Images) -> None:
    setup = Setup(mlp([36, 4, 3]).network, batch_size=16, shift=1)
    with pytest.raises(ValueError, match=r"\(240, 3\): images that are shifted need them of every view, \(9, 240\)"):
        trained(data._replace(logits=jnp.zeros((240, 3))), setup, method=KD(jnp.float32(0.5), jnp.float32(2)))


def test_other_numbers_of_labels_or_logits_than_of_images_are_refused(data: Images) -> None:
    setup = Setup(mlp([36, 4, 3]).network, batch_size=16)
    with pytest.raises(ValueError, match="there are 240 images and 239 labels: give one label for each image"):
        trained(data._replace(labels=data.labels[1:]), setup)
    with pytest.raises(ValueError, match="there are 240 images and the teacher's logits of 239: give its logits of"):
        trained(data._replace(logits=jnp.zeros((239, 3))), setup, method=KD(jnp.float32(0.5), jnp.float32(2)))
