"""Crops, flips and normalisation of `prepare=`, against loops over pixels."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import HOW

import kd_jax as kd
from kd_jax.errors import ConfigError, ShapeError

KEY = jax.random.key(5)
BYTES = np.random.default_rng(0).integers(1, 256, (40, 5, 4, 3)).astype(np.uint8)


def moved(image, down, right):
    """The image elsewhere, pixel by pixel, with 0 where there was none."""
    result = np.zeros_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        if 0 <= y + down < image.shape[0] and 0 <= x + right < image.shape[1]:
            result[y, x] = image[y + down, x + right]
    return result


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_crop_is_the_image_moved_and_every_place_is_drawn(dtype):
    images = BYTES.astype(dtype)
    found = kd.augment.random_crop(padding=1)(KEY, images, True)
    assert found.dtype == dtype
    places = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    drawn = [
        [place for place in places if (moved(image, *place) == np.asarray(crop)).all()]
        for image, crop in zip(images, found, strict=True)
    ]
    assert all(len(fitting) == 1 for fitting in drawn)
    assert {fitting[0] for fitting in drawn} == set(places)


def test_places_of_a_crop_are_equally_likely():
    images = np.zeros((9000, 3, 3, 1), np.uint8)
    images[:, 1, 1] = 1
    found = np.asarray(kd.augment.random_crop(padding=1)(KEY, images, True)).sum(axis=0, dtype=np.int64)[..., 0]
    # 4.5 standard deviations of a count of 1,000.
    assert found.sum() == 9000
    assert np.abs(found - 1000).max() < 135


def test_half_of_the_images_are_turned_left_to_right():
    found = np.asarray(kd.augment.random_flip()(KEY, BYTES, True))
    turned = (found == BYTES[:, :, ::-1]).all(axis=(1, 2, 3))
    same = (found == BYTES).all(axis=(1, 2, 3))
    assert (turned ^ same).all()
    assert 8 < turned.sum() < 32
    np.testing.assert_array_equal(kd.augment.random_flip(1.0)(KEY, BYTES, True), BYTES[:, :, ::-1])
    np.testing.assert_array_equal(kd.augment.random_flip(0.0)(KEY, BYTES, True), BYTES)


@pytest.mark.parametrize("train", [True, False])
def test_normalised_images_have_mean_0_and_deviation_1(train):
    pixels = BYTES.astype(np.float64) / 255
    mean, std = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    prepare = kd.augment.normalise(mean, std)
    found = prepare(KEY, BYTES, train)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (pixels - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(prepare(KEY, pixels.astype(np.float32), train), found, rtol=1e-5, atol=1e-6)
    assert prepare(KEY, jnp.asarray(pixels, jnp.bfloat16), train).dtype == jnp.bfloat16


def make():
    parts = kd.augment.random_crop(padding=1), kd.augment.random_flip(), kd.augment.normalise([0.5] * 3, [0.25] * 3)
    return kd.augment.chain(*parts), parts


def test_a_chain_is_one_after_the_other_with_keys_that_differ():
    chained, parts = make()
    expected = BYTES
    for number, part in enumerate(parts):
        expected = part(jax.random.fold_in(KEY, number), expected, True)
    found = jax.jit(chained, static_argnums=2)(KEY, BYTES, True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (chained(jax.random.key(6), BYTES, True) != found).any()
    np.testing.assert_array_equal(chained(None, BYTES, False), parts[-1](KEY, BYTES, False))


def test_equal_ones_are_equal_by_value():
    assert make()[0] == make()[0]
    assert hash(make()[0]) == hash(make()[0])
    assert kd.augment.random_crop(1) != kd.augment.random_crop(2)


def test_a_training_sees_other_views_in_every_epoch_and_evaluation_none():
    seen = []

    def watched(key, images, train):
        jax.debug.callback(lambda views: seen.append(np.array(views)), images)
        return images

    prepare = kd.augment.chain(kd.augment.random_crop(padding=1), watched, kd.augment.normalise([0.5] * 3, [0.25] * 3))
    data = kd.Batch(BYTES[:4], np.arange(4) % 2)
    result = kd.distill(kd.mlp([60, 2]), None, data, prepare=prepare, **(HOW | {"epochs": 3, "batch_size": 4}))
    jax.effects_barrier()
    views = [sorted(image.tobytes() for image in part) for part in seen]
    assert len(views) == 3
    assert views[0] != views[1] != views[2]
    seen.clear()
    kd.evaluate(result.student, data, prepare=prepare)
    assert all((part == BYTES[:4]).all() for part in seen)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: kd.augment.random_crop(-1), "padding is -1: it must be a whole number"),
        (lambda: inspect.unwrap(kd.augment.random_crop)("4"), "padding is '4': it must be a whole number"),
        (lambda: inspect.unwrap(kd.augment.random_crop)((2, 2)), r"padding is \(2, 2\): it must be a whole number"),
        (lambda: kd.augment.random_flip(1.5), "probability is 1.5: it must be a number from 0 to 1"),
        (lambda: inspect.unwrap(kd.augment.random_flip)("1"), "probability is '1': it must be a number from 0 to 1"),
        (lambda: inspect.unwrap(kd.augment.mixup)(None), "alpha is None: it must be a number above 0"),
        (lambda: inspect.unwrap(kd.augment.cutmix)(1.0, None), "probability is None: it must be a number from 0 to 1"),
        (lambda: kd.augment.normalise(0.13, 0.31), r"mean is 0\.13 and std 0\.31: give a number for each channel"),
        (lambda: kd.augment.normalise([0.5], [0.5, 0.5]), "mean has 1 numbers and std 2"),
        (lambda: kd.augment.normalise([0.5], [0.0]), r"std is \(0.0,\): every number must be above 0"),
        (lambda: kd.augment.chain(None), "None is no function"),
    ],
)
def test_what_cannot_be_is_refused(wrong, says):
    with pytest.raises(ConfigError, match=says) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_what_are_no_images_is_refused():
    for prepare in make()[1]:
        with pytest.raises(ShapeError, match=r"the inputs are of the shape \(5, 4, 3\): give images"):
            prepare(KEY, BYTES[0], True)
    with pytest.raises(ShapeError, match="the inputs are a dict"):
        kd.augment.random_flip()(KEY, {"x": BYTES}, True)
    with pytest.raises(ShapeError, match="the images have 3 channels and normalise 1 means"):
        kd.augment.normalise([0.5], [0.5])(KEY, BYTES, True)
