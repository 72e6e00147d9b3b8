"""The door of PyTorch: a module there as a teacher here, on the CPU and without a gradient."""

import copy
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from kd_jax.errors import ConfigError
from kd_jax.models.calling import Call, arguments, check_own_call
from kd_jax.models.host import Host, HostNetwork
from kd_jax.models.network import Model, PyTree


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
    try:
        held = copy.deepcopy(module).to("cpu").eval().requires_grad_(False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(module).__name__} cannot be copied ({_first_line(error)}): give one that keeps nothing of a call, "
            "or kd.from_torch(module) before it is called"
        ) from None
    return Model(HostNetwork(_Held(held, call)), {})


class _Held(Host):
    """A PyTorch module, and how it is called."""

    kind = "a PyTorch module"

    def __init__(self, module: Any, call: Call | None) -> None:
        super().__init__()
        self.module, self.call, self.name = module, call, type(module).__name__

    @functools.cached_property
    def digest(self) -> str:
        """Of its classes, what they were made with, its values, and the name of `call`."""
        sha = hashlib.sha256(getattr(self.call, "__qualname__", type(self.call).__name__).encode())
        for name, part in self.module.named_modules():
            own = part.extra_repr()
            if not type(part).__module__.startswith("torch."):
                own += str(sorted((key, value) for key, value in vars(part).items() if isinstance(value, _SIMPLE)))
            sha.update(f"{name} {type(part).__qualname__} {own}".encode())
        for name, value in (*self.module.named_parameters(), *self.module.named_buffers()):
            sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            sha.update(_bytes(value))
        return sha.hexdigest()

    def asked(self, inputs: PyTree) -> Float[np.ndarray, "..."]:
        """The module's logits."""
        import torch

        tensors = jax.tree.map(_tensor, inputs)
        with torch.inference_mode():
            try:
                if self.call is not None:
                    result = self.call(self.module, tensors, False)
                else:
                    args, kwargs = arguments(tensors)
                    result = self.module(*args, **kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in jax.tree.leaves(tensors))
                raise ConfigError(
                    f"{self.name} cannot be called with inputs of the shape {shapes} ({_first_line(error)}): give them "
                    "as it wants them, call=lambda module, inputs, train: module(inputs.permute(0, 3, 1, 2)) for images"
                ) from None
        if isinstance(result, Mapping):
            result = result.get("logits", result)
        result = getattr(result, "logits", result)
        if not (isinstance(result, torch.Tensor) and result.is_floating_point()):
            kind = f"tensor of {result.dtype}" if isinstance(result, torch.Tensor) else type(result).__name__
            raise ConfigError(
                f"{self.name} gives a {kind} and no tensor of logits: say what of it are the logits, "
                "call=lambda module, inputs, train: module(inputs)[0]"
            )
        return result.to(torch.float32).numpy()


# What a module of one's own may have as settings.
_SIMPLE = (bool, int, float, str)


def _bytes(tensor: Any) -> Any:
    """Of a tensor of any type, in the order of its values."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensor(leaf: Any) -> Any:
    import torch

    array = np.array(leaf)
    # PyTorch reads no bfloat16 of NumPy, and warns of arrays that it may not write to.
    return torch.from_numpy(array if array.dtype.kind in "biuf" else array.astype(np.float32))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
