"""Compiled programs that are kept: what computes the same is compiled once, however it was written down."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from kd_jax.convolution import compiling
from kd_jax.models.compiled import has_hash

PyTree = Any

_MOST = 64
_SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")

_by_value: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
_by_text: OrderedDict[str, Any] = OrderedDict()


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is a tracer: then the caller's own `jit` or `vmap` compiles."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def call(
    function: Callable[..., Any], *arguments: PyTree, same: Hashable = None, option: tuple[str, str] | None = None
) -> Any:
    """`function(*arguments)`, compiled once; traced arguments just call it. same, option: as `compiled` has them."""
    if is_traced(arguments):
        return function(*arguments)
    return compiled(function, *arguments, same=same, option=option)(*arguments)


def compiled(
    function: Callable[..., Any], *arguments: PyTree, same: Hashable = None, donate: bool = False,
    shardings: PyTree = None, option: tuple[str, str] | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """`function` compiled for such arguments, arrays or their shapes.

    A function that lowers to the same text as one before is not compiled again: two optimisers with equal numbers, or
    two equal models, make one program. same: what the function depends on beside its arguments; where it and their
    shapes are equal to those of a call before, the function is not even traced again.
    donate: whether the first argument's memory may be used for the result. shardings: of the result, on a mesh; a tree
    of which each leaf counts for all below it. option: of XLA, its name and value. `same` must tell both.
    """
    if jax.config.values["jax_disable_jit"]:
        return function
    leaves, structure = jax.tree.flatten(arguments)
    leaves = [_as_leaf(leaf) for leaf in leaves]
    shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
    key = _key(same, structure, shapes, donate)
    known = _recall(_by_value, key)
    if known is not None:
        return known
    structures: list[Any] = []

    def flat(*leaves: Any) -> Any:
        result = function(*jax.tree.unflatten(structure, leaves))
        out, of_result = jax.tree.flatten(result)
        structures.append(of_result)
        return out if shardings is None else result

    first = len(jax.tree.leaves(arguments[0])) if donate else 0
    places_of_result: dict[str, Any] = {} if shardings is None else {"out_shardings": shardings}
    lowered = jax.jit(flat, donate_argnums=tuple(range(first)), keep_unused=True, **places_of_result).lower(*leaves)
    of_result = structures[-1]
    # The text does not say on which devices the program runs, nor which functions of Python it calls.
    usual = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = repr([None if sharding == usual else _place(sharding) for _, _, sharding in shapes])
    written = lowered.as_text()
    text = None if "callback" in written else hashlib.sha256((written + places + str(option)).encode()).hexdigest()
    program = _recall(_by_text, text)
    if program is None:
        program = compiling.compiled(lowered, written, option)
        if text is not None:
            _keep(_by_text, text, program)

    def run(*given: PyTree) -> Any:
        results = program(*[_as_leaf(leaf) for leaf in jax.tree.leaves(given)])
        return jax.tree.unflatten(of_result, jax.tree.leaves(results))

    return run if key is None else _keep(_by_value, key, run)


def forget() -> None:
    """Lets go of all programs."""
    _by_value.clear()
    _by_text.clear()


def _place(sharding: Any) -> Any:
    """A sharding as text that tells its devices, too."""
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is None else (sharding, [device.id for device in mesh.devices.flat])


def _as_leaf(leaf: Any) -> Any:
    """An array, or the shape of one: numbers of Python get JAX's usual types."""
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    array = np.asarray(leaf)
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _key(same: Hashable, structure: Any, shapes: Any, donate: bool) -> Hashable | None:
    """None where something cannot be hashed."""
    if same is None:
        return None
    settings = tuple(str(jax.config.values.get(name)) for name in _SETTINGS)
    key = (same, structure, shapes, donate, settings)
    return key if has_hash(key) else None


def _recall(cache: OrderedDict[Any, Any], key: Any) -> Any:
    if key is None or key not in cache:
        return None
    cache.move_to_end(key)
    return cache[key]


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any) -> Any:
    cache[key] = value
    while len(cache) > _MOST:
        cache.popitem(last=False)
    return value
