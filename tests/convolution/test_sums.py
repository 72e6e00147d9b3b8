import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

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


@pytest.mark.parametrize("swapped", [False, True])
def test_a_sum_of_columns_of_products_is_one_of_the_array_that_is_there_already(swapped):
    def two(x, scale):
        product = scale * x if swapped else x * scale
        return jnp.sum(x, (0, 1)), jnp.sum(-product, (0, 1)), product

    rng = np.random.default_rng(0)
    x, scale = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 32, 5), (1, 1, 5)))
    compiled = jax.jit(canonical(two)).lower(x, scale).compile()
    assert compiled.as_text().count(" dot(") == 1
    for own, other in zip(compiled(x, scale), two(*(np.asarray(a, np.float64) for a in (x, scale))), strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(64, 1, 5), (64, 32, 1), (64, 32, 5), ()])
def test_products_with_other_numbers_for_each_row_are_added_as_they_are(shape):
    def total(x, scale):
        return jnp.sum(-(x * scale), (0, 1))

    rng = np.random.default_rng(0)
    x, scale = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((64, 32, 5), shape))
    own = jax.jit(canonical(total))(x, scale)
    np.testing.assert_allclose(own, total(*(np.asarray(a, np.float64) for a in (x, scale))), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_the_gradient_of_a_normalisation_has_two_sums_of_its_columns(kind):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 16, 4)), jnp.float32)
    if kind == "nnx":
        module = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        graph, params, state = nnx.split(module, nnx.Param, ...)

        def normalised(params, x):
            return nnx.merge(graph, params, state, copy=True)(x)
    else:
        layer = linen.BatchNorm(use_running_average=False)
        variables = layer.init(jax.random.key(0), x)
        params = variables["params"]

        def normalised(params, x):
            return layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]

    def step(params, x):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(normalised(*args))), (0, 1))(params, x)

    compiled = jax.jit(canonical(step)).lower(params, x).compile()
    assert compiled.as_text().count(" dot(") == 4  # the mean and the mean square, and the gradients by scale and bias
    for own, other in zip(*map(jax.tree.leaves, (compiled(params, x), step(params, x))), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_stays_in_its_column():
    x = np.ones((2048, 3), np.float32)
    x[100, 0], x[1999, 2] = np.nan, np.inf
    np.testing.assert_array_equal(sums.column_sums(jnp.asarray(x), (0,)), [np.nan, 2048, np.inf])
