"""Losses: pure functions of logits or features, one value for each example or position."""

from kd_jax.losses.alpha_beta_divergence import alpha_beta
from kd_jax.losses.batch import dist, mlkd
from kd_jax.losses.binary import binary_cross_entropy, binary_kd
from kd_jax.losses.contrastive import (
    ClassOrder,
    CRDBank,
    class_order,
    crd,
    crd_bank,
    crd_negatives,
    crd_negatives_of_other_classes,
    crd_update,
)
from kd_jax.losses.cross_layer import reviewkd_fuse, semckd, semckd_attention, semckd_similarities
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
from kd_jax.losses.features import (
    ab,
    fitnet,
    mask_channels,
    mask_positions,
    mgd,
    ofd,
    ofd_margin,
    simkd,
    vid,
    vid_variance,
    vkd,
)
from kd_jax.losses.labels import cross_entropy, label_smoothing
from kd_jax.losses.linear import linear_divergence
from kd_jax.losses.logits import distillation_kl, kd, kd_as_written, kl_divergence
from kd_jax.losses.maps import average_pool, match_space, max_pool, resize_nearest
from kd_jax.losses.mixing import mix
from kd_jax.losses.orthogonal import orthogonal_cayley, orthogonal_exponential
from kd_jax.losses.ranking import pld
from kd_jax.losses.relations import cc, cc_gaussian, pkt, rkd_angle, rkd_distance, sp, srd
from kd_jax.losses.sparse import sampled_kl, sampled_targets, top_k_kl, top_k_targets, uld
from kd_jax.losses.standardisation import standardise
from kd_jax.losses.summaries import at, cat_kd, class_activation_maps, fsp, ft, ickd, nst, reviewkd, wkd_f
from kd_jax.losses.targets import dkd, nkd, ofa, rld, ttm, virtual_teacher, wttm
from kd_jax.losses.transformers import attention_maps, cosine, hidden_states, minilm_relations
from kd_jax.losses.transport import wkd

__all__ = [
    "CRDBank", "ClassOrder", "ab", "adaptive_kl", "alpha_beta", "at", "attention_maps", "average_pool",
    "binary_cross_entropy", "binary_kd", "cat_kd", "cc", "cc_gaussian", "class_activation_maps", "class_order",
    "cosine", "crd", "crd_bank", "crd_negatives", "crd_negatives_of_other_classes", "crd_update", "cross_entropy",
    "dist", "distillation_kl", "dkd", "fitnet", "fsp", "ft", "hidden_states", "ickd", "jsd", "kd", "kd_as_written",
    "kl_divergence", "label_smoothing", "linear_divergence", "logit_mse", "mask_channels", "mask_positions",
    "match_space", "max_pool", "mgd", "minilm_relations", "mix", "mlkd", "nkd", "nst", "ofa", "ofd", "ofd_margin",
    "orthogonal_cayley", "orthogonal_exponential", "pkt", "pld", "resize_nearest", "reverse_kl", "reviewkd",
    "reviewkd_fuse", "rkd_angle", "rkd_distance", "rld", "sampled_kl", "sampled_targets", "semckd",
    "semckd_attention", "semckd_similarities", "simkd", "skew_kl", "skew_reverse_kl", "sp", "srd", "standardise",
    "symmetric_kl", "top_k_kl", "top_k_targets", "total_variation", "ttm", "uld", "vid", "vid_variance",
    "virtual_teacher", "vkd", "wkd", "wkd_f", "wttm",
]  # fmt: skip
