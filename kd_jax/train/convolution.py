"""Fast convolutions in compiled loops on a CPU: `canonical(fun)`.

XLA's CPU compiler has a fast kernel for one order of a convolution's axes: batch, space, features; space, inputs,
outputs. It turns convolutions into that order outside loops only (jax-ml/jax#12868), and the gradients of a
convolution have another one: in the body of a `lax.scan` they are 100 times slower. So `canonical` rewrites them in the
program of one function. It changes nothing else in the process, and the function may be anybody's.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.extend.core.primitives import conv_general_dilated_p
from jaxtyping import Array

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def canonical(fun: Callable[Arguments, Result], *, platform: str | None = None) -> Callable[Arguments, Result]:
    """`fun` with each convolution in the form for which XLA's CPU compiler has a fast kernel; equal but for rounding.

    It reaches into everything that `fun` calls: jit, scan, while, cond, remat, custom gradients, vmap, shard_map.
    Gradients are reached that `fun` itself takes, so give it the whole training step: `jax.jit(canonical(step))`. Of
    `vmap`s it had best be outside, as `canonical(jax.vmap(step))`.

    fun: a function of PyTrees of arrays.
    platform: where `fun` will run; None is where JAX puts arrays. `fun` is untouched where it is not "cpu".
    """

    @functools.wraps(fun)
    def rewritten(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if (platform or _default_platform()) != "cpu":
            return fun(*args, **kwargs)
        traced, shapes = jax.make_jaxpr(fun, return_shape=True)(*args, **kwargs)
        results = jaxpr_as_fun(_Rewriter().closed(traced))(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rewritten


def _default_platform() -> str:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


class _Rewriter:
    """Rewrites jaxprs. One that is called from several places stays one, so that it is lowered once."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, Any]] = {}

    def closed(self, jaxpr: Any) -> Any:
        return self.value(jaxpr)

    def value(self, value: Any) -> Any:
        """A parameter of an equation, with the jaxprs in it rewritten; the same object where nothing changes."""
        if isinstance(value, tuple | list):
            parts = [self.value(part) for part in value]
            if all(new is old for new, old in zip(parts, value, strict=True)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if not isinstance(value, Jaxpr | ClosedJaxpr):
            return value
        # The old one is kept, too, so that no other object gets its id.
        if id(value) not in self.done:
            self.done[id(value)] = value, self._jaxpr(value)
        return self.done[id(value)][1]

    def _jaxpr(self, jaxpr: Any) -> Any:
        if not isinstance(jaxpr, Jaxpr):
            inner = self.value(jaxpr.jaxpr)
            return jaxpr if inner is jaxpr.jaxpr else jaxpr.replace(jaxpr=inner)
        equations = [new for old in jaxpr.eqns for new in self._equation(old)]
        same = len(equations) == len(jaxpr.eqns) and all(map(_is, equations, jaxpr.eqns))
        return jaxpr if same else jaxpr.replace(eqns=equations)

    def _equation(self, equation: JaxprEqn) -> Iterator[JaxprEqn]:
        if equation.primitive is conv_general_dilated_p and _is_rewritten(equation):
            yield from _inlined(functools.partial(_convolution, **equation.params), equation)
            return
        params = {name: self.value(value) for name, value in equation.params.items()}
        same = all(params[name] is value for name, value in equation.params.items())
        yield equation if same else equation.replace(params=params)


def _is(new: object, old: object) -> bool:
    return new is old


def _is_rewritten(equation: JaxprEqn) -> bool:
    """Explicit shardings name the axes that would be transposed; there is no kernel for more than three of space."""
    sharding = equation.params.get("out_sharding")
    return (sharding is None or not any(sharding.spec)) and 3 <= len(equation.params["dimension_numbers"].lhs_spec) <= 5


def _inlined(fun: Callable[..., Array], equation: JaxprEqn) -> Iterator[JaxprEqn]:
    """The equations of `fun`, which take the place of `equation`."""
    with equation.ctx.manager:
        traced = jax.make_jaxpr(fun)(*(atom.aval for atom in equation.invars))
    names = dict(zip(traced.jaxpr.invars, equation.invars, strict=True))
    names |= dict(zip(traced.jaxpr.outvars, equation.outvars, strict=True))
    for own in traced.jaxpr.eqns:
        yield own.replace(
            invars=[names.get(atom, atom) if isinstance(atom, Var) else atom for atom in own.invars],
            outvars=[names.get(var, var) for var in own.outvars],
            source_info=equation.source_info,
            ctx=equation.ctx,
        )


def _convolution(
    lhs: Array,
    rhs: Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    **params: Any,
) -> Array:
    """`lax.conv_general_dilated` as transpose → canonical convolution → transpose."""
    lhs_spec, rhs_spec, out_spec = dimension_numbers
    lhs = lax.transpose(lhs, (lhs_spec[0], *lhs_spec[2:], lhs_spec[1]))
    rhs = lax.transpose(rhs, (*rhs_spec[2:], rhs_spec[1], rhs_spec[0]))
    if batch_group_count > 1:
        lhs, feature_group_count = _features_of_groups(lhs, batch_group_count), batch_group_count
    swapped = feature_group_count == 1 and _is_window_larger(lhs, rhs, **params)
    if swapped:
        lhs, rhs, params = _swapped(lhs, rhs, **params)
    last = lhs.ndim - 1
    space = range(1, last)
    numbers = lax.ConvDimensionNumbers((0, last, *space), (last, last - 1, *range(last - 1)), (0, last, *space))
    out = conv_general_dilated_p.bind(
        lhs, rhs, dimension_numbers=numbers, feature_group_count=feature_group_count, batch_group_count=1, **params
    )
    batch, features = (last, 0) if swapped else (0, last)
    places = dict(zip(out_spec, (batch, features, *space), strict=True))
    return lax.transpose(out, [places[axis] for axis in range(out.ndim)])


def _is_window_larger(
    lhs: Array,
    rhs: Array,
    *,
    window_strides: Sequence[int],
    rhs_dilation: Sequence[int],
    **_: Any,
) -> bool:
    """Whether XLA would swap the operands, as its rule has it (`SwapConvOperands` of the algebraic simplifier)."""
    pairs = []
    for size, window, stride, dilation in zip(
        lhs.shape[1:-1], rhs.shape[:-2], window_strides, rhs_dilation, strict=True
    ):
        pairs.append((window, window if size == stride == dilation == 1 else size))
    windows, sizes = zip(*pairs, strict=True)
    return math.prod(windows) > math.prod(sizes)


def _swapped(
    lhs: Array,
    rhs: Array,
    *,
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    **params: Any,
) -> tuple[Array, Array, dict[str, Any]]:
    """The same convolution with inputs as kernel and kernel as inputs, whose output has batch and features swapped.

    The gradient of a strided transposed convolution has a window as large as an image, dilated with zeros: so swapped
    it multiplies no zeros. XLA swaps those, too, but into an order for which it has no kernel.
    """
    space = range(1, lhs.ndim - 1)
    kernel = lax.transpose(lax.rev(lhs, space), (*space, lhs.ndim - 1, 0))
    inputs = lax.rev(rhs, [axis - 1 for axis in space])
    inputs = lax.transpose(inputs, (rhs.ndim - 1, *range(rhs.ndim - 1)))
    pads = []
    for (low, high), size, window, dilation, own in zip(
        padding, lhs.shape[1:-1], rhs.shape[:-2], lhs_dilation, rhs_dilation, strict=True
    ):
        more = (size - 1) * dilation - (window - 1) * own
        pads.append((low + more, high + more))
    return (
        inputs,
        kernel,
        {"padding": tuple(pads), "lhs_dilation": rhs_dilation, "rhs_dilation": lhs_dilation, **params},
    )


def _features_of_groups(lhs: Array, groups: int) -> Array:
    """[groups · batch, …, features] as [batch, …, groups · features]: groups of the batch as groups of features."""
    batch, *space, features = lhs.shape
    parts = lax.reshape(lhs, (groups, batch // groups, *space, features))
    moved = lax.transpose(parts, (*range(1, parts.ndim - 1), 0, parts.ndim - 1))
    return lax.reshape(moved, (batch // groups, *space, groups * features))
