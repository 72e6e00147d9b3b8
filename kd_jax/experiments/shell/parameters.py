"""The parameters of one trained model, as a safetensors file holds them."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from kd_jax.files.names import path_name


def safetensors(variables: Any, place: tuple[int, ...], description: Mapping[str, Any]) -> bytes:
    """The content of the file; kernels are `[inputs, outputs]`.

    variables: parameters and state of an NNX network. place: of the model along the leading axes of every array.
    description: what is kept beside the arrays.
    """
    leaves = jax.tree.leaves_with_path(variables)
    arrays = {path_name(path[1:]): np.array(leaf[place], order="C") for path, leaf in leaves}
    # One entry: safetensors writes several in an order that changes from process to process.
    return save(arrays, metadata={"kd_jax": json.dumps(description)})
