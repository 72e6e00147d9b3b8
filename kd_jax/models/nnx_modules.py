"""NNX modules as they live: how they are made, what they are made of, and their mode."""

import inspect
from typing import Any, cast

import jax
from flax import nnx

from kd_jax.errors import ConfigError
from kd_jax.models.calling import named_parameters
from kd_jax.models.network import Model
from kd_jax.models.trying import reason


def constructed(constructor: Any, rngs: nnx.Rngs) -> nnx.Module:
    """What a class or function makes of random streams. Raises `ConfigError` where that is no module."""
    name = getattr(constructor, "__name__", type(constructor).__name__)
    who = "the lambda" if name == "<lambda>" else name
    # The signature of a class of NNX says nothing: that of its metaclass hides it.
    function: Any = constructor
    first: tuple[None, ...] = ()
    if isinstance(constructor, type):
        function, first = cast(Any, constructor).__init__, (None,)
    args, kwargs = ((), {"rngs": rngs}) if "rngs" in named_parameters(function) else ((rngs,), {})
    try:
        inspect.signature(function).bind(*first, *args, **kwargs)
    except TypeError as error:
        own = "Net" if name == "<lambda>" else name
        raise ConfigError(
            f"{who} cannot be called with nnx.Rngs alone ({error}): give a "
            f"function, kd.from_nnx(lambda rngs: {own}(…, rngs=rngs))"
        ) from None
    except ValueError:
        pass
    try:
        module = constructor(*args, **kwargs)
    except Exception as error:
        if isinstance(constructor, type) or "rngs" in kwargs:
            raise
        raise ConfigError(
            f"{who} was called with nnx.Rngs, as a function that makes a module is, and failed ({reason(error)}): a "
            "function of inputs is a model by kd.from_function(apply, params)"
        ) from error
    if not isinstance(module, nnx.Module):
        remedy = "a function rngs -> nnx.Module, or use kd.from_linen or kd.from_function"
        if isinstance(module, Model):
            remedy = "that Model itself"
        raise ConfigError(f"{who} gives a {type(module).__name__} and no nnx.Module: give {remedy}")
    for part in modules(module).values():
        for name, value in list(vars(part).items()):
            if isinstance(value, jax.core.Tracer):
                # A plain array of a module is data, but not for NNX while it is traced.
                setattr(part, name, nnx.data(value))
    return module


def modules(module: nnx.Module) -> dict[tuple[Any, ...], nnx.Module]:
    """A module and its parts, by their paths."""
    return dict(nnx.iter_modules(module))


def set_mode(module: nnx.Module, *, train: bool) -> None:
    """Training or evaluation, of Flax's layers and by the module's own `train()` or `eval()`, where it has such."""
    nnx.Module.train(module) if train else nnx.Module.eval(module)
    name = "train" if train else "eval"
    own = getattr(type(module), name, None)
    if own is getattr(nnx.Module, name) or not callable(own):
        return
    try:
        inspect.signature(own).bind(module)
    except (TypeError, ValueError):
        # A method of that name for something else, which takes arguments.
        return
    own(module)
