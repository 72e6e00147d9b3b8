"""Operations by others compute what those of `jax.lax` do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax.export.convertible import CONVERTIBLE, CONVERTIBLE_LITERT
from kd_jax.export.program import traced

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 1, 6, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "config",
    [
        ((0, 0, 0), (1, 2, 0), (0, 3, 0), (0, 0, 0)), ((0, 0, 0), (0, 0, 0), (-1, 2, 0), (2, -3, 0)),
        ((0, 0, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0)), ((0, 0, 0),) * 4,
        ((0, 0, 0), (0, 0, 0), (-4, 0, 0), (-1, -1, 0)), ((0, 0, 0), (-2, 4, 0), (0, 0, 0), (0, 0, 0)),
    ],
)  # fmt: skip
def test_padding(config):
    padding = jnp.float32(2)
    found = CONVERTIBLE["pad"](jnp.asarray(X), padding, padding_config=config)
    np.testing.assert_array_equal(found, jax.lax.pad(X, padding, config))


@pytest.mark.parametrize("name", ["reduce_window_max", "reduce_window_min"])
@pytest.mark.parametrize("dilation", [(1, 1, 1, 1), (1, 1, 2, 1)])
def test_pools(name, dilation):
    kind, start = (jax.lax.max, -np.inf) if name.endswith("max") else (jax.lax.min, np.inf)
    params = {
        "window_dimensions": (1, 1, 3, 2), "window_strides": (1, 1, 2, 1), "padding": ((0, 0), (0, 0), (1, 0), (0, 1)),
        "base_dilation": (1, 1, 1, 1), "window_dilation": dilation,
    }  # fmt: skip
    found = CONVERTIBLE[name](jnp.asarray(X), **params)
    np.testing.assert_array_equal(found, jax.lax.reduce_window(X, start, kind, **params))


def test_padded_inputs_are_exported_for_any_number_of_examples(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")

    def apply(params, x):
        return jnp.pad(x, ((0, 0), (2, 1)), constant_values=3)[:, 1:].sum(-1, keepdims=True) + params

    # to_onnx compares the logits.
    assert kd.export.to_onnx(kd.from_function(apply, jnp.ones((1, 2))), tmp_path / "a.onnx", X[:, 0, 0]).is_file()


def scanned(reverse):
    def inner(state, one):
        return jax.lax.scan(lambda a, b: (a * b, a), state, jnp.stack([one, one]))

    def apply(params, x):
        start = params[None] + jnp.zeros_like(x[..., 0])
        last, every = jax.lax.scan(inner, start, jnp.moveaxis(x, 2, 0), reverse=reverse)
        return jnp.stack([last, every[0, 1], every[-1, 0]], 1)

    return apply


def without_steps(params, x):
    last, none = jax.lax.scan(lambda a, b: (a + b, a), x[..., 0], x[..., :0].transpose(2, 0, 1))
    return jnp.concatenate([last, none.sum(0)], 1)


AT = [
    lambda params, x: x[:, 0], lambda params, x: x[:, -1], lambda params, x: x[:, 1:3], lambda params, x: x[:, -2, 1:4],
    lambda params, x: x[..., -1],
]  # fmt: skip
ELSEWHERE = [
    lambda params, x: x[:, jnp.array([0, 2])], lambda params, x: x[:, ::-1],
    lambda params, x: jnp.take(params, x[:, 0].astype(jnp.int32), axis=0),
]  # fmt: skip
SERIES = np.moveaxis(X[:, 0], 1, 2)
HALVES = jnp.arange(5) / 2


def exported(apply):
    """The program for LiteRT, of any number of examples."""
    program = traced(kd.from_function(apply, HALVES), SERIES)._replace(instead=CONVERTIBLE_LITERT)
    return jax.export.export(jax.jit(lambda x: program(x)))(program.inputs)


@pytest.mark.parametrize("apply", [scanned(False), scanned(True), without_steps, *AT])
def test_loops_and_places_without_an_operation_of_their_own(apply):
    found = exported(apply)
    assert not re.search(r"stablehlo\.(while|\w*gather)", found.mlir_module())
    np.testing.assert_allclose(found.call(SERIES), apply(HALVES, SERIES), rtol=1e-6)


@pytest.mark.parametrize("apply", ELSEWHERE)
def test_other_places_stay_as_they_are(apply):
    found = exported(apply)
    assert re.search(r"stablehlo\.(reverse|\w*gather)", found.mlir_module())
    np.testing.assert_array_equal(found.call(SERIES), apply(HALVES, SERIES))
