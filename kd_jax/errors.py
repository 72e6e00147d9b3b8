"""Errors that kd_jax raises: each is one sentence with the value, the bound and the remedy."""


class ShapeError(ValueError):
    """Arrays whose shapes or types do not fit each other. Raised while tracing, so under `jit` and `vmap` too."""
