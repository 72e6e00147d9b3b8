"""The arguments of a call: unknown names, and models and data in each other's places, are one sentence."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from flax import linen, nnx

from kd_jax.data.batch import Batch
from kd_jax.errors import ArgumentError, ConfigError
from kd_jax.models import Model, Network
from kd_jax.models.doors import is_result

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_OF_METHODS = ("alpha", "temperature")


def called_as(call: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Makes a function raise `ArgumentError` for arguments that it does not take. call: how it is called, in words."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        taken = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                taken.bind(*args, **kwargs)
            except TypeError as error:
                raise ArgumentError(_refusal(error, taken, call, len(args), kwargs)) from None
            return function(*args, **kwargs)

        return checked

    return decorate


def _refusal(error: TypeError, taken: inspect.Signature, call: str, given: int, named: dict[str, Any]) -> str:
    function, names = call.partition("(")[0], list(taken.parameters)
    unknown = next((name for name in named if name not in names), None)
    if unknown in _OF_METHODS and function != "kd.evaluate":
        return f"{function} has no {unknown}, which is a number of the method: give it there, as kd.KD({unknown}=…)"
    if unknown is not None:
        return f"{function} has no {unknown}: did you mean {difflib.get_close_matches(unknown, names, 1, 0)[0]}?"
    if "too many positional" in str(error):
        return (
            f"{function} was given {given} arguments without a name: call it as {call}, with labels beside their "
            "inputs, kd.Batch(inputs, labels), and all else by name"
        )
    return f"{function} was called wrongly ({error}): call it as {call}, and all else by name"


def check_order(call: str, *, models: dict[str, Any], data: dict[str, Any]) -> None:
    """Raises `ConfigError` for a `Batch` in the place of a model, and for a model in the place of data.

    call: the function with its arguments in their order, in words. models, data: what was given, by its name.
    """
    wrong = [(name, value) for name, value in models.items() if isinstance(value, Batch)]
    wrong += [(name, value) for name, value in data.items() if _is_model(value)]
    for name, value in wrong:
        said = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise ConfigError(f"{name} is {said}: the order is {call}")


def _is_model(value: Any) -> bool:
    kinds = (Model, Network, nnx.Module, linen.Module)
    is_class = isinstance(value, type) and issubclass(value, kinds)
    return (
        is_class
        or isinstance(value, kinds)
        or is_result(value)
        or (hasattr(value, "state_dict") and hasattr(value, "forward"))
    )
