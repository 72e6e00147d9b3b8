"""A network's outputs on many examples, in evaluation mode, a batch at a time."""

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.convolution import canonical
from kd_jax.models.compiled import call
from kd_jax.models.network import Network, Output
from kd_jax.models.trying import PREPARE, told

PyTree = Any


def outputs_in_batches(
    network: Network, variables: PyTree, inputs: PyTree, *, batch_size: int = 1000, features: tuple[str, ...] = (),
    prepare: Any = None,
) -> Output:  # fmt: skip
    """Logits and features of all examples, without dropout and with carried statistics.

    inputs: a PyTree whose arrays have a first axis of examples; none at all give an empty answer of the right shape.
    prepare: `prepare(key, inputs, train)`, called with `train=False` on each batch.
    Traced inputs make one loop in the program; others are given to one compiled program, batch after batch.
    """
    leaves = jax.tree.leaves(inputs)
    examples = leaves[0].shape[0]
    apply = partial(_apply, network=network, features=features, prepare=prepare)
    if examples == 0:
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), inputs)
        shapes = jax.eval_shape(apply, variables, one)
        return jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape[1:]), leaf.dtype), shapes)
    batch_size = min(batch_size, examples)
    count = -(-examples // batch_size)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in (*leaves, *jax.tree.leaves(variables))):
        padding = count * batch_size - examples

        def batched(leaf: Any) -> Any:
            padded = jnp.pad(leaf, [(0, padding)] + [(0, 0)] * (leaf.ndim - 1))
            return padded.reshape(count, batch_size, *leaf.shape[1:])

        stacked = jax.lax.map(partial(apply, variables), jax.tree.map(batched, inputs))
        return jax.tree.map(lambda leaf: leaf.reshape(count * batch_size, *leaf.shape[2:])[:examples], stacked)
    parts = []
    for start in range(0, examples, batch_size):
        part = jax.tree.map(lambda leaf, start=start: leaf[start : start + batch_size], inputs)
        short = batch_size - jax.tree.leaves(part)[0].shape[0]
        if short:
            # One program for all batches: the last is filled up with its own first example.
            part = jax.tree.map(lambda leaf, n=short: jnp.concatenate([leaf, jnp.repeat(leaf[:1], n, axis=0)]), part)
        output = call(_apply, variables, part, network=network, features=features, prepare=prepare)
        parts.append(jax.tree.map(lambda leaf, n=batch_size - short: leaf[:n], output))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves) if len(leaves) > 1 else leaves[0], *parts)


def highest_precision() -> contextlib.AbstractContextManager[None]:
    """Matrix products with all digits of float32, also on GPUs and TPUs, unless the user chose a precision."""
    return jax.default_matmul_precision(jax.config.values["jax_default_matmul_precision"] or "highest")


def _apply(variables: PyTree, inputs: PyTree, *, network: Network, features: tuple[str, ...], prepare: Any) -> Output:
    if prepare is not None:
        with told("prepare", inputs, PREPARE):
            inputs = prepare(jax.random.key(0), inputs, False)
    inputs = jax.tree.map(jnp.asarray, inputs)

    def output(variables: PyTree, inputs: PyTree) -> Output:
        return network.apply(variables, inputs, train=False, key=jax.random.key(0), features=features)[0]

    with told("the model", inputs), highest_precision():
        return canonical(output)(variables, inputs)
