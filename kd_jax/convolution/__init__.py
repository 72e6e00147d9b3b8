"""Programs with convolutions, made fast on a CPU: `canonical(function)`."""

from kd_jax.convolution.canonical import canonical

__all__ = ["canonical"]
