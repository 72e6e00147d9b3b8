"""What the oracles of feature losses are made of: loops in NumPy's longest float, and gradients by differences."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Long = np.longdouble
PI = Long("3.14159265358979323846264338327950288")


def long(*arrays: Any) -> list[np.ndarray]:
    return [np.asarray(array, dtype=Long) for array in arrays]


def numeric_gradient(
    function: Callable[..., Any], arrays: list[np.ndarray], which: int, step: float = 2e-4
) -> np.ndarray:
    """The gradient of a number by one of the arrays: five points an element, with an error of step^4."""
    arrays = [np.array(array, dtype=Long) for array in arrays]
    array = arrays[which]
    gradient = np.zeros(array.shape, dtype=Long)
    h = Long(step)
    for index in np.ndindex(array.shape):
        middle, total = array[index], Long(0)
        for offset, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            array[index] = middle + offset * h
            total += factor * Long(function(*arrays))
        array[index] = middle
        gradient[index] = total / (12 * h)
    return gradient


def numeric_slopes(
    function: Callable[..., Any], arrays: list[np.ndarray], which: int, directions: np.ndarray, step: float = 2e-4
) -> np.ndarray:
    """The slopes of a number along directions of one of the arrays, by five points each, with an error of step^4."""
    arrays = [np.array(array, dtype=Long) for array in arrays]
    middle, slopes = arrays[which], []
    for direction in directions:
        total = Long(0)
        for offset, factor in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            moved = [*arrays]
            moved[which] = middle + offset * Long(step) * direction
            total += factor * Long(function(*moved))
        slopes.append(total / (12 * Long(step)))
    return np.array(slopes)


def length(vector: np.ndarray) -> Any:
    return np.sqrt(sum(x * x for x in vector.ravel()))


def direction(vector: np.ndarray) -> np.ndarray:
    size = length(vector)
    return vector / size if size > 0 else np.zeros_like(vector)


def positions(space: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, space))


def cell(index: tuple[int, ...], counts: tuple[int, ...], sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The positions that touch the real interval [i n / m, (i + 1) n / m) on every axis."""
    return [
        p
        for p in positions(sizes)
        if all((x + 1) * m > i * n and x * m < (i + 1) * n for x, i, m, n in zip(p, index, counts, sizes, strict=True))
    ]


def pool(image: np.ndarray, counts: tuple[int, ...], reduce: Callable[..., Any] = np.mean) -> np.ndarray:
    out = np.zeros((*counts, image.shape[-1]), dtype=image.dtype)
    for index in positions(counts):
        here = cell(index, counts, image.shape[:-1])
        for c in range(image.shape[-1]):
            out[(*index, c)] = reduce([image[(*p, c)] for p in here])
    return out


def matched(a: np.ndarray, b: np.ndarray, reduce: Callable[..., Any] = np.mean) -> tuple[np.ndarray, np.ndarray]:
    counts = tuple(min(n, m) for n, m in zip(a.shape[:-1], b.shape[:-1], strict=True))
    return pool(a, counts, reduce), pool(b, counts, reduce)


def by_example(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """A loss of batches from one of single examples."""

    def batched(*batches: np.ndarray, **numbers: Any) -> np.ndarray:
        return np.array([function(*examples, **numbers) for examples in zip(*batches, strict=True)], dtype=Long)

    return batched


def huber(x: Any) -> Any:
    return x * x / 2 if abs(x) <= 1 else abs(x) - Long(0.5)


def vectors(batch: np.ndarray) -> list[np.ndarray]:
    return [example.ravel() for example in batch]


def dot(a: np.ndarray, b: np.ndarray) -> Any:
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(scores: list[Any]) -> list[Any]:
    powers = [np.exp(x - max(scores)) for x in scores]
    return [x / sum(powers) for x in powers]
