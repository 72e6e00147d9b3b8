"""The zoo's transformer: causality, packed rows, features, and what it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kd_jax as kd
from kd_jax.data import tokens as of_tokens
from kd_jax.errors import ConfigError, ShapeError
from kd_jax.models import count_parameters
from kd_jax.models.zoo.transformer import RopeScaling, rope_frequencies, transformer

pytestmark = pytest.mark.usefixtures("quick_compiling")
SMALL = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return kd.from_nnx(lambda rngs: transformer(**SMALL, qk_norm=True, qkv_bias=True, rngs=rngs)).init(0)


def loud(model):
    """With weights of a size that every path shows in the logits."""
    return kd.Model(model.network, jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, model.variables))


def test_the_default_has_as_many_parameters_as_its_docstring_says():
    shapes = nnx.eval_shape(lambda: transformer(rngs=nnx.Rngs(0)))
    count = count_parameters(nnx.to_pure_dict(nnx.state(shapes, nnx.Param)))
    assert f"{count:,} parameters" in transformer.__doc__
    assert count == 256 * 128 + 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128


def test_a_position_sees_itself_and_those_before(model):
    before = np.asarray(loud(model)(TOKENS))
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 256
    after = np.asarray(loud(model)(changed))
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (np.abs(after[:, 4:] - before[:, 4:]).max(axis=-1) > 1e-3).all()


def test_packed_sequences_have_the_logits_of_each_alone(model):
    sequences = [TOKENS[0, :3], TOKENS[1, :4], TOKENS[0, 3:6]]
    packed, segments = of_tokens.pack(sequences, 8)
    batch = of_tokens.token_batch(packed, segments=segments)
    found = np.asarray(loud(model)(batch.inputs))
    assert np.isfinite(found).all()
    places = [(row, at) for row, of in enumerate(segments) for at in range(8) if of[at]]
    together = np.stack([found[place] for place in places])
    order = [sequences[0], sequences[1], sequences[2]]
    alone = np.concatenate([np.asarray(loud(model)(one[None]))[0] for one in order])
    np.testing.assert_allclose(together, alone, rtol=2e-4, atol=2e-4)


def test_features_hold_the_hidden_states_of_the_head(model):
    output = model(TOKENS, features=["norm", "layers.1.self_attn"])
    head = np.asarray(model.variables["params"]["embed_tokens"]["embedding"])
    np.testing.assert_allclose(output.logits, np.asarray(output.features["norm"]) @ head.T, rtol=1e-4, atol=1e-5)
    assert output.features["layers.1.self_attn"].shape == (2, 7, 16)


def test_remat_has_the_same_values_and_gradients():
    def gradients(remat):
        model = kd.from_nnx(lambda rngs: transformer(**SMALL, tied=False, remat=remat, rngs=rngs)).init(0)

        def loss(params):
            output = model.network.apply({"params": params, "state": {}}, TOKENS, train=True)[0]
            return jnp.mean(kd.losses.cross_entropy(output.logits, TOKENS))

        program = jax.make_jaxpr(jax.grad(loss))(model.variables["params"])
        return jax.jit(jax.value_and_grad(loss))(model.variables["params"]), str(program)

    (plain, without), (again, with_remat) = gradients(False), gradients(True)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert "remat" in with_remat
    assert "remat" not in without


def test_bfloat16_parameters_give_bfloat16_logits_near_those_of_float32():
    made = kd.from_nnx(lambda rngs: transformer(**SMALL, rngs=rngs)).init(0)
    half = kd.from_nnx(lambda rngs: transformer(**SMALL, param_dtype=jnp.bfloat16, rngs=rngs)).init(0)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.variables)} == {jnp.dtype(jnp.bfloat16)}
    found, wanted = half(TOKENS), made(TOKENS)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), wanted, atol=0.03 * float(jnp.abs(wanted).max()))


def test_long_wavelengths_are_stretched_and_short_ones_stay():
    plain = np.asarray(rope_frequencies(64, 500_000.0, None), np.float64)
    np.testing.assert_allclose(plain, 500_000.0 ** (-np.arange(0, 64, 2) / 64), rtol=1e-5)
    found = np.asarray(rope_frequencies(64, 500_000.0, RopeScaling(8.0, 1.0, 4.0, 8192)))
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(found[waves > 8192], plain[waves > 8192] / 8, rtol=1e-5)
    np.testing.assert_allclose(found[waves < 2048], plain[waves < 2048], rtol=1e-5)
    between = (waves > 2048) & (waves < 8192)
    assert between.any()
    assert ((found < plain) & (found > plain / 8))[between].all()


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"heads": 3, "kv_heads": 2}, "multiple of kv_heads"),
        ({"width": 18}, "multiple of heads"),
        ({"width": 12}, "even head_width"),
        ({"layers": 0}, "at least 1"),
        ({"param_dtype": "foo"}, "param_dtype is 'foo': give a type of floats"),
        ({"param_dtype": jnp.int32}, "param_dtype is .*int32.*: give a type of floats"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers, said):
    with pytest.raises(ConfigError, match=said) as error:
        transformer(**{**SMALL, **numbers}, rngs=nnx.Rngs(0))
    assert "\n" not in str(error.value)


def test_segments_of_another_shape_are_refused(model):
    with pytest.raises(ShapeError, match="segments and positions alike"):
        model({"tokens": TOKENS, "segments": TOKENS[:, :3], "positions": TOKENS})


def test_padding_may_be_a_token_that_has_no_embedding(model):
    tokens = np.int32([[1, 2, 3, 0, 0]])
    segments = np.int32([[1, 1, 1, 0, 0]])
    wanted = model({"tokens": tokens, "segments": segments})
    found = model({"tokens": np.where(segments == 0, 256, tokens), "segments": segments})
    np.testing.assert_array_equal(found, wanted)
    assert np.isfinite(np.asarray(wanted)).all()


def test_rotations_are_computed_once_for_all_layers_heads_and_gradients(model):
    tokens = jnp.asarray(TOKENS)
    apply, variables = model.network.apply, model.variables

    def loss(params):
        return apply(variables | {"params": params}, tokens, train=False)[0].logits.sum()

    program = jax.jit(jax.grad(loss)).lower(variables["params"]).compile().as_text()
    assert len(re.findall(r" cosine\(", program)) == 1


def test_logits_are_float32_where_float64_is_on(model):
    with jax.enable_x64(True):
        assert model(TOKENS).dtype == jnp.float32
