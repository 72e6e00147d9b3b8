"""Products of the zoo's linear layers and tied heads."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.losses.softmax import is_training


def of_rows(x: Any, kernel: Any, dimensions: Any, *rest: Any, **named: Any) -> Any:
    """`jax.lax.dot_general` of a linear layer, with all axes of `x` but the last as one.

    On a CPU, XLA's gradient by the kernel over two axes takes more than twice as long.
    """
    usual = dimensions == (((x.ndim - 1,), (0,)), ((), ())) and named.get("out_sharding") is None
    if x.ndim < 3 or not usual:
        return jax.lax.dot_general(x, kernel, dimensions, *rest, **named)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), *rest, **named)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def of_embedding(x: Any, embedding: Any) -> Any:
    """x · embeddingᵀ, the logits of a tied head, `[..., width]` and `[vocabulary, width]`.

    On a CPU, XLA writes the gradient by the logits a second time, transposed, for that by the embedding, and computes
    all of the loss's gradient anew for it. In a training step a product with the unit matrix, which changes no bit of
    finite numbers, stands between: then it is the smaller factor that is transposed. It is worth it where there are
    many more rows than columns.
    """
    if not is_training() or jax.default_backend() != "cpu" or not jax.typeof(embedding).sharding.mesh.empty:
        return jnp.matmul(x, embedding.T)
    width, rows = x.shape[-1], math.prod(x.shape[:-1])
    if rows < 8 * width:
        return jnp.matmul(x, embedding.T)
    unit = jnp.eye(width, dtype=embedding.dtype)
    turned = jax.lax.dot_general(unit, embedding, (((1,), (1,)), ((), ())), precision="highest")
    return jnp.matmul(x.reshape(rows, width), turned).reshape(*x.shape[:-1], -1)


class Embedding(nnx.Embed):
    """Flax's, whose `attend` is `of_embedding`."""

    def attend(self, query: Any, out_sharding: Any = None) -> Any:
        """Logits of each row of the table, `[..., vocabulary]`, of hidden states `[..., width]`."""
        if out_sharding is not None:
            return super().attend(query, out_sharding=out_sharding)
        return of_embedding(*self.promote_dtype((query, self.embedding[...]), dtype=self.dtype))
