"""The sum of a divergence over chunks of tokens, with its gradients made on the way."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from kd_jax.errors import ConfigError
from kd_jax.losses.linear_terms import DIVERGENCES, FLOOR, Columns, distributions
from kd_jax.losses.mixing import mix

PyTree = Any


class Network(NamedTuple):
    """hidden `[tokens, width]`, head `[width, columns]`, bias `[columns]` or None."""

    hidden: Array
    head: Array
    bias: Array | None


class Tokens(NamedTuple):
    """weights and labels `[tokens]`; places `[tokens, samples]` of the draws of "sampled_kl"."""

    weights: Array
    labels: Array | None
    draws: Array | None


@dataclass(frozen=True)
class Plan:
    """What is known while tracing.

    static: the divergence's numbers that are no arrays. columns: how many are looked at here; real: how many there are,
    on all devices along `axis`. caps: the student's and the teacher's. rows: tokens in a chunk. block: columns of the
    head's gradient that are added at a time; 0 for all. tempered: T may differ from 1. soft, hard: which losses are
    needed. types: of the student's hidden states, head and bias.
    """

    divergence: str
    static: tuple[tuple[str, Any], ...]
    columns: int
    real: int
    axis: str | None
    caps: tuple[float | None, float | None]
    rows: int
    block: int
    tempered: bool
    soft: bool
    hard: bool
    types: tuple[Any, ...]


class _By(NamedTuple):
    """Something for each of the student's parts: hidden states, head and bias."""

    hidden: Any
    head: Any
    bias: Any


def fused(plan: Plan, student: Network, teacher: Network, given: PyTree, tokens: Tokens) -> tuple[Array, Array]:
    """The sum of weight times value, and the values `[tokens]`."""
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves((student, teacher, given, tokens))))
    student = jax.tree.map(lambda x: _varying(x, axes), student)
    weights = _varying(tokens.weights, axes - {plan.axis})
    return _fused(plan, student, teacher, given, tokens._replace(weights=weights))


def _values(plan: Plan, student: Network, teacher: Network, given: PyTree, tokens: Tokens) -> tuple[Array, Array]:
    total, values, _ = _scanned(plan, student, teacher, given, tokens, _By(False, False, False))
    return total, values


_fused = jax.custom_vjp(_values, nondiff_argnums=(0,))


def _forward(
    plan: Plan, student: Any, teacher: Any, given: Any, tokens: Any
) -> tuple[tuple[Array, Array], tuple[_By, Array]]:
    for name, number in given.items():
        if any(leaf.perturbed for leaf in jax.tree.leaves(number)):
            raise ConfigError(
                f"linear_divergence has no derivative by {name}: stop its gradient with jax.lax.stop_gradient, or take "
                "the loss of the whole logits"
            )
    asked = _By(*(part is not None and part.perturbed for part in student))
    student, teacher, given, tokens = jax.tree.map(lambda leaf: leaf.value, (student, teacher, given, tokens))
    total, values, gradients = _scanned(plan, student, teacher, given, tokens, asked)
    return (total, values), (gradients, values)


def _backward(
    plan: Plan, residuals: tuple[_By, Array], cotangents: tuple[Any, Any]
) -> tuple[Network | None, None, None, Tokens | None]:
    gradients, values = residuals
    by_total = cotangents[0]
    if isinstance(by_total, SymbolicZero):
        return None, None, None, None

    def scaled(gradient: Array | None, kind: Any) -> Any:
        return None if gradient is None else (by_total * gradient.astype(by_total.dtype)).astype(kind)

    student = Network(*map(scaled, gradients, (*plan.types, None)))
    return student, None, None, Tokens(by_total * values, None, None)


_fused.defvjp(_forward, _backward, symbolic_zeros=True)


def _scanned(
    plan: Plan, student: Network, teacher: Network, given: PyTree, tokens: Tokens, asked: _By
) -> tuple[Array, Array, _By]:
    """The sum, the values, and the gradients that are asked for."""
    kind, count = tokens.weights.dtype, tokens.weights.size
    chunks = -(-count // plan.rows)

    def split(x: Array) -> Array:
        # Each chunk takes tokens from everywhere, so that tokens sharded over devices keep all of them busy.
        padded = jnp.pad(x, [(0, plan.rows * chunks - count)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(padded.reshape(plan.rows, chunks, *x.shape[1:]), 0, 1)

    def joined(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(plan.rows * chunks, *x.shape[2:])[:count]

    def zeros(x: Array | None, wanted: bool) -> Array | None:
        return _varying(jnp.zeros(x.shape, kind), varying_axes(x)) if x is not None and wanted else None

    def step(sums: _By, part: tuple[Array, Array, Tokens]) -> tuple[_By, tuple[Array, Array | None]]:
        mine, taught, here = part
        networks = student._replace(hidden=mine), teacher._replace(hidden=taught)
        return _chunk(plan, *networks, given, here, asked, sums)

    start = _By(None, zeros(student.head, asked.head), zeros(student.bias, asked.bias))
    sums, (values, by_hidden) = jax.lax.scan(step, start, jax.tree.map(split, (student.hidden, teacher.hidden, tokens)))
    values = joined(values)
    gradients = sums._replace(hidden=None if by_hidden is None else joined(by_hidden))
    return jnp.sum(tokens.weights * values), values, gradients


def _chunk(
    plan: Plan, student: Network, teacher: Network, given: PyTree, tokens: Tokens, asked: _By, sums: _By
) -> tuple[_By, tuple[Array, Array | None]]:
    """The sums of gradients with those of a chunk, its values, and its gradient by the hidden states."""
    counted, columns = tokens.weights != 0, Columns(plan.axis)
    student, teacher = (net._replace(hidden=jnp.where(counted[:, None], net.hidden, 0)) for net in (student, teacher))
    logits, capped = _logits(plan, student, plan.caps[0], columns)
    if not plan.soft:
        values, slopes = _hard(plan, logits, tokens, columns)
    else:
        taught, _ = _logits(plan, teacher, plan.caps[1], columns)
        values, slopes = _soft(plan, logits, taught, given, tokens, columns)
        if plan.hard:
            alpha, (hard, of_hard) = given["alpha"], _hard(plan, logits, tokens, columns)
            values = mix(hard, values, alpha=alpha)
            slopes = jnp.where(alpha == 0, 0, alpha * of_hard) + jnp.where(alpha == 1, 0, (1 - alpha) * slopes)
    values = jnp.where(counted, values, 0)
    if not any(asked):
        return sums, (values, None)
    slopes = jnp.where(counted[:, None], tokens.weights[:, None] * slopes, 0)
    if capped is not None:
        slopes = slopes * (1 - capped * capped)
    beyond = ((0, 0), (0, student.head.shape[1] - slopes.shape[1]))
    bias = sums.bias + jnp.pad(jnp.sum(slopes, axis=0), beyond[1]) if asked.bias else None
    # Products in the type of hidden states and head, as those of the logits.
    narrow = jnp.dtype(wider(*plan.types[:2]))
    unit: Array | None = None
    if narrow == jnp.float16:
        # A token's weight may be 1/8192, and slopes beside it below what float16 holds.
        unit = _power_of_two(slopes)
        slopes = slopes / unit
    slopes = slopes.astype(narrow)
    by_hidden: Array | None = None
    if asked.hidden:
        # Without the columns that are padding, which may hold anything.
        made = _times(_product(slopes, student.head[:, : plan.columns], ((1,), (1,))), unit)
        by_hidden = made if narrow == jnp.float16 else made.astype(plan.types[0])
    head = _added(sums.head, student.hidden, jnp.pad(slopes, beyond), plan.block, unit) if asked.head else None
    return _By(None, head, bias), (values, by_hidden)


def _power_of_two(slopes: Array) -> Array:
    """That which makes the largest of the slopes about 2¹⁵ when they are divided by it: float16 ends at 65,504."""
    _, exponent = jnp.frexp(jnp.max(jnp.abs(slopes)))
    return jnp.ldexp(jnp.ones((), slopes.dtype), jnp.clip(exponent - 15, -100, 100))


def _times(x: Array, unit: Array | None) -> Array:
    return x if unit is None else x * unit


def _logits(plan: Plan, network: Network, cap: float | None, columns: Columns) -> tuple[Array, Array | None]:
    """Logits of at least FLOOR, and the tanh of their cap."""
    z, capped = _product(network.hidden, network.head, ((1,), (0,)))[:, : plan.columns], None
    if network.bias is not None:
        z = z + network.bias[: plan.columns].astype(z.dtype)[None]
    if cap is not None:
        capped = jnp.tanh(z / cap)
        z = cap * capped
        if network.bias is not None:
            # A cap would bring a column back that its bias rules out.
            z = jnp.where(network.bias[None, : plan.columns] <= FLOOR, FLOOR, z)
    if plan.axis is not None:
        z = jnp.where(columns.numbers(z) < plan.real, z, FLOOR)
    return jnp.maximum(z, FLOOR), capped


def _soft(
    plan: Plan, student: Array, teacher: Array, given: PyTree, tokens: Tokens, columns: Columns
) -> tuple[Array, Array]:
    """T² times the divergence, `[rows]`, and its gradient by the student's logits."""
    numbers = dict(plan.static) | {name: x for name, x in given.items() if name not in ("temperature", "alpha")}
    if tokens.draws is not None:
        numbers["draws"] = tokens.draws
    t = given["temperature"]
    if plan.tempered:
        # What is ruled out stays so at any temperature.
        student, teacher = (jnp.where(z <= FLOOR, FLOOR, jnp.maximum(z / t, FLOOR)) for z in (student, teacher))
    pair = distributions(student, teacher, columns)
    summed = DIVERGENCES[plan.divergence](pair, columns, **numbers)
    value, drift = columns.total(summed.terms, summed.u)
    value = (value + summed.rest)[:, 0]
    return t**2 * jnp.where(value > 1e20, jnp.inf, value), t * (summed.u - pair.q * drift)


def _hard(plan: Plan, logits: Array, tokens: Tokens, columns: Columns) -> tuple[Array, Array]:
    """The cross entropy of the labels, `[rows]`, and its gradient by the logits."""
    labels = tokens.labels[:, None]  # type: ignore[index]
    is_label = columns.numbers(logits).astype(labels.dtype) == labels
    (normaliser,) = columns.log_normalisers(logits)
    (of_label,) = columns.total(jnp.where(is_label, logits, 0))
    known = (labels >= 0) & (labels < plan.real)
    value = jnp.where(known, normaliser - of_label, jnp.nan)[:, 0]
    # As `cross_entropy`, which has no gradient of a label outside the vocabulary.
    slopes = jnp.where(known, jnp.exp(logits - normaliser) - is_label.astype(logits.dtype), 0)
    return jnp.where(value > 1e20, jnp.inf, value), slopes


def _added(head: Array, hidden: Array, slopes: Array, block: int, unit: Array | None) -> Array:
    """head + hiddenᵀ slopes, in `unit` where there is one.

    In blocks of columns, so that on a CPU the product is added while it is in the cache.
    """
    whole = head.shape[1] // block if block else 0
    if whole < 2:
        return head + _times(_product(hidden, slopes, ((0,), (0,))), unit)

    def add(head: Array, start: Any, width: int) -> Array:
        part, of_part = (jax.lax.dynamic_slice_in_dim(x, start, width, axis=1) for x in (slopes, head))
        risen = of_part + _times(_product(hidden, part, ((0,), (0,))), unit)
        return jax.lax.dynamic_update_slice_in_dim(head, risen, start, axis=1)

    head = jax.lax.fori_loop(0, whole, lambda i, head: add(head, i * block, block), head)
    rest = head.shape[1] - whole * block
    return add(head, whole * block, rest) if rest else head


def _product(a: Array, b: Array, contracted: tuple[tuple[int], tuple[int]]) -> Array:
    """A matrix product in the wider of two types, added up in float32 or better."""
    kind = wider(a.dtype, b.dtype)
    added = wider(kind, jnp.dtype(jnp.float32))
    precision = jax.lax.Precision.HIGHEST if added == kind else None
    a, b = a.astype(kind), b.astype(kind)
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=added)


def wider(a: Any, b: Any) -> Any:
    """The wider of two types of floats; at least float32 where they differ."""
    return a if a == b else max(jnp.dtype(jnp.float32), a, b, key=lambda kind: kind.itemsize)


def varying_axes(x: Array) -> frozenset[Any]:
    """The axes of a mesh along which an array may differ, under `jax.shard_map`."""
    kind: Any = jax.typeof(x)
    # Its name before jax 0.10.2.
    return kind.vma if hasattr(kind, "vma") else kind.mat.varying


def _varying(x: Array, axes: frozenset[Any]) -> Array:
    """The same array, as one that may differ along axes of a mesh: the derivative is then summed over them."""
    missing = tuple(axes - varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
