"""Fresh variables of a network, made by one program that is compiled quickly."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import jax

# The first of LLVM's levels. Random numbers have the same bits as with the usual one.
_QUICKLY: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}

_programs: dict[int, Callable[[Any], Any]] = {}


def fresh(network: Any, key: Any) -> Any:
    """`network.init(key)`, on a CPU as one program where that pays (`Network.compiles_init`); the same bits.

    Operation by operation JAX compiles each initialiser for each shape, at the usual level: of eight convolutions and a
    head, as Flax initialises them, that takes 4.5 times as long (`benchmarks/start_up.py`).
    """
    if isinstance(key, jax.core.Tracer) or jax.config.values["jax_disable_jit"]:
        return network.init(key)
    if not network.compiles_init or jax.default_backend() != "cpu" or not _has_levels():
        return network.init(key)
    known = id(network)
    if known not in _programs:
        # It must not keep the network, which it is forgotten with.
        there = weakref.ref(network)
        _programs[known] = jax.jit(lambda key: there().init(key), compiler_options=_QUICKLY)  # type: ignore[union-attr]
        weakref.finalize(network, _programs.pop, known, None)
    return _programs[known](key)


@functools.cache
def _has_levels() -> bool:
    """Whether XLA knows the option."""
    nothing: Any = jax.jit(lambda: 0).lower()
    try:
        nothing.compile(compiler_options=_QUICKLY)
    except jax.errors.JaxRuntimeError:
        return False
    return True
