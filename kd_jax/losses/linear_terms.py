"""What each divergence sums over a large vocabulary, for a chunk of tokens, and its gradient by the student's logits.

With u = q ∂D/∂q, the gradient of a divergence D by the logits z / T is u - q Σ u: so each needs, besides the softmaxes,
two sums over the vocabulary, Σ terms = D and Σ u. Where a mesh axis holds the vocabulary, these are summed over it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kd_jax.errors import ConfigError
from kd_jax.losses.alpha_beta_divergence import alpha_beta_slopes, alpha_beta_terms
from kd_jax.losses.pairs import Pair
from kd_jax.losses.sparse import rising

FLOOR = -1e37
"""In place of -inf, so that the probability 0 times a ratio is 0."""


class Columns(NamedTuple):
    """The part of the vocabulary that is here: all of it, or a shard along the mesh axis `axis`."""

    axis: str | None

    def total(self, *terms: Array) -> list[Array]:
        """Sums over the whole vocabulary, `[tokens, 1]` each, with one message between devices."""
        return self._across(jax.lax.psum, [jnp.sum(term, axis=-1, keepdims=True) for term in terms])

    def top(self, *logits: Array) -> list[Array]:
        """The largest over the whole vocabulary, `[tokens, 1]` each; constants for derivatives."""
        return self._across(jax.lax.pmax, [jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True)) for z in logits])

    def _across(self, reduced: Callable[..., Array], parts: list[Array]) -> list[Array]:
        if self.axis is None:
            return parts
        return jnp.split(reduced(jnp.concatenate(parts, axis=-1), self.axis), len(parts), axis=-1)

    def shards(self, local: Array) -> Array:
        """What each shard has, `[shards, ...]`."""
        return local[None] if self.axis is None else jax.lax.all_gather(local, self.axis)

    def shard(self) -> Array:
        """Which shard this is."""
        return jnp.int32(0) if self.axis is None else jax.lax.axis_index(self.axis)

    def numbers(self, local: Array) -> Array:
        """The number of each column that is here, among all, `[tokens, columns]`."""
        here = jax.lax.broadcasted_iota(jnp.int32, local.shape, local.ndim - 1)
        return here + self.shard() * local.shape[-1]

    def log_normalisers(self, *logits: Array) -> list[Array]:
        """log Σ e^z, `[tokens, 1]` each."""
        tops = self.top(*logits)
        sums = self.total(*(jnp.exp(z - top) for z, top in zip(logits, tops, strict=True)))
        return [top + jnp.log(mass) for top, mass in zip(tops, sums, strict=True)]


class Summed(NamedTuple):
    """terms and u of every column, `[tokens, columns]`; rest: of a token, `[tokens, 1]`, on every shard the same."""

    terms: Array
    u: Array
    rest: Array | float = 0.0


def distributions(student: Array, teacher: Array, columns: Columns) -> Pair:
    """Softmaxes of logits that are at least FLOOR."""
    of_student, of_teacher = columns.log_normalisers(student, teacher)
    log_q, log_p = student - of_student, teacher - of_teacher
    # From the logits, so that no more arrays than those are in memory for it.
    ratio = (student - teacher) - (of_student - of_teacher)
    return Pair(jnp.exp(log_p), jnp.exp(log_q), log_p, log_q, ratio)


def kl(pair: Pair, columns: Columns) -> Summed:
    """KL(p‖q)."""
    return Summed(pair.q - pair.p - pair.p * pair.ratio, -pair.p)


def reverse_kl(pair: Pair, columns: Columns) -> Summed:
    """KL(q‖p)."""
    weighted = pair.q * pair.ratio
    return Summed(pair.p - pair.q + weighted, weighted)


def symmetric_kl(pair: Pair, columns: Columns, *, skew: Any = 0.9) -> Summed:
    """(1 - skew) KL(p‖q) + skew KL(q‖p)."""
    return _weighed(kl(pair, columns), reverse_kl(pair, columns), 1 - skew, skew)


def skew_kl(pair: Pair, columns: Columns, *, skew: Any = 0.1) -> Summed:
    """KL(p ‖ skew p + (1 - skew) q)."""
    return _to_mixture(pair, skew).of_p


def skew_reverse_kl(pair: Pair, columns: Columns, *, skew: Any = 0.1, detached: bool = False) -> Summed:
    """KL(q ‖ skew q + (1 - skew) p)."""
    mixture = _to_mixture(pair, 1 - skew)
    return mixture.of_q._replace(u=mixture.detached) if detached else mixture.of_q


def jsd(pair: Pair, columns: Columns, *, beta: Any = 0.5, convention: str = "paper") -> Summed:
    """Two KLs to the mixture m = beta p + (1 - beta) q."""
    if convention not in ("paper", "continuous"):
        raise ConfigError(f'convention {convention!r} is unknown: use "paper" or "continuous"')
    mixture, share = _to_mixture(pair, beta), beta if convention == "paper" else 1 - beta
    return _weighed(mixture.of_p, mixture.of_q, share, 1 - share)


def alpha_beta(pair: Pair, columns: Columns, *, exponents: Any = (0.2, 0.7)) -> Summed:
    """The alpha-beta divergence; `exponents` are its α and β."""
    logs = [jnp.where(log < FLOOR / 2, -jnp.inf, log) for log in (pair.log_p, pair.log_q)]
    both = jnp.isneginf(logs[0]) & jnp.isneginf(logs[1])
    known = pair._replace(log_p=logs[0], log_q=logs[1], ratio=jnp.where(both, 0, pair.ratio))
    alpha, beta = (jnp.asarray(x, pair.p.dtype) for x in exponents)
    terms, endless = alpha_beta_terms(known, alpha, beta)
    return Summed(jnp.where(endless, -FLOOR, terms), alpha_beta_slopes(known, alpha, beta))


def total_variation(pair: Pair, columns: Columns) -> Summed:
    """Σ |p - q| / 2."""
    apart = pair.q - pair.p
    sign = jax.lax.stop_gradient(jnp.sign(apart)) / 2
    return Summed(sign * apart, sign * pair.q)


def adaptive_kl(pair: Pair, columns: Columns, *, mu: Any = 0.5) -> Summed:
    """Both KLs, weighed by the differences in the head and in the tail; of tied probabilities all are in the tail."""
    p, apart = (jax.lax.stop_gradient(x) for x in (pair.p, jnp.abs(pair.q - pair.p)))
    head = p >= jnp.minimum(_head_threshold(p, columns, mu), columns.top(p)[0])
    in_head, total = columns.total(jnp.where(head, apart, 0), apart)
    share = jnp.where(total == 0, 0.5, in_head / jnp.where(total == 0, 1, total))
    return _weighed(kl(pair, columns), reverse_kl(pair, columns), share, 1 - share)


def top_k_kl(pair: Pair, columns: Columns, *, k: int = 64, rest: str = "tail") -> Summed:
    """KL over the teacher's k most probable columns, with the others as one, as none, or renormalised away."""
    if rest not in ("renormalised", "tail", "zero"):
        raise ConfigError(f'rest {rest!r} is unknown: use "renormalised", "tail" or "zero"')
    chosen = _top_k(pair.log_p, columns, k)
    p = jnp.where(chosen, pair.p, 0)
    if rest == "zero":
        return Summed(-p * pair.ratio, -p)
    if rest == "renormalised":
        (mass,) = columns.total(p)
        return Summed(pair.q - p / mass - p / mass * (pair.ratio + jnp.log(mass)), -p / mass)
    q = jnp.where(chosen, pair.q, 0)
    of_p, of_q = columns.total(pair.p - p, pair.q - q)
    # Where all of a tail underflows it has no ratio.
    known = (of_p > 0) & (of_q > 0)
    ratio = jnp.where(known, of_p / jnp.where(known, of_q, 1), jnp.where(of_p > 0, -FLOOR, 0))
    tail = of_q - of_p + of_p * jnp.log(jnp.where(known, ratio, 1)) + jnp.where(known, 0, of_p * ratio)
    return Summed(q - p - p * pair.ratio, -p - (pair.q - q) * jnp.where(known, ratio, 0), tail)


def sampled_kl(pair: Pair, columns: Columns, *, draws: Array, power: Any = 1.0) -> Summed:
    """Σ w log(p / q) over columns drawn from p^power, at the places `draws` `[tokens, samples]` in [0, 1)."""
    log_p = jax.lax.stop_gradient(pair.log_p)
    possible = log_p > FLOOR / 2
    mass = jnp.where(possible, jnp.exp(power * (log_p - columns.top(log_p)[0])), 0)
    cumulative = rising(mass)
    here = cumulative[:, -1:]
    masses, shard = columns.shards(here), columns.shard()
    earlier = jnp.arange(masses.shape[0], dtype=jnp.int32)[:, None, None] < shard
    total = jnp.sum(masses, axis=0)
    places = jnp.minimum(draws * total, jnp.nextafter(total, 0)) - jnp.sum(jnp.where(earlier, masses, 0), axis=0)
    drawn = jax.vmap(lambda row, points: jnp.searchsorted(row, points, side="right"))(cumulative, places)
    drawn = jnp.minimum(drawn, mass.shape[-1] - 1)
    weights = jnp.exp((1 - power) * jnp.take_along_axis(log_p, drawn, axis=-1))
    weights = jnp.where((places >= 0) & (places < here), weights, 0)
    weights = weights / columns.total(weights)[0]
    terms = -weights * jnp.take_along_axis(pair.ratio, drawn, axis=-1)
    rows = jnp.arange(drawn.shape[0], dtype=drawn.dtype)[:, None]
    return Summed(terms, jnp.zeros_like(mass).at[rows, drawn].add(-weights))


DIVERGENCES: dict[str, Callable[..., Summed]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "jsd": jsd,
    "alpha_beta": alpha_beta,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
    "top_k_kl": top_k_kl,
    "sampled_kl": sampled_kl,
}


class _Mixture(NamedTuple):
    """KL(p‖m) and KL(q‖m); and u of the second where the q within m is a constant."""

    of_p: Summed
    of_q: Summed
    detached: Array


def _to_mixture(pair: Pair, share: Any) -> _Mixture:
    """m = share p + (1 - share) q, measured from the larger of the two."""
    above = pair.ratio > 0
    small = jnp.exp(-jnp.abs(pair.ratio))
    inner = jnp.where(above, (1 - share) + share * small, share + (1 - share) * small)
    # Only where m is one of the two alone, and that one is as nothing beside the other.
    vanished = inner == 0
    inner = jnp.where(vanished, 1, inner)
    log = jnp.where(vanished, -jnp.abs(pair.ratio), jnp.log(inner))
    # log(m / p), log(m / q) and q / m.
    over_p, over_q = log + jnp.maximum(pair.ratio, 0), log - jnp.minimum(pair.ratio, 0)
    of_m = jnp.where(above | vanished, 1 / inner, small / inner)
    m = share * pair.p + (1 - share) * pair.q
    drawn_apart = -pair.q * over_q
    return _Mixture(
        Summed(m - pair.p - pair.p * over_p, -(1 - share) * pair.p * of_m),
        Summed(m - pair.q + drawn_apart, drawn_apart - (1 - share) * pair.q * of_m),
        drawn_apart,
    )


def _weighed(a: Summed, b: Summed, of_a: Any, of_b: Any) -> Summed:
    """The sum with two weights."""
    return Summed(of_a * a.terms + of_b * b.terms, of_a * a.u + of_b * b.u)


def _head_threshold(p: Array, columns: Columns, mu: Any) -> Array:
    """The least probability from which on the columns' mass is at most mu, `[tokens, 1]`, by bisection of its bits.

    The bits of floats that are not negative are in the order of their values.
    """
    kind = jnp.uint32 if p.dtype == jnp.float32 else jnp.uint64
    bits = jax.lax.bitcast_convert_type(p, kind)
    least = jnp.zeros_like(bits[:, :1])
    most = least + jax.lax.bitcast_convert_type(jnp.ones((), p.dtype), kind) + 1

    def halved(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        within = columns.total(jnp.where(bits >= middle, p, 0))[0] <= mu
        return jnp.where(within, low, middle + 1), jnp.where(within, middle, high)

    _, found = jax.lax.fori_loop(0, 8 * p.dtype.itemsize - 1, halved, (least, most))
    return jax.lax.bitcast_convert_type(found, p.dtype)


def _top_k(log_p: Array, columns: Columns, k: int) -> Array:
    """Whether a column is among the k largest of its row; of equal ones, the first."""
    width = log_p.shape[-1]
    values, places = jax.lax.top_k(log_p, min(k, width))
    held = values.shape[-1]
    everywhere = jnp.moveaxis(columns.shards(values), 0, 1).reshape(len(values), -1)
    if not 1 <= k <= everywhere.shape[-1] // held * width:
        columns_in_all = everywhere.shape[-1] // held * width
        raise ConfigError(f"k is {k}: it must be from 1 to {columns_in_all}, the number of columns")
    _, chosen = jax.lax.top_k(everywhere, k)
    local = chosen - columns.shard().astype(chosen.dtype) * held
    here = (local >= 0) & (local < held)
    at = jnp.where(here, jnp.take_along_axis(places, jnp.clip(local, 0, held - 1), axis=-1), width)
    rows = jnp.arange(len(values), dtype=at.dtype)[:, None]
    return jnp.zeros(log_p.shape, bool).at[rows, at].set(True, mode="drop")
