"""Every divergence of a large vocabulary, in float64, against an oracle."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import linear_oracles as oracle

from kd_jax import losses

TOKENS, REAL = 6, 11
RNG = np.random.default_rng(5)
STUDENT = tuple(RNG.normal(size=shape) for shape in ((TOKENS, 3), (3, 13), (13,)))
TEACHER = tuple(RNG.normal(size=shape) for shape in ((TOKENS, 4), (4, 12), (12,)))
WEIGHTS = np.array([1.0, 0.5, 0.0, 2.0, 1.0, 0.3])
LABELS = np.array([3, 0, -100, 10, 5, 5], np.int32)
SETTING: dict[str, Any] = {"temperature": 1.7, "alpha": 0.3}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("kl", {}),
    ("reverse_kl", {}),
    ("symmetric_kl", {}),
    ("skew_kl", {}),
    ("skew_reverse_kl", {}),
    ("skew_reverse_kl", {"skew": 0.4, "detached": True}),
    ("jsd", {"beta": 0.3}),
    ("jsd", {"beta": 0.3, "convention": "continuous"}),
    ("jsd", {"beta": 0.0, "convention": "continuous"}),
    ("jsd", {"beta": 1.0, "convention": "continuous"}),
    ("alpha_beta", {}),
    ("alpha_beta", {"exponents": (0.0, 0.6)}),
    ("alpha_beta", {"exponents": (0.6, 0.0)}),
    ("alpha_beta", {"exponents": (0.6, -0.6)}),
    ("total_variation", {}),
    ("adaptive_kl", {"mu": 0.6}),
    ("top_k_kl", {"k": 4}),
    ("top_k_kl", {"k": 4, "rest": "renormalised"}),
    ("top_k_kl", {"k": 4, "rest": "zero"}),
    ("sampled_kl", {"samples": 5}),
    ("sampled_kl", {"samples": 9, "power": 0.7}),
]
pytestmark = pytest.mark.usefixtures("quick_compiling")


def network(parts: tuple[np.ndarray, ...]) -> list[jax.Array]:
    """Hidden states, head and bias, of which the token of weight 0 is NaN."""
    hidden = parts[0].copy()
    hidden[WEIGHTS == 0] = np.nan
    return [jnp.asarray(x) for x in (hidden, *parts[1:])]


def fused(*student: jax.Array, teacher: Any, **options: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sum, and what is beside it."""
    total, weight, values = losses.linear_divergence(
        student[0], student[1], teacher[0], teacher[1], student_bias=student[2], teacher_bias=teacher[2], **options
    )
    return total, (weight, values)


@pytest.mark.parametrize(("divergence", "numbers"), CASES, ids=lambda case: str(case))
def test_values_and_gradients_are_those_of_the_oracle(divergence: str, numbers: dict[str, Any]) -> None:
    """With padded heads, biases, caps, labels, weights, a token of NaN, and chunks that do not divide the tokens."""
    kept = WEIGHTS > 0
    labels, weights = LABELS[kept], WEIGHTS[kept]
    own, drawn = dict(numbers), dict(numbers)
    if divergence == "sampled_kl":
        own["key"] = jax.random.key(3)
        with jax.enable_x64(True):
            draws = jax.random.uniform(own["key"], (TOKENS, drawn.pop("samples")), jnp.float64)
        drawn["draws"] = np.asarray(draws)[kept]
    options = {"divergence": divergence, "labels": labels, "caps": (5.0, 3.0), "vocabulary": REAL, **SETTING, **drawn}

    def exact(hidden: np.ndarray, head: np.ndarray, bias: np.ndarray) -> Any:
        return oracle.values((hidden[kept], head, bias), (TEACHER[0][kept], *TEACHER[1:]), **options)

    wanted = oracle.gradients(lambda *arrays: (weights * exact(*arrays)).sum(), STUDENT)
    with jax.enable_x64(True):
        given = {
            "labels": jnp.asarray(LABELS),
            "weights": jnp.asarray(WEIGHTS),
            "vocabulary": REAL,
            **SETTING,
            **own,
        }
        form = partial(fused, teacher=network(TEACHER), divergence=divergence, soft_cap=(5.0, 3.0), chunk=4, **given)
        derived = jax.jit(jax.value_and_grad(form, (0, 1, 2), has_aux=True))
        (total, (weight, values)), gradients = derived(*network(STUDENT))
        np.testing.assert_allclose(values[kept], exact(*STUDENT).real, rtol=1e-11)
        np.testing.assert_array_equal(values[~kept], 0)
        np.testing.assert_allclose(total, (weights * exact(*STUDENT).real).sum(), rtol=1e-12)
        np.testing.assert_allclose(weight, WEIGHTS.sum())
        for found, by in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(found, by, rtol=1e-9, atol=1e-11 * np.abs(by).max())
        assert not gradients[1][:, REAL:].any()
