"""A model as one program of its inputs alone, for any number of examples: what StableHLO and ONNX are made of."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Float

from kd_jax.errors import ConfigError
from kd_jax.files import as_numpy
from kd_jax.files.names import path_name
from kd_jax.models import Model, as_model
from kd_jax.models.predict import highest_precision
from kd_jax.models.trying import PREPARE, told

PyTree = Any

_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
    "checkpoint", "remat2",
}  # fmt: skip
# Of constants that grow when they are computed no more than so many numbers are kept.
_MOST_MADE = 4096
_BATCH = "batch"
# Between the same logits of one example at a time and of several.
_ROUNDING = 1e-4
# A logit of this size is a mask's.
_LARGEST = 1e4


class Program(NamedTuple):
    """A model's logits of its inputs, in evaluation mode, with the variables inside.

    closed: a jaxpr without calls and without what the logits do not need. inputs: a PyTree of the shapes and types, its
    first axis of any size where `batch` is None. names: one for each array of it. shape: of one example's logits.
    instead: functions by the name of the operation of `jax.lax` in whose place the program calls them.
    """

    closed: ClosedJaxpr
    inputs: PyTree
    names: tuple[str, ...]
    shape: tuple[int, ...]
    instead: Mapping[str, Any] = MappingProxyType({})

    def __call__(self, *arrays: Any) -> Any:
        """The logits, of the arrays of the inputs in their order; traced, or of the fixed number of examples."""
        return evaluated(self.closed, arrays, self.instead)[0]


def traced(model: Any, inputs: PyTree, *, prepare: Any = None, batch: int | None = None) -> Program:
    """The `Program` of a model, for inputs of these shapes with any number of examples, or `batch` of them.

    model: whatever `as_model` takes, with its variables. inputs: arrays, or `jax.ShapeDtypeStruct`s, whose first axis
    is examples. prepare: as of the training; the program does it, too. Raises `ConfigError`.
    """
    known = with_variables(model)
    sizes = _symbolic() if batch is None else batch
    shapes = jax.tree.map(lambda leaf: _any_batch(leaf, sizes), inputs, is_leaf=lambda leaf: isinstance(leaf, list))
    if not jax.tree.leaves(shapes):
        raise ConfigError("there are no inputs to export the model for: give some, such as test.inputs[:32]")

    def logits(inputs: PyTree) -> Any:
        if prepare is not None:
            with told("prepare", inputs, PREPARE):
                inputs = prepare(jax.random.key(0), inputs, False)
        key = jax.random.key(0)
        with told("the model", inputs), highest_precision():
            return known.network.apply(known.variables, inputs, train=False, key=key)[0].logits

    def trace(function: Any, shapes: PyTree) -> ClosedJaxpr:
        with highest_precision():
            return jax.make_jaxpr(function)(shapes)

    def one_by_one(inputs: PyTree) -> Any:
        return jax.vmap(lambda one: logits(jax.tree.map(lambda leaf: leaf[None], one))[0])(inputs)

    try:
        whole = trace(logits, shapes)
    except ConfigError:
        if batch is not None:
            raise
        # What fails with two examples, too, has another reason. Else, such as for len(x), it is traced for one example.
        trace(logits, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), shapes))
        whole = trace(one_by_one, shapes)
        given = jax.tree.map(lambda leaf: leaf[:8], example_inputs(inputs))
        wanted = np.asarray(jax.jit(logits)(given), np.float32)
        if not difference(np.asarray(jax.jit(one_by_one)(given), np.float32), wanted) <= _ROUNDING:
            raise ConfigError(
                "the model's logits of an example depend on how many others there are, so it cannot be exported for "
                "any number of them: export it for one, batch=32"
            ) from None
    leaves = jax.tree.leaves(shapes)
    closed = jax.make_jaxpr(lambda *arrays: evaluated(whole, arrays))(*leaves)
    shape = closed.out_avals[0].shape
    if not shape or shape[0] != leaves[0].shape[0]:
        raise ConfigError(
            f"the model's logits have the shape {shape} for inputs of {leaves[0].shape}: the first axis of both "
            "must be the examples"
        )
    return Program(closed, shapes, input_names(inputs), tuple(shape[1:]))


def input_names(inputs: PyTree) -> tuple[str, ...]:
    """`inputs` for an array, `inputs_0`, … for a tuple, and the names of a dict."""
    paths = [path for path, _ in jax.tree.leaves_with_path(inputs, is_leaf=lambda leaf: isinstance(leaf, list))]
    names = [path_name(path).replace(".", "_") for path in paths]
    return tuple(f"inputs_{name}" if name[:1].isdigit() else name or "inputs" for name in names)


def named_inputs(inputs: PyTree) -> str:
    """The dict from the names of a file's inputs to parts of `inputs`, as a program has it."""
    paths = [path for path, _ in jax.tree.leaves_with_path(inputs, is_leaf=lambda leaf: isinstance(leaf, list))]
    each = zip(input_names(inputs), paths, strict=True)
    return "{" + ", ".join(f'"{name}": inputs{jax.tree_util.keystr(path)}' for name, path in each) + "}"


def difference(found: Float[np.ndarray, "*shape"], wanted: Float[np.ndarray, "*shape"]) -> float:
    """The largest difference of logits, in parts of the largest that is wanted, or of 1 where that is below 1.

    What is 1e4 or more, as -1e9 of a mask, does not count as the largest: it is compared in parts of itself. The same
    infinity, or no number in both, is no difference.
    """
    sizes = np.abs(wanted)
    usual = sizes < _LARGEST
    parts = np.where(usual | ~np.isfinite(sizes), max(1.0, float(sizes[usual].max(initial=0))), sizes)
    same = (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.max(np.where(same, 0, np.abs(found - wanted) / parts), initial=0))


def with_variables(model: Any) -> Model:
    """`model` as a `Model` that has its variables. Raises `ConfigError`."""
    known = as_model(model)
    if known.variables is None:
        raise ConfigError("the model has no variables yet: train it, or give a module that has its values")
    return known


def example_inputs(inputs: PyTree, examples: int = 8) -> PyTree:
    """NumPy arrays of the given inputs; of shapes alone, numbers that are made: normal floats, whole numbers 0 and 1.

    Bytes are of 0 to 255.
    """
    rng = np.random.default_rng(0)

    def array(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return np.asarray(as_numpy(leaf, "an input"))
        shape, kind = (examples, *leaf.shape[1:]), np.dtype(leaf.dtype)
        if kind.kind in "iu":
            return rng.integers(0, 256 if kind == np.uint8 else 2, shape).astype(kind)
        return rng.random(shape) < 0.5 if kind.kind == "b" else rng.normal(size=shape).astype(kind)

    arrays = jax.tree.map(array, inputs, is_leaf=lambda leaf: isinstance(leaf, list))
    return jax.tree.map(lambda leaf: leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype)), arrays)


def _symbolic() -> Any:
    return jax_export.symbolic_shape(_BATCH)[0]


def _any_batch(leaf: Any, size: Any) -> jax.ShapeDtypeStruct:
    array = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(as_numpy(leaf, "an input"))
    if not array.shape:
        raise ConfigError("an input is a single number: give arrays whose first axis is examples")
    return jax.ShapeDtypeStruct((size, *array.shape[1:]), jax.dtypes.canonicalize_dtype(array.dtype))


def evaluated(closed: Any, arguments: Sequence[Any], instead: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
    """What the program gives: calls are inlined, what nobody needs is left out, constants are computed now."""
    jaxpr = closed.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in _needed(jaxpr):
        inputs = [read(atom) for atom in equation.invars]
        name, params = equation.primitive.name, equation.params
        inner = next((params[key] for key in _INNER if key in params), None) if name in _CALLS else None
        if inner is not None:
            results = evaluated(inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ()), inputs, instead)
        elif name == "sub" and isinstance(inputs[0], jax.core.Tracer) and not isinstance(inputs[1], jax.core.Tracer):
            # The same number; runtimes make one of a convolution and the products and sums after it.
            with jax.ensure_compile_time_eval():
                minus = jax.lax.neg(jnp.asarray(inputs[1], equation.invars[1].aval.dtype))
            results = [jax.lax.add(inputs[0], minus)]
        elif _is_constant(equation, inputs):
            with jax.ensure_compile_time_eval():
                results = equation.primitive.bind(*inputs, **params)
        elif name in instead:
            results = instead[name](*inputs, **params)
        else:
            results = equation.primitive.bind(*inputs, **params)
        results = results if isinstance(results, list | tuple) else [results]
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[Any]:
    """The equations whose results are used."""
    used = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if used.intersection(equation.outvars):
            kept.append(equation)
            used |= {atom for atom in equation.invars if not isinstance(atom, Literal)}
    return kept[::-1]


def _is_constant(equation: Any, inputs: list[Any]) -> bool:
    """Whether it is computed of constants, and does not make large arrays of small ones."""
    of_batch = equation.primitive.name == "dim_as_value"
    if of_batch or any(isinstance(value, jax.core.Tracer) for value in inputs):
        return False
    shapes = [var.aval.shape for var in equation.outvars]
    if not all(isinstance(size, int | np.integer) for shape in shapes for size in shape):
        return False
    made, given = sum(map(_size, shapes)), sum(_size(np.shape(value)) for value in inputs)
    return made <= max(_MOST_MADE, given)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
