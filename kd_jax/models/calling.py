"""How a user's model is called, and what is made of its answer."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.errors import ConfigError, FeatureError
from kd_jax.files.names import path_name
from kd_jax.models.network import Output

PyTree = Any
# `call(module, inputs, train)` of a user, which returns logits or an `Output`.
Call = Callable[..., Any]

_TRAIN = ("train", "training", "is_training", "is_train")
_EVALUATE = ("deterministic", "use_running_average", "inference")
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NEAREST = 4

REMEDY = "say how it is called and what of its result are the logits, call=lambda module, inputs, train: …"


def arguments(inputs: PyTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with: `(x)` for an array, `(*inputs)` for a tuple, `(**inputs)` for a dict."""
    if isinstance(inputs, tuple):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    return (inputs,), {}


def named_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function that can be given by name; none where it does not tell."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in _NAMED}


def mode(names: Iterable[str], *, train: bool) -> dict[str, bool]:
    """Those of `train`, `deterministic`, … that are among `names`, for training or evaluation."""
    known = set(names)
    return {
        **{name: train for name in _TRAIN if name in known},
        **{name: not train for name in _EVALUATE if name in known},
    }


def check_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str) -> None:
    """Raises `ConfigError` where a function cannot be called with these arguments."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{what} cannot be called with these inputs ({error}): {REMEDY}") from None
    except ValueError:
        return


def check_own_call(call: Call | None) -> None:
    """Raises `ConfigError` where a user's `call` does not take what it is given."""
    if call is None:
        return
    try:
        inspect.signature(call).bind(None, None, False)
    except TypeError as error:
        raise ConfigError(
            f"call takes other arguments ({error}): it is called as call(module, inputs, train)"
        ) from None
    except ValueError:
        return


def as_output(result: Any, what: str = "the model") -> Output:
    """What a model returned, as an `Output`: logits, an `Output`, or an object or dict that has `logits`.

    The other arrays of such a dict or named tuple become its features. Raises `ConfigError` for anything else.
    """
    if isinstance(result, Output):
        if not isinstance(result.features, Mapping):
            raise ConfigError(
                f"{what} gives its features as a {type(result.features).__name__}: give them by name, "
                "kd.Output(logits, {'name': array})"
            )
        return Output(_logits(result.logits, what), dict(result.features))
    if _is_array(result):
        return Output(_logits(result, what))
    fields = _fields(result)
    if "logits" not in fields:
        raise ConfigError(f"{what} gives {_described(result)} and no logits: {REMEDY}")
    logits = _logits(fields.pop("logits"), what)
    return Output(logits, {name: value for key in fields for name, value in named_arrays(str(key), fields[key])})


def named_arrays(name: str, tree: PyTree) -> list[tuple[str, Any]]:
    """The arrays of a PyTree by their paths below `name`: `name` itself for an array, `name.0`, … for a tuple."""
    leaves = jax.tree.leaves_with_path(tree)
    return [(path_name((name, *path)), leaf) for path, leaf in leaves if _is_array(leaf)]


def unknown_feature(path: str, names: Iterable[str]) -> FeatureError:
    """The error for a path that is none of `names`; it names the nearest that exist."""
    every = list(dict.fromkeys(names))
    if not every:
        return FeatureError(path, "does not exist: this model has no features")
    nearest = ", ".join(map(repr, difflib.get_close_matches(path, every, _NEAREST, 0.3) or every[:_NEAREST]))
    return FeatureError(path, f"does not exist: the nearest are {nearest}; kd.feature_names(model, inputs) lists all")


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "ndim")


def _fields(result: Any) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return dict(result)
    if hasattr(result, "_asdict"):
        return dict(result._asdict())
    return {"logits": result.logits} if hasattr(result, "logits") else {}


def _logits(logits: Any, what: str) -> Any:
    if not _is_array(logits):
        raise ConfigError(f"{what} gives {_described(logits)} where its logits should be: {REMEDY}")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ConfigError(
            f"{what} gives logits of type {logits.dtype}: they must be floating-point numbers, so {REMEDY}"
        )
    if logits.ndim == 0:
        raise ConfigError(
            f"{what} gives a single number: logits need an axis of examples and one of classes, so {REMEDY}"
        )
    return logits


def _described(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
