"""What each loss of a map's summary has of its own. See also `test_feature_oracles`."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from losses import feature_oracles as oracles
from losses.feature_cases import assert_close, assert_is_oracle, draw, floats

from kd_jax.losses import maps, summaries


def both(name: str, *arrays: np.ndarray, **numbers: Any) -> None:
    assert_is_oracle(partial(getattr(summaries, name), **numbers), partial(getattr(oracles, name), **numbers), *arrays)


@pytest.mark.parametrize("exponent", [1, 3, 4])
def test_at_and_ft_have_an_exponent(exponent: int) -> None:
    both("at", *draw("at", batch=2), exponent=exponent)
    both("ft", *draw("ft", batch=2), exponent=exponent)


@pytest.mark.parametrize(("pool", "reduce"), [(maps.average_pool, np.mean), (maps.max_pool, np.max)])
def test_fsp_of_stages_that_grow_or_shrink(pool: Any, reduce: Any) -> None:
    rng = np.random.default_rng(2)
    shapes = [(2, 3, 2, 2), (2, 2, 3, 1), (2, 2, 2, 2), (2, 4, 2, 1)]
    arrays = [rng.normal(size=shape) for shape in shapes]
    assert_is_oracle(partial(summaries.fsp, pool=pool), partial(oracles.fsp, reduce=reduce), *arrays)


def test_fsp_of_other_channels_is_refused() -> None:
    maps_of = [jnp.ones((2, 2, 2, channels)) for channels in (2, 3, 2, 4)]
    with pytest.raises(
        ValueError, match=r"\[2, 2, 2, 3\] and teacher features \[2, 2, 2, 4\] of the last layer differ in chann"
    ):
        summaries.fsp(*maps_of)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("resolution", [1, 2, 3])
def test_cat_kd_at_other_resolutions(resolution: int, normalised: bool) -> None:
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 4, 3, 2)), rng.normal(size=(2, 5, 3, 2))
    both("cat_kd", student, teacher, resolution=resolution, normalised=normalised)


def test_cat_kd_of_maps_that_stay_unequal_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\[2, 1, 2, 3\] and teacher features \[2, 2, 2, 3\] differ in shape: at the resolution 2"
    ):
        summaries.cat_kd(jnp.ones((2, 1, 2, 3)), jnp.ones((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="a resolution of 0 has no positions: give at least 1"):
        summaries.cat_kd(jnp.ones((2, 1, 2, 3)), jnp.ones((2, 4, 4, 3)), resolution=0)


def test_class_activation_maps_have_the_logits_as_means() -> None:
    rng = np.random.default_rng(4)
    features, kernel = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(5, 6)).astype(np.float32)
    found = summaries.class_activation_maps(jnp.asarray(features), jnp.asarray(kernel))
    assert found.shape == (2, 3, 4, 6)
    assert_close(found.mean((1, 2)), features.mean((1, 2)) @ kernel, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"a kernel \[6, 5\] does not fit features \[2, 3, 4, 5\]: give \[5, classes\]"
    ):
        summaries.class_activation_maps(jnp.asarray(features), jnp.asarray(kernel.T))


@pytest.mark.parametrize("numbers", [{"grid": 2}, {"grid": 1, "ratio": 0.5, "epsilon": 0.1}])
def test_wkd_f_has_a_grid_and_numbers(numbers: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    both("wkd_f", rng.normal(size=(2, 4, 3, 2)), rng.normal(size=(2, 5, 4, 2)), **numbers)


@pytest.mark.parametrize(("shape", "grid"), [((2, 3), 1), ((2, 1, 1, 3), 1), ((2, 2, 2, 3), 2), ((2, 4, 4, 3), 0)])
def test_wkd_f_of_cells_without_a_deviation_is_refused(shape: tuple[int, ...], grid: int) -> None:
    with pytest.raises(ValueError, match=rf"a grid of {grid} over features "):
        summaries.wkd_f(jnp.ones(shape), jnp.ones(shape), grid=grid)


def test_wkd_f_does_not_see_where_things_are() -> None:
    student, teacher = floats("wkd_f")
    np.testing.assert_allclose(summaries.wkd_f(student[:, ::-1], teacher), summaries.wkd_f(student, teacher), rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6, 1), (4, 2, 1), (1, 1, 2), (6, 2)])
def test_reviewkd_pools_to_levels_below_the_map(shape: tuple[int, ...]) -> None:
    both("reviewkd", *np.random.default_rng(6).normal(size=(2, 2, *shape)))


def test_ickd_of_an_absent_example() -> None:
    student, teacher = (np.array(array) for array in floats("ickd"))
    expected = summaries.ickd(jnp.asarray(student), jnp.asarray(teacher))
    student[2] = np.nan
    found = summaries.ickd(jnp.asarray(student), jnp.asarray(teacher), weights=jnp.asarray([1.0, 3, 0, 1]))
    np.testing.assert_allclose(found, expected.at[2].set(0), rtol=1e-6)
