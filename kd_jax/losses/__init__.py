"""Losses: pure functions of logits, one value for each example."""

from kd_jax.losses.logits import (
    cross_entropy,
    distillation_kl,
    kd,
    kd_as_written,
    kl_divergence,
    label_smoothing,
    mix,
)

__all__ = ["cross_entropy", "distillation_kl", "kd", "kd_as_written", "kl_divergence", "label_smoothing", "mix"]
