"""On-policy distillation: in a share of each batch the student itself writes what both networks are compared on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from kd_jax.data.batch import Batch
from kd_jax.errors import MethodError
from kd_jax.generation import Sampling, check_sampling, sample, written_batch
from kd_jax.methods.base import Method, Parts, PyTree, Terms, Wrapped, as_method, static, terms_of
from kd_jax.methods.bounds import Share, Weight, walk
from kd_jax.methods.schedules import Scheduled
from kd_jax.models import Network, Output
from kd_jax.models.predict import highest_precision

# Beside those of `train.step`.
_SAMPLE = 7


@dataclass(frozen=True)
class OnPolicy(Wrapped):
    """A method on sequences of the student's own; `on_policy` makes it."""

    method: Method
    share: Share = 0.5
    temperature: Weight = 1.0
    top_k: int | None = static(None)
    end: int | None = static(None)

    def loss(
        self, parts: Parts, student: Output, teacher: Output | None, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Terms, PyTree]:
        """The method's terms."""
        return terms_of(self.method, parts, student, teacher, batch, step)

    def resample(self, key: Key[Array, ""], network: Network, variables: PyTree, batch: Batch) -> Batch:
        """The batch with sequences of the network's own in a share of its rows. Raises `MethodError`."""
        inputs = batch.inputs
        tokens: Any = inputs.get("tokens") if isinstance(inputs, Mapping) else inputs
        if not hasattr(tokens, "ndim") or tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise MethodError(
                "kd.on_policy writes tokens, and the batch has none: give inputs of whole numbers [batch, positions], "
                "or a dict with such tokens, as kd.token_batch makes it"
            )
        rows, room = tokens.shape
        weights = jnp.ones(tokens.shape, jnp.float32) if batch.weights is None else jnp.asarray(batch.weights)
        weights = weights if jnp.issubdtype(weights.dtype, jnp.floating) else weights.astype(jnp.float32)
        if weights.shape != tokens.shape:
            raise MethodError(
                f"the weights have the shape {list(weights.shape)} and the tokens {list(tokens.shape)}: give one for "
                "each position, for the first that is not 0 tells where the prompt ends"
            )
        learned = weights > 0
        some = jnp.any(learned, axis=1)
        # What a row weighs, for each position that it learns.
        count = jnp.sum(learned.astype(weights.dtype), axis=1)
        mean = jnp.sum(jnp.where(learned, weights, 0), axis=1) / jnp.maximum(count, 1)
        if isinstance(inputs, Mapping) and "segments" in inputs:
            some &= jnp.max(inputs["segments"], axis=1) <= jnp.min(inputs["segments"][:, :1], axis=1)
        which, draws = jax.random.split(key)
        chosen = some & jax.random.bernoulli(which, self.share, (rows,))
        lengths = jnp.where(some, jnp.argmax(learned, axis=1) + 1, room).astype(jnp.int32)
        how = Sampling(False, self.top_k, self.end)
        with highest_precision():
            written = sample(
                network, variables, inputs, lengths, draws, self.temperature, how=how, room=room, wanted=chosen
            )
        own = written_batch(batch._replace(weights=weights), written)

        def put(new: Any, old: Any) -> Array:
            old = jnp.asarray(old)
            return jnp.where(chosen.reshape(-1, *(1,) * (old.ndim - 1)), new, old).astype(old.dtype)

        whole = getattr(batch.labels, "shape", None) == tokens.shape and jnp.issubdtype(batch.labels.dtype, jnp.integer)
        return batch._replace(
            inputs=jax.tree.map(put, own.inputs, inputs),
            labels=put(own.labels, batch.labels) if whole else batch.labels,
            weights=put(own.weights * mean[:, None].astype(own.weights.dtype), weights),
        )


def on_policy(method: Any, *, share: Any = 0.5, temperature: Any = 1.0, top_k: Any = None, end: Any = None) -> OnPolicy:
    """The method, with sequences that the student writes itself in a share of each batch.

    GKD, Agarwal et al. (2024), https://arxiv.org/abs/2306.13649: `kd.on_policy(kd.JSD(alpha=0))`. DistiLLM, Ko et al.
    (2024), https://arxiv.org/abs/2402.03898, mixes them with the data likewise, with `kd.SkewKL(alpha=0)`, and has
    more of them as it goes: `kd.scheduled(kd.on_policy(…), share=optax.linear_schedule(0, 1, 1000))`. It keeps samples
    for several steps; here each step has its own.

    In each step every row is the student's own with probability `share`. It goes on from the row's prompt, which ends
    with the first position that has a weight, to the row's end or the sign `end`; both networks then say what they
    think of each position of it. Each such position has the mean weight of those that the row learned. There is no
    gradient through the sampling. Packed rows stay as they are; padding must be on the right.

    method: one that needs no labels, for those of a student's own sequence are that sequence. temperature, top_k: of
    the sampling alone, as of `kd.generate`. The teacher is asked in each step: it cannot be cached. Raises
    `ConfigError`; where it is part of a sum, too: it stands around the sum.
    """
    method = as_method(method)
    if method.needs_labels:
        raise MethodError(
            f"{type(method).__name__} learns labels, and those of a student's own sequences are the sequences: give a "
            "method of the teacher alone, such as kd.JSD(alpha=0)"
        )
    top_k, end = check_sampling(top_k, end)
    return OnPolicy(method, share, temperature, top_k, end)


def is_on_policy(method: Method) -> bool:
    """Whether the student writes some of its sequences itself."""
    return any(isinstance(one, OnPolicy) for one in walk(method))


def check_rows(batch: Batch, *, whole: bool = True) -> None:
    """Raises `MethodError` for rows that are padded on the left, and where all are packed; nothing traced is looked at.

    whole: whether this is all the data, so that rows of one sequence cannot come later.
    """
    inputs = batch.inputs
    segments: Any = inputs.get("segments") if isinstance(inputs, Mapping) else None
    if segments is None or isinstance(segments, jax.core.Tracer) or segments.ndim != 2 or not segments.size:
        return
    segments = np.asarray(segments)
    used = segments.any(axis=1)
    padded = (segments[:, 0] == 0) & used
    if padded.any():
        raise MethodError(
            f"row {int(np.argmax(padded))} begins with padding, the segment 0, and kd.on_policy goes on from a row's "
            "left: put the padding behind each sequence"
        )
    if whole and (segments[used].max(axis=1) > segments[used, 0]).all():
        raise MethodError(
            f"each of the {int(used.sum())} rows is packed from several sequences, and kd.on_policy writes on rows of "
            "one alone: give one sequence a row, padded on the right"
        )


def resampled(
    method: Method, key: Key[Array, ""], network: Network, variables: PyTree, batch: Batch, step: Int[Array, ""]
) -> Batch:
    """The batch as a method trains on it. key: of the training. Raises `MethodError`."""
    if isinstance(method, Scheduled) and is_on_policy(method):
        method = method.at(step)
    if isinstance(method, OnPolicy):
        key = jax.random.fold_in(jax.random.fold_in(key, _SAMPLE), step)
        return method.resample(key, network, jax.lax.stop_gradient(variables), batch)
    if is_on_policy(method):
        raise MethodError(
            "kd.on_policy stands inside of another method, and a step has one batch for all of it: put it around the "
            "whole, kd.on_policy(one + other)"
        )
    return batch
