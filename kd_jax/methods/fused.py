"""Divergences of language models from hidden states and heads, so that no logits of a whole batch are in memory."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kd_jax import losses
from kd_jax.data.batch import Batch, check_whole
from kd_jax.errors import MethodError
from kd_jax.losses.checks import are_soft
from kd_jax.losses.linear import check_caps
from kd_jax.methods import blocks
from kd_jax.methods.base import Method, Parts, Terms, Wrapped, as_method, static
from kd_jax.methods.bounds import walk
from kd_jax.methods.divergences import (
    JSD,
    AdaptiveKL,
    AlphaBeta,
    ReverseKL,
    SampledKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TopKKL,
    TotalVariation,
)
from kd_jax.methods.logits import KD, CrossEntropy, is_zero, require_labels, require_teacher
from kd_jax.methods.schedules import Scheduled
from kd_jax.models import Output
from kd_jax.models.heads import HIDDEN, KERNEL, head_of

_DIVERGENCES: dict[type[Method], tuple[str, tuple[str, ...]]] = {
    KD: ("kl", ()),
    ReverseKL: ("reverse_kl", ()),
    SymmetricKL: ("symmetric_kl", ("skew",)),
    SkewKL: ("skew_kl", ("skew",)),
    SkewReverseKL: ("skew_reverse_kl", ("skew", "detached")),
    JSD: ("jsd", ("beta", "convention")),
    AdaptiveKL: ("adaptive_kl", ("mu",)),
    TotalVariation: ("total_variation", ()),
    TopKKL: ("top_k_kl", ("k", "rest")),
    AlphaBeta: ("alpha_beta", ()),
    SampledKL: ("sampled_kl", ("samples", "power")),
}
"""The divergence of a method and its numbers, beside those of the labels and the temperature."""
_TAKEN: tuple[type[Method], ...] = (CrossEntropy, *_DIVERGENCES)


@dataclass(frozen=True)
class FusedLinear(Wrapped):
    """A method from hidden states and heads; `fused_linear` makes it."""

    method: Method
    chunk: int | None = static(None)
    soft_cap: tuple[float | None, float | None] | None = static(None)
    vocabulary: int | None = static(None)

    @property
    def compares_logits(self) -> bool:  # type: ignore[override]
        """As the method; of the first `vocabulary` columns alone, where heads are padded."""
        return self.vocabulary is None and bool(self.method.compares_logits)

    @property
    def student_features(self) -> tuple[str, ...]:
        """The head's."""
        return (HIDDEN, KERNEL)

    @property
    def teacher_features(self) -> tuple[str, ...]:
        """The head's."""
        return (HIDDEN, KERNEL) if self.needs_teacher else ()

    def loss(self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]) -> Terms:
        """One term, `fused`: the mean over the batch, by its weights. It is the sum of the method's own terms."""
        method: Any = self.method.at(step) if isinstance(self.method, Scheduled) else self.method
        ours = head_of(student)
        labels = batch.labels
        if labels is not None and (are_soft(labels) or not jnp.issubdtype(labels.dtype, jnp.integer)):
            raise MethodError(
                f"the labels are {labels.dtype}, and kd.fused_linear takes whole numbers: leave it out, for "
                f"{type(method).__name__} alone takes soft labels"
            )
        alpha, scale, divergence, numbers = _weights(method, labels is not None)
        if isinstance(method, SampledKL):
            numbers["key"] = blocks.step_key(parts.carried, step)
        if isinstance(method, CrossEntropy):
            # The weight of the divergence is 0, so that the teacher is not looked at.
            require_labels(method, batch)
            theirs = jax.lax.stop_gradient(ours)
        else:
            theirs = head_of(require_teacher(method, teacher))
        weights = None
        if batch.weights is not None:
            weights = jnp.asarray(batch.weights)
            places = ours.hidden.shape[:-1]
            weights = jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(places) - weights.ndim)), places)
        total, weight, _ = losses.linear_divergence(
            ours.hidden, ours.kernel, theirs.hidden, theirs.kernel, student_bias=ours.bias, teacher_bias=theirs.bias,
            divergence=divergence, alpha=alpha, labels=None if _is_nothing(alpha) else labels, weights=weights,
            temperature=getattr(method, "temperature", 1.0), chunk=self.chunk, soft_cap=self.soft_cap,
            vocabulary=self.vocabulary, **numbers,
        )  # fmt: skip
        mean = total / jnp.where(weight == 0, 1, weight)
        return {"fused": mean if scale is None else jnp.asarray(scale, mean.dtype) * mean}


def fused_linear(
    method: Any, *, chunk: int | None = None, soft_cap: Any = None, vocabulary: int | None = None
) -> FusedLinear:
    """The method from hidden states and heads (`kd.losses.linear_divergence`): the same loss, in much less memory.

    The logits of `chunk` tokens are in memory at a time, and never `[tokens, vocabulary]`. For language models with a
    large vocabulary: `kd.distill(student, teacher, data, method=kd.fused_linear(kd.KD(alpha=0.5, temperature=1.0)))`.
    Liger's "fused linear" losses (Hsu et al., 2024, https://arxiv.org/abs/2410.10989) do this for two of them.

    method: `CrossEntropy`, `KD`, `ReverseKL`, `SymmetricKL`, `SkewKL`, `SkewReverseKL`, `JSD`, `AdaptiveKL`,
        `TotalVariation`, `TopKKL`, `AlphaBeta` or `SampledKL`, or one of them `scheduled`. Labels are whole numbers.
    chunk: tokens; None for as many as fit the width.
    soft_cap: c of logits c tanh(z / c), or one for each network, (student's, teacher's); None for none.
    vocabulary: how many of the heads' first columns are real, where they are padded, or padded differently.

    Student and teacher are NNX modules whose logits are what an `nnx.Linear`, or an `nnx.Embed` by `attend`, returns,
    with nothing behind it, as those of the zoo; or models that return `kd.Output(logits, features)` with the features
    `linear_head.hidden` `[..., width]`, `linear_head.kernel` `[width, vocabulary]` and, where there is one,
    `linear_head.bias`. The teacher's can be kept: `kd.cached(…, keep="hidden")`. Their widths may differ. The history
    has one term, `fused`, and no accuracy, which would need the logits; `validation` computes them.

    Raises `MethodError` for another method.
    """
    method = as_method(method)
    inner = method.method if isinstance(method, Scheduled) else method
    if type(inner) not in _TAKEN:
        names = ", ".join(one.__name__ for one in _TAKEN)
        raise MethodError(
            f"{type(inner).__name__} cannot be computed from hidden states and heads: give one of {names}, and put "
            "sums and weights around kd.fused_linear"
        )
    for name, number in {"chunk": chunk, "vocabulary": vocabulary}.items():
        if number is not None:
            check_whole(number, name)
    return FusedLinear(method, chunk, check_caps(soft_cap), vocabulary)


def is_fused(method: Method) -> bool:
    """Whether nothing may ask for all logits of a batch, for the method does without."""
    return any(isinstance(one, FusedLinear) for one in walk(method))


def _weights(method: Any, labelled: bool) -> tuple[Any, Any, str, dict[str, Any]]:
    """The share of the labels, a factor of the whole or None, the divergence, and its numbers."""
    if isinstance(method, CrossEntropy):
        return 1.0, None, "kl", {}
    divergence, names = _DIVERGENCES[type(method)]
    numbers = {name: getattr(method, name) for name in names}
    if not isinstance(method, AlphaBeta | SampledKL):
        return method.alpha if labelled else 0.0, None, divergence, numbers
    if isinstance(method, AlphaBeta):
        numbers = {"exponents": (method.alpha, method.beta)}
    if not labelled or is_zero(method.hard):
        return 0.0, None, divergence, numbers
    # hard · CE + D as a factor of a share of both.
    hard = jnp.asarray(method.hard)
    return hard / (1 + hard), 1 + hard, divergence, numbers


def _is_nothing(alpha: Any) -> bool:
    return isinstance(alpha, float) and alpha == 0
