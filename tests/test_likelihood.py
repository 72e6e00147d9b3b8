import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import ShapeError
from kd_jax.likelihood import bits_per_byte, perplexity


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary_and_the_bits_of_its_tokens() -> None:
    nll = jnp.full((3, 5), jnp.log(256.0))
    np.testing.assert_allclose(perplexity(nll), 256, rtol=1e-5)
    np.testing.assert_allclose(bits_per_byte(nll, jnp.ones((3, 5))), 8, rtol=1e-6)
    np.testing.assert_allclose(bits_per_byte(nll, jnp.full((3, 5), 4)), 2, rtol=1e-6)


def test_weights_count_and_what_has_none_may_be_anything() -> None:
    rng = np.random.default_rng(0)
    nll, counts = rng.uniform(0, 5, (4, 6)), rng.integers(0, 5, (4, 6))
    weights = rng.integers(0, 3, (4, 6)).astype(float)
    wanted = (weights * nll).sum() / weights.sum(), (weights * nll).sum() / np.log(2) / (weights * counts).sum()
    nll[weights == 0] = np.nan
    found = jax.jit(perplexity)(nll, weights), jax.jit(bits_per_byte)(nll, counts, weights)
    np.testing.assert_allclose(found, (np.exp(wanted[0]), wanted[1]), rtol=1e-5)
    assert perplexity(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
    assert jnp.isnan(perplexity(jnp.ones(3), jnp.zeros(3)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"weights \[3\] do not fit nll \[2\]: give one for each token"):
        perplexity(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ShapeError, match="byte_counts"):
        bits_per_byte(jnp.ones(2), jnp.ones(3))
