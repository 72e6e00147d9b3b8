import ctypes
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.convolution import ffi

pytestmark = pytest.mark.skipif(bool(ffi.why_not()), reason=ffi.why_not())


def called(name, x):
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def test_a_function_is_told_where_its_arguments_and_its_results_lie():
    def twice(arguments, results):
        size = 4 * 5
        given = np.frombuffer((ctypes.c_char * size).from_address(arguments[0]), np.float32)
        made = np.frombuffer((ctypes.c_char * size).from_address(results[0]), np.float32)
        made[...] = 2 * given

    ffi.register("kd_jax.test.twice", twice)
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: called("kd_jax.test.twice", x), x))
    np.testing.assert_array_equal(loop(jnp.arange(5.0)), 8 * np.arange(5.0))


def test_what_it_raises_ends_the_program():
    def broken(arguments, results):
        raise ValueError("the sky is falling")

    ffi.register("kd_jax.test.broken", broken)
    with pytest.raises(Exception, match="ValueError: the sky is falling"):
        jax.block_until_ready(jax.jit(lambda x: called("kd_jax.test.broken", x))(jnp.ones(5)))


def test_an_interrupt_within_it_is_an_error_of_the_program():
    def interrupted(arguments, results):
        raise KeyboardInterrupt

    ffi.register("kd_jax.test.interrupted", interrupted)
    with pytest.raises(Exception, match="KeyboardInterrupt"):
        jax.block_until_ready(jax.jit(lambda x: called("kd_jax.test.interrupted", x))(jnp.ones(5)))


def test_several_threads_may_register_the_same_name():
    def nothing(arguments, results):
        pass

    with ThreadPoolExecutor(8) as threads:
        for number in range(20):
            runs = [threads.submit(ffi.register, f"kd_jax.test.thread{number}", nothing) for _ in range(8)]
            assert [run.result() for run in runs] == [None] * 8


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "jaxlib's header of its foreign functions is missing"),
        ((0, 99), "jaxlib's interface of foreign functions is 0.99, which kd_jax does not know"),
        ((1, 3), "jaxlib's interface of foreign functions is 1.3, which kd_jax does not know"),
    ],
)
def test_an_interface_that_is_not_known_is_not_used(version, reason, monkeypatch):
    monkeypatch.setattr(ffi, "_version", lambda: version)
    assert ffi.why_not() == reason
