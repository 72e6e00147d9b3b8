"""Models as programs of their inputs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small import CNN, IMAGES, Residual, assert_close

import kd_jax as kd
from kd_jax.errors import ConfigError
from kd_jax.export.program import example_inputs, input_names, traced

pytestmark = pytest.mark.usefixtures("quick_compiling")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5)).astype(np.float32)
PIXELS = IMAGES.astype(np.float32)


def primitives(jaxpr):
    return {equation.primitive.name for equation in jaxpr.eqns}


def test_calls_random_numbers_and_what_is_computed_of_constants_alone_are_gone():
    model = kd.mlp([5, 4, 3], dropout=0.5).init(0)
    program = traced(model, X)
    assert primitives(program.closed.jaxpr) <= {"dot_general", "add", "max", "reshape"}
    assert program.shape == (3,)
    for count in (6, 1):
        assert_close(program(X[:count]), model(X[:count]), atol=1e-7)


@pytest.mark.parametrize(
    "model", [kd.from_nnx(CNN(rngs=nnx.Rngs(0))), kd.from_linen(Residual(), PIXELS).init(0)], ids=["nnx", "linen"]
)
def test_batch_statistics_are_constants_that_are_added_and_multiplied(model):
    program = traced(model, PIXELS)
    assert not primitives(program.closed.jaxpr) & {"rsqrt", "sub", "custom_call", "ffi_call"}
    assert_close(jax.jit(program.__call__)(PIXELS), model(PIXELS), rtol=1e-4, atol=1e-5)


def test_a_constant_that_is_taken_away_is_added():
    program = traced(kd.from_function(lambda params, x: x - params, jnp.full((1, 5), 3.0)), X)
    assert primitives(program.closed.jaxpr) == {"add"}
    np.testing.assert_array_equal(program(X), X - 3)


def test_large_constants_are_not_made_of_small_ones():
    table = kd.from_function(lambda params, x: x + jnp.zeros((300, 300)).sum() + params, jnp.ones((1, 5)))
    assert all(np.size(value) < 300 * 300 for value in traced(table, X).closed.consts)


def test_what_prepares_the_inputs_is_in_the_program():
    model = kd.from_nnx(CNN(rngs=nnx.Rngs(0)))
    program = traced(model, IMAGES, prepare=lambda key, images, train: images.astype(jnp.float32) / 255)
    assert_close(program(IMAGES), model(PIXELS / 255), rtol=1e-4, atol=1e-5)
    assert jax.tree.leaves(program.inputs)[0].dtype == np.uint8


@pytest.mark.parametrize(
    ("inputs", "names"),
    [(X, ("inputs",)), ((X, X), ("inputs_0", "inputs_1")), ({"b": X, "a": X}, ("a", "b")), ([[1.0]], ("inputs",))],
)
def test_inputs_have_names(inputs, names):
    assert input_names(inputs) == names


def test_inputs_are_made_of_shapes():
    shapes = {
        "x": jax.ShapeDtypeStruct((2, 3), jnp.float32), "tokens": jax.ShapeDtypeStruct((2, 4), jnp.int32),
        "bytes": jax.ShapeDtypeStruct((2, 500), jnp.uint8), "mask": jax.ShapeDtypeStruct((2,), jnp.bool_),
    }  # fmt: skip
    made = example_inputs(shapes, 8)
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in made.items()} == {
        "x": ((8, 3), "float32"), "tokens": ((8, 4), "int32"), "bytes": ((8, 500), "uint8"), "mask": ((8,), "bool"),
    }  # fmt: skip
    assert made["bytes"].max() > 200
    assert set(np.unique(made["tokens"])) == {0, 1}


@pytest.mark.parametrize(
    ("apply", "inputs", "says"),
    [
        (lambda params, x: x if x.shape[0] > 3 else x + 1, X, "depend on how many others there are.*batch=32"),
        (lambda params, x: x[0], X, "the first axis of both must be the examples"),
        (lambda params, x: x @ jnp.ones((4, 4)), X, "the model cannot be called with inputs of float32"),
        (lambda params, x: x, np.float32(1), "a single number"),
        (lambda params, x: x, (), "no inputs to export"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(apply, inputs, says):
    with pytest.raises(ConfigError, match=says) as caught:
        traced(kd.from_function(apply, {}), inputs)
    assert "\n" not in str(caught.value)


def test_a_model_that_asks_for_the_number_of_its_examples_is_traced_for_one():
    model = kd.from_function(lambda params, x: x.reshape(len(x), -1) @ params, jnp.ones((192, 2)))
    program = traced(model, PIXELS)
    assert jax.tree.leaves(program.inputs)[0].shape[1:] == (8, 8, 3)
    assert not isinstance(jax.tree.leaves(program.inputs)[0].shape[0], int)
    fixed = traced(model, PIXELS, batch=16)
    assert_close(fixed(PIXELS), model(PIXELS))


def test_a_model_that_counts_its_examples_has_a_fixed_number_of_them():
    model = kd.from_function(lambda params, x: x if x.shape[0] > 3 else x + 1, {})
    assert traced(model, X, batch=2).inputs.shape == (2, 5)
    np.testing.assert_array_equal(traced(model, X, batch=2)(X[:2]), X[:2] + 1)


def test_a_model_without_variables_is_refused():
    with pytest.raises(ConfigError, match="has no variables yet"):
        traced(kd.mlp([5, 3]), X)


def test_a_batch_is_as_good_as_its_inputs(tmp_path):
    model, batch = kd.mlp([5, 3]).init(0), kd.Batch(X)
    path = kd.export.to_stablehlo(model, tmp_path / "a.stablehlo", batch, platforms=("cpu",))
    assert_close(kd.predict(kd.export.from_stablehlo(path), batch), model(X), atol=1e-6)
    assert list(kd.feature_names(model, batch)) == list(kd.feature_names(model, X))
