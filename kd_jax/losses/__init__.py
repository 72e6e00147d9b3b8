"""Losses: pure functions of logits or features, one value for each example or position."""

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
from kd_jax.losses.logits import distillation_kl, kd, kd_as_written, kl_divergence
from kd_jax.losses.maps import average_pool, match_space, max_pool, resize_nearest
from kd_jax.losses.mixing import mix
from kd_jax.losses.orthogonal import orthogonal_cayley, orthogonal_exponential
from kd_jax.losses.relations import cc, cc_gaussian, pkt, rkd_angle, rkd_distance, sp, srd
from kd_jax.losses.summaries import at, cat_kd, class_activation_maps, fsp, ft, ickd, nst, reviewkd, wkd_f
from kd_jax.losses.transformers import attention_maps, cosine, hidden_states, minilm_relations

__all__ = [
    "CRDBank", "ClassOrder", "ab", "at", "attention_maps", "average_pool", "cat_kd", "cc", "cc_gaussian",
    "class_activation_maps", "class_order", "cosine", "crd", "crd_bank", "crd_negatives",
    "crd_negatives_of_other_classes", "crd_update", "cross_entropy", "distillation_kl", "fitnet", "fsp", "ft",
    "hidden_states", "ickd", "kd", "kd_as_written", "kl_divergence", "label_smoothing", "mask_channels",
    "mask_positions", "match_space", "max_pool", "mgd", "minilm_relations", "mix", "nst", "ofd", "ofd_margin",
    "orthogonal_cayley", "orthogonal_exponential", "pkt", "resize_nearest", "reviewkd", "reviewkd_fuse", "rkd_angle",
    "rkd_distance", "semckd", "semckd_attention", "semckd_similarities", "simkd", "sp", "srd", "vid", "vid_variance",
    "vkd", "wkd_f",
]  # fmt: skip
