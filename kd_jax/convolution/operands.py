"""The operands and parameters of one convolution in canonical order, and what its window sees."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Operands(NamedTuple):
    """A convolution in canonical order, its parameters those of `lax.conv_general_dilated`.

    lhs: [batch, *space, groups · inputs]. rhs: [*window, inputs, groups · outputs].
    """

    lhs: Array
    rhs: Array
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    options: dict[str, Any]

    @property
    def dims(self) -> int:
        """How many axes of space there are."""
        return self.lhs.ndim - 2

    @property
    def window(self) -> tuple[int, ...]:
        """The kernel's extent in space, without dilation."""
        return self.rhs.shape[:-2]

    @property
    def extents(self) -> tuple[int, ...]:
        """The output's extent in space."""
        sizes = self.lhs.shape[1:-1], self.window, self.window_strides, self.padding
        return tuple(
            max(0, (dilated(size, dilation) + low + high - dilated(window, own)) // stride + 1)
            for size, window, stride, (low, high), dilation, own in zip(
                *sizes, self.lhs_dilation, self.rhs_dilation, strict=True
            )
        )

    @property
    def dtype(self) -> Any:
        """Of the output."""
        return self.options.get("preferred_element_type") or self.lhs.dtype

    @property
    def sum_type(self) -> Any:
        """Sums of bfloat16 and float16 are of float32, as in XLA's kernel."""
        return jnp.float32 if self.dtype in (jnp.bfloat16, jnp.float16) else self.dtype

    def padded(self) -> Array:
        """The inputs with their zeros."""
        space = [
            (low, high, dilation - 1) for (low, high), dilation in zip(self.padding, self.lhs_dilation, strict=True)
        ]
        return lax.pad(self.lhs, jnp.zeros((), self.lhs.dtype), [(0, 0, 0), *space, (0, 0, 0)])

    def seen_at(self, padded: Array, offset: Sequence[int]) -> Array:
        """What all outputs see at one offset of the window."""
        return _strided(padded, offset, self.rhs_dilation, self.extents, self.window_strides)

    def seen_by(self, padded: Array, output: Sequence[int]) -> Array:
        """What one output sees at all offsets of the window."""
        return _strided(padded, output, self.window_strides, self.window, self.rhs_dilation)

    def assembled(self, outputs: Sequence[Array]) -> Array:
        """[batch, *extents, features] of a [batch, features] for each output."""
        return lax.reshape(jnp.stack(outputs, 1), (len(outputs[0]), *self.extents, outputs[0].shape[-1]))


def channels_last(dims: int) -> lax.ConvDimensionNumbers:
    """Batch, space, features; space, inputs, outputs: the order for which XLA has a fast kernel."""
    last, space = dims + 1, range(1, dims + 1)
    return lax.ConvDimensionNumbers((0, last, *space), (last, dims, *range(dims)), (0, last, *space))


def places(extents: Sequence[int]) -> list[tuple[int, ...]]:
    """All places in a space."""
    return list(itertools.product(*map(range, extents)))


def dilated(size: int, dilation: int) -> int:
    """The size with `dilation - 1` zeros between numbers."""
    return (size - 1) * dilation + 1


def _strided(
    array: Array, place: Sequence[int], steps: Sequence[int], counts: Sequence[int], strides: Sequence[int]
) -> Array:
    """In each axis of space, `count` numbers every `stride`, from `place · step` on."""
    starts = [at * step for at, step in zip(place, steps, strict=True)]
    ends = [start + (count - 1) * stride + 1 for start, count, stride in zip(starts, counts, strides, strict=True)]
    return lax.slice(array, (0, *starts, 0), (len(array), *ends, array.shape[-1]), (1, *strides, 1))


def points(own: Operands) -> list[int]:
    """Axes of one position under a window of one, such as the second of 1,024 × 1: all but the last axis at most.

    With them oneDNN takes two to four times as long.
    """
    sizes = zip(own.lhs.shape[1:-1], own.window, own.padding, strict=True)
    alone = [axis for axis, (size, window, padding) in enumerate(sizes) if (size, window, *padding) == (1, 1, 0, 0)]
    return alone[: own.dims - 1]


def without(own: Operands, axes: list[int]) -> Operands:
    """The same of fewer axes of space."""

    def kept(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value for axis, value in enumerate(values) if axis not in axes)

    lhs, rhs = own.lhs, own.rhs
    return own._replace(
        lhs=lax.reshape(lhs, (lhs.shape[0], *kept(lhs.shape[1:-1]), lhs.shape[-1])),
        rhs=lax.reshape(rhs, (*kept(rhs.shape[:-2]), *rhs.shape[-2:])),
        window_strides=kept(own.window_strides),
        padding=kept(own.padding),
        lhs_dilation=kept(own.lhs_dilation),
        rhs_dilation=kept(own.rhs_dilation),
    )
