"""Programs with convolutions are compiled without YNN where XLA computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.convolution import compiling, onednn


def convolved(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")


def product(x, kernel):
    return x * jnp.sum(kernel)


@pytest.fixture
def options(monkeypatch):
    """What programs are compiled with, one entry for each."""
    seen, real = [], jax.stages.Lowered.compile

    def watched(lowered, compiler_options=None):
        seen.append(compiler_options)
        return real(lowered, compiler_options=compiler_options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", watched)
    return seen


def test_only_convolutions_that_xla_computes_are_compiled_without_ynn(options, monkeypatch):
    monkeypatch.setattr(compiling, "takes", lambda option, value: True)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 8))
    kernel = jax.random.normal(jax.random.key(1), (4, 3, 3, 3))
    expected = convolved(x, kernel)
    for missing in ("", "it is not installed"):
        monkeypatch.setattr(onednn, "why_not", lambda missing=missing: missing)
        for function in (convolved, product):
            options.clear()
            run = compiling.compiled(jax.jit(function).lower(x, kernel))
            assert options == [dict([compiling._WITHOUT_YNN]) if missing and function is convolved else None]
        np.testing.assert_allclose(
            compiling.compiled(jax.jit(convolved).lower(x, kernel))(x, kernel), expected, rtol=1e-5, atol=1e-5
        )
        assert run(x, kernel).shape == x.shape


def test_an_xla_that_does_not_know_ynn_compiles_as_it_is(options, monkeypatch):
    assert compiling.takes(*compiling._WITHOUT_YNN)
    assert not compiling.takes("xla_cpu_no_such_option", "")
    monkeypatch.setattr(compiling, "_WITHOUT_YNN", ("xla_cpu_no_such_option", ""))
    monkeypatch.setattr(onednn, "why_not", lambda: "it is not installed")
    lowered = jax.jit(convolved).lower(jnp.ones((2, 3, 8, 8)), jnp.ones((4, 3, 3, 3)))
    options.clear()
    compiling.compiled(lowered)
    assert options == [None]
