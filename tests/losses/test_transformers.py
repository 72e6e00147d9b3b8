"""Masks, keys and heads of transformers' losses. See also `test_feature_oracles`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import feature_oracles as oracles
from losses.feature_cases import assert_close, assert_is_oracle, draw, floats
from programs import with_gradients

from kd_jax.errors import ShapeError
from kd_jax.losses import transformers

MASK = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]])


def test_minilm_leaves_padding_out() -> None:
    student, teacher = draw("minilm_relations")
    assert_is_oracle(
        partial(transformers.minilm_relations, heads=2, mask=MASK),
        lambda s, t: oracles.minilm(np.stack([s, s]), np.stack([t, t]), MASK, 2),
        student,
        teacher,
    )


@pytest.mark.parametrize("heads", [1, 2])
def test_minilm_of_queries_and_keys_is_its_attention(heads: int) -> None:
    rng = np.random.default_rng(1)
    (s, s_keys), (t, t_keys) = rng.normal(size=(2, 2, 3, 4)), rng.normal(size=(2, 2, 3, 2))

    def loss(s, s_keys, t, t_keys):
        return transformers.minilm_relations(s, t, heads=heads, student_keys=s_keys, teacher_keys=t_keys)

    def oracle(s, s_keys, t, t_keys):
        return oracles.minilm(np.stack([s, s_keys]), np.stack([t, t_keys]), np.ones((2, 3)), heads)

    assert_is_oracle(loss, oracle, s, s_keys, t, t_keys)


def test_minilm_takes_queries_as_flax_has_them() -> None:
    """A head's axis apart is the same as all heads side by side, and other axes are told as such."""
    rng = np.random.default_rng(2)
    s, t = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(2, 3, 6)).astype(np.float32)
    for heads in (1, 2):
        apart = transformers.minilm_relations(s.reshape(2, 3, 2, 2), t.reshape(2, 3, 2, 3), heads=heads)
        np.testing.assert_array_equal(apart, transformers.minilm_relations(s, t, heads=heads))
    with pytest.raises(ShapeError, match="have other axes"):
        transformers.minilm_relations(s[0], t[0], heads=1)


def test_minilm_is_blind_to_rotations_within_a_head() -> None:
    student, teacher = draw("minilm_relations")
    turn = np.kron(np.eye(2), [[0.6, -0.8], [0.8, 0.6]])
    loss = jax.jit(partial(transformers.minilm_relations, heads=2))
    with jax.enable_x64(True):
        assert_close(
            loss(*map(jnp.asarray, (student @ turn, teacher))), loss(*map(jnp.asarray, (student, teacher))), rtol=1e-12
        )


def test_attention_maps_leave_padding_out() -> None:
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(size=(2, 4, 2, 2, 3))
    assert_is_oracle(
        partial(transformers.attention_maps, mask=MASK),
        lambda s, t: oracles.attention_maps(s, t, MASK),
        student,
        teacher,
    )


def test_causal_scores_count_what_they_have() -> None:
    """Each query by its own keys, against the plain mean over them."""
    rng = np.random.default_rng(4)
    student, teacher = rng.normal(size=(2, 1, 2, 3, 3)).astype(np.float32)
    causal = [jnp.where(np.tri(3, dtype=bool), z, -jnp.inf) for z in (student, teacher)]
    (found, gradients) = with_gradients(transformers.attention_maps, (0, 1))(*causal)
    wanted = [np.square(student - teacher)[0, :, query, : query + 1].mean() for query in range(3)]
    np.testing.assert_allclose(found, [wanted], rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    # What one alone rules out is no score of the other.
    assert np.isposinf(transformers.attention_maps(causal[0], jnp.asarray(teacher))[0, 0])


@pytest.mark.parametrize("name", ["attention_maps", "minilm_relations"])
@pytest.mark.parametrize("hole", [np.nan, -np.inf, 1e30])
def test_padding_may_hold_anything(name: str, hole: float) -> None:
    rng = np.random.default_rng(3)
    shape = (4, 2, 2, 3) if name == "attention_maps" else (4, 3, 4)
    loss = {
        "attention_maps": transformers.attention_maps,
        "minilm_relations": partial(transformers.minilm_relations, heads=2),
    }[name]
    arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(2)]
    where = (
        np.broadcast_to(MASK[:, None, None] == 0, shape)
        if len(shape) == 4
        else np.broadcast_to(MASK[..., None] == 0, shape)
    )
    both = jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(loss(s, t, mask=jnp.asarray(MASK))), (0, 1)))
    expected, exact = both(*map(jnp.asarray, arrays))
    found, gradients = both(*(jnp.asarray(np.where(where, np.float32(hole), array)) for array in arrays))
    assert float(found) == float(expected)
    for gradient, other in zip(gradients, exact, strict=True):
        np.testing.assert_array_equal(gradient, other)
        np.testing.assert_array_equal(np.asarray(gradient)[where], 0)


def test_cosine_of_zeros_and_of_near_and_opposite_states() -> None:
    states = jnp.asarray([[[0.0, 0], [1, 0], [3, 4], [1, 0]]])
    others = jnp.asarray([[[1.0, 2], [-2, 0], [6, 8], [1, 1e-4]]])
    found = transformers.cosine(states, others)
    np.testing.assert_allclose(found, [[1, 2, 0, 5e-9]], rtol=1e-4, atol=1e-12)
    np.testing.assert_array_equal(jax.grad(lambda s: transformers.cosine(s, others)[0, 0])(states), 0)


def test_shapes_are_checked() -> None:
    states, _ = floats("minilm_relations")
    minilm = transformers.minilm_relations
    with pytest.raises(
        ValueError, match=r"3 heads do not divide the width of \[4, 3, 4\]: choose a divisor of the width"
    ):
        minilm(states, states, heads=3)
    with pytest.raises(ValueError, match="keys of one network alone were given: give both"):
        minilm(states, states, heads=2, student_keys=states)
    with pytest.raises(ValueError, match=r"keys \[4, 3, 2\] and queries \[4, 3, 4\] differ in shape"):
        minilm(states, states, heads=2, student_keys=states[..., :2], teacher_keys=states)
    with pytest.raises(ValueError, match=r"\[4, 3, 4\] and teacher features \[4, 2, 4\] differ in positions"):
        minilm(states, states[:, :2], heads=2)
    with pytest.raises(ValueError, match=r"a mask \[4, 2\] does not fit features \[4, 3, 4\]: give \[4, 3\]"):
        minilm(states, states, heads=2, mask=jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"attention maps \[4, 3, 4\] need \[batch, heads, queries, keys\]"):
        transformers.attention_maps(states, states)
    with pytest.raises(ValueError, match="choose layers of as many heads, or average both over their heads"):
        transformers.attention_maps(jnp.ones((1, 2, 3, 3)), jnp.ones((1, 4, 3, 3)))


@pytest.mark.parametrize("loss", ["minilm", "attention maps"])
def test_packed_sequences_are_compared_as_each_alone(loss: str) -> None:
    rng = np.random.default_rng(3)
    segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
    mask = segments != 0
    if loss == "minilm":
        student, teacher = rng.normal(size=(2, 2, 5, 4)).astype(np.float32)
        compare = partial(transformers.minilm_relations, heads=2)
    else:
        student, teacher = rng.normal(size=(2, 2, 3, 5, 5)).astype(np.float32)
        compare = transformers.attention_maps
    found = np.asarray(compare(student, teacher, mask=mask, segments=segments))
    for row, first, last in [(0, 0, 2), (0, 2, 5), (1, 0, 4)]:
        here = slice(first, last)
        pair = [one[row : row + 1, here] if loss == "minilm" else one[row : row + 1, :, here, here]
                for one in (student, teacher)]  # fmt: skip
        np.testing.assert_allclose(found[row, here], compare(*pair)[0], rtol=1e-5, atol=1e-7)
    with pytest.raises(ShapeError, match=r"segments \[2, 4\] do not fit"):
        compare(student, teacher, segments=segments[:, :4])


def test_segments_of_one_sequence_do_not_fit_queries_and_keys_of_two() -> None:
    scores = np.zeros((2, 3, 4, 6), np.float32)
    with pytest.raises(ShapeError, match="have other queries than keys"):
        transformers.attention_maps(scores, scores, segments=np.ones((2, 6), np.int32))
