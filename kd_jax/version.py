"""The version of kd_jax, which files keep that it leaves."""

__version__ = "0.3.0"
