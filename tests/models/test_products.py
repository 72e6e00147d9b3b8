"""The products of the zoo's linear layers and tied heads are those that they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax import losses
from kd_jax.losses.softmax import in_training
from kd_jax.models.products import of_embedding, of_rows

ROWS, WIDTH, VOCABULARY = (16, 32), 16, 96
RNG = np.random.default_rng(0)
EMBEDDING = RNG.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [(), (3,), ROWS])
def test_a_tied_head_is_the_product_with_the_embedding(rows: tuple[int, ...], dtype: jnp.dtype) -> None:
    """Of many rows and of few; with its gradients by both."""
    x, embedding = (jnp.asarray(array, dtype) for array in (RNG.normal(size=(*rows, WIDTH)), EMBEDDING))
    given = jnp.asarray(RNG.normal(size=(*rows, VOCABULARY)), dtype)
    with in_training():
        found, back = jax.vjp(of_embedding, x, embedding)
    wide = [jnp.asarray(array, jnp.float32) for array in (x, embedding, given)]
    expected, plain = jax.vjp(lambda x, embedding: jnp.matmul(x, embedding.T), *wide[:2])
    assert found.dtype == dtype
    bounds = {"rtol": 1e-5, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 0.5}
    for own, other in zip((found, *back(given)), (expected, *plain(wide[2])), strict=True):
        np.testing.assert_allclose(np.asarray(own, np.float32), other, **bounds)


def test_the_gradient_by_the_logits_is_not_written_a_second_time() -> None:
    """The compiled gradient of a distilled head has no array of the transposed shape of its logits."""
    x = RNG.normal(size=(*ROWS, WIDTH)).astype(np.float32)
    teacher = RNG.normal(size=(*ROWS, VOCABULARY)).astype(np.float32)

    def loss(x: jax.Array, embedding: jax.Array) -> jax.Array:
        with in_training():
            return losses.kd(of_embedding(x, embedding), teacher, temperature=2.0).sum()

    program = jax.jit(jax.grad(loss, (0, 1))).lower(x, EMBEDDING).compile().as_text()
    assert f"[{VOCABULARY},{np.prod(ROWS)}]" not in program
    assert f"[{np.prod(ROWS)},{VOCABULARY}]" in program


def test_outside_of_a_training_step_it_is_the_plain_product() -> None:
    """An exported program may have any number of rows, and has no unit matrix."""
    rows = jax.export.symbolic_shape("rows, 32")
    x = jax.ShapeDtypeStruct((*rows, WIDTH), jnp.float32)
    program = jax.export.export(jax.jit(lambda x: of_embedding(x, EMBEDDING)))(x)
    assert "iota" not in program.mlir_module()
    found = program.call(RNG.normal(size=(*ROWS, WIDTH)).astype(np.float32))
    assert found.shape == (*ROWS, VOCABULARY)


def test_a_linear_layer_of_several_axes_is_its_product_of_rows() -> None:
    x, kernel = RNG.normal(size=(*ROWS, WIDTH)).astype(np.float32), EMBEDDING.T
    dimensions = (((2,), (0,)), ((), ()))
    np.testing.assert_allclose(of_rows(x, kernel, dimensions), x @ kernel, rtol=1e-5, atol=1e-5)
