"""Whether tokens are in the vocabulary of a network that says how large it is, as the zoo's decoders do."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kd_jax.errors import DataError
from kd_jax.models.network import Network

PyTree = Any


def vocabulary_sizes(network: Network, variables: PyTree) -> Mapping[str, int]:
    """By the name of the input, as a module tells them: `vocabularies = {"tokens": 256}`; of others nothing is known.

    variables: None where a training makes them.
    """
    if variables is None:
        variables = jax.eval_shape(network.init, jax.random.key(0))
    sizes = getattr(network.bound(variables), "vocabularies", None)
    told = sizes if isinstance(sizes, Mapping) else {}
    return {name: size for name, size in told.items() if isinstance(size, int) and not isinstance(size, bool)}


def check_vocabulary(network: Network, variables: PyTree, inputs: PyTree, weights: Any = None) -> None:
    """`check_tokens` of a model."""
    check_tokens(vocabulary_sizes(network, variables), inputs, weights)


def check_tokens(sizes: Mapping[str, int], inputs: PyTree, weights: Any = None) -> None:
    """Raises `DataError` for a token that a network has no embedding of, which would make NaN, or be another's.

    Padding, where segments are 0, may be anything, and so may an example without a weight. Nothing that is traced or
    lies on other hosts is looked at, and no tuple, whose parts have no names.
    """
    if isinstance(inputs, tuple | list):
        return
    given = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
    for name, size in sizes.items():
        tokens = _known(given.get(name))
        if tokens is None or tokens.dtype.kind not in "iu" or not tokens.size:
            continue
        if tokens.min() >= 0 and tokens.max() < size:
            continue
        outside = (tokens < 0) | (tokens >= size)
        segments, counted = _known(given.get("segments")), _known(weights)
        if name == "tokens" and segments is not None and segments.shape == tokens.shape:
            outside &= segments != 0
        if counted is not None and counted.shape[:1] == tokens.shape[:1]:
            # A position of weight 0 may be a prompt, which the others see.
            rows = (counted != 0).reshape(len(counted), -1).any(-1)
            outside &= rows.reshape(-1, *[1] * (tokens.ndim - 1))
        if outside.any():
            at = tuple(np.argwhere(outside)[0])
            raise DataError(
                f"row {at[0]} of the {name} has {tokens[at]}, and the model's are 0 to {size - 1}: give tokens of its "
                "own tokenizer, and padding that is one of these, or that has segments of 0"
            )


def _known(values: Any) -> np.ndarray | None:
    if values is None or isinstance(values, jax.core.Tracer) or not getattr(values, "is_fully_addressable", True):
        return None
    return np.asarray(values)
