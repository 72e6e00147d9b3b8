"""Losses and measures again, from their formulas, in 60 digits; they share no code with kd_jax.

Arrays are lists of rows of floats; results are mpmath numbers.
"""

from collections.abc import Sequence

import mpmath as mp
import numpy as np

mp.mp.dps = 60

Row = Sequence[mp.mpf]


def rows(array: np.ndarray) -> list[list[mp.mpf]]:
    """The exact numbers of an array `[batch, classes]`."""
    return [[mp.mpf(float(value)) for value in row] for row in array]


def softmax(z: Row) -> list[mp.mpf]:
    top = max(z)
    powers = [mp.exp(value - top) for value in z]
    return [power / mp.fsum(powers) for power in powers]


def log_softmax(z: Row) -> list[mp.mpf]:
    top = max(z)
    normaliser = top + mp.log(mp.fsum(mp.exp(value - top) for value in z))
    return [value - normaliser for value in z]


def cross_entropy(z: Row, label: int) -> mp.mpf:
    return -log_softmax(z)[label]


def cross_entropy_gradient(z: Row, label: int) -> list[mp.mpf]:
    return [p - (k == label) for k, p in enumerate(softmax(z))]


def kl(student: Row, teacher: Row, temperature: float) -> mp.mpf:
    log_s, log_t = _tempered(student, teacher, temperature)
    return mp.fsum(mp.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True))


def kl_gradients(student: Row, teacher: Row, temperature: float) -> tuple[list[mp.mpf], list[mp.mpf]]:
    """By the student's and by the teacher's logits."""
    log_s, log_t = _tempered(student, teacher, temperature)
    value = mp.fsum(mp.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True))
    pairs = list(zip(log_s, log_t, strict=True))
    by_student = [(mp.exp(s) - mp.exp(t)) / mp.mpf(temperature) for s, t in pairs]
    by_teacher = [mp.exp(t) * (t - s - value) / mp.mpf(temperature) for s, t in pairs]
    return by_student, by_teacher


def as_written(student: Row, teacher: Row, temperature: float) -> mp.mpf:
    log_s, log_t = _tempered(student, teacher, temperature)
    return mp.fsum(mp.exp(t) * (t - mp.exp(s)) for s, t in zip(log_s, log_t, strict=True))


def as_written_gradients(student: Row, teacher: Row, temperature: float) -> tuple[list[mp.mpf], list[mp.mpf]]:
    log_s, log_t = _tempered(student, teacher, temperature)
    p_s, p_t = [mp.exp(s) for s in log_s], [mp.exp(t) for t in log_t]
    inner = mp.fsum(s * t for s, t in zip(p_s, p_t, strict=True))
    by_student = [-s * (t - inner) / mp.mpf(temperature) for s, t in zip(p_s, p_t, strict=True)]
    slopes = [t + 1 - s for s, t in zip(p_s, log_t, strict=True)]
    mean = mp.fsum(t * slope for t, slope in zip(p_t, slopes, strict=True))
    by_teacher = [t * (slope - mean) / mp.mpf(temperature) for t, slope in zip(p_t, slopes, strict=True)]
    return by_student, by_teacher


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> tuple[float, float]:
    """Guo et al. (2017), equation 3, bin by bin; and the mean size of the terms that cancel within a bin."""
    total = terms = mp.mpf(0)
    members: list[list[tuple[mp.mpf, bool]]] = [[] for _ in range(bins)]
    for z, label in zip(rows(logits), labels, strict=True):
        p = softmax(z)
        confidence = max(p)
        members[int(mp.ceil(confidence * bins)) - 1].append((confidence, p.index(confidence) == label))
    for inside in members:
        total += abs(mp.fsum(right - confidence for confidence, right in inside))
        terms += mp.fsum(abs(right - confidence) for confidence, right in inside)
    return float(total / len(labels)), float(terms / len(labels))


def paired(before: Sequence[int], after: Sequence[int]) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """Mean of after - before, half its 95 % interval, and the p-value, with t's distribution as an integral."""
    differences = [mp.mpf(b) - mp.mpf(a) for a, b in zip(before, after, strict=True)]
    n = len(differences)
    mean = mp.fsum(differences) / n
    error = mp.sqrt(mp.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)

    def beyond(t: mp.mpf) -> mp.mpf:
        return mp.betainc(mp.mpf(n - 1) / 2, mp.mpf(1) / 2, 0, (n - 1) / (n - 1 + t * t), regularized=True)

    low, high = mp.mpf(1), mp.mpf(16)
    while high - low > mp.mpf(10) ** -20:
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle) > mp.mpf("0.05") else (low, middle)
    return mean, high * error, beyond(mean / error)


def _tempered(student: Row, teacher: Row, temperature: float) -> tuple[list[mp.mpf], list[mp.mpf]]:
    t = mp.mpf(temperature)
    return log_softmax([z / t for z in student]), log_softmax([z / t for z in teacher])


def label_smoothing(z: Row, label: int, smoothing: float) -> mp.mpf:
    logs, share = log_softmax(z), mp.mpf(smoothing)
    return -(1 - share) * logs[label] - share * mp.fsum(logs) / len(logs)


def label_smoothing_gradient(z: Row, label: int, smoothing: float) -> list[mp.mpf]:
    share = mp.mpf(smoothing)
    return [p - (1 - share) * (k == label) - share / len(z) for k, p in enumerate(softmax(z))]
