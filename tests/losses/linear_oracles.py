"""The loss of hidden states and heads again in float64 NumPy, with all logits; gradients by complex steps.

A step of 1e-30 along the imaginary axis has the derivative in its imaginary part, to rounding. What is held constant
for derivatives takes the real part.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

STEP = 1e-30
Array = np.ndarray


def log_softmax(z: Array) -> Array:
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(p: Array, q: Array) -> Array:
    return (p * (np.log(p) - np.log(q))).sum(-1)


def jsd(p: Array, q: Array, beta: float = 0.5, convention: str = "paper") -> Array:
    m = beta * p + (1 - beta) * q
    share = beta if convention == "paper" else 1 - beta
    return share * kl(p, m) + (1 - share) * kl(q, m)


def skew_reverse_kl(p: Array, q: Array, skew: float = 0.1, detached: bool = False) -> Array:
    return kl(q, skew * (q.real if detached else q) + (1 - skew) * p)


def alpha_beta(p: Array, q: Array, exponents: tuple[float, float] = (0.2, 0.7)) -> Array:
    a, b = exponents
    if a == 0:
        terms = (q**b * np.log(q**b / p**b) - q**b + p**b) / b**2
    elif b == 0:
        terms = (p**a * np.log(p**a / q**a) - p**a + q**a) / a**2
    elif a + b == 0:
        terms = (np.log(q**a / p**a) + (p / q) ** a - 1) / a**2
    else:
        terms = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)
    return terms.sum(-1)


def total_variation(p: Array, q: Array) -> Array:
    return (np.sign((p - q).real) * (p - q)).sum(-1) / 2


def adaptive_kl(p: Array, q: Array, mu: float = 0.5) -> Array:
    shares = []
    for row, gap in zip(p, np.abs(p - q.real), strict=True):
        order = np.argsort(-row)
        head = [k for place, k in enumerate(order) if place == 0 or row[order[: place + 1]].sum() <= mu]
        shares.append(gap[head].sum() / gap.sum())
    share = np.array(shares)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def top_k_kl(p: Array, q: Array, k: int = 64, rest: str = "tail") -> Array:
    values = []
    for a, b in zip(p, q, strict=True):
        top = np.argsort(-a)[:k]
        known = a[top] * np.log(a[top] / b[top])
        mass, of_student = a[top].sum(), b[top].sum()
        values.append(
            {
                "zero": known.sum(),
                "renormalised": (a[top] / mass * np.log(a[top] / mass / b[top])).sum(),
                "tail": known.sum() + (1 - mass) * np.log((1 - mass) / (1 - of_student)),
            }[rest]
        )
    return np.array(values)


def sampled_kl(p: Array, q: Array, draws: Array, power: float = 1.0) -> Array:
    """draws: `[tokens, samples]` in [0, 1), where in the teacher's cumulative distribution."""
    found = []
    for a, b, places in zip(p, q, draws, strict=True):
        proposal = a**power / (a**power).sum()
        drawn = [int(np.sum(np.cumsum(proposal) <= place)) for place in places]
        weights = a[drawn] / proposal[drawn]
        found.append((weights / weights.sum() * np.log(a[drawn] / b[drawn])).sum())
    return np.array(found)


DIVERGENCES: dict[str, Callable[..., Array]] = {
    "kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "symmetric_kl": lambda p, q, skew=0.9: (1 - skew) * kl(p, q) + skew * kl(q, p),
    "skew_kl": lambda p, q, skew=0.1: kl(p, skew * p + (1 - skew) * q),
    "skew_reverse_kl": skew_reverse_kl,
    "jsd": jsd,
    "alpha_beta": alpha_beta,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
    "top_k_kl": top_k_kl,
    "sampled_kl": sampled_kl,
}


def values(
    student: tuple[Array, Array, Array],
    teacher: tuple[Array, Array, Array],
    *,
    divergence: str,
    temperature: float,
    labels: Array,
    alpha: float,
    caps: tuple[float, float],
    vocabulary: int,
    **numbers: Any,
) -> Array:
    """A value for each token. Networks: hidden states, head, bias."""
    logits = []
    for (hidden, head, bias), cap in zip((student, teacher), caps, strict=True):
        logits.append((cap * np.tanh((hidden @ head + bias) / cap))[:, :vocabulary])
    hard = -log_softmax(logits[0])[np.arange(len(labels)), labels]
    q, p = (np.exp(log_softmax(z / temperature)) for z in logits)
    return alpha * hard + (1 - alpha) * temperature**2 * DIVERGENCES[divergence](p, q, **numbers)


def gradients(loss: Callable[..., Any], arrays: tuple[Array, ...]) -> list[Array]:
    """Of a number of several arrays, by each of their elements."""
    found = [np.zeros_like(array) for array in arrays]
    for i, array in enumerate(arrays):
        for place in np.ndindex(array.shape):
            moved = [x.astype(complex) for x in arrays]
            moved[i][place] += 1j * STEP
            found[i][place] = loss(*moved).imag / STEP
    return found
