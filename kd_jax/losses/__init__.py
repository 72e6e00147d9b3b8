"""Losses: pure functions of logits `[..., classes]`, one value for each position `[...]`."""

from kd_jax.losses.labels import cross_entropy, label_smoothing
from kd_jax.losses.logits import distillation_kl, kd, kd_as_written, kl_divergence
from kd_jax.losses.mixing import mix

__all__ = ["cross_entropy", "distillation_kl", "kd", "kd_as_written", "kl_divergence", "label_smoothing", "mix"]
