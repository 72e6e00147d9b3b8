import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from kd_jax.convolution import canonical

# Inputs, window, strides, padding.
CASES = {
    "2 x 2": ((3, 6, 8, 5), (2, 2), (2, 2), "VALID"),
    "something left over": ((2, 7, 9, 3), (2, 3), (2, 3), "VALID"),
    "padded": ((2, 7, 8, 3), (2, 3), (2, 3), "SAME"),
    "numbers between the windows": ((2, 9, 8, 3), (2, 1), (3, 2), "VALID"),
    "one axis": ((4, 10, 3), (2,), (2,), "VALID"),
    "three axes": ((2, 4, 6, 4, 2), (2, 2, 2), (2, 2, 2), "VALID"),
    "more padding than needed": ((2, 6, 6, 3), (3, 3), (3, 3), ((1, 2), (2, 1))),
}


def gradient(pool, case):
    _, window, strides, padding = CASES[case]

    def run(x, other):
        return jax.vjp(lambda x: pool(x, window, strides, padding), x)[1](other)[0]

    return run


def arrays(case, dtype=np.float32, levels=None):
    """Inputs, of few different numbers where `levels` is given, and a gradient of the outputs."""
    shape, window, strides, padding = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) if levels is None else rng.integers(0, levels, shape)
    x = jnp.asarray(x, dtype)
    out = jax.eval_shape(lambda x: nnx.max_pool(x, window, strides, padding), x)
    return x, jnp.asarray(rng.normal(size=out.shape), dtype)


def is_rewritten(fun, *args):
    return "select_and_scatter_add" not in str(jax.make_jaxpr(canonical(fun))(*args))


@pytest.mark.parametrize("pool", [nnx.max_pool, nnx.min_pool])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_pool_has_the_bits_of_xlas_also_at_ties(case, pool):
    for levels in (None, 2):
        args = arrays(case, levels=levels)
        assert is_rewritten(gradient(pool, case), *args)
        own = jax.jit(canonical(gradient(pool, case)))(*args)
        np.testing.assert_array_equal(own, jax.jit(gradient(pool, case))(*args))


def test_the_first_of_the_largest_gets_it_all():
    x = jnp.asarray([[3.0, 5.0, 5.0, 1.0], [2.0, 2.0, 7.0, 0.0]]).reshape(1, 2, 4, 1)
    run = canonical(
        jax.grad(lambda x: jnp.sum(nnx.max_pool(x, (2, 2), (2, 2)) * jnp.asarray([1.0, 10.0])[None, None, :, None]))
    )
    np.testing.assert_array_equal(run(x)[0, ..., 0], [[0, 1, 0, 0], [0, 0, 10, 0]])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan]), min_size=16, max_size=16))
def test_it_chooses_as_xla_also_among_what_is_not_finite(numbers):
    x, other = jnp.asarray(numbers, jnp.float32).reshape(1, 4, 4, 1), jnp.arange(1.0, 5.0).reshape(1, 2, 2, 1)
    np.testing.assert_array_equal(*(run(x, other) for run in (FAST, PLAIN)))


PLAIN = jax.jit(gradient(nnx.max_pool, "2 x 2"))
FAST = jax.jit(canonical(gradient(nnx.max_pool, "2 x 2")))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_types_of_floats_too(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        args = arrays("2 x 2", dtype)
        own = jax.jit(canonical(gradient(nnx.max_pool, "2 x 2")))(*args)
        assert own.dtype == dtype
        np.testing.assert_array_equal(own, jax.jit(gradient(nnx.max_pool, "2 x 2"))(*args))


def test_within_a_loop_and_mapped():
    x, other = arrays("2 x 2")

    def loop(x):
        def body(x, _):
            return x - gradient(nnx.max_pool, "2 x 2")(x, other), None

        return lax.scan(body, x, None, length=3)[0]

    several = jnp.stack([x, -x])
    assert is_rewritten(jax.vmap(loop), several)
    np.testing.assert_array_equal(jax.jit(canonical(jax.vmap(loop)))(several), jax.jit(jax.vmap(loop))(several))


def test_windows_that_meet_and_large_ones_are_left():
    x = jnp.ones((1, 12, 12, 2))
    for window, stride in ((3, 2), (6, 6)):
        run = jax.grad(lambda x, window=window, stride=stride: jnp.sum(nnx.max_pool(x, (window,) * 2, (stride,) * 2)))
        assert not is_rewritten(run, x)
