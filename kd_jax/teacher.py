"""The teacher's outputs: computed once, in evaluation mode, or from a file."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from kd_jax.data import shifts as augment
from kd_jax.errors import DataError
from kd_jax.evaluate import predict
from kd_jax.files import floats, npy, tensors
from kd_jax.models.network import Network, Output, Params, State


def outputs(
    params: Params,
    state: State,
    images: UInt8[Array, "examples height width channels"],
    *,
    network: Network,
    shift: int = 0,
) -> Output:
    """What the teacher says of every image, or, with a shift, of every view of it: logits `[views, examples, classes]`.

    `predict` with a shift gives the mean of them instead.

    The result is for `Examples.teacher` of a training with the same images and the same `Recipe.shift`.
    """
    if not shift:
        return Output(predict(params, state, images, network=network))
    views = augment.all_views(augment.pad(images, shift), shift=shift)
    return Output(jnp.stack([predict(params, state, view, network=network) for view in views]))


def load_logits(path: str | Path, *, examples: int, classes: int) -> Float[np.ndarray, "examples classes"]:
    """Logits that a teacher gave for `examples` images, in their order, of a `.npy`, `.npz` or `.safetensors` file.

    path: `.npz` and `.safetensors` files hold them by the name `logits`.

    The result is in float32, or in float64 where the file is that and JAX is set to compute in it. Raises `DataError`
    for another shape than `[examples, classes]` before the logits are read, and for other numbers than finite floats.
    """
    shape, suffix = (examples, classes), Path(path).suffix
    if suffix == ".npy":
        logits = npy.read_npy(path, shape)
    elif suffix == ".npz":
        (logits,) = npy.read_npz(path, ["logits"], shape)
    elif suffix == ".safetensors":
        logits = tensors.read(path, ["logits"], shape)["logits"]
    else:
        raise DataError(f"logits cannot be read from {path}: name a file that ends in .npy, .npz or .safetensors")
    return floats(logits, f"the array logits of {path}")
