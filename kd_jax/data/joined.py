"""The batches of an iterable as one."""

from typing import Any

import jax
import numpy as np

from kd_jax.errors import ConfigError


def joined(parts: list[Any], what: str) -> Any:
    """One array, or tree of arrays, of those of all batches; None where none has any. Raises `ConfigError`."""
    missing = [part is None for part in parts]
    if all(missing):
        return None
    if any(missing):
        raise ConfigError(f"some batches have {what} and some have none: give all of them {what}, or none")
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def padded(logits: list[Any], labels: list[Any], weights: list[Any], taught: list[Any]) -> tuple[list[Any], ...]:
    """Batches of sequences of different lengths with the length of the longest; what is added has the weight 0."""
    longest = max(part.shape[1] for part in logits)

    def pad(array: Any) -> Any:
        return np.pad(array, [(0, 0), (0, longest - array.shape[1])] + [(0, 0)] * (array.ndim - 2))

    filled = []
    for part, own in zip(logits, weights, strict=True):
        given = np.ones(part.shape[:2], np.float32) if own is None else own
        filled.append(pad(np.broadcast_to(given[:, None], part.shape[:2]) if given.ndim == 1 else given))
    known = [None if part is None else jax.tree.map(pad, part) for part in labels]
    return [pad(part) for part in logits], known, filled, [pad(part) for part in taught]
