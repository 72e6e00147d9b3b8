"""Fresh variables of a network, made by one program that is compiled quickly."""

import functools
import hashlib
import weakref
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp

# The first of LLVM's levels. Random numbers have the bits that the same program has at the usual one.
_QUICKLY: dict[str, str | bool] = {"xla_backend_optimization_level": "1"}
_SETTINGS = ("jax_enable_x64", "jax_threefry_partitionable", "jax_default_device", "jax_numpy_dtype_promotion")
_MOST = 64

# Programs by their text: those of equal networks are one. And the text that a network has, while it is there.
_programs: OrderedDict[str, Any] = OrderedDict()
_texts: dict[int, dict[Any, str]] = {}


def fresh(network: Any, key: Any) -> Any:
    """`network.init(key)`, as one program where `is_one_program`.

    Operation by operation JAX compiles each initialiser for each shape, at the usual level: of eight convolutions and a
    head, as Flax initialises them, that takes five times as long (`benchmarks/start_up.py`).
    """
    if not is_one_program(network, key):
        return network.init(key)
    known = _texts.get(id(network))
    if known is None:
        known = _texts[id(network)] = {}
        weakref.finalize(network, _texts.pop, id(network), None)
    settings = (str(key.dtype), str(key.sharding), *(str(jax.config.values.get(name)) for name in _SETTINGS))
    program = _programs.get(known.get(settings, ""))
    if program is None:
        lowered = jax.jit(network.init).lower(key)
        written = lowered.as_text()
        if "callback" in written:
            # The text does not say which function of Python it calls.
            return network.init(key)
        text = hashlib.sha256(repr((written, lowered.out_tree, settings)).encode()).hexdigest()
        known[settings], program = text, _programs.get(text)
        if program is None:
            program = _programs[text] = lowered.compile(compiler_options=_QUICKLY)
            while len(_programs) > _MOST:
                _programs.popitem(last=False)
    return program(key)


def is_one_program(network: Any, key: Any) -> bool:
    """Whether `fresh` makes one program: on a CPU, for a network that gains by it, outside of other programs."""
    # Options belong to a program of its own. Within one of the user's, a key from outside is no tracer.
    if isinstance(key, jax.core.Tracer) or isinstance(jnp.zeros(()), jax.core.Tracer):
        return False
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return False
    if jax.config.values["jax_disable_jit"] or jax.default_backend() != "cpu":
        return False
    return bool(network.compiles_init) and _has_levels()


@functools.cache
def _has_levels() -> bool:
    """Whether XLA knows the option."""
    nothing: Any = jax.jit(lambda: 0).lower()
    try:
        nothing.compile(compiler_options=_QUICKLY)
    except jax.errors.JaxRuntimeError:
        return False
    return True
