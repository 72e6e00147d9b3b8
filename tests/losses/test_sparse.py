from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import proof
import pytest
from programs import compiled
from scipy import special

from kd_jax import losses
from kd_jax.errors import ConfigError
from kd_jax.losses.sparse import drawn_at, rising

RESTS = ["renormalised", "tail", "zero"]


@pytest.mark.parametrize("rest", RESTS)
def test_top_k_kl(rest: str) -> None:
    proof.assert_proven(
        partial(losses.top_k_kl, k=3, rest=rest),
        partial(oracles.top_k_kl, k=3, rest=rest),
        temperature=2.0,
    )


@pytest.mark.parametrize("rest", RESTS)
def test_top_k_at_extremes_types_modes_and_transformations(rest: str) -> None:
    proof.assert_sound(partial(losses.top_k_kl, k=3, rest=rest))


def test_all_classes_are_kd_and_the_tail_is_a_lower_bound() -> None:

    @jax.jit
    def everything(*pair: jax.Array) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        of = partial(losses.top_k_kl, *pair, temperature=2.0)
        whole = losses.kd(*pair, temperature=2.0)
        all_classes = [of(k=proof.CLASSES, rest=rest) for rest in RESTS]
        return whole, all_classes, [of(k=k, rest="tail") for k in range(1, proof.CLASSES)]

    whole, all_classes, tails = everything(*(jnp.asarray(z, jnp.float32) for z in proof.pairs()))
    for found in all_classes:
        np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
    for found in map(np.asarray, tails):
        assert (found >= 0).all()
        assert (found <= np.asarray(whole) * (1 + 1e-5) + 1e-7).all()


def test_what_is_unknown_or_out_of_bounds_is_refused() -> None:
    z = jnp.zeros((2, 5))
    with pytest.raises(ValueError, match="from 1 to 5"):
        losses.top_k_kl(z, z, k=6)
    with pytest.raises(ConfigError, match="tail"):
        losses.top_k_kl(z, z, k=2, rest="bucket")
    with pytest.raises(ValueError, match="align"):
        losses.uld(z, z[:1])


def drawn(student: jax.Array, teacher: jax.Array, samples: int, **numbers: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values, and the weights of the draws: by the student's logits the derivative is q - w."""

    @jax.jit
    def both(s: jax.Array) -> tuple[jax.Array, jax.Array]:
        def values(s: jax.Array) -> jax.Array:
            return losses.sampled_kl(s, teacher, key=jax.random.key(3), samples=samples, **numbers)

        return values(s), jax.grad(lambda s: values(s).sum())(s)

    values, gradient = both(student)
    return np.array(values), special.softmax(np.asarray(student), axis=-1) - np.asarray(gradient)


def test_the_gradient_of_samples_is_that_of_their_counts() -> None:
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(z[:4]) for z in proof.pairs())
        values, weights = drawn(student, teacher, 20)
        counts = 20 * weights
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
        np.testing.assert_allclose(counts.sum(-1), 20, rtol=1e-12)
        logs = special.log_softmax(teacher, axis=-1) - special.log_softmax(student, axis=-1)
        np.testing.assert_allclose(values, (weights * logs).sum(-1), rtol=1e-9, atol=1e-12)
        by_teacher = jax.jit(jax.grad(lambda t: losses.sampled_kl(student, t, key=jax.random.key(3)).sum()))(teacher)
        np.testing.assert_array_equal(by_teacher, 0)


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_samples_are_kd_on_average(power: float) -> None:
    """Over 40,000 draws, within 5 standard errors; reweighted ones have a bias of 1 / N of their spread."""
    student, teacher = (jnp.asarray(np.random.default_rng(i).normal(0, 1, 6), jnp.float32) for i in (0, 1))
    rows = [jnp.broadcast_to(z, (2000, 6)) for z in (student, teacher)]
    found = np.asarray(twenty_samples(*rows, key=jax.random.key(0), power=power))
    expected = float(compiled(losses.kl_divergence)(student, teacher))
    error = np.std(found) / np.sqrt(2000)
    assert abs(found.mean() - expected) < 5 * error + (0 if power == 1 else np.std(found) / 20)


twenty_samples = jax.jit(partial(losses.sampled_kl, samples=20))


def test_a_class_that_the_teacher_rules_out_is_never_drawn() -> None:
    teacher = jnp.broadcast_to(jnp.array([-jnp.inf, 0.0, -1e4, 0.0, -jnp.inf]), (50, 5))
    values, weights = drawn(jnp.zeros((50, 5)), teacher, 100)
    assert np.isfinite(values).all()
    assert np.abs(weights[:, [0, 2, 4]]).max() < 1e-6
    assert weights[:, [1, 3]].min() > 0.2


def test_no_class_of_mass_0_is_drawn_from_a_large_vocabulary() -> None:
    """XLA adds in blocks, so that a running sum of 32,000 falls by a rounding here and there."""
    rng = np.random.default_rng(0)
    mass = np.where(rng.random((64, 32000)) < 0.7, 0, np.exp(rng.normal(size=(64, 32000)))).astype(np.float32)
    sums = np.asarray(jax.jit(rising)(mass))
    assert (np.diff(sums, axis=-1) >= 0).all()
    drawn = np.asarray(jax.jit(drawn_at)(mass, rng.random((64, 2000), np.float32)))
    assert (np.take_along_axis(mass, drawn, axis=-1) > 0).all()


def test_samples_have_derivatives_of_every_kind() -> None:
    student, teacher = (jnp.asarray(z[:2], jnp.float32) for z in proof.pairs())

    def loss(s: jax.Array, temperature: Any, power: Any) -> jax.Array:
        return losses.sampled_kl(
            s, teacher, key=jax.random.key(3), samples=4, temperature=temperature, power=power
        ).sum()

    given = student, jnp.float32(2), jnp.float32(0.7)
    backward = jax.jit(jax.grad(loss, (0, 1, 2)))(*given)
    _, forward = jax.jit(lambda *x: jax.jvp(loss, x, tuple(map(jnp.ones_like, x))))(*given)
    np.testing.assert_allclose(forward, sum(x.sum() for x in backward), rtol=1e-5)


def test_uld() -> None:
    proof.assert_proven(losses.uld, oracles.uld, temperature=2.0)
    proof.assert_sound(losses.uld)


def test_uld_pads_the_smaller_vocabulary_and_knows_no_order() -> None:
    student, teacher = (jnp.asarray(z, jnp.float32) for z in proof.pairs())
    of = compiled(losses.uld)
    found = of(student[:, :4], teacher)
    rows = zip(oracles.rows(np.array(student[:, :4])), oracles.rows(np.array(teacher)), strict=True)
    expected = [float(oracles.uld(s, t, temperature=1)) for s, t in rows]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of(student[:, ::-1], teacher), of(student, teacher), rtol=1e-6)
    assert np.max(of(teacher[:, ::-1], teacher)) == 0


def known_of(teacher: np.ndarray, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k most probable classes, their log-probabilities, and what the others sum to."""
    log_p = special.log_softmax(teacher, axis=-1)
    order = np.argsort(-log_p, axis=-1, kind="stable")
    top, others = (np.take_along_axis(log_p, part, -1) for part in (order[..., :k], order[..., k:]))
    rest = special.logsumexp(others, axis=-1) if others.shape[-1] else np.full(others.shape[:-1], -np.inf)
    return jnp.asarray(order[..., :k]), jnp.asarray(top), jnp.asarray(rest)


@pytest.mark.parametrize("rest", RESTS)
def test_top_k_targets_are_top_k_kl_without_the_other_logits(rest: str) -> None:
    """Values and gradients in float64, also where fewer classes are used than are known, and all of them."""
    rng = np.random.default_rng(5)
    student, teacher = 2 * rng.normal(size=(2, 12, 9))
    temperature = 2.0 if rest == "renormalised" else 1.0
    cases = ((4, None), (4, 2), (9, None))

    @jax.jit
    def both(z: jax.Array, known: Any) -> list[Any]:
        found = []
        for (all_known, k), facts in zip(cases, known, strict=True):

            def ours(z: jax.Array, facts: Any = facts, k: Any = k) -> jax.Array:
                return losses.top_k_targets(z, *facts, k=k, temperature=temperature, rest=rest)

            def theirs(z: jax.Array, k: int = k or all_known) -> jax.Array:
                return losses.top_k_kl(z, jnp.asarray(teacher), k=k, temperature=temperature, rest=rest)

            found.append([(f(z), jax.grad(lambda z, f=f: f(z).sum())(z)) for f in (ours, theirs)])
        return found

    with jax.enable_x64(True):
        known = [known_of(teacher, all_known) for all_known, _ in cases]
        for found, wanted in both(jnp.asarray(student), known):
            np.testing.assert_allclose(found[0], wanted[0], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(found[1], wanted[1], rtol=1e-8, atol=1e-12)


def test_sampled_targets_are_the_cross_entropy_of_their_weights() -> None:
    rng = np.random.default_rng(6)
    with jax.enable_x64(True):
        z = jnp.asarray(rng.normal(size=(3, 7)))
        classes = jnp.asarray([[2, 5, 0], [1, 0, 0], [6, 3, 4]])
        weights = jnp.asarray([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [0.3, 0.9, 0.1]])
        dense = np.zeros((3, 7))
        for row, column in np.ndindex(3, 3):
            dense[row, classes[row, column]] += weights[row, column]
        log_q = special.log_softmax(np.asarray(z), axis=-1)
        values, gradient = jax.vmap(jax.value_and_grad(losses.sampled_targets))(z, classes, weights)
        np.testing.assert_allclose(values, -(dense * log_q).sum(-1), rtol=1e-12)
        np.testing.assert_allclose(gradient, np.exp(log_q) * dense.sum(-1, keepdims=True) - dense, atol=1e-12)
        ruled_out = z.at[1, 0].set(-jnp.inf)
        assert np.isfinite(losses.sampled_targets(ruled_out, classes, weights)[1])


def test_known_parts_that_do_not_fit_are_refused() -> None:
    z, (classes, logs, rest) = jnp.zeros((2, 5)), known_of(np.zeros((2, 5)), 3)
    with pytest.raises(ValueError, match="from 1 to 3, the number of classes that are known"):
        losses.top_k_targets(z, classes, logs, rest, k=4)
    with pytest.raises(ConfigError, match="tail"):
        losses.top_k_targets(z, classes, logs, rest, rest="bucket")
    with pytest.raises(ValueError, match=r"do not fit logits \[2, 5\]: give \[\.\.\., k\]"):
        losses.top_k_targets(z, classes[:1], logs, rest)
    with pytest.raises(ValueError, match=r"do not fit logits \[2, 5\]"):
        losses.sampled_targets(z, classes, logs[:1])
    assert np.isnan(losses.top_k_targets(z, classes, logs, rest, temperature=2.0)).all()
