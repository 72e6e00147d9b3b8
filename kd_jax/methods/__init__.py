"""Methods: what a student is trained to minimise."""

from kd_jax.methods.base import LossFunction, Method, Parts, Scaled, Sum, as_method, static
from kd_jax.methods.divergences import (
    JSD,
    TTM,
    WTTM,
    AdaptiveKL,
    AlphaBeta,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TopKKL,
    TotalVariation,
)
from kd_jax.methods.features import CC, SRD, VID, FitNet, HiddenStates
from kd_jax.methods.logits import KD, CrossEntropy, KDWithoutTSquared, LabelSmoothing, SoftLoss
from kd_jax.methods.relations import AT, NST, PKT, RKD, SP, Cosine
from kd_jax.methods.targets import DIST, DKD, NKD, OFA, PLD, RLD

__all__ = [
    "AT", "CC", "DIST", "DKD", "JSD", "KD", "NKD", "NST", "OFA", "PKT", "PLD", "RKD", "RLD", "SP", "SRD", "TTM",
    "VID", "WTTM", "AdaptiveKL", "AlphaBeta", "Cosine", "CrossEntropy", "FitNet", "HiddenStates", "KDWithoutTSquared",
    "LabelSmoothing", "LogitMSE", "LossFunction", "Method", "Parts", "ReverseKL", "Scaled", "SkewKL", "SkewReverseKL",
    "SoftLoss", "Sum", "SymmetricKL", "TopKKL", "TotalVariation", "as_method", "static",
]  # fmt: skip  # fmt: skip
