"""Measures of language models from the negative log-likelihoods of their tokens."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped

from kd_jax.errors import ShapeError

Values = Shaped[Array | np.ndarray, "..."]


def perplexity(nll: Values, weights: Values | None = None) -> Float[Array, ""]:
    r"""$\exp(\sum_i w_i \ell_i / \sum_i w_i)$ of negative log-likelihoods ℓ in nats, `[...]`.

    Of all tokens together: the mean of the perplexities of batches is another, larger number.

    nll: as of `kd.losses.cross_entropy`. weights: `[...]`; a token of weight 0 counts for nothing, whatever it holds.
    NaN of nothing.
    """
    nll, weights = _pair(nll, weights, "weights")
    return jnp.exp(_total(nll, weights) / jnp.sum(weights))


def bits_per_byte(nll: Values, byte_counts: Values, weights: Values | None = None) -> Float[Array, ""]:
    r"""$\sum_i w_i \ell_i / (\ln 2 \sum_i w_i b_i)$: bits for each byte of text, which compares vocabularies.

    nll: ℓ, negative log-likelihoods in nats, `[...]`. byte_counts: b, how many bytes of text each label stands for,
    `[...]`; 1 where tokens are bytes, 0 for a sign that ends a text. weights: `[...]`, as of `perplexity`.
    """
    nll, counts = _pair(nll, byte_counts, "byte_counts")
    nll, weights = _pair(nll, weights, "weights")
    return _total(nll, weights) / (float(np.log(2)) * jnp.sum(weights * counts))


def of_tokens(nll: float) -> dict[str, np.float32]:
    """Measures of positions from their mean negative log-likelihood in nats, by name: perplexity, and bits per token.

    Bits per token are bits per byte where tokens are bytes.
    """
    with np.errstate(over="ignore"):
        return {"perplexity": np.float32(np.exp(nll)), "bits_per_token": np.float32(nll / np.log(2))}


def _pair(nll: Values, others: Values | None, name: str) -> tuple[Num[Array, "..."], Num[Array, "..."]]:
    """Floats of at least 32 bits, of the same shape."""
    nll = jnp.asarray(nll)
    nll = nll.astype(nll.dtype if jnp.issubdtype(nll.dtype, jnp.floating) and nll.dtype.itemsize > 2 else jnp.float32)
    others = jnp.ones_like(nll) if others is None else jnp.asarray(others).astype(nll.dtype)
    if others.shape != nll.shape:
        raise ShapeError(f"{name} {list(others.shape)} do not fit nll {list(nll.shape)}: give one for each token")
    return nll, others


def _total(nll: Array, weights: Array) -> Array:
    return jnp.sum(jnp.where(weights == 0, 0, nll) * weights)
