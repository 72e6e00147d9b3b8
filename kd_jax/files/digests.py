"""Digests of arrays and of programs: whether what is given is what was given before."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


# Examples that are converted at once.
_AT_ONCE = 4096


def digest(tree: PyTree, *, as_jax: bool = False) -> str:
    """SHA-256 of every array of a tree with its path, shape and type. as_jax: as JAX has it, 64 bits as 32."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        dtype = jax.dtypes.canonicalize_dtype(array.dtype) if as_jax else array.dtype
        sha.update(f"{jax.tree_util.keystr(path)} {array.shape} {dtype}".encode())
        if dtype == array.dtype:
            sha.update(bytes_of(array))
            continue
        for start in range(0, len(array), _AT_ONCE):
            sha.update(bytes_of(array[start : start + _AT_ONCE].astype(dtype)))
    return sha.hexdigest()


def bytes_of(array: np.ndarray) -> Any:
    """The bytes of an array of any type in the order of its values, without a copy where it lies so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def program_digest(function: Callable[..., Any], *arguments: PyTree) -> str:
    """SHA-256 of what a function computes, from shapes of its arguments alone."""
    return text_digest(program_text(function, *arguments))


def program_text(function: Callable[..., Any], *arguments: PyTree) -> str:
    """What a function computes, from shapes of its arguments alone; not what it calls back in Python."""
    shapes = jax.eval_shape(lambda *given: given, *arguments)
    return jax.jit(function).lower(*shapes).as_text()


def calls_back(text: str) -> bool:
    """Whether a program calls functions of Python, of which its text says nothing."""
    return "callback" in text


def text_digest(*texts: str) -> str:
    """SHA-256 of texts, one behind the other."""
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def is_digest(value: Any) -> bool:
    """Whether a value looks like a SHA-256, of which a person learns nothing more than that it differs."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
