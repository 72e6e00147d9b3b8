import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from kd_jax.convolution import canonical, onednn_form

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


def test_a_window_larger_than_its_inputs_leaves_nothing():
    run = jax.grad(lambda x: jnp.sum(nnx.max_pool(x, (4, 4), (4, 4))))
    np.testing.assert_array_equal(jax.jit(canonical(run))(jnp.ones((2, 3, 3, 5))), np.zeros((2, 3, 3, 5)))


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


# Inputs, and parameters of `lax.reduce_window`.
SUMS = {
    "3 x 3 over 2, padded": ((3, 8, 9, 5), {"window": (3, 3), "strides": (2, 2), "padding": ((1, 1), (0, 1))}),
    "all within": ((2, 6, 6, 3), {"window": (2, 2), "strides": (2, 2), "padding": ((0, 0), (0, 0))}),
    "something left over": ((2, 8, 7, 3), {"window": (3, 2), "strides": (3, 2), "padding": ((0, 0), (0, 0))}),
    "dilated": ((2, 9, 9, 3), {"window": (3, 3), "strides": (1, 2), "padding": ((2, 2), (2, 1)), "dilation": (2, 2)}),
    "zeros between": (
        (2, 5, 4, 3),
        {"window": (3, 3), "strides": (1, 1), "padding": ((2, 1), (2, 2)), "zeros": (2, 2)},
    ),
    "one axis": ((4, 12, 6), {"window": (4,), "strides": (2,), "padding": ((1, 1),)}),
    "fewer inputs than the window": ((2, 1, 2, 3), {"window": (3, 3), "strides": (1, 1), "padding": ((0, 0), (0, 0))}),
    "fewer on both axes": ((2, 1, 1, 3), {"window": (3, 3), "strides": (1, 1), "padding": ((0, 0), (0, 0))}),
    "as large as the inputs": ((3, 4, 4, 5), {"window": (4, 4), "strides": (4, 4), "padding": ((0, 0), (0, 0))}),
    "three axes": ((2, 4, 5, 6, 3), {"window": (2, 2, 2), "strides": (2, 1, 2), "padding": ((0, 0), (1, 0), (0, 0))}),
}


def summed_windows(case):
    """Sums, and two arrays of inputs."""
    shape, how = SUMS[case]
    ones = (1,) * (len(shape) - 2)

    def run(x):
        return lax.reduce_window(
            x, np.zeros((), x.dtype), lax.add, (1, *how["window"], 1), (1, *how["strides"], 1),
            ((0, 0), *how["padding"], (0, 0)), (1, *how.get("zeros", ones), 1), (1, *how.get("dilation", ones), 1),
        )  # fmt: skip

    return run, *np.random.default_rng(0).normal(size=(2, *shape))


def has_window_sums(fun, *args):
    return "reduce_window_sum" in str(jax.make_jaxpr(canonical(fun))(*args))


@pytest.mark.parametrize("worth", [0, 4_000_000])
@pytest.mark.parametrize("case", SUMS)
def test_sums_of_windows_and_their_gradients_are_those_of_float64(case, worth, monkeypatch):
    monkeypatch.setattr(onednn_form, "_WORTH", worth)
    run, x, _ = summed_windows(case)
    other = np.random.default_rng(1).normal(size=jax.eval_shape(run, x.astype(np.float32)).shape)

    def both(x, other):
        out, back = jax.vjp(run, x)
        return out, back(other)[0]

    own = jnp.asarray(x, jnp.float32), jnp.asarray(other, jnp.float32)
    assert not has_window_sums(both, *own)
    found = jax.jit(canonical(both))(*own)
    with jax.enable_x64(True):
        expected = jax.jit(both)(jnp.asarray(x), jnp.asarray(other))
    for value, known in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, known, rtol=0, atol=1e-5)


@pytest.mark.parametrize("worth", [0, 4_000_000])
@pytest.mark.parametrize("case", SUMS)
def test_a_rewritten_pool_can_be_derived_and_mapped(case, worth, monkeypatch):
    monkeypatch.setattr(onednn_form, "_WORTH", worth)
    run, *given = summed_windows(case)
    x, direction = (jnp.asarray(array, jnp.float32) for array in given)
    fun = canonical(lambda x: jnp.sin(run(x)))
    for way in (
        lambda fun: jax.jit(lambda x: jax.jvp(fun, (x,), (direction,))[1]),
        lambda fun: jax.jit(jax.grad(lambda x: jnp.sum(fun(x)))),
        lambda fun: jax.jit(lambda x: jax.vmap(fun)(jnp.stack([x, direction]))),
    ):
        own, known = way(fun)(x), way(lambda x: jnp.sin(run(x)))(x)
        np.testing.assert_allclose(own, known, rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 3, 4])
def test_a_pool_of_several_at_once_has_two_axes_of_space(place, monkeypatch):
    monkeypatch.setattr(onednn_form, "_WORTH", 0)
    run, *given = summed_windows("3 x 3 over 2, padded")
    x = jnp.asarray(given[0], jnp.float32)
    several = jnp.stack([x, -2 * x], place)
    fun = canonical(jax.vmap(run, place, place))
    np.testing.assert_allclose(jax.jit(fun)(several), jax.vmap(run, place, place)(several), rtol=0, atol=1e-5)
    if place != 3:
        assert jax.jit(fun).lower(several).compile().as_text().count("kd_jax.onednn.forward.6x8x9x5") == (place < 2)


@pytest.mark.parametrize(("case", "calls"), [("as large as the inputs", 0), ("all within", 1)])
def test_a_window_as_large_as_its_inputs_is_left_to_xla(case, calls, monkeypatch):
    monkeypatch.setattr(onednn_form, "_WORTH", 0)
    run, x, _ = summed_windows(case)
    compiled = jax.jit(canonical(run)).lower(jnp.asarray(x, jnp.float32)).compile()
    assert compiled.as_text().count("kd_jax.onednn") == calls


def test_numpys_whole_numbers_are_taken(monkeypatch):
    monkeypatch.setattr(onednn_form, "_WORTH", 0)
    window, strides = np.array([1, 3, 3, 1]), np.array([1, 2, 2, 1])

    def run(x):
        return lax.reduce_window(x, np.float32(0), lax.add, tuple(window), tuple(strides), "SAME", strides * 0 + 1)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 9, 5)), jnp.float32)
    assert not has_window_sums(run, x)
    np.testing.assert_allclose(jax.jit(canonical(run))(x), run(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "window", "dtype"),
    [
        ((4, 8, 8, 6), (1, 2, 2, 2), np.float32),
        ((4, 8, 8, 6), (2, 2, 2, 1), np.float32),
        ((4, 8, 8, 6), (1, 8, 8, 1), np.float32),
        ((4, 8, 8, 6), (1, 1, 1, 1), np.float32),
        ((4, 8, 8, 1), (1, 2, 2, 1), np.float32),
        ((8, 8), (2, 2), np.float32),
        ((4, 8, 8, 6), (1, 2, 2, 1), np.int32),
    ],
)
def test_windows_over_other_axes_large_ones_and_other_types_are_left(shape, window, dtype):
    def run(x):
        return lax.reduce_window(x, np.zeros((), dtype), lax.add, window, window, "VALID")

    x = jnp.asarray(np.random.default_rng(0).integers(0, 9, shape), dtype)
    assert has_window_sums(run, x)
    np.testing.assert_array_equal(jax.jit(canonical(run))(x), run(x))


@pytest.mark.parametrize("worth", [0, 4_000_000])
def test_a_sum_of_windows_that_is_not_finite_stays_in_its_windows(worth, monkeypatch):
    x = np.ones((1, 6, 6, 2), np.float32)
    x[0, 0, 0, 0], x[0, 5, 5, 1] = np.nan, np.inf
    monkeypatch.setattr(onednn_form, "_WORTH", worth)
    own = jax.jit(canonical(lambda x: nnx.pool(x, 0.0, lax.add, (3, 3), (3, 3), "VALID")))(jnp.asarray(x))
    np.testing.assert_array_equal(own[0, :, :, 0], [[np.nan, 9], [9, 9]])
    np.testing.assert_array_equal(own[0, :, :, 1], [[9, 9], [9, np.inf]])
