"""From which size on networks are trained in another way."""

SMALL = 100_000
"""Parameters below which a network is small: it gains by longer turns of the loop, by transposed kernels, and by
trainings side by side (results/throughput/findings.md)."""
