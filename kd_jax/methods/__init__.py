"""Methods: what a student is trained to minimise."""

from kd_jax.methods.base import LossFunction, Method, Parts, Scaled, Sum, as_method, static
from kd_jax.methods.features import CC, SRD, VID, FitNet, HiddenStates
from kd_jax.methods.logits import KD, CrossEntropy, KDWithoutTSquared, LabelSmoothing, SoftLoss
from kd_jax.methods.relations import AT, NST, PKT, RKD, SP, Cosine

__all__ = [
    "AT", "CC", "KD", "NST", "PKT", "RKD", "SP", "SRD", "VID", "Cosine", "CrossEntropy", "FitNet", "HiddenStates",
    "KDWithoutTSquared", "LabelSmoothing", "LossFunction", "Method", "Parts", "Scaled", "SoftLoss", "Sum", "as_method",
    "static",
]  # fmt: skip
