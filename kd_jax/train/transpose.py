"""How parameters lie in memory while a loop of steps runs: kernels of few units as [outputs, inputs].

A CPU multiplies rows of 784 numbers faster than rows of 20. So for the length of a loop the parameters, their gradients
and the optimiser's moments are the transposes of what the network knows, which costs one transposition at each end of
the loop; the network sees its own shapes, and the compiler draws the transposition into the matrix product.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from kd_jax.models import Network, Output

PyTree = Any

# A kernel is transposed that has so many times as many inputs as outputs (results/throughput/findings.md).
_TALL = 8

# Primitives that do the same with every number wherever it stands.
_ELEMENTWISE = frozenset({
    "abs", "add", "add_any", "and", "broadcast_in_dim", "cbrt", "ceil", "clamp", "convert_element_type", "copy",
    "cos", "div", "eq", "erf", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow", "rem", "round",
    "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh", "xor",
})  # fmt: skip


@dataclass(frozen=True)
class Transposed(Network):
    """A network whose variables are its parameters, transposed where `which` says so, and its state.

    which: a flag for each leaf of the parameters.
    """

    network: Network
    which: tuple[bool, ...]

    def init(self, key: Any) -> PyTree:
        """The network's own, transposed."""
        return self.transpose(self.network.init(key))

    def apply(self, variables: PyTree, inputs: PyTree, **options: Any) -> tuple[Output, PyTree]:
        """What the network says."""
        return self.network.apply(self.back(variables), inputs, **options)

    def bound(self, variables: PyTree) -> Any:
        """As the network."""
        return self.network.bound(self.back(variables))

    def split(self, variables: PyTree) -> tuple[PyTree, PyTree]:
        """The transposed parameters, and the state."""
        return variables

    def merge(self, params: PyTree, state: PyTree) -> PyTree:
        """Both as a pair."""
        return params, state

    def transpose(self, variables: PyTree) -> PyTree:
        """The network's variables as this one has them."""
        params, state = self.network.split(variables)
        return self.turned(params), state

    def back(self, variables: PyTree) -> PyTree:
        """The variables as the network has them."""
        params, state = variables
        return self.network.merge(self.turned(params), state)

    def turned(self, params: PyTree) -> PyTree:
        """Parameters with the chosen arrays transposed; twice they are what they were."""
        leaves, structure = jax.tree.flatten(params)
        turned = [leaf.T if which else leaf for leaf, which in zip(leaves, self.which, strict=True)]
        return jax.tree.unflatten(structure, turned)

    def optimizer_state(
        self, optimizer: optax.GradientTransformation, state: PyTree, params: PyTree, learned: PyTree
    ) -> PyTree:
        """The same for what `optimizer` keeps for each of the parameters and of what a method learns."""
        of_params = jax.tree.unflatten(jax.tree.structure(params), self.which)
        flags = (of_params, jax.tree.map(lambda _: False, learned)) if jax.tree.leaves(learned) else of_params
        return optax.tree_utils.tree_map_params(optimizer, lambda leaf, which: leaf.T if which else leaf, state, flags)


def tall(params: PyTree) -> tuple[bool, ...]:
    """Which leaves are kernels that are better transposed."""
    return tuple(jnp.ndim(leaf) == 2 and leaf.shape[0] >= _TALL * leaf.shape[1] for leaf in jax.tree.leaves(params))


def elementwise(optimizer: optax.GradientTransformation) -> bool:
    """Whether an optimiser does the same with every number wherever it stands, read from its own computation.

    Adam, AdamW and SGD do, and chains of them with schedules; what looks at norms or at the shape of a parameter does
    not, and neither does what cannot be traced.
    """
    params = jax.ShapeDtypeStruct((3, 2), jnp.float32)

    def once(gradients: Array, params: Array) -> Any:
        # No primitive of the initial state counts: its shapes are the parameters' own.
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    try:
        jaxpr = jax.make_jaxpr(once)(params, params)
        optax.tree_utils.tree_map_params(optimizer, lambda leaf: leaf, jax.eval_shape(optimizer.init, params))
    except Exception:
        return False
    return _all_elementwise(jaxpr.jaxpr)


def is_blind(optimizer: optax.GradientTransformation, params: PyTree, transposed: PyTree) -> bool:
    """Whether an optimiser is elementwise, and does the same with parameters as with those where some are transposed.

    A mask by the number of a kernel's rows, or a rate by their number, is not blind.
    """
    if not elementwise(optimizer):
        return False

    def once(gradients: PyTree, params: PyTree) -> Any:
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    try:
        one, other = (jax.make_jaxpr(once)(given, given) for given in map(_shapes, (params, transposed)))
    except Exception:
        return False
    return _operations(one.jaxpr) == _operations(other.jaxpr)


def _shapes(params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _operations(jaxpr: Any) -> list[Any]:
    """What is computed, without shapes: the primitives in their order, and the numbers among their inputs."""
    found: list[Any] = []
    for equation in jaxpr.eqns:
        numbers = [str(variable.val) for variable in equation.invars if hasattr(variable, "val")]
        found.append((equation.primitive.name, len(equation.invars), numbers))
        for inner in equation.params.values():
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found.append(_operations(getattr(inner, "jaxpr", inner)))
    return found


def _all_elementwise(jaxpr: Any) -> bool:
    """Whether every equation that touches an array of the parameter's shape is elementwise."""
    for equation in jaxpr.eqns:
        inner = [p for p in equation.params.values() if hasattr(p, "jaxpr") or hasattr(p, "eqns")]
        if inner and all(_all_elementwise(getattr(one, "jaxpr", one)) for one in inner):
            continue
        variables = (*equation.invars, *equation.outvars)
        if all(getattr(variable.aval, "ndim", 0) == 0 for variable in variables):
            continue
        if inner or equation.primitive.name not in _ELEMENTWISE:
            return False
        if equation.primitive.name == "broadcast_in_dim" and equation.invars[0].aval.ndim:
            return False
    return True
