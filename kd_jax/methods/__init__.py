"""Methods: what a student is trained to minimise."""

from kd_jax.methods.base import LossFunction, Method, Parts, Scaled, Sum, as_method, static
from kd_jax.methods.binary import BinaryKD
from kd_jax.methods.contrastive import CRD
from kd_jax.methods.divergences import (
    JSD,
    TTM,
    ULD,
    WTTM,
    AdaptiveKL,
    AlphaBeta,
    LogitMSE,
    ReverseKL,
    SampledKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TopKKL,
    TotalVariation,
)
from kd_jax.methods.features import CC, SRD, VID, FitNet, HiddenStates
from kd_jax.methods.fused import FusedLinear, fused_linear
from kd_jax.methods.fused import is_fused as is_fused
from kd_jax.methods.layers import ReviewKD, SemCKD
from kd_jax.methods.logits import KD, CrossEntropy, KDWithoutTSquared, LabelSmoothing, SoftLoss
from kd_jax.methods.maps import AB, CATKD, FSP, FT, ICKD, MGD, OFD, WKDF, VkD
from kd_jax.methods.moving_average import SelfTaught, averaged, self_taught, with_average
from kd_jax.methods.mutual import DML, cohort, members
from kd_jax.methods.relations import AT, NST, PKT, RKD, SP, Cosine
from kd_jax.methods.sampling import OnPolicy, on_policy
from kd_jax.methods.sampling import check_rows as check_rows
from kd_jax.methods.sampling import is_on_policy as is_on_policy
from kd_jax.methods.sampling import resampled as resampled
from kd_jax.methods.schedules import TAID, Scheduled, scheduled
from kd_jax.methods.simkd import SimKD, with_classifier
from kd_jax.methods.standardisation import Standardised, standardised
from kd_jax.methods.targets import DIST, DKD, MLKD, NKD, OFA, PLD, RLD, WKD, VirtualTeacher
from kd_jax.methods.temperature import CTKD
from kd_jax.methods.transformers import AttentionMaps, MiniLM

__all__ = [
    "AB", "AT", "CATKD", "CC", "CRD", "CTKD", "DIST", "DKD", "DML", "FSP", "FT", "ICKD", "JSD", "KD", "MGD", "MLKD",
    "NKD", "NST", "OFA", "OFD", "PKT", "PLD", "RKD", "RLD", "SP", "SRD", "TAID", "TTM", "ULD", "VID", "WKD", "WKDF",
    "WTTM", "AdaptiveKL", "AlphaBeta", "AttentionMaps", "BinaryKD", "Cosine", "CrossEntropy", "FitNet",
    "FusedLinear", "HiddenStates", "KDWithoutTSquared", "LabelSmoothing", "LogitMSE", "LossFunction", "Method",
    "MiniLM", "OnPolicy", "Parts", "ReverseKL", "ReviewKD", "SampledKL", "Scaled", "Scheduled", "SelfTaught",
    "SemCKD", "SimKD", "SkewKL", "SkewReverseKL", "SoftLoss", "Standardised", "Sum", "SymmetricKL", "TopKKL",
    "TotalVariation", "VirtualTeacher", "VkD", "as_method", "averaged", "cohort", "fused_linear", "members",
    "on_policy", "scheduled", "self_taught", "standardised", "static", "with_average", "with_classifier",
]  # fmt: skip
