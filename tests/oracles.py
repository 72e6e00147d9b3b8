"""Losses and measures again, from their formulas, in 60 digits; they share no code with kd_jax.

Arrays are lists of rows of floats; results are mpmath numbers.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import mpmath as mp
import numpy as np

mp.mp.dps = 60

Row = Sequence[mp.mpf]


def rows(array: np.ndarray) -> list[list[mp.mpf]]:
    """The exact numbers of an array `[batch, classes]`."""
    return [[mp.mpf(float(value)) for value in row] for row in array]


def once(function: Callable[[tuple[mp.mpf, ...]], list[mp.mpf]]) -> Callable[[Row], list[mp.mpf]]:
    """Computes it once for a row: a gradient by differences asks again and again for the side that does not move."""
    known = lru_cache(4096)(lambda row: tuple(function(row)))

    @wraps(function)
    def found(row: Row) -> list[mp.mpf]:
        return list(known(tuple(row)))

    return found


@once
def softmax(z: Row) -> list[mp.mpf]:
    top = max(z)
    powers = [mp.exp(value - top) for value in z]
    total = mp.fsum(powers)
    return [power / total for power in powers]


@once
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

    return mean, _critical(n) * error, _beyond(mean / error, n)


def _beyond(t: mp.mpf, n: int) -> mp.mpf:
    return mp.betainc(mp.mpf(n - 1) / 2, mp.mpf(1) / 2, 0, (n - 1) / (n - 1 + t * t), regularized=True)


@lru_cache
def _critical(n: int) -> mp.mpf:
    """What |t| is above in one case of twenty."""
    return mp.findroot(lambda t: _beyond(t, n) - mp.mpf("0.05"), (1, 16), solver="anderson", tol=mp.mpf(10) ** -40)


def _tempered(student: Row, teacher: Row, temperature: float) -> tuple[list[mp.mpf], list[mp.mpf]]:
    t = mp.mpf(temperature)
    return log_softmax([z / t for z in student]), log_softmax([z / t for z in teacher])


def label_smoothing(z: Row, label: int, smoothing: float) -> mp.mpf:
    logs, share = log_softmax(z), mp.mpf(smoothing)
    return -(1 - share) * logs[label] - share * mp.fsum(logs) / len(logs)


def label_smoothing_gradient(z: Row, label: int, smoothing: float) -> list[mp.mpf]:
    share = mp.mpf(smoothing)
    return [p - (1 - share) * (k == label) - share / len(z) for k, p in enumerate(softmax(z))]


def distributions(student: Row, teacher: Row, temperature: float) -> tuple[list[mp.mpf], list[mp.mpf]]:
    """q and p."""
    t = mp.mpf(temperature)
    return softmax([z / t for z in student]), softmax([z / t for z in teacher])


def relative_entropy(p: Row, q: Row) -> mp.mpf:
    return mp.fsum(a * mp.log(a / b) for a, b in zip(p, q, strict=True) if a)


def mixture(p: Row, q: Row, share: float) -> list[mp.mpf]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def reverse_kl(student: Row, teacher: Row, *, temperature: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    return temperature**2 * relative_entropy(q, p)


def symmetric_kl(student: Row, teacher: Row, *, temperature: float, skew: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    return temperature**2 * ((1 - skew) * relative_entropy(p, q) + skew * relative_entropy(q, p))


def skew_kl(student: Row, teacher: Row, *, temperature: float, skew: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    return temperature**2 * relative_entropy(p, mixture(p, q, skew))


def skew_reverse_kl(student: Row, teacher: Row, *, temperature: float, skew: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    return temperature**2 * relative_entropy(q, mixture(q, p, skew))


def jsd(student: Row, teacher: Row, *, temperature: float, beta: float, convention: str) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    m = mixture(p, q, beta)
    weight = beta if convention == "paper" else 1 - beta
    return temperature**2 * (weight * relative_entropy(p, m) + (1 - weight) * relative_entropy(q, m))


def alpha_beta(student: Row, teacher: Row, *, temperature: float, alpha: float, beta: float) -> mp.mpf:
    """With the limits as they follow from the formula by l'Hôpital's rule."""
    q, p = distributions(student, teacher, temperature)
    total = mp.mpf(0)
    for a, b in zip(p, q, strict=True):
        if alpha == 0 and beta == 0:
            term = mp.log(a / b) ** 2 / 2
        elif alpha == 0:
            term = (b**beta * beta * mp.log(b / a) - b**beta + a**beta) / beta**2
        elif beta == 0:
            term = (a**alpha * alpha * mp.log(a / b) - a**alpha + b**alpha) / alpha**2
        elif alpha + beta == 0:
            term = (alpha * mp.log(b / a) + (a / b) ** alpha - 1) / alpha**2
        else:
            s = alpha + beta
            term = -(a**alpha * b**beta - alpha / s * a**s - beta / s * b**s) / (alpha * beta)
        total += term
    return temperature**2 * total


def adaptive_weights(p: Row, q: Row, mu: float) -> mp.mpf:
    """The share of the forward KL."""
    order = sorted(range(len(p)), key=lambda k: -p[k])
    head, mass = mp.mpf(0), mp.mpf(0)
    for place, k in enumerate(order):
        mass += p[k]
        if place == 0 or mass <= mu:
            head += abs(p[k] - q[k])
    return head / mp.fsum(abs(a - b) for a, b in zip(p, q, strict=True))


def total_variation(student: Row, teacher: Row, *, temperature: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    return temperature**2 * mp.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2


def logit_mse(student: Row, teacher: Row) -> mp.mpf:
    return mp.fsum((a - b) ** 2 for a, b in zip(student, teacher, strict=True)) / len(student)


def dkd(student: Row, teacher: Row, label: int, *, alpha: float, beta: float, temperature: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    target = relative_entropy(*([x[label], mp.fsum(x[:label] + x[label + 1 :])] for x in (p, q)))
    others = relative_entropy(*(_renormalised(x[:label] + x[label + 1 :]) for x in (p, q)))
    return temperature**2 * (alpha * target + beta * others)


def nkd(student: Row, teacher: Row, label: int, *, gamma: float, temperature: float) -> mp.mpf:
    sharp_q, sharp_p = distributions(student, teacher, 1)
    q, p = (_renormalised(x[:label] + x[label + 1 :]) for x in distributions(student, teacher, temperature))
    others = mp.fsum(a * mp.log(b) for a, b in zip(p, q, strict=True))
    return -sharp_p[label] * mp.log(sharp_q[label]) - gamma * temperature**2 * others


def ttm(student: Row, teacher: Row, *, gamma: float) -> mp.mpf:
    powers = [x**gamma for x in softmax(teacher)]
    return relative_entropy(_renormalised(powers), softmax(student))


def wttm(student: Row, teacher: Row, *, gamma: float) -> mp.mpf:
    return mp.fsum(x**gamma for x in softmax(teacher)) * ttm(student, teacher, gamma=gamma)


def rld(student: Row, teacher: Row, label: int, *, alpha: float, beta: float, temperature: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    confidence = relative_entropy([max(p), 1 - max(p)], [q[label], 1 - q[label]])
    below = [k for k in range(len(p)) if teacher[k] < teacher[label]]
    others = relative_entropy(*(_renormalised([x[k] for k in below]) for x in (p, q))) if below else 0
    return temperature**2 * (alpha * confidence + beta * others)


def ofa(student: Row, teacher: Row, label: int, *, gamma: float, temperature: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    terms = (
        ((a + (k == label)) ** gamma - (k == label)) * mp.log(b) for k, (a, b) in enumerate(zip(p, q, strict=True))
    )
    return -(temperature**2) * mp.fsum(terms)


def virtual_teacher(student: Row, label: int, *, probability: float, temperature: float) -> mp.mpf:
    rest = (1 - probability) / (len(student) - 1)
    return temperature**2 * kl(
        student, [mp.log(probability if k == label else rest) for k in range(len(student))], temperature
    )


def pld(student: Row, teacher: Row, label: int, *, temperature: float) -> mp.mpf:
    _, p = distributions(student, teacher, temperature)
    order = [label, *sorted((k for k in range(len(p)) if k != label), key=lambda k: -teacher[k])]
    return mp.fsum(
        p[k] * (mp.log(mp.fsum(mp.exp(student[j]) for j in order[place:])) - student[k])
        for place, k in enumerate(order)
    )


def binary_kd(student: Row, teacher: Row, *, temperature: float) -> mp.mpf:
    total = mp.mpf(0)
    for s, t in zip(student, teacher, strict=True):
        q, p = ([1 / (1 + mp.exp(sign * z / temperature)) for sign in (-1, 1)] for z in (s, t))
        total += relative_entropy(p, q)
    return temperature**2 * total


def standardised(z: Row) -> list[mp.mpf]:
    mean = mp.fsum(z) / len(z)
    deviation = mp.sqrt(mp.fsum((x - mean) ** 2 for x in z) / (len(z) - 1))
    return [(x - mean) / (mp.mpf("1e-7") + deviation) for x in z]


def top_k_kl(student: Row, teacher: Row, *, k: int, rest: str, temperature: float) -> mp.mpf:
    q, p = distributions(student, teacher, temperature)
    top = sorted(range(len(p)), key=lambda j: -teacher[j])[:k]
    terms = [p[j] * mp.log(p[j] / q[j]) for j in top]
    mass, other = mp.fsum(p[j] for j in top), mp.fsum(q[j] for j in top)
    if rest == "renormalised":
        terms = [p[j] / mass * mp.log(p[j] / mass / q[j]) for j in top]
    if rest == "tail":
        terms.append((1 - mass) * mp.log((1 - mass) / (1 - other)))
    return temperature**2 * mp.fsum(terms)


def uld(student: Row, teacher: Row, *, temperature: float) -> mp.mpf:
    q, p = (sorted(softmax([x / mp.mpf(temperature) for x in z]), reverse=True) for z in (student, teacher))
    size = max(len(p), len(q))
    q, p = (x + [mp.mpf(0)] * (size - len(x)) for x in (q, p))
    return mp.mpf(temperature) ** 2 * mp.fsum(abs(a - b) for a, b in zip(p, q, strict=True))


def wkd(
    student: Row, teacher: Row, label: int, *, cost: Sequence[Row], gamma: float, temperature: float, regulariser: float
) -> mp.mpf:
    """Sinkhorn's plan as products, not in logarithms."""
    sharp_q, sharp_p = distributions(student, teacher, 1)
    kept = [k for k in range(len(student)) if k != label]
    q, p = (_renormalised([x[k] for k in kept]) for x in distributions(student, teacher, temperature))
    kernel = [[mp.exp(-cost[i][j] / regulariser) for j in kept] for i in kept]
    n = range(len(kept))
    u = [mp.mpf(1)] * len(kept)
    for _ in range(10):
        v = [p[j] / mp.fsum(kernel[i][j] * u[i] for i in n) for j in n]
        u = [q[i] / mp.fsum(kernel[i][j] * v[j] for j in n) for i in n]
    moved = mp.fsum(u[i] * kernel[i][j] * v[j] * cost[kept[i]][kept[j]] for i in n for j in n)
    return -sharp_p[label] * mp.log(sharp_q[label]) + gamma * moved


def dist(students: Sequence[Row], teachers: Sequence[Row], *, beta: float, gamma: float, temperature: float) -> mp.mpf:
    """The whole loss of a batch."""
    both = [distributions(s, t, temperature) for s, t in zip(students, teachers, strict=True)]
    q, p = [x for x, _ in both], [x for _, x in both]
    rows = _mean([1 - _correlation(a, b) for a, b in zip(p, q, strict=True)])
    columns = _mean([1 - _correlation(a, b) for a, b in zip(zip(*p, strict=True), zip(*q, strict=True), strict=True)])
    return temperature**2 * (beta * rows + gamma * columns)


def mlkd(students: Sequence[Row], teachers: Sequence[Row], temperatures: Sequence[float]) -> mp.mpf:
    total = mp.mpf(0)
    for t in temperatures:
        both = [distributions(s, z, t) for s, z in zip(students, teachers, strict=True)]
        q, p = mp.matrix([x for x, _ in both]), mp.matrix([x for _, x in both])
        total += t**2 * _mean([relative_entropy(y, x) for x, y in both])
        total += _square(p * p.T - q * q.T) / len(both) + _square(p.T * p - q.T * q) / len(both[0][0])
    return total


def _renormalised(p: Row) -> list[mp.mpf]:
    total = mp.fsum(p)
    return [x / total for x in p]


def _mean(x: Row) -> mp.mpf:
    return mp.fsum(x) / len(x)


def _square(m: Any) -> mp.mpf:
    return mp.fsum(x**2 for x in m)


def _correlation(a: Row, b: Row) -> mp.mpf:
    x, y = ([v - _mean(z) for v in z] for z in (a, b))
    product = mp.fsum(s * t for s, t in zip(x, y, strict=True))
    return product / mp.sqrt(mp.fsum(s * s for s in x) * mp.fsum(t * t for t in y))
