"""Feature and relation losses written from the papers' formulas, one example, element or pair at a time.

In NumPy's longest float and plain loops; nothing here knows kd_jax. Maps are `[*space, channels]`, one example each.
Each loss returns one value for each example of the batches that it is given.
"""

import itertools
import math
from typing import Any

import mpmath as mp
import numpy as np
from losses.layer_oracles import (
    attention_maps as attention_maps,
)
from losses.layer_oracles import (
    cosine as cosine,
)
from losses.layer_oracles import (
    hidden_states as hidden_states,
)
from losses.layer_oracles import (
    minilm as minilm,
)
from losses.layer_oracles import (
    semckd as semckd,
)
from losses.oracle_tools import (
    PI as PI,
)
from losses.oracle_tools import (
    Long as Long,
)
from losses.oracle_tools import (
    by_example as by_example,
)
from losses.oracle_tools import (
    cell as cell,
)
from losses.oracle_tools import (
    direction as direction,
)
from losses.oracle_tools import (
    dot as dot,
)
from losses.oracle_tools import (
    huber as huber,
)
from losses.oracle_tools import (
    length as length,
)
from losses.oracle_tools import (
    long as long,
)
from losses.oracle_tools import (
    matched as matched,
)
from losses.oracle_tools import (
    numeric_gradient as numeric_gradient,
)
from losses.oracle_tools import (
    numeric_slopes as numeric_slopes,
)
from losses.oracle_tools import (
    pool as pool,
)
from losses.oracle_tools import (
    positions as positions,
)
from losses.oracle_tools import (
    softmax as softmax,
)
from losses.oracle_tools import (
    vectors as vectors,
)

# Element by element.


@by_example
def mean_square(s: np.ndarray, t: np.ndarray) -> Any:
    return sum((a - b) ** 2 for a, b in zip(s.ravel(), t.ravel(), strict=True)) / s.size


@by_example
def sum_square(s: np.ndarray, t: np.ndarray) -> Any:
    return sum((a - b) ** 2 for a, b in zip(s.ravel(), t.ravel(), strict=True))


@by_example
def simkd(s: np.ndarray, t: np.ndarray) -> Any:
    return np.mean((s - pool(t, s.shape[:-1])) ** 2)


def vid(mean: np.ndarray, t: np.ndarray, a: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    def one(m: np.ndarray, x: np.ndarray) -> Any:
        total = Long(0)
        for index in np.ndindex(m.shape):
            variance = np.log(1 + np.exp(a[index[-1]])) + Long(epsilon)
            # The negative log density of a Gaussian, less log(2 pi) / 2.
            density = np.exp(-((m[index] - x[index]) ** 2) / (2 * variance)) / np.sqrt(2 * PI * variance)
            total += -np.log(density) - np.log(2 * PI) / 2
        return total / m.size

    return by_example(one)(mean, t)


@by_example
def ab(s: np.ndarray, t: np.ndarray, margin: float = 1.0) -> Any:
    total = Long(0)
    for a, b in zip(s.ravel(), t.ravel(), strict=True):
        # A neuron is wrong by how far it is from being on its side of the boundary by the margin.
        wrong = margin - a if b > 0 else margin + a
        total += max(wrong, Long(0)) ** 2
    return total


def ofd(s: np.ndarray, t: np.ndarray, margin: np.ndarray) -> np.ndarray:
    def one(a: np.ndarray, b: np.ndarray) -> Any:
        total = Long(0)
        b = pool(b, a.shape[:-1])
        for index in np.ndindex(a.shape):
            x, y, m = a[index], b[index], margin[index[-1]]
            if y > 0:
                total += (x - y) ** 2
            elif y > m:
                total += (x - y) ** 2 if x > y else 0
            else:
                total += (x - m) ** 2 if x > m else 0
        return total

    return by_example(one)(s, t)


def negative_mean(mean: float, deviation: float) -> float:
    """E[x | x < 0] of a Gaussian, by quadrature."""
    with mp.workdps(40):
        top = mp.npdf(min(mean, 0), mean, deviation)

        def density(x: Any) -> Any:
            # Of a size near 1: the quadrature's error is absolute.
            return mp.npdf(x, mean, deviation) / top

        # Where the tail of a distant mean decays.
        scale = min(deviation, deviation**2 / max(mean, deviation))
        ends = [-mp.inf, min(mean, 0) - 12 * deviation, min(mean, 0) - deviation]
        ends += [-3 * k * scale for k in range(20)]
        below = mp.quad(density, sorted(set(ends)))
        return float(mp.quad(lambda x: x * density(x), sorted(set(ends))) / below)


@by_example
def vkd(s: np.ndarray, t: np.ndarray, epsilon: float = 1e-5) -> Any:
    total = Long(0)
    for p in positions(s.shape[:-1]):
        mean = sum(t[p]) / len(t[p])
        variance = sum((x - mean) ** 2 for x in t[p]) / len(t[p])
        for a, b in zip(s[p], t[p], strict=True):
            total += huber(a - (b - mean) / np.sqrt(variance + Long(epsilon)))
    return total / s.size


# Summaries of an example's map.


@by_example
def at(s: np.ndarray, t: np.ndarray, exponent: int = 2) -> Any:
    maps = []
    for image in matched(s, t):
        strengths = [sum(abs(x) ** exponent for x in image[p]) / image.shape[-1] for p in positions(image.shape[:-1])]
        maps.append(direction(np.array(strengths)))
    return sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) / len(maps[0])


@by_example
def nst(s: np.ndarray, t: np.ndarray) -> Any:
    s, t = ([direction(image[..., c]).ravel() for c in range(image.shape[-1])] for image in matched(s, t))

    def kernel(a: Any, b: Any) -> Any:
        return sum(sum(x * y for x, y in zip(u, v, strict=True)) ** 2 for u in a for v in b) / (len(a) * len(b))

    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


@by_example
def fsp(s1: np.ndarray, s2: np.ndarray, t1: np.ndarray, t2: np.ndarray, reduce: Any = np.max) -> Any:
    flows = []
    for first, last in ((s1, s2), (t1, t2)):
        f, g = matched(first, last, reduce)
        points = list(positions(f.shape[:-1]))
        flows.append(
            [
                sum(f[(*p, i)] * g[(*p, j)] for p in points) / len(points)
                for i in range(f.shape[-1])
                for j in range(g.shape[-1])
            ]
        )
    return sum((a - b) ** 2 for a, b in zip(*flows, strict=True)) / len(flows[0])


@by_example
def ft(s: np.ndarray, t: np.ndarray, exponent: int = 1) -> Any:
    return np.mean(np.abs(direction(s) - direction(t)) ** exponent)


@by_example
def ickd(s: np.ndarray, t: np.ndarray) -> Any:
    rows = []
    for image in (s, t):
        channels = [image[..., c].ravel() for c in range(image.shape[-1])]
        rows.append([direction(np.array([a @ b for b in channels])) for a in channels])
    return sum(length(a - b) ** 2 for a, b in zip(*rows, strict=True)) / s.shape[-1]


@by_example
def cat_kd(s: np.ndarray, t: np.ndarray, resolution: int = 2, normalised: bool = True) -> Any:
    counts = tuple(min(resolution, n) for n in s.shape[:-1])
    total, s, t = Long(0), pool(s, counts), pool(t, counts)
    for c in range(s.shape[-1]):
        a, b = s[..., c], t[..., c]
        if normalised:
            a, b = direction(a), direction(b)
        total += np.mean((a - b) ** 2)
    return total / s.shape[-1]


@by_example
def wkd_f(s: np.ndarray, t: np.ndarray, ratio: float = 2.0, grid: int = 1, epsilon: float = 1e-5) -> Any:
    total, counts = Long(0), (grid,) * (s.ndim - 1)
    for index in positions(counts):
        for c in range(s.shape[-1]):
            moments = []
            for image in (s, t):
                values = [image[(*p, c)] for p in cell(index, counts, image.shape[:-1])]
                mean = sum(values) / len(values)
                variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
                moments.append((mean, np.sqrt(variance + Long(epsilon))))
            (m, d), (n, e) = moments
            total += ratio * (m - n) ** 2 + (d - e) ** 2
    return total / grid ** len(counts)


@by_example
def reviewkd(s: np.ndarray, t: np.ndarray, levels: tuple[int, ...] = (4, 2, 1)) -> Any:
    terms = [np.mean((s - t) ** 2)]
    for level in levels:
        counts = tuple(min(level, n) for n in s.shape[:-1])
        if counts != s.shape[:-1]:
            terms.append(np.mean((pool(s, counts) - pool(t, counts)) ** 2))
    weights = [Long(0.5) ** k for k in range(len(terms))]
    return sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights)


# Relations of a batch. Values by the first index; their mean is the loss.


def sp(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    rows = []
    for batch in (vectors(s), vectors(t)):
        rows.append([direction(np.array([dot(a, b) for b in batch])) for a in batch])
    return np.array([sum((a - b) ** 2) / len(s) for a, b in zip(*rows, strict=True)])


def rkd_distance(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    potentials = []
    for batch in (vectors(s), vectors(t)):
        distances = [[length(a - b) for b in batch] for a in batch]
        positive = [d for row in distances for d in row if d > 0]
        mean = sum(positive) / len(positive) if positive else Long(1)
        potentials.append([[d / mean for d in row] for row in distances])
    return np.array(
        [sum(huber(a - b) for a, b in zip(*rows, strict=True)) / len(s) for rows in zip(*potentials, strict=True)]
    )


def rkd_angle(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    def cosine(batch: list[np.ndarray], i: int, j: int, k: int) -> Any:
        return dot(direction(batch[j] - batch[i]), direction(batch[k] - batch[i]))

    n, a, b = len(s), vectors(s), vectors(t)
    triples = [[huber(cosine(a, i, j, k) - cosine(b, i, j, k)) for j in range(n) for k in range(n)] for i in range(n)]
    return np.array([sum(row) / n**2 for row in triples])


def pkt(s: np.ndarray, t: np.ndarray, epsilon: float = 1e-7) -> np.ndarray:
    def neighbours(batch: list[np.ndarray]) -> list[list[Any]]:
        rows = [[(dot(direction(a), direction(b)) + 1) / 2 for b in batch] for a in batch]
        return [[x / sum(row) for x in row] for row in rows]

    p, q = neighbours(vectors(t)), neighbours(vectors(s))
    e, n = Long(epsilon), len(s)
    return np.array(
        [sum(x * np.log((x + e) / (y + e)) for x, y in zip(a, b, strict=True)) / n for a, b in zip(p, q, strict=True)]
    )


def cc(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The mean over the pairs is put on the first of each: a batch's mean of these is it."""
    gaps = [np.abs(a - b) for a, b in zip(vectors(s), vectors(t), strict=True)]
    pairs = [dot(a, b) * len(s) / (len(s) - 1) for a, b in itertools.pairwise(gaps)]
    return np.array([*pairs, Long(0)])


def cc_gaussian(s: np.ndarray, t: np.ndarray, gamma: float = 0.4, order: int = 2) -> np.ndarray:
    def kernel(a: np.ndarray, b: np.ndarray) -> Any:
        x = 2 * Long(gamma) * dot(direction(a), direction(b))
        return np.exp(-2 * Long(gamma)) * sum(x**p / math.factorial(p) for p in range(order + 1))

    n, a, b = len(s), vectors(s), vectors(t)
    return np.array([sum((kernel(a[i], a[j]) - kernel(b[i], b[j])) ** 2 for j in range(n)) / n for i in range(n)])


def srd(
    s: np.ndarray, t: np.ndarray, exponent: int = 4, epsilon: float = 1e-5, variance_epsilon: float = 1e-4
) -> np.ndarray:
    total, columns = Long(0), [np.array(vectors(batch)) for batch in (s, t)]
    for d in range(columns[0].shape[1]):
        normal = []
        for batch in columns:
            x = batch[:, d]
            mean = sum(x) / len(x)
            variance = sum((x - mean) ** 2) / len(x)
            normal.append((x - mean) / np.sqrt(variance + Long(variance_epsilon)))
        total += sum(abs(normal[0] - normal[1]) ** exponent)
    return np.full(len(s), np.log(total + Long(epsilon)))


def crd(
    s: np.ndarray, t: np.ndarray, student_bank: np.ndarray, teacher_bank: np.ndarray, rows: Any, temperature: float
) -> tuple[np.ndarray, list[Any]]:
    """Values and the two Z of a first batch. `rows`: for each example its own row and those of its negatives."""
    size, values, constants = len(student_bank), np.zeros(len(s), dtype=Long), []
    for batch, bank in ((s, teacher_bank), (t, student_bank)):
        raised = [
            [np.exp(dot(direction(x), bank[r]) / Long(temperature)) for r in row]
            for x, row in zip(batch, rows, strict=True)
        ]
        z = sum(map(sum, raised)) / sum(map(len, raised)) * size
        constants.append(z)
        for i, row in enumerate(raised):
            noise = Long(len(row) - 1) / size
            c = noise + Long(1e-7)
            # The probability that a sample came from the data, not from the noise.
            values[i] -= np.log(row[0] / z / (row[0] / z + c))
            values[i] -= sum(np.log(noise / (x / z + c)) for x in row[1:])
    return values, constants


def crd_row(old: np.ndarray, new: np.ndarray, momentum: float) -> np.ndarray:
    return direction(Long(momentum) * old + (1 - Long(momentum)) * direction(new))
