"""What each element by element loss has of its own. See also `test_feature_oracles`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import feature_oracles as oracles
from losses.feature_cases import MARGIN, VARIANCE, assert_close, assert_is_oracle, draw
from programs import compiled, with_gradients

from kd_jax.losses import features


def test_the_variances_of_vid_are_learned() -> None:
    student, teacher = draw("vid", batch=2)
    assert_is_oracle(features.vid, oracles.vid, student, teacher, VARIANCE)


def test_vid_is_least_at_the_mean_square_as_variance() -> None:
    """And its start is the variance that was asked for, also where an exponential would overflow."""
    with jax.enable_x64(True):
        for start in (0.01, 5.0, 2000.0):
            raw = features.vid_variance(3, start=start)
            gap = jnp.full((1, 3), jnp.sqrt(start))
            values, (slope,) = with_gradients(features.vid, (2,))(gap, jnp.zeros((1, 3)), raw)
            assert float(values[0]) == pytest.approx((1 + np.log(start)) / 2, rel=1e-12)
            np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_the_margins_of_ofd_are_learnable_or_not_but_right() -> None:
    student, teacher = draw("ofd", batch=2)
    assert_is_oracle(features.ofd, oracles.ofd, student, teacher, MARGIN)


@pytest.mark.parametrize("size", [(4, 4), (3, 2)])
def test_a_larger_teacher_is_pooled_for_ofd_and_simkd(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 2, 2, 3)), rng.normal(size=(2, *size, 3))
    assert_is_oracle(lambda s, t: features.ofd(s, t, MARGIN), lambda s, t: oracles.ofd(s, t, MARGIN), student, teacher)
    assert_is_oracle(features.simkd, oracles.simkd, student, teacher)
    with pytest.raises(ValueError, match="apply match_space, then a projector, to the student's"):
        features.simkd(jnp.ones((2, *size, 3)), jnp.ones((2, 2, 2, 3)))


@pytest.mark.parametrize("mean", [-8.0, -1.0, 0.0, 0.5, 2.5, 6.0, 30.0])
@pytest.mark.parametrize("deviation", [0.1, 2.0])
def test_the_margin_is_the_mean_of_what_is_negative(mean: float, deviation: float) -> None:
    expected = oracles.negative_mean(mean * deviation, deviation)
    with jax.enable_x64(True):
        found = compiled(features.ofd_margin)(jnp.asarray([mean * deviation]), jnp.asarray([-deviation]))
    assert float(found[0]) == pytest.approx(expected, rel=1e-9)


def test_the_margin_of_a_channel_that_does_not_vary() -> None:
    found = features.ofd_margin(jnp.asarray([-2.0, 0.0, 3.0]), jnp.zeros(3))
    np.testing.assert_array_equal(found, [-2, 0, 0])


@pytest.mark.parametrize("margin", [0.25, 2.0])
def test_ab_has_a_margin(margin: float) -> None:
    arrays = draw("ab", batch=2)
    assert_is_oracle(
        lambda s, t: features.ab(s, t, margin=margin), lambda s, t: oracles.ab(s, t, margin=margin), *arrays
    )


def test_ab_is_0_where_every_neuron_is_on_its_side_by_the_margin() -> None:
    teacher = jnp.asarray(draw("ab")[1], jnp.float32)
    np.testing.assert_array_equal(features.ab(1.01 * jnp.sign(teacher), teacher), 0)


def test_ofd_asks_nothing_of_a_student_below_a_negative_teacher() -> None:
    teacher = -jnp.abs(jnp.asarray(draw("ofd")[1], jnp.float32))
    np.testing.assert_array_equal(features.ofd(teacher - 3, teacher, MARGIN), 0)


@pytest.mark.parametrize("name", ["vid", "ofd"])
def test_numbers_of_other_channels_are_refused(name: str) -> None:
    student, teacher = (jnp.asarray(array, jnp.float32) for array in draw(name))
    with pytest.raises(
        ValueError, match=r"has the shape \[2\] and features \[4, 2, 2, 3\] need one number for each channel"
    ):
        getattr(features, name)(student, teacher, jnp.ones(2))


def test_masks_are_drawn_by_a_key() -> None:
    maps = jnp.ones((60, 5, 6, 40))
    by_channel = np.asarray(features.mask_channels(jax.random.key(0), maps, ratio=0.15))
    by_position = np.asarray(features.mask_positions(jax.random.key(0), maps, ratio=0.65))
    np.testing.assert_array_equal(by_channel, np.broadcast_to(by_channel[:, :1, :1], maps.shape))
    np.testing.assert_array_equal(by_position, np.broadcast_to(by_position[..., :1], maps.shape))
    for mask, ratio, drawn in ((by_channel, 0.15, 60 * 40), (by_position, 0.65, 60 * 30)):
        assert set(np.unique(mask)) == {0, 1}
        assert 1 - mask.mean() == pytest.approx(ratio, abs=5 * np.sqrt(ratio * (1 - ratio) / drawn))
    other = features.mask_channels(jax.random.key(1), maps, ratio=0.15)
    assert np.any(other != by_channel)


def test_a_masked_nan_is_gone() -> None:
    maps = jnp.full((2, 3, 4), jnp.nan)
    np.testing.assert_array_equal(features.mask_channels(jax.random.key(0), maps, ratio=1.0), 0)


def test_vkd_at_every_position_and_with_an_epsilon() -> None:
    arrays = np.random.default_rng(4).normal(0, 2, (2, 2, 3, 4))
    assert_is_oracle(lambda s, t: features.vkd(s, t, epsilon=0.3), lambda s, t: oracles.vkd(s, t, epsilon=0.3), *arrays)


def test_vkd_is_0_at_the_normalised_teacher() -> None:
    teacher = np.random.default_rng(5).normal(3, 2, (4, 50)).astype(np.float32)
    normal = (teacher - teacher.mean(1, keepdims=True)) / teacher.std(1, keepdims=True)
    assert_close(features.vkd(jnp.asarray(normal), jnp.asarray(teacher)), np.zeros(4), rtol=1e-9)
