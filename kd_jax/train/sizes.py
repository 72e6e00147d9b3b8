"""From which size on networks are trained in another way, and how many steps a compiled loop has."""

SMALL = 100_000
"""Parameters below which a network is small: it gains by longer turns of the loop, by transposed kernels, and by
trainings side by side (results/throughput/findings.md)."""


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
