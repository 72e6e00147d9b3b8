"""The order of a function's arguments: models and data that stand in each other's places are one sentence."""

from typing import Any

from flax import linen, nnx

from kd_jax.data.batch import Batch
from kd_jax.errors import ConfigError
from kd_jax.models import Model, Network
from kd_jax.models.doors import is_result


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
