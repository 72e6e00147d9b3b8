"""The zoo's attention: values, and gradients that are its own, against the plain form in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.zoo.attention import masked_attention


def plain(queries, keys, values, mask):
    """As the textbook has it, with gradients of JAX's own."""
    scores = jnp.einsum("bkgqd,bksd->bkgqs", queries, keys)
    scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
    return jnp.einsum("bkgqs,bksd->bkgqd", jax.nn.softmax(scores, axis=-1), values)


def arrays(dtype, *, group=2, positions=7, known=7):
    rng = np.random.default_rng(0)
    shapes = [(3, 2, group, positions, 4), (3, 2, known, 4), (3, 2, known, 4), (3, 2, group, positions, 4)]
    return [jnp.asarray(2 * rng.normal(size=shape), dtype) for shape in shapes]


def masks(positions=7, known=7):
    causal = jnp.arange(positions)[:, None] >= jnp.arange(known)[None] - (known - positions)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1] * 7, [1, 2, 3, 4, 5, 6, 7]])
    packed = causal[None] & (segments[:, :, None] == segments[:, None, :]) if known == positions else causal[None]
    packed = jnp.broadcast_to(packed, (3, positions, known))
    return {"causal": causal[None, None, None], "packed": packed[:, None, None]}


@pytest.mark.parametrize("kind", ["causal", "packed"])
@pytest.mark.parametrize("group", [1, 2])
def test_values_and_gradients_are_those_of_the_plain_form(kind, group):
    with jax.enable_x64(True):
        queries, keys, values, given = arrays(jnp.float64, group=group)
        mask = masks()[kind]
        out, back = jax.vjp(lambda *those: masked_attention(*those, mask), queries, keys, values)
        expected, plain_back = jax.vjp(lambda *those: plain(*those, mask), queries, keys, values)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-13)
        for one, other in zip(back(given), plain_back(given), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


def test_fewer_queries_than_keys():
    queries, keys, values, _ = arrays(jnp.float32, positions=2)
    mask = masks(2)["causal"]
    np.testing.assert_allclose(
        masked_attention(queries, keys, values, mask), plain(queries, keys, values, mask), rtol=1e-5, atol=1e-5
    )


def test_no_gradient_flows_through_what_is_masked():
    queries, keys, values, given = arrays(jnp.float32)
    mask = masks()["packed"]
    _, back = jax.vjp(lambda *those: masked_attention(*those, mask), queries, keys, values)
    # The third row's positions see themselves alone: a softmax of one number has no gradient.
    of_queries, of_keys, of_values = back(given)
    np.testing.assert_allclose(of_queries[2], 0, atol=1e-5)
    np.testing.assert_allclose(of_keys[2], 0, atol=1e-5)
    np.testing.assert_allclose(of_values[2], given[2].sum(1), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_computed_in_float32_within():
    queries, keys, values, given = arrays(jnp.bfloat16)
    mask = masks()["causal"]
    out, back = jax.vjp(lambda *those: masked_attention(*those, mask), queries, keys, values)
    assert out.dtype == jnp.bfloat16
    wide = [one.astype(jnp.float32) for one in (queries, keys, values)]
    expected, plain_back = jax.vjp(lambda *those: plain(*those, mask), *wide)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)
    for one, other in zip(back(given), plain_back(given.astype(jnp.float32)), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.3)


def test_of_many_parameters_at_once():
    queries, keys, values, given = arrays(jnp.float32)
    mask = masks()["causal"]

    def gradient(scale):
        return jax.grad(lambda of: jnp.vdot(masked_attention(of * queries, keys, values, mask), given))(scale)

    scales = jnp.asarray([0.5, 1.0, 2.0])
    np.testing.assert_allclose(jax.vmap(gradient)(scales), [gradient(one) for one in scales], rtol=1e-4)
