"""Moving the biases of some classes of a trained network: how many errors each offset gives, exactly."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

# Offsets nearer to each other than this are one: no offset lies well between them.
_APART = 1e-6


class Errors(NamedTuple):
    """Errors as a function of one offset, added to the logits of all of some classes: a step function.

    at: offsets at which the number changes, ascending. counts: errors below the first, between each two, and above the
    last of them.
    """

    at: Float[np.ndarray, " changes"]
    counts: Int[np.ndarray, " intervals"]


def errors(
    logits: Float[np.ndarray, "examples classes"], labels: Int[np.ndarray, " examples"], classes: Sequence[int]
) -> Errors:
    """The errors for every offset of `classes`, which must be some of all classes and not all of them.

    An image's answer is the best of the other classes up to an offset of (their largest logit - the largest logit of
    `classes`), and beyond it the best of `classes`: one change for each image, found without a search.
    """
    moved = np.isin(np.arange(logits.shape[1]), classes)
    if moved.all() or not moved.any():
        raise ValueError(f"the classes {list(classes)} are all or none of {len(moved)}: move the biases of some")
    exact = np.asarray(logits, np.float64)
    inside, outside = np.where(moved, exact, -np.inf), np.where(moved, -np.inf, exact)
    at = outside.max(axis=1) - inside.max(axis=1)
    below, above = outside.argmax(axis=1) != labels, inside.argmax(axis=1) != labels
    change = above.astype(np.int64) - below
    places, which = np.unique(at[change != 0], return_inverse=True)
    steps = np.zeros(len(places), np.int64)
    np.add.at(steps, which, change[change != 0])
    return Errors(places, below.sum() + np.concatenate([np.zeros(1, np.int64), np.cumsum(steps)]))


def at(found: Errors, offsets: Float[np.ndarray, " offsets"]) -> Int[np.ndarray, " offsets"]:
    """The errors at each of the offsets."""
    return found.counts[np.searchsorted(found.at, offsets)]


def best(found: Errors) -> float:
    """The offset with the fewest errors: the middle of the widest interval that has so few.

    Intervals without an end are taken to be 1 wide.
    """
    if len(found.at) == 0:
        return 0.0
    edges = np.concatenate([found.at[:1] - 1, found.at, found.at[-1:] + 1])
    widths = np.diff(edges)
    fewest = found.counts[widths > _APART].min()
    place = int(np.argmax(np.where(found.counts == fewest, widths, 0)))
    return float((edges[place] + edges[place + 1]) / 2)
