import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.data import shifts as augment

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
