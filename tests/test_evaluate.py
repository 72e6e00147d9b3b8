import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from kd_jax.evaluate import calibration_error, evaluate, predict
from kd_jax.models.network import mlp


def oracle_ece(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Guo et al. (2017), equation 3, bin by bin."""
    p = np.float64(special.softmax(logits, axis=-1))
    confidence, right = p.max(-1), p.argmax(-1) == labels
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
    return total / len(labels)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 80, 1000]))
def test_measures_equal_their_definitions(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    logits, teacher = rng.normal(0, 3, (2, n, 5)).astype(np.float32)
    labels = rng.integers(0, 5, n)
    found = evaluate(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(teacher))
    answers = logits.argmax(-1)
    assert found.correct == (answers == labels).sum()
    assert found.correct + found.errors == n
    log_p, log_t = (special.log_softmax(np.float64(z), axis=-1) for z in (logits, teacher))
    np.testing.assert_allclose(found.nll, -log_p[np.arange(n), labels].mean(), rtol=1e-5)
    # The nearest float32, as people who divide the counts find.
    assert found.accuracy == np.float32((answers == labels).mean())
    assert found.teacher_agreement == np.float32((answers == teacher.argmax(-1)).mean())
    np.testing.assert_allclose(found.kl_to_teacher, (np.exp(log_t) * (log_t - log_p)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(found.ece, oracle_ece(logits, labels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [60, 1000, 10_000])
@pytest.mark.parametrize("taught", [True, False])
def test_fractions_are_the_nearest_float32_of_one_network_and_of_many(count: int, taught: bool) -> None:
    """Of the counts that a multiplication by the inverse would round otherwise."""
    all_counts = np.arange(count + 1, dtype=np.float32)
    exact = all_counts / np.float32(count)
    (right,) = np.nonzero(all_counts * (np.float32(1) / np.float32(count)) != exact)
    right = right[:: -(-len(right) // 20)]
    assert len(right)
    logits = jnp.asarray(np.stack([np.arange(count) < one for one in right])[..., None] * np.float32([0, 1]))
    teacher = jnp.zeros((count, 2)).at[:, 1].set(1) if taught else None
    together = jax.vmap(evaluate, in_axes=(0, None, None))(logits, jnp.ones(count, jnp.int32), teacher)
    alone = [evaluate(one, jnp.ones(count, jnp.int32), teacher) for one in logits]
    np.testing.assert_array_equal(together.accuracy, exact[right])
    np.testing.assert_array_equal([one.accuracy for one in alone], exact[right])
    if taught:
        np.testing.assert_array_equal(together.teacher_agreement, exact[right])
        np.testing.assert_array_equal([one.teacher_agreement for one in alone], exact[right])


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize(("batch_size", "dtype"), [(1, "float32"), (4, "float32"), (1000, "float32"), (4, "float64")])
def test_logits_are_averaged_over_every_shift(shift: int, batch_size: int, dtype: str) -> None:
    rng = np.random.default_rng(shift)
    images = rng.integers(0, 256, (9, 5, 4, 2)).astype(np.uint8)
    network = mlp([40, 7, 3])
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    with jax.enable_x64(dtype == "float64"):
        params, state = network.init(jax.random.key(0))
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        how = {"network": network, "dtype": jnp.dtype(dtype)}
        expected = np.zeros((9, 3))
        for down in range(2 * shift + 1):
            for right in range(2 * shift + 1):
                view = jnp.asarray(padded[:, down : down + 5, right : right + 4])
                expected += np.asarray(predict(params, state, view, **how))
        expected /= (2 * shift + 1) ** 2
        found = predict(params, state, jnp.asarray(images), batch_size=batch_size, shift=shift, **how)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shift", [-1, 2])
def test_a_shift_out_of_sight_is_refused(shift: int) -> None:
    network = mlp([6, 3])
    params, state = network.init(jax.random.key(0))
    with pytest.raises(ValueError, match=f"shift is {shift}: it must be from 0 to 1, less than the images' 2 pixels"):
        predict(params, state, jnp.zeros((1, 3, 2, 1), jnp.uint8), network=network, shift=shift)


def test_certain_and_right_is_calibrated_and_certain_and_wrong_is_not() -> None:
    logits = jnp.eye(3) * 100
    assert calibration_error(logits, jnp.arange(3)) == pytest.approx(0, abs=1e-6)
    assert calibration_error(logits, (jnp.arange(3) + 1) % 3) == pytest.approx(1, abs=1e-6)


def test_a_bin_of_the_calibration_error_holds_its_upper_edge_and_not_its_lower() -> None:
    certain, nearly = [100.0, 0.0], [3.0, 0.0]
    confidence = float(special.expit(3.0))
    assert confidence > 14 / 15
    found = calibration_error(jnp.array([certain, nearly]), jnp.array([1, 0]))
    assert found == pytest.approx(((1 - 0) - (1 - confidence)) / 2)
    # Of two bins, a confidence of exactly 1/2 lies in the first, 3/4 in the second.
    even, sure = [0.0, 0.0], [float(np.log(3)), 0.0]
    found = calibration_error(jnp.array([even, sure]), jnp.array([1, 0]), bins=2)
    assert found == pytest.approx((0.5 + 0.25) / 2)


def test_without_a_teacher_there_is_no_agreement() -> None:
    found = evaluate(jnp.eye(3), jnp.arange(3))
    assert found.teacher_agreement is None
    assert found.kl_to_teacher is None


@pytest.mark.parametrize("batch_size", [1, 7, 20, 1000])
def test_predictions_do_not_depend_on_the_batch(batch_size: int) -> None:
    network = mlp([36, 8, 3], dropout=0.5)
    params, state = network.init(jax.random.key(0))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (20, 6, 6, 1)), jnp.uint8)
    found = predict(params, state, images, network=network, batch_size=batch_size)
    pixels = images.astype(jnp.float32) / 255
    expected = network.apply(params, state, pixels, train=False, key=jax.random.key(9))[0].logits
    assert found.shape == (20, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
