"""A method is its loss with its weights, and cross entropy beside it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kd_jax as kd
from kd_jax import losses
from kd_jax.errors import MethodError
from kd_jax.methods.base import as_parts, terms_of
from kd_jax.methods.blocks import step_key, stored_key

RNG = np.random.default_rng(5)
STUDENT, TEACHER = (kd.Output(jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)) for _ in range(2))
LABELS = jnp.asarray(RNG.integers(0, 4, 6), jnp.int32)
BATCH = kd.Batch(jnp.zeros((6, 1)), LABELS)
Z, T = STUDENT.logits, TEACHER.logits
ALIKE = jnp.asarray(np.eye(4) * 0.6 + 0.4, jnp.float32)
KEY = jax.random.key(2)

SOFT: dict[str, tuple[Any, Any]] = {
    "ReverseKL": (kd.ReverseKL(0.3, 2.0), lambda: losses.reverse_kl(Z, T, temperature=2.0)),
    "SymmetricKL": (kd.SymmetricKL(0.3, 0.8, 2.0), lambda: losses.symmetric_kl(Z, T, skew=0.8, temperature=2.0)),
    "SkewKL": (kd.SkewKL(0.3, 0.2, 2.0), lambda: losses.skew_kl(Z, T, skew=0.2, temperature=2.0)),
    "SkewReverseKL": (kd.SkewReverseKL(0.3, 0.2, 2.0), lambda: losses.skew_reverse_kl(Z, T, skew=0.2, temperature=2.0)),
    "JSD": (kd.JSD(0.3, 0.4, 2.0, "paper"), lambda: losses.jsd(Z, T, beta=0.4, temperature=2.0, convention="paper")),
    "AdaptiveKL": (kd.AdaptiveKL(0.3, 0.6, 2.0), lambda: losses.adaptive_kl(Z, T, mu=0.6, temperature=2.0)),
    "TotalVariation": (kd.TotalVariation(0.3, 2.0), lambda: losses.total_variation(Z, T, temperature=2.0)),
    "LogitMSE": (kd.LogitMSE(0.3), lambda: losses.logit_mse(Z, T)),
    "TTM": (kd.TTM(0.3, 0.5), lambda: losses.ttm(Z, T, gamma=0.5)),
    "WTTM": (kd.WTTM(0.3, 0.5), lambda: losses.wttm(Z, T, gamma=0.5)),
    "TopKKL": (kd.TopKKL(0.3, 2, 2.0, "tail"), lambda: losses.top_k_kl(Z, T, k=2, temperature=2.0, rest="tail")),
}
BESIDE: dict[str, tuple[Any, Any]] = {
    "AlphaBeta": (
        kd.AlphaBeta(0.2, 0.7, 2.0, 0.3),
        lambda: losses.alpha_beta(Z, T, alpha=0.2, beta=0.7, temperature=2.0),
    ),
    "DKD": (kd.DKD(1.5, 6.0, 2.0, 0.3), lambda: losses.dkd(Z, T, LABELS, alpha=1.5, beta=6.0, temperature=2.0)),
    "NKD": (kd.NKD(1.2, 2.0, 0.3), lambda: losses.nkd(Z, T, LABELS, gamma=1.2, temperature=2.0)),
    "RLD": (kd.RLD(1.5, 6.0, 2.0, 0.3), lambda: losses.rld(Z, T, LABELS, alpha=1.5, beta=6.0, temperature=2.0)),
    "OFA": (kd.OFA(1.2, 2.0, 0.3), lambda: losses.ofa(Z, T, LABELS, gamma=1.2, temperature=2.0)),
    "PLD": (kd.PLD(2.0, 0.3), lambda: losses.pld(Z, T, LABELS, temperature=2.0)),
    "WKD": (
        kd.WKD(ALIKE, 2.0, 3.0, 0.1, 5, 0.3),
        lambda: losses.wkd(Z, T, LABELS, similarity=ALIKE, gamma=2.0, temperature=3.0, regulariser=0.1, iterations=5),
    ),
    "MLKD": (kd.MLKD((2.0, 4.0), 0.3), lambda: losses.mlkd(Z, T, temperature=(2.0, 4.0))),
    "ULD": (kd.ULD(2.0, 0.3), lambda: losses.uld(Z, T, temperature=2.0)),
    "SampledKL": (
        kd.SampledKL(7, 0.8, 2.0, 0.3),
        lambda: losses.sampled_kl(
            Z, T, key=step_key(stored_key(KEY), jnp.int32(0)), samples=7, power=0.8, temperature=2.0
        ),
    ),
    "DIST": (kd.DIST(1.5, 0.5, 2.0, 0.3), lambda: losses.dist(Z, T, beta=1.5, gamma=0.5, temperature=2.0)),
}


def terms(method: kd.Method, teacher: kd.Output | None = TEACHER, batch: kd.Batch = BATCH, step: int = 0) -> Any:
    parts = as_parts(method.init(KEY, STUDENT, TEACHER), method)
    return terms_of(method, parts, STUDENT, teacher, batch, jnp.int32(step))[0]


@pytest.mark.parametrize("name", SOFT)
def test_alpha_weighs_the_hard_loss_and_the_rest_the_soft_one(name: str) -> None:
    method, soft = SOFT[name]
    found = terms(method)
    assert set(found) == {"hard", "soft"}
    np.testing.assert_allclose(found["soft"], 0.7 * soft(), rtol=1e-5)
    np.testing.assert_allclose(found["hard"], 0.3 * losses.cross_entropy(Z, LABELS), rtol=1e-5)


@pytest.mark.parametrize("name", BESIDE)
def test_a_hard_loss_stands_beside_with_its_own_weight(name: str) -> None:
    method, soft = BESIDE[name]
    found = terms(method)
    assert set(found) == {"hard", "soft"}
    np.testing.assert_allclose(found["soft"], soft(), rtol=1e-5)
    np.testing.assert_allclose(found["hard"], 0.3 * losses.cross_entropy(Z, LABELS), rtol=1e-5)


@pytest.mark.parametrize("name", [*SOFT, *BESIDE])
def test_numbers_are_leaves_and_names_are_not(name: str) -> None:
    method, _ = (SOFT | BESIDE)[name]
    leaves, structure = jax.tree.flatten(method)
    assert leaves
    assert all(isinstance(leaf, float | int) or leaf is ALIKE for leaf in leaves)
    doubled = jax.tree.unflatten(structure, [2 * leaf for leaf in leaves])
    assert type(doubled) is type(method)
    assert jax.tree.structure(doubled) == structure


@pytest.mark.parametrize("name", [*SOFT, *BESIDE])
def test_without_a_teacher_it_says_so(name: str) -> None:
    method, _ = (SOFT | BESIDE)[name]
    with pytest.raises(MethodError, match=f"{name} needs a teacher"):
        terms(method, teacher=None)


@pytest.mark.parametrize(
    "method", [kd.AlphaBeta(), kd.DIST(hard=0.0), kd.SkewKL(alpha=0.0), kd.SampledKL(), kd.ULD(hard=0.0)]
)
def test_labels_are_not_needed_where_they_have_no_weight(method: kd.Method) -> None:
    assert not method.needs_labels
    assert set(terms(method, batch=kd.Batch(jnp.zeros((6, 1))))) == {"soft"}


@pytest.mark.parametrize("kind", [kd.DKD, kd.RLD])
def test_both_parts_warm_up_in_a_line(kind: type[kd.Method]) -> None:
    whole = terms(kind())["soft"]
    assert (whole > 0).all()
    for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
        np.testing.assert_allclose(terms(kind(warmup=4), step=step)["soft"], share * whole, rtol=1e-6)


def test_an_absent_example_does_not_matter_to_dist() -> None:
    some = kd.Batch(BATCH.inputs, LABELS, jnp.asarray([1, 1, 1, 1, 1, 0], jnp.float32))
    other = kd.Output(TEACHER.logits.at[5].set(7.0))
    first, second = (terms(kd.DIST(hard=0.0), teacher=one, batch=some)["soft"][:5] for one in (TEACHER, other))
    np.testing.assert_allclose(first, second, rtol=1e-6)


def test_draws_are_others_in_each_step() -> None:
    first, second = (terms(kd.SampledKL(samples=5), step=step)["soft"] for step in (0, 1))
    assert not np.array_equal(first, second)


def test_a_teacher_of_other_classes_will_do_for_uld() -> None:
    method, other = kd.ULD(hard=0.0), kd.Output(T[:, :2])
    assert not method.compares_logits
    np.testing.assert_allclose(terms(method, teacher=other)["soft"], losses.uld(Z, T[:, :2]), rtol=1e-6)
