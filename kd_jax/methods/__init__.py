"""Methods: what a student is trained to minimise."""

from kd_jax.methods.base import LossFunction, Method, Parts, Scaled, Sum, as_method
from kd_jax.methods.features import FitNet
from kd_jax.methods.logits import KD, CrossEntropy, KDWithoutTSquared, LabelSmoothing, SoftLoss

__all__ = [
    "KD", "CrossEntropy", "FitNet", "KDWithoutTSquared", "LabelSmoothing", "LossFunction", "Method", "Parts", "Scaled",
    "SoftLoss", "Sum", "as_method",
]  # fmt: skip
