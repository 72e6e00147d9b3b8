"""What a converter made of a model, beside the model itself: the check that comes before a file is kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Shaped

from kd_jax.errors import ConfigError
from kd_jax.export.program import Program, difference, example_inputs, input_names, with_variables
from kd_jax.files import listed
from kd_jax.models.predict import outputs_in_batches

PyTree = Any

TOLERANCE = 1e-5
"""How far logits may be from the model's: so much of its largest logit, or so much where that is below 1."""

OUTPUT = "logits"
_MOST_COMPARED = 64


class Wanted(NamedTuple):
    """inputs: the arrays of some examples, in the order of the file's inputs. logits: the model's own of them."""

    inputs: list[Shaped[np.ndarray, "..."]]
    logits: Float[np.ndarray, "examples ..."]


def check_names(inputs: PyTree, kind: str) -> None:
    """Raises `ConfigError` where a file's inputs and its output have not each a name of its own."""
    names = input_names(inputs)
    if OUTPUT in names or len(set(names)) < len(names):
        raise ConfigError(
            f"the inputs have the names {listed(names)}, and in {kind} each has its own, and the output is "
            f"called {OUTPUT}: give a dict with other names"
        )


def wanted(model: Any, inputs: PyTree, *, prepare: Any, batch: int | None) -> Wanted:
    """The first 64 of the given examples, or `batch` of them, with the model's logits; where there are fewer, again."""
    given = jax.tree.map(lambda leaf: leaf[: batch or _MOST_COMPARED], example_inputs(inputs, batch or 8))
    # A file that takes one example alone does not take any number, and one of `batch` takes no fewer.
    least = batch or 2
    given = jax.tree.map(lambda leaf: np.resize(leaf, (least, *leaf.shape[1:])) if len(leaf) < least else leaf, given)
    known = with_variables(model)
    found = outputs_in_batches(known.network, known.variables, given, prepare=prepare, batch_size=_MOST_COMPARED)
    return Wanted(jax.tree.leaves(given), np.asarray(found.logits, np.float32))


def check_logits(
    run: Callable[[list[Any]], Float[np.ndarray, "..."]], program: Program, wanted: Wanted, tolerance: float, kind: str,
    instead: str,
) -> None:  # fmt: skip
    """Raises `ConfigError` where the logits of a file are not those wanted, for all examples at once and for one.

    run: the file's logits, of its inputs. kind: of the file, "the ONNX file". instead: what to do where they differ.
    """
    any_number = not isinstance(jax.tree.leaves(program.inputs)[0].shape[0], int)
    for count in {len(wanted.logits), 1} if any_number else {len(wanted.logits)}:
        found, own = run([leaf[:count] for leaf in wanted.inputs]), wanted.logits[:count]
        if found.shape != own.shape:
            raise ConfigError(f"{kind} gives logits of {found.shape} where the model's are {own.shape}: {instead}")
        far = difference(found, own)
        if not far <= tolerance:
            more = f", or allow more with tolerance={far:.1g}" if np.isfinite(far) else ""
            raise ConfigError(
                f"the logits of {kind} differ from the model's by {far:.2g}, and may by {tolerance:.2g}, in "
                f"parts of the largest (or of 1): {instead}{more}"
            )
