"""From which size on networks are trained in another way, and how many steps a compiled loop has."""

from collections.abc import Iterable

SMALL = 100_000
"""Parameters below which a network is small: it gains by longer turns of the loop, by transposed kernels, and by
trainings side by side (results/throughput/findings.md)."""

_REPORTS = 10  # about this many times an epoch a loop comes back to tell how far it is
_FEWEST_STEPS = 8  # of a loop: the system gives each one its memory anew, which takes a quarter of a step or more
_SHORT = 32  # fewer steps are one program, whatever divides them


def loop_lengths(steps: int, parts: int = 1) -> list[int]:
    """Of the compiled loops of an epoch of `steps` steps: long enough to be fast, short enough to tell how far it is.

    Equal ones where some number of them divides; else of two lengths that differ by 1. Each length is a program.
    parts: there are at least so many loops, of a step each where there are fewer steps.
    """
    fewest = max(1, min(parts, steps))
    most = max(fewest, steps // _FEWEST_STEPS)
    usual = max(fewest, min(_REPORTS, most))
    few = fewest if steps < _SHORT else max(fewest, (usual + 1) // 2)
    equal = _equal(steps, (*range(usual, min(2 * usual, most) + 1), *range(usual - 1, few - 1, -1)))
    if equal:
        return equal
    length, longer = divmod(steps, usual)
    return [length + 1] * longer + [length] * (usual - longer)


def chunk_lengths(steps: int, reports: int) -> list[int]:
    """`steps` steps in about `reports` chunks: half to twice as many, equal ones where some number of them divides.

    Each distinct length is a program to compile, so there are at most two.
    """
    fewest, most = min(reports, steps), min(2 * reports, steps)
    equal = _equal(steps, (*range(fewest, most + 1), *range(fewest - 1, (fewest + 1) // 2, -1)))
    if equal:
        return equal
    length = -(-steps // reports)
    return [length] * (steps // length) + [steps % length] * (steps % length > 0)


def _equal(steps: int, numbers: Iterable[int]) -> list[int]:
    """As many equal parts as the first of the numbers that divides; [] where none does."""
    return next(([steps // number] * number for number in numbers if steps % number == 0), [])
