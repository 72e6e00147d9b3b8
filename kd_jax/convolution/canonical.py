"""Fast convolutions in compiled loops on a CPU: `canonical(fun)`.

XLA's CPU compiler has a fast kernel for one order of a convolution's axes: batch, space, features; space, inputs,
outputs. It turns convolutions into that order outside loops only (jax-ml/jax#12868), and the gradients of a
convolution have another one: in the body of a `lax.scan` they are 100 times slower. So `canonical` rewrites them in the
program of one function, or has oneDNN compute them (`kd_jax.convolution.onednn`). Beside them it rewrites sums of
columns, which batch normalisation needs (minus the products with a number for each column: the sums of what is
multiplied, times these numbers), and pools. It changes nothing else in the process, and the
function may be anybody's.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun
from jax.extend.core.primitives import (
    conv_general_dilated_p,
    mul_p,
    neg_p,
    reduce_sum_p,
    reduce_window_sum_p,
    select_and_scatter_add_p,
)
from jaxtyping import Array

from kd_jax.convolution import pools, sums
from kd_jax.convolution.forms import convolve

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def canonical(fun: Callable[Arguments, Result], *, platform: str | None = None) -> Callable[Arguments, Result]:
    """`fun` with each convolution in a form that has a fast kernel on a CPU; equal but for rounding.

    It reaches into everything that `fun` calls: jit, scan, while, cond, remat, custom gradients, vmap, shard_map (where
    it moves axes only).
    Gradients are reached that `fun` itself takes, so give it the whole training step: `jax.jit(canonical(step))`. Of
    `vmap`s it had best be outside, as `canonical(jax.vmap(step))`.

    fun: a function of PyTrees of arrays.
    platform: where `fun` will run; None is where JAX puts arrays by default, wherever those of the call lie. `fun` is
        untouched where it is not "cpu". A program that calls oneDNN runs on a CPU alone, and cannot be exported.
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
        made = {var: old for old in jaxpr.eqns for var in old.outvars}
        equations = [new for old in jaxpr.eqns for new in self._equation(old, made)]
        same = len(equations) == len(jaxpr.eqns) and all(map(_is, equations, jaxpr.eqns))
        return jaxpr if same else jaxpr.replace(eqns=equations)

    def _equation(self, equation: JaxprEqn, made: Mapping[Any, JaxprEqn]) -> Iterator[JaxprEqn]:
        """What takes its place. made: the equations of the same jaxpr, by what they make."""
        if equation.primitive is conv_general_dilated_p and _is_rewritten(equation):
            yield from _inlined(functools.partial(convolve, plain=_is_sharded(equation), **equation.params), equation)
            return
        if equation.primitive is reduce_sum_p and _is_slow_sum(equation):
            factors = _factors(equation, made)
            fun = sums.column_sums if len(factors) == 1 else sums.scaled_column_sums
            yield from _inlined(functools.partial(fun, axes=_axes(equation)), equation, factors)
            return
        if equation.primitive is select_and_scatter_add_p and _is_slow_pool(equation):
            yield from _inlined(functools.partial(pools.scattered, **equation.params), equation)
            return
        if equation.primitive is reduce_window_sum_p and _is_slow_window_sum(equation):
            yield from _inlined(functools.partial(pools.summed, **equation.params), equation)
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


def _is_slow_sum(equation: JaxprEqn) -> bool:
    """A sum of many rows of float32, which has no axes of a mesh in its type."""
    array: Any = equation.invars[0].aval
    return array.dtype == jnp.float32 and not _is_sharded(equation) and sums.is_worth_it(array.shape, _axes(equation))


def _is_slow_pool(equation: JaxprEqn) -> bool:
    """The gradient of a pool of floats, which has no axes of a mesh in its type."""
    source: Any = equation.invars[0].aval
    array: Any = equation.invars[1].aval
    floats = jnp.issubdtype(array.dtype, jnp.floating) and 0 not in (*array.shape, *source.shape)
    return bool(floats and not _is_sharded(equation) and pools.is_worth_it(**equation.params))


def _is_slow_window_sum(equation: JaxprEqn) -> bool:
    """A mean pool of float32 or its gradient, which has no axes of a mesh in its type."""
    array: Any = equation.invars[0].aval
    worth_it = array.dtype == jnp.float32 and pools.is_sum_worth_it(array.shape, **equation.params)
    return worth_it and not _is_sharded(equation)


def _factors(equation: JaxprEqn, made: Mapping[Any, JaxprEqn]) -> Sequence[Any]:
    """What a sum adds, or the array and the numbers of each column that it is minus the product of.

    The gradient of a normalisation by its mean is such a sum. The sum of the array alone is there already, as the
    gradient by the bias.
    """
    [added] = equation.invars
    negated = _maker(added, neg_p, made)
    if negated is not None:
        product = _maker(negated.invars[0], mul_p, made)
        if product is not None:
            shape = added.aval.shape  # type: ignore[attr-defined]
            columns = tuple(1 if axis in _axes(equation) else size for axis, size in enumerate(shape))
            for array, column in (product.invars, product.invars[::-1]):
                if array.aval.shape == shape and column.aval.shape == columns:  # type: ignore[attr-defined]
                    return array, column
    return (added,)


def _maker(atom: Any, primitive: Any, made: Mapping[Any, JaxprEqn]) -> JaxprEqn | None:
    """The equation of `primitive` that makes it, if one does."""
    found = made.get(atom) if isinstance(atom, Var) else None
    return found if found is not None and found.primitive is primitive else None


def _axes(equation: JaxprEqn) -> tuple[int, ...]:
    """Of a sum; a vmap makes NumPy's whole numbers of them."""
    return tuple(map(int, equation.params["axes"]))


def _is_sharded(equation: JaxprEqn) -> bool:
    """Whether its arrays have axes of a mesh in their types, as within `shard_map`."""
    meshes = [atom.aval.sharding.mesh for atom in equation.invars]  # type: ignore[attr-defined]
    return not all(mesh.empty or mesh.are_all_axes_auto for mesh in meshes)


def _inlined(fun: Callable[..., Array], equation: JaxprEqn, atoms: Sequence[Any] | None = None) -> Iterator[JaxprEqn]:
    """The equations of `fun` of `atoms`, which take the place of `equation`; else of its own operands."""
    atoms = equation.invars if atoms is None else atoms
    with equation.ctx.manager:
        traced = jax.make_jaxpr(fun)(*(atom.aval for atom in atoms))
    names = dict(zip(traced.jaxpr.invars, atoms, strict=True))
    names |= dict(zip(traced.jaxpr.outvars, equation.outvars, strict=True))
    for own in traced.jaxpr.eqns:
        yield own.replace(
            invars=[names.get(atom, atom) if isinstance(atom, Var) else atom for atom in own.invars],
            outvars=[names.get(var, var) for var in own.outvars],
            source_info=equation.source_info,
            ctx=equation.ctx,
        )
