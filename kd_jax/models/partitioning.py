"""How a module says that its arrays lie on a mesh: the metadata of `with_partitioning`, of NNX and of Linen."""

from typing import Any

import jax
from flax import linen, nnx
from flax.core.meta import AxisMetadata
from jax.sharding import PartitionSpec

from kd_jax.models.linen import LinenNetwork
from kd_jax.models.network import Network, PyTree, Variables
from kd_jax.models.nnx import NNXNetwork


def partitioning(network: Network, variables: Variables) -> PyTree:
    """A `PartitionSpec` in the place of each array of the variables; an empty one where the module says nothing.

    Logical names become those of the mesh by the rules that Flax has (`linen.logical_axis_rules`, and of NNX
    `nnx.logical_axis_rules` or the variable's own `sharding_rules`).
    """
    if isinstance(network, NNXNetwork):
        values = network.shapes
        module = nnx.merge(network.graph, values["params"], network.streams, values["state"])
        _, *parts = nnx.split(module, nnx.Param, nnx.RngState, nnx.Intermediate, ...)
        said = [nnx.to_pure_dict(nnx.get_partition_spec(part)) for part in parts]
        return jax.tree.map(_as_spec, {"params": said[0], "state": said[-1]}, is_leaf=_is_said)
    if isinstance(network, LinenNetwork):
        return jax.tree.map(_of_box, variables, is_leaf=lambda leaf: isinstance(leaf, AxisMetadata))
    return jax.tree.map(lambda _: PartitionSpec(), variables)


def _is_said(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, PartitionSpec)


def _as_spec(leaf: Any) -> PartitionSpec:
    return leaf if isinstance(leaf, PartitionSpec) else PartitionSpec()


def _of_box(leaf: Any) -> Any:
    """The same box with the specification in the place of its array."""
    spec: Any = None
    if isinstance(leaf, linen.LogicallyPartitioned):
        spec = linen.logical_to_mesh_axes(leaf.names, leaf.rules)
    elif isinstance(leaf, linen.Partitioned):
        spec = leaf.get_partition_spec()
    return jax.tree.map(lambda _: _as_spec(spec), leaf)
