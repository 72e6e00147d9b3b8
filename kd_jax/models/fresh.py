"""Fresh variables of a network, made by one program that is compiled quickly."""

from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.convolution import compiling
from kd_jax.models import programs

# The first of LLVM's levels. Random numbers have the bits that the same program has at the usual one.
_QUICKLY = ("xla_backend_optimization_level", "1")


def fresh(network: Any, key: Any) -> Any:
    """`network.init(key)`, as one program where `is_one_program`.

    Operation by operation JAX compiles each initialiser for each shape, at the usual level: of eight convolutions and a
    head, as Flax initialises them, that takes five times as long (`benchmarks/start_up.py`).
    """
    if not is_one_program(network, key):
        return network.init(key)
    return programs.call(network.init, key, same=("init", network), option=_QUICKLY)


def is_one_program(network: Any, key: Any) -> bool:
    """Whether `fresh` makes one program: on a CPU, for a network that gains by it, outside of other programs."""
    # Options belong to a program of its own. Within one of the user's, a key from outside is no tracer.
    if isinstance(key, jax.core.Tracer) or isinstance(jnp.zeros(()), jax.core.Tracer):
        return False
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return False
    if jax.config.values["jax_disable_jit"] or jax.default_backend() != "cpu":
        return False
    return bool(network.compiles_init) and compiling.takes(*_QUICKLY)
