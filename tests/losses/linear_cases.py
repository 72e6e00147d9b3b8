"""Small hidden states and heads, and the plain form of a loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax import losses


def arrays(kind: Any = jnp.float32, tokens: int = 10, columns: int = 40) -> list[jax.Array]:
    """Hidden states and head of a student and of a teacher."""
    rng = np.random.default_rng(3)
    shapes = (tokens, 5), (5, columns), (tokens, 8), (8, columns)
    return [jnp.asarray(rng.normal(size=shape), kind) for shape in shapes]


def derived(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The first of what a loss returns, and its gradients by the student."""
    return jax.jit(jax.value_and_grad(lambda h, w, *more: loss(h, w, *more)[0], (0, 1)))


def whole(name: str, **numbers: Any) -> Callable[..., Any]:
    """The same from all logits."""

    def loss(h: jax.Array, w: jax.Array, ht: jax.Array, wt: jax.Array) -> tuple[jax.Array]:
        return (jnp.sum(getattr(losses, name)(h @ w, ht @ wt, **numbers)),)

    return loss


def assert_close(found: Any, wanted: Any, rtol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())
