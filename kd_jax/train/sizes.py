"""From which size on networks are trained in another way, and how many steps a compiled loop has."""

SMALL = 100_000
"""Parameters below which a network is small: it gains by longer turns of the loop, by transposed kernels, and by
trainings side by side (results/throughput/findings.md)."""

_REPORTS = 10  # about this many times an epoch a loop comes back to tell how far it is
_STEPS_PER_REPORT = 8  # at least: the system gives each loop its memory anew, which takes a step of a ResNet a third
_SHORT = 32  # fewer steps are one loop, and one program


def loop_lengths(steps: int, parts: int = 1) -> list[int]:
    """Of the compiled loops of an epoch of `steps` steps: long enough to be fast, short enough to tell how far it is.

    parts: the fewest loops.
    """
    reports = min(_REPORTS, steps // _STEPS_PER_REPORT) if steps >= _SHORT else 1
    return chunk_lengths(steps, max(reports, parts))


def chunk_lengths(steps: int, reports: int) -> list[int]:
    """`steps` steps in about `reports` chunks: half to twice as many, equal ones where some number of them divides.

    Each distinct length is a program to compile, so there are at most two.
    """
    fewest, most = min(reports, steps), min(2 * reports, steps)
    for chunks in (*range(fewest, most + 1), *range(fewest - 1, (fewest + 1) // 2, -1)):
        if steps % chunks == 0:
            return [steps // chunks] * chunks
    length = -(-steps // reports)
    return [length] * (steps // length) + [steps % length] * (steps % length > 0)
