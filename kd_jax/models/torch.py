"""The door of PyTorch: a module there as a teacher here, on the CPU and without a gradient."""

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from kd_jax.errors import ConfigError
from kd_jax.models.calling import Call, arguments, as_output, check_own_call, unknown_feature
from kd_jax.models.network import Model, Network, Output, Params, PyTree, State, Variables


def from_torch(module: Any, *, call: Call | None = None) -> Model:
    """A `Model` that asks a PyTorch module for its logits, as a teacher: on the CPU, in evaluation mode, no gradient.

    The module is copied, and never changed. It is called back from compiled programs, one batch after another, and gets
    the inputs as tensors, `module(x)`, of a tuple `module(*inputs)`, of a dict `module(**inputs)`; its logits come
    back in float32.

    call: `call(module, inputs, train)` where it is called in another way, or wants its inputs in another layout. Images
        with the channels last: `call=lambda module, inputs, train: module(inputs.permute(0, 3, 1, 2))`.

    Raises `ConfigError`, also where PyTorch is missing.
    """
    try:
        import torch
    except ImportError:
        raise ConfigError(
            "kd.from_torch needs PyTorch, which is not installed: pip install torch, or carry the weights over with "
            "kd_jax.models.torch_weights"
        ) from None
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"a {type(module).__name__} is no PyTorch module: give a torch.nn.Module")
    check_own_call(call)
    held = copy.deepcopy(module).to("cpu").eval().requires_grad_(False)
    return Model(TorchNetwork(_Held(held), call), {})


class _Held:
    """A PyTorch module, compared and hashed as the object that it is, and called by one thread at a time."""

    def __init__(self, module: Any):
        self.module = module
        self.lock = threading.Lock()
        self.shapes: dict[Any, tuple[int, ...]] = {}

    def logits(self, call: Call | None, inputs: PyTree) -> np.ndarray:
        """The logits of NumPy arrays."""
        import torch

        name = type(self.module).__name__
        tensors = jax.tree.map(_tensor, inputs)
        with self.lock, torch.inference_mode():
            try:
                if call is not None:
                    result = call(self.module, tensors, False)
                else:
                    args, kwargs = arguments(tensors)
                    result = self.module(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in jax.tree.leaves(tensors))
                raise ConfigError(
                    f"{name} cannot be called with inputs of the shape {shapes} ({_first_line(error)}): give them as "
                    "it wants them, call=lambda module, inputs, train: module(inputs.permute(0, 3, 1, 2)) for images"
                ) from None
        if isinstance(result, Mapping):
            result = result.get("logits", result)
        result = getattr(result, "logits", result)
        if not (isinstance(result, torch.Tensor) and result.is_floating_point()):
            kind = f"tensor of {result.dtype}" if isinstance(result, torch.Tensor) else type(result).__name__
            raise ConfigError(
                f"{name} gives a {kind} and no tensor of logits: say what of it are the logits, "
                "call=lambda module, inputs, train: module(inputs)[0]"
            )
        return result.to(torch.float32).numpy()


@dataclass(frozen=True)
class TorchNetwork(Network):
    """A `Network` that calls a PyTorch module back. It has no variables, and can only teach."""

    held: _Held
    call: Call | None = None

    def init(self, key: Any) -> Variables:
        """None: the values are PyTorch's."""
        return {}

    def apply(
        self,
        variables: Variables,
        inputs: PyTree,
        *,
        train: bool = False,
        key: Any = None,
        features: tuple[str, ...] = (),
    ) -> tuple[Output, State]:
        """As of every `Network`. Raises `ConfigError` where it shall be trained, differentiated, or name features."""
        name = type(self.held.module).__name__
        if train:
            raise ConfigError(f"{name} is a PyTorch module and cannot be trained here: give it as the teacher")
        for path in features:
            raise unknown_feature(path, ())
        shape = self._shape(inputs)

        @jax.custom_jvp
        def asked(inputs: PyTree) -> jax.Array:
            return jax.pure_callback(
                lambda given: self.held.logits(self.call, given),
                jax.ShapeDtypeStruct(shape, np.float32),
                inputs,
                vmap_method="sequential",
            )

        @asked.defjvp
        def refuse(primals: Any, tangents: Any) -> Any:
            raise ConfigError(
                f"{name} is a PyTorch module and has no gradient here: stop it with jax.lax.stop_gradient"
            )

        return as_output(asked(inputs), name), {}

    def split(self, variables: Variables) -> tuple[Params, State]:
        """Nothing twice."""
        return {}, {}

    def merge(self, params: Params, state: State) -> Variables:
        """Nothing."""
        return {}

    def _shape(self, inputs: PyTree) -> tuple[int, ...]:
        """The shape of the logits, found once for inputs of each shape by asking for those of zeros."""
        leaves, structure = jax.tree.flatten(inputs)
        what = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves), self.call)
        if what not in self.held.shapes:
            zeros = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
            self.held.shapes[what] = self.held.logits(self.call, jax.tree.unflatten(structure, zeros)).shape
        return self.held.shapes[what]


def _tensor(leaf: Any) -> Any:
    import torch

    array = np.array(leaf)
    # PyTorch reads no bfloat16 of NumPy, and warns of arrays that it may not write to.
    return torch.from_numpy(array if array.dtype.kind in "biuf" else array.astype(np.float32))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
