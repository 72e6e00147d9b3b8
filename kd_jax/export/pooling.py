"""Max pools in the form that ONNX's runtimes have.

jax2onnx writes one that pools over all axes, with two new ones before them, and onnxruntime has no kernel for more than
three.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_MOST_AXES = 3
"""Over so many axes onnxruntime can pool."""


def move_axes(model: Any) -> None:
    """Writes each max pool of an `onnx.ModelProto` anew, in place: the axes of its windows come last, and then go back.

    Those that are no such pool, or pool over more than three axes, stay as they are.
    """
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    nodes: list[Any] = []
    for node in graph.node:
        pooled = made_by.get(node.input[0]) if node.op_type == "Squeeze" else None
        moved = None if pooled is None else _moved(pooled, node, made_by, constants)
        nodes += [node] if moved is None else moved
    del graph.node[:]
    graph.node.extend(_needed(nodes, {one.name for one in graph.output}))


def _moved(pool: Any, squeeze: Any, made_by: dict[str, Any], constants: dict[str, Any]) -> list[Any] | None:
    """The nodes instead of Unsqueeze, Unsqueeze, MaxPool, Squeeze; None if it is not that."""
    first = made_by.get(pool.input[0]) if pool.op_type == "MaxPool" and len(pool.output) == 1 else None
    before = None if first is None or first.op_type != "Unsqueeze" else made_by.get(first.input[0])
    if first is None or before is None or before.op_type != "Unsqueeze":
        return None
    axes = [_axes(one, constants, made_by) for one in (before, first, squeeze)]
    if axes != [[0], [1], [0, 1]]:
        return None
    given = {one.name: list(one.ints) for one in pool.attribute if one.ints}
    window = given["kernel_shape"]
    rank = len(window)
    strides, dilations = given.get("strides", [1] * rank), given.get("dilations", [1] * rank)
    pads = given.get("pads", [0] * 2 * rank)
    low, high = pads[:rank], pads[rank:]
    pooled = [at for at in range(rank) if (window[at], strides[at], low[at], high[at]) != (1, 1, 0, 0)]
    still = [at for at in range(rank) if at not in pooled]
    # A pool has two axes of its own: examples and channels.
    while len(still) > 2 and len(pooled) < _MOST_AXES:
        pooled = sorted([*pooled, still.pop(1)])
    if len(still) != 2 or not 1 <= len(pooled) <= _MOST_AXES:
        return None
    order = [*still, *pooled]
    name = squeeze.output[0]
    turned, result = f"{name}_windows_last", f"{name}_pooled"
    return [
        helper.make_node("Transpose", [before.input[0]], [turned], perm=order),
        helper.make_node(
            "MaxPool", [turned], [result], kernel_shape=[window[at] for at in pooled],
            strides=[strides[at] for at in pooled], dilations=[dilations[at] for at in pooled],
            pads=[of[at] for of in (low, high) for at in pooled],
        ),
        helper.make_node("Transpose", [result], [name], perm=np.argsort(order).tolist()),
    ]  # fmt: skip


def _axes(node: Any, constants: dict[str, Any], made_by: dict[str, Any]) -> Sequence[int] | None:
    """The axes of a Squeeze or an Unsqueeze, if they are written down."""
    if len(node.input) < 2:
        return None
    name = node.input[1]
    if name in constants:
        return np.atleast_1d(numpy_helper.to_array(constants[name])).tolist()
    made = made_by.get(name)
    values = [one.t for one in made.attribute if one.name == "value"] if made and made.op_type == "Constant" else []
    return np.atleast_1d(numpy_helper.to_array(values[0])).tolist() if values else None


def _needed(nodes: list[Any], wanted: set[str]) -> list[Any]:
    """Those on which the wanted values depend."""
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted = wanted.union(node.input)
            for one in node.attribute:
                if one.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                    return nodes
    return kept[::-1]
