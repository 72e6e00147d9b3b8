"""Distillation over a large vocabulary from hidden states and heads, without the logits of all tokens at once."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from kd_jax.errors import ConfigError, ShapeError
from kd_jax.losses.checks import Scalar
from kd_jax.losses.linear_scan import Network, Plan, Tokens, fused, varying_axes, wider
from kd_jax.losses.linear_terms import DIVERGENCES

Tensor = Shaped[Array | np.ndarray, "..."]

_STATIC = ("convention", "detached", "k", "rest")
_LEAST_ROWS = 128
# Of 512 to 8,192 columns, 512 and 1,024 were the fastest.
_BLOCK = 1024


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    divergence: str = "kl",
    temperature: Scalar = 1.0,
    labels: Tensor | None = None,
    alpha: Scalar = 0.0,
    weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    soft_cap: Any = None,
    vocabulary: Any = None,
    axis_name: str | None = None,
    chunk: Any = None,
    **numbers: Any,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "..."]]:
    r"""$\alpha \, \mathrm{CE} + (1 - \alpha) T^2 D$ of two language models, from their hidden states and heads.

    Returns the sum over the tokens of weight times value, the sum of the weights, and the values `[...]`, without
    gradient. The logits of `chunk` tokens are in memory at a time; gradients are made beside the values, once. None by
    the teacher; one by a number is refused, as are forward derivatives. Second derivatives of the student are right.

    hidden: `[..., width]`, of each network's own width. head: `[width, vocabulary]`. bias: `[vocabulary]`. Products in
        the inputs' type, sums in float32 or better. soft_cap: c of logits c tanh(z / c), or one for each network.
    divergence: a function of `kd_jax.losses` by name: "kl" (`kl_divergence`), "reverse_kl", "symmetric_kl", "skew_kl",
        "skew_reverse_kl", "jsd", "alpha_beta", "total_variation", "adaptive_kl", "top_k_kl" or "sampled_kl".
    numbers: its keyword arguments. "alpha_beta" has `exponents=(0.2, 0.7)`, as alpha is the weight of the hard loss.
    labels: whole numbers `[...]`, for the cross entropy at temperature 1; NaN for one outside the vocabulary.
    weights: `[...]`, 1 by default. A token of weight 0 counts for nothing, whatever it holds, and has the value 0.
    vocabulary: the number of columns that are real, where heads are padded. axis_name: under `jax.shard_map`, the mesh
        axis that shards the columns of heads and biases. chunk: by default, so many that logits take about as much
        memory as the head's gradient.
    """
    _check_bounds(temperature=temperature, alpha=alpha, skew=numbers.get("skew", 0.5))
    _check_whole(chunk=chunk, vocabulary=vocabulary, k=numbers.get("k"), samples=numbers.get("samples"))
    student = _network(student_hidden, student_head, student_bias, "student")
    teacher = jax.lax.stop_gradient(_network(teacher_hidden, teacher_head, teacher_bias, "teacher"))
    places = student.hidden.shape[:-1]
    if teacher.hidden.shape[:-1] != places:
        raise ShapeError(
            f"the student's hidden states {list(student.hidden.shape)} and the teacher's {list(teacher.hidden.shape)} "
            "differ in their tokens: give the same tokens to both"
        )
    kind = jnp.dtype(jnp.float32)
    for x in (*student[:2], *teacher[:2]):
        kind = wider(kind, x.dtype)
    if labels is None and not _is(alpha, 0):
        raise ConfigError(f"alpha is {alpha} and there are no labels: give labels, or alpha 0")
    hard = None if labels is None or _is(alpha, 0) else _labels(labels, places)
    counts = jnp.ones(places, kind) if weights is None else jnp.asarray(weights).astype(kind)
    if counts.shape != places:
        raise ShapeError(f"weights {list(counts.shape)} do not fit tokens {list(places)}: give one for each token")
    if isinstance(weights, np.ndarray) and (weights < 0).any():
        raise ConfigError(f"a weight is {weights.min()}: it must be at least 0")
    static, traced, draws = _numbers(divergence, numbers, counts)
    columns, real = _columns(student, teacher, vocabulary, axis_name)
    plan = Plan(
        divergence,
        static,
        columns,
        real,
        axis_name,
        check_caps(soft_cap),
        _rows(chunk, counts.size, student.hidden.shape[-1]),
        _BLOCK if jax.default_backend() == "cpu" else 0,
        tempered=not _is(temperature, 1),
        soft=not _is(alpha, 1),
        hard=hard is not None,
        types=tuple(x.dtype for x in student if x is not None),
    )
    given = {"temperature": _scalar(temperature, kind), "alpha": _scalar(alpha, kind), **traced}
    if counts.size == 0:
        return jnp.zeros((), kind), jnp.zeros((), kind), counts
    tokens = Tokens(counts.reshape(-1), None if hard is None else hard.reshape(-1), draws)
    student, teacher = (net._replace(hidden=net.hidden.reshape(counts.size, -1)) for net in (student, teacher))
    total, values = fused(plan, student, teacher, given, tokens)
    return total, jnp.sum(counts), jax.lax.stop_gradient(values).reshape(places)


def _network(hidden: Tensor, head: Tensor, bias: Tensor | None, name: str) -> Network:
    network = Network(jnp.asarray(hidden), jnp.asarray(head), None if bias is None else jnp.asarray(bias))
    for x, what in zip(network, ("hidden states", "head", "bias"), strict=True):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ShapeError(f"the {name}'s {what} are {x.dtype}, and must be floats: convert them")
    if network.hidden.ndim < 1 or network.head.ndim != 2 or network.hidden.shape[-1] != network.head.shape[0]:
        raise ShapeError(
            f"the {name}'s hidden states {list(network.hidden.shape)} and head {list(network.head.shape)} do not fit: "
            "give [..., width] and [width, vocabulary]"
        )
    if network.bias is not None and network.bias.shape != network.head.shape[1:]:
        raise ShapeError(
            f"the {name}'s bias {list(network.bias.shape)} does not fit its head {list(network.head.shape)}: give one "
            "number for each column"
        )
    return network


def _labels(labels: Tensor, places: tuple[int, ...]) -> Array:
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != places:
        raise ShapeError(
            f"labels are {labels.dtype} {list(labels.shape)} for tokens {list(places)}: give one whole number for each"
        )
    return labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)


def _numbers(
    divergence: str, numbers: dict[str, Any], counts: Array
) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any], Array | None]:
    """A divergence's numbers: those that are known while tracing, the others, and the places of draws."""
    if divergence not in DIVERGENCES:
        raise ConfigError(f"the divergence {divergence!r} is unknown: use one of {', '.join(DIVERGENCES)}")
    known = [name for name in list(inspect.signature(DIVERGENCES[divergence]).parameters)[2:] if name != "draws"]
    sampled = divergence == "sampled_kl"
    for name in numbers:
        if name not in [*known, *(("key", "samples") if sampled else ())]:
            raise ConfigError(
                f"the divergence {divergence!r} has no number {name}: it takes {', '.join(known) or 'none'}"
            )
    numbers = dict(numbers)
    draws = None
    if sampled:
        key, samples = numbers.pop("key", None), numbers.pop("samples", 50)
        if key is None:
            raise ConfigError("the divergence 'sampled_kl' has no key: give key=jax.random.key(0), another every step")
        draws = jax.random.uniform(key, (counts.size, samples), counts.dtype)
    static = tuple(sorted((name, value) for name, value in numbers.items() if name in _STATIC))
    traced = {
        name: jax.tree.map(lambda x: _scalar(x, counts.dtype), value)
        for name, value in numbers.items()
        if name not in _STATIC
    }
    return static, traced, draws


def _columns(student: Network, teacher: Network, vocabulary: int | None, axis: str | None) -> tuple[int, int]:
    """How many columns are looked at on this device, and how many are real on all of them."""
    widths = student.head.shape[1], teacher.head.shape[1]
    if widths[0] != widths[1] and (vocabulary is None or axis is not None):
        raise ShapeError(
            f"the student's head has {widths[0]} columns and the teacher's {widths[1]}: "
            + (
                "pad both to the same number"
                if axis
                else "say with vocabulary= how many of the first ones are the same"
            )
        )
    if axis is None:
        most = min(widths)
    else:
        if axis not in varying_axes(student.head) & varying_axes(teacher.head):
            raise ConfigError(
                f"the heads do not vary along the axis {axis!r}: shard their columns over it, under jax.shard_map with "
                "its default check_vma=True"
            )
        most = widths[0] * jax.lax.axis_size(axis)
    real = most if vocabulary is None else vocabulary
    if not 1 <= real <= most:
        raise ConfigError(f"vocabulary is {vocabulary}: it must be from 1 to the {most} columns of the heads")
    return (real, real) if axis is None else (widths[0], real)


def check_caps(soft_cap: Any) -> tuple[float | None, float | None]:
    """Of the student and of the teacher. Raises `ConfigError` for what is no cap."""
    pair = soft_cap if isinstance(soft_cap, tuple | list) else (soft_cap, soft_cap)
    if len(pair) != 2 or not all(cap is None or _is_cap(cap) for cap in pair):
        raise ConfigError(f"soft_cap is {soft_cap!r}: it must be above 0 and finite, or None, or a pair of such")
    student, teacher = (None if cap is None else float(cap) for cap in pair)
    return student, teacher


def _is_cap(cap: Any) -> bool:
    return isinstance(cap, int | float | np.number) and not isinstance(cap, bool) and bool(0 < cap < np.inf)


def _rows(chunk: int | None, tokens: int, width: int) -> int:
    """Tokens in a chunk, of about equal chunks: by default half the width, as the logits' two largest arrays are then
    together as large as the head's gradient.
    """
    if chunk is not None:
        return min(chunk, max(tokens, 1))
    chunks = max(1, -(-tokens // max(_LEAST_ROWS, width // 2)))
    return max(1, -(-tokens // chunks))


def _scalar(value: Any, kind: Any) -> Array:
    value = jnp.asarray(value, kind)
    if value.ndim:
        raise ShapeError(f"a loss's number has the shape {list(value.shape)} and must be one number: use jax.vmap")
    return value


def _check_bounds(*, temperature: Any, **shares: Any) -> None:
    """Raises `ConfigError` for a number of Python or NumPy out of its bounds; what is traced is not known."""
    known = int | float | np.number
    if isinstance(temperature, known) and not temperature > 0:
        raise ConfigError(f"temperature is {temperature}: it must be above 0")
    for name, share in shares.items():
        if isinstance(share, known) and not 0 <= share <= 1:
            raise ConfigError(f"{name} is {share}: it must be from 0 to 1")


def _check_whole(**counts: Any) -> None:
    """Raises `ConfigError` for a count that is no whole number of at least 1; None is as it is."""
    for name, count in counts.items():
        whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
        if count is not None and not (whole and count >= 1):
            what = " token" if name == "chunk" else ""
            raise ConfigError(f"{name} is {count!r}: it must be a whole number of at least 1{what}")


def _is(value: Any, known: int) -> bool:
    """Whether a number is known while tracing, and which one it is."""
    return isinstance(value, int | float | np.number) and float(value) == known
