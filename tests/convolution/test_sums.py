import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.convolution import canonical, sums

SHAPES = [((16, 8, 8, 6), (0, 1, 2)), ((1025, 3), (0,)), ((1500, 2, 3), (0,)), ((40, 40, 1), (0, 1))]


@pytest.mark.parametrize(("shape", "axes"), SHAPES)
def test_a_sum_of_columns_is_that_of_float64(shape, axes):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    own = sums.column_sums(jnp.asarray(x), axes)
    np.testing.assert_allclose(own, x.astype(np.float64).sum(axes), rtol=0, atol=1e-3)
    assert own.shape == x.sum(axes).shape


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((64, 10), (0,)), ((2048, 10), (1,)), ((2048, 10), (0, 1)), ((1021, 3), (0,)), ((4096, 2, 2), (0, 2))],
)
def test_few_rows_other_axes_and_lengths_that_do_not_split_are_left(shape, axes):
    assert not sums.is_worth_it(shape, axes)


def test_a_program_has_its_sums_of_columns_rewritten_and_no_others():
    def moments(x):
        return jnp.mean(x, (0, 1)), jnp.var(x, (0, 1)), jnp.sum(x), jnp.max(x, (0, 1))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32, 5)), jnp.float32)
    written = str(jax.make_jaxpr(canonical(moments))(x))
    assert written.count("dot_general") == 3  # two means, and the variance
    assert written.count("reduce_sum") == 1
    for own, other in zip(jax.jit(canonical(moments))(x), moments(np.asarray(x, np.float64)), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_in_its_column():
    x = np.ones((2048, 3), np.float32)
    x[100, 0], x[1999, 2] = np.nan, np.inf
    np.testing.assert_array_equal(sums.column_sums(jnp.asarray(x), (0,)), [np.nan, 2048, np.inf])
