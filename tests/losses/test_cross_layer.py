from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import feature_oracles as oracles
from losses.feature_cases import assert_close, assert_is_oracle

from kd_jax.losses import cross_layer

SHAPES = [[(2, 1, 2), (1, 3)], [(2,), (2, 2)], [(1, 1, 1), (3,)]]


def pairs_of(arrays: Any) -> tuple[list[list[Any]], list[list[Any]]]:
    """Six arrays of the student and six of the teacher, as three rows of two pairs."""
    student, teacher = arrays[:6], arrays[6:12]
    return ([list(side[2 * i : 2 * i + 2]) for i in range(3)] for side in (student, teacher))


def draw_all(batch: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [shape for row in SHAPES for shape in row]
    return [rng.normal(size=(batch, *shape)) for shape in shapes * 2] + [rng.uniform(size=(batch, 3, 2))]


def test_semckd_is_the_oracle() -> None:
    def loss(*arrays: Any) -> Any:
        return cross_layer.semckd(*pairs_of(arrays), arrays[12])

    def oracle(*arrays: Any) -> Any:
        student, teacher = pairs_of(arrays)
        return oracles.semckd(
            [list(zip(*rows, strict=True)) for rows in zip(student, teacher, strict=True)], arrays[12]
        )

    assert_is_oracle(loss, oracle, *draw_all())


def test_semckd_of_an_absent_example() -> None:
    arrays = [jnp.asarray(array, jnp.float32) for array in draw_all(batch=3)]
    expected = jax.jit(lambda a: cross_layer.semckd(*pairs_of(a), a[12]))(arrays)
    holes = [array.at[1].set(jnp.nan) for array in arrays]

    def loss(arrays: Any) -> Any:
        values = cross_layer.semckd(*pairs_of(arrays), arrays[12], weights=jnp.asarray([1.0, 0, 2]))
        return values.sum(), values

    (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(holes)
    np.testing.assert_allclose(values, expected.at[1].set(0), rtol=1e-6)
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[1], 0)


def test_attention_is_a_softmax_over_the_teachers_layers() -> None:
    queries, keys = np.random.default_rng(1).normal(size=(2, 2, 2, 3))

    def oracle(q: Any, k: Any) -> Any:
        rows = [
            [oracles.softmax([oracles.dot(a, b) / 2 for b in keys]) for a in queries]
            for queries, keys in zip(q, k, strict=True)
        ]
        return np.array(rows)

    assert_is_oracle(lambda q, k: cross_layer.semckd_attention(q, k, temperature=2.0), oracle, queries, keys)


def test_similarities_are_inner_products_of_those_present() -> None:
    features = np.random.default_rng(2).normal(size=(3, 2, 2)).astype(np.float32)
    flat = features.reshape(3, -1)
    assert_close(cross_layer.semckd_similarities(jnp.asarray(features)), flat @ flat.T, rtol=1e-6)
    features[1] = np.nan
    expected = flat @ flat.T
    expected[1], expected[:, 1] = 0, 0
    assert_close(
        cross_layer.semckd_similarities(jnp.asarray(features), weights=jnp.asarray([1, 0, 5])), expected, rtol=1e-6
    )


def test_fusion() -> None:
    rng = np.random.default_rng(3)
    lower, upper, gates = rng.normal(size=(2, 4, 3, 2)), rng.normal(size=(2, 2, 1, 2)), rng.uniform(size=(2, 4, 3, 2))

    @oracles.by_example
    def oracle(x: Any, y: Any, g: Any) -> Any:
        large = np.array([[y[i // 2, 0] for _ in range(3)] for i in range(4)])
        return g[..., :1] * x + g[..., 1:] * large

    assert_is_oracle(cross_layer.reviewkd_fuse, oracle, lower, upper, gates)


def test_shapes_are_checked() -> None:
    one = jnp.ones((2, 3))
    with pytest.raises(
        ValueError, match=r"the student's pairs \[2\] and the teacher's \[1\] differ: give one list for each"
    ):
        cross_layer.semckd([[one, one]], [[one]], jnp.ones((2, 1, 2)))
    with pytest.raises(
        ValueError, match=r"an attention \[2, 2, 1\] does not fit the pairs of layers: give \[2, 1, 2\]"
    ):
        cross_layer.semckd([[one, one]], [[one, one]], jnp.ones((2, 2, 1)))
    with pytest.raises(
        ValueError, match=r"\[2, 3\] and teacher features \[2, 2\] differ in shape: apply match_space, then"
    ):
        cross_layer.semckd([[one]], [[one[:, :2]]], jnp.ones((2, 1, 1)))
    with pytest.raises(ValueError, match=r"queries \[2, 1, 3\] and keys \[2, 1, 2\] differ in dim"):
        cross_layer.semckd_attention(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 2)))
    with pytest.raises(
        ValueError, match=r"gates \[2, 4, 1\] do not fit features \[2, 4, 3\]: give two for each position"
    ):
        cross_layer.reviewkd_fuse(jnp.ones((2, 4, 3)), jnp.ones((2, 2, 3)), jnp.ones((2, 4, 1)))
    with pytest.raises(ValueError, match="give both stages the same channels"):
        cross_layer.reviewkd_fuse(jnp.ones((2, 4, 3)), jnp.ones((2, 2, 2)), jnp.ones((2, 4, 2)))


def fused_maps(arrays: Any) -> Any:
    return cross_layer.reviewkd_fuse(arrays[0], arrays[1], arrays[2])


def semckd_of(arrays: Any) -> Any:
    return cross_layer.semckd(*pairs_of(arrays), arrays[12])


@pytest.mark.parametrize("loss", [semckd_of, fused_maps])
def test_narrow_types_loops_and_seeds_change_nothing(loss: Any) -> None:
    """In bfloat16 it is computed in float32; in a vmap of seeds and in a scan of steps it has the same values."""
    rng = np.random.default_rng(2)
    maps = [rng.normal(size=shape) for shape in ((3, 2, 2, 4), (3, 2, 2, 4), (3, 2, 2, 2))]
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (draw_all(3) if loss is semckd_of else maps)]
    wide = [array.astype(jnp.float32) for array in narrow]
    found = jax.jit(loss)(narrow)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, jax.jit(loss)(wide))
    many = [jnp.stack([array, array[::-1]]) for array in wide]

    def both(arrays: Any) -> Any:
        return jax.value_and_grad(lambda given: loss(given).sum())(arrays)

    apart = [jax.jit(both)([array[place] for array in many]) for place in range(2)]
    in_turn = jax.jit(lambda many: jax.lax.scan(lambda _, one: (None, both(one)), None, many)[1])(many)
    for values, gradients in (in_turn, jax.jit(jax.vmap(both))(many)):
        for place, (value, slopes) in enumerate(apart):
            np.testing.assert_allclose(values[place], value, rtol=1e-5)
            for gradient, slope in zip(gradients, slopes, strict=True):
                assert_close(gradient[place], slope, rtol=1e-5)
