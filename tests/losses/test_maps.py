import jax.numpy as jnp
import numpy as np
import pytest
from losses import feature_oracles as oracles

from kd_jax.losses import maps

SIZES = [((4,), (2,)), ((5,), (3,)), ((2,), (3,)), ((6, 4), (3, 1)), ((5, 7), (2, 4)), ((3, 2, 5), (2, 2, 3)), ((), ())]


@pytest.mark.parametrize(("pool", "reduce"), [(maps.average_pool, np.mean), (maps.max_pool, np.max)])
@pytest.mark.parametrize(("space", "counts"), SIZES)
def test_pooling(pool, reduce, space, counts) -> None:
    features = np.random.default_rng(0).normal(size=(2, *space, 3)).astype(np.float32)
    expected = [oracles.pool(image, counts, reduce) for image in features]
    np.testing.assert_allclose(pool(jnp.asarray(features), counts), expected, rtol=1e-5, atol=1e-6)


def test_maps_meet_at_the_smaller_size_of_each_axis() -> None:
    student, teacher = np.random.default_rng(1).normal(size=(2, 2, 6, 6, 3)).astype(np.float32)
    student, teacher = student[:, :, :4], teacher[:, :3, :, :2]
    found = maps.match_space(jnp.asarray(student), jnp.asarray(teacher))
    for matched, features in zip(found, (student, teacher), strict=True):
        expected = [oracles.pool(image, (3, 4)) for image in features]
        np.testing.assert_allclose(matched, expected, rtol=1e-5, atol=1e-6)
    largest, _ = maps.match_space(jnp.asarray(student), jnp.asarray(teacher), maps.max_pool)
    np.testing.assert_array_equal(largest, [oracles.pool(image, (3, 4), np.max) for image in student])


@pytest.mark.parametrize(
    ("before", "after", "index"), [(2, 4, [0, 0, 1, 1]), (3, 5, [0, 0, 1, 1, 2]), (4, 3, [0, 1, 2])]
)
def test_the_nearest_position(before: int, after: int, index: list[int]) -> None:
    features = np.random.default_rng(2).normal(size=(1, before, 2, 3)).astype(np.float32)
    np.testing.assert_array_equal(maps.resize_nearest(jnp.asarray(features), (after, 2)), features[:, index])


@pytest.mark.parametrize("space", [(2,), (2, 0), (1, 1, 1)])
def test_a_space_that_does_not_fit_is_refused(space: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"does not fit features \[1, 4, 4, 2\]: give 2 sizes of at least 1"):
        maps.average_pool(jnp.ones((1, 4, 4, 2)), space)


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 0, 3)])
def test_features_without_a_batch_or_elements_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"need \[batch, \*space, channels\], none of them 0"):
        maps.as_features(jnp.ones(shape))
