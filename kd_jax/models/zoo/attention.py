"""Masked attention with gradients of its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Queries = Float[Array, "batch kv_heads group queries head_width"]
Keys = Float[Array, "batch kv_heads keys head_width"]
Mask = Bool[Array, "..."]
# The queries of a group lie in one row, one behind the other.
Merged = Float[Array, "batch kv_heads merged head_width"]
Shares = Float[Array, "batch kv_heads merged keys"]
Matrices = Float[Array, "batch kv_heads _first _second"]


class _Kept(NamedTuple):
    """For the backward pass."""

    queries: Merged
    keys: Keys
    values: Keys
    shares: Shares
    seen: Merged


@jax.custom_vjp
def masked_attention(queries: Queries, keys: Keys, values: Keys, mask: Mask) -> Queries:
    """softmax(queries · keysᵀ) · values over the keys that `mask`, broadcast to `[…, queries, keys]`, lets be seen.

    Each query must see a key. The softmax is computed in float32 at least. The gradient by the scores needs no sum over
    the keys: Σ p ∂p is the output times its gradient (Dao et al. 2022, https://arxiv.org/abs/2205.14135, B.2).
    """
    return _forward(queries, keys, values, mask)[0]


def _forward(queries: Queries, keys: Keys, values: Keys, mask: Mask) -> tuple[Queries, _Kept]:
    batch, kv_heads, group, positions, width = queries.shape
    q = queries.reshape(batch, kv_heads, group * positions, width)
    scores = _product(q, keys, 3, 3).astype(at_least_float32(q)).reshape(*queries.shape[:-1], -1)
    shares = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    shares = shares.astype(q.dtype).reshape(*q.shape[:-1], -1)
    seen = _product(shares, values, 3, 2)
    return seen.reshape(queries.shape), _Kept(q, keys, values, shares, seen)


def _backward(kept: _Kept, given: Queries) -> tuple[Queries, Keys, Keys, None]:
    q, keys, values, shares, seen = kept
    by_seen = given.reshape(q.shape)
    wide = at_least_float32(given)
    # Where the mask is False, the shares are 0, as each query sees a key, and so are these.
    inner = (seen.astype(wide) * by_seen.astype(wide)).sum(-1, keepdims=True)
    by_scores = (shares.astype(wide) * (_product(by_seen, values, 3, 3).astype(wide) - inner)).astype(given.dtype)
    by_queries = _product(by_scores, keys, 3, 2).reshape(given.shape)
    return by_queries, _product(by_scores, q, 2, 2), _product(shares, by_seen, 2, 2), None


masked_attention.defvjp(_forward, _backward)


def at_least_float32(x: Array) -> Any:
    """Float32, or the type of `x` where that is wider."""
    return x.dtype if x.dtype.itemsize > 4 else jnp.float32


def _product(a: Matrices, b: Matrices, of_a: int, of_b: int) -> Matrices:
    """Matrix products of each example and head over these two axes."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((0, 1), (0, 1))))
