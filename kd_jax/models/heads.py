"""The linear layer whose output a model's logits are, as features: what it was given, and its own arrays."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from kd_jax.errors import FeatureError
from kd_jax.models.network import Output
from kd_jax.models.products import Embedding, of_rows

HIDDEN, KERNEL, BIAS = (f"linear_head.{name}" for name in ("hidden", "kernel", "bias"))
"""Hidden states `[..., width]`, a matrix `[width, classes]`, and `[classes]` where there is a bias."""
OF_THE_MODEL = (KERNEL, BIAS)
"""Features that have no axis of examples."""


class Head(NamedTuple):
    """hidden @ kernel + bias are the logits."""

    hidden: Float[Array, "..."]
    kernel: Float[Array, "width classes"]
    bias: Float[Array, " classes"] | None


class _Call(NamedTuple):
    layer: Any
    given: Any
    result: Any


_calls: ContextVar[list[_Call] | None] = ContextVar("calls of linear layers", default=None)


def head_of(output: Output) -> Head:
    """The head among an output's features."""
    return Head(output.features[HIDDEN], output.features[KERNEL], output.features.get(BIAS))


@contextlib.contextmanager
def watched(module: nnx.Module, *, wanted: bool) -> Iterator[list[_Call]]:
    """The calls of linear layers, and of embeddings as heads, while this lasts. The module is a copy.

    wanted: whether anything is done at all.
    """
    for _, part in nnx.iter_modules(module) if wanted else ():
        # Of other classes nobody knows what they do.
        if type(part) in (nnx.Embed, Embedding) or (
            type(part) is nnx.Linear and part.dot_general in (jax.lax.dot_general, of_rows)
        ):
            object.__setattr__(part, "__class__", _watched(type(part)))
    calls: list[_Call] = []
    token = _calls.set(calls if wanted else None)
    try:
        yield calls
    finally:
        _calls.reset(token)


def with_head(output: Output, calls: list[_Call]) -> Output:
    """The output with the head as features. Raises `FeatureError` where no call gave the logits."""
    if HIDDEN in output.features and KERNEL in output.features:
        return output
    last = next((call for call in reversed(calls) if call.result is output.logits), None)
    if last is None:
        raise no_head()
    layer = last.layer
    kernel = layer.embedding[...].T if isinstance(layer, nnx.Embed) else layer.kernel[...]
    bias = None if isinstance(layer, nnx.Embed) or layer.bias is None else layer.bias[...]
    arrays = {HIDDEN: last.given, KERNEL: kernel} | ({} if bias is None else {BIAS: bias})
    if layer.dtype is not None:
        arrays = {name: array.astype(layer.dtype) for name, array in arrays.items()}
    return output._replace(features={**output.features, **arrays})


def no_head() -> FeatureError:
    """The error for a model that has none."""
    return FeatureError(
        HIDDEN, "does not exist: the model's logits are not what an nnx.Linear, or nnx.Embed.attend, returns"
    )


@functools.cache
def _watched(kind: Any) -> Any:
    """A subclass that tells of its calls."""
    method = "attend" if issubclass(kind, nnx.Embed) else "__call__"

    def call(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(kind, method)(self, given, *args, **kwargs)
        calls = _calls.get()
        if calls is not None:
            calls.append(_Call(self, given, result))
        return result

    body = {method: call, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), body, pytree=kind._pytree__is_pytree)
