"""Losses: pure functions of logits `[..., classes]`, one value for each position `[...]`."""

from kd_jax.losses.alpha_beta_divergence import alpha_beta
from kd_jax.losses.batch import dist, mlkd
from kd_jax.losses.binary import binary_kd
from kd_jax.losses.divergences import (
    adaptive_kl,
    jsd,
    logit_mse,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    symmetric_kl,
    total_variation,
)
from kd_jax.losses.labels import cross_entropy, label_smoothing
from kd_jax.losses.logits import distillation_kl, kd, kd_as_written, kl_divergence
from kd_jax.losses.mixing import mix
from kd_jax.losses.ranking import pld
from kd_jax.losses.sparse import sampled_kl, top_k_kl, uld
from kd_jax.losses.standardisation import standardise
from kd_jax.losses.targets import dkd, nkd, ofa, rld, ttm, virtual_teacher, wttm
from kd_jax.losses.transport import wkd

__all__ = [
    "adaptive_kl",
    "alpha_beta",
    "binary_kd",
    "cross_entropy",
    "dist",
    "distillation_kl",
    "dkd",
    "jsd",
    "kd",
    "kd_as_written",
    "kl_divergence",
    "label_smoothing",
    "logit_mse",
    "mix",
    "mlkd",
    "nkd",
    "ofa",
    "pld",
    "reverse_kl",
    "rld",
    "sampled_kl",
    "skew_kl",
    "skew_reverse_kl",
    "standardise",
    "symmetric_kl",
    "top_k_kl",
    "total_variation",
    "ttm",
    "uld",
    "virtual_teacher",
    "wkd",
    "wttm",
]
