"""Outputs of an NNX module's submodules, recorded by path without a change to the user's classes or modules.

A submodule of the copy that `apply` makes gets a subclass of its own class, which keeps what its call returns. The
state of NNX carries it out of `nnx.remat`, `nnx.scan` and the like. Of several calls the last output is kept.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from flax import nnx
from flax.errors import TraceContextError

from kd_jax.errors import ConfigError, FeatureError
from kd_jax.models.calling import named_arrays, unknown_feature
from kd_jax.models.network import Output

_KEPT = "_kd_jax_output"

Recorded = dict[str, nnx.Module]


class _Feature(nnx.Intermediate):
    """What a submodule returned."""


def start(module: nnx.Module, features: Iterable[str]) -> dict[str, Recorded]:
    """Lets the submodules at the paths `features` keep their outputs; for each path those that may have it."""
    wanted: dict[str, Recorded] = {path: {} for path in features}
    known = submodules(module) if wanted else {}
    for path, recorded in wanted.items():
        prefix = next((prefix for prefix in _prefixes(path) if _at(module, known, prefix) is not None), None)
        if prefix is not None:
            recorded[prefix] = _record(_at(module, known, prefix))
    return wanted


def record(module: nnx.Module, paths: Iterable[str]) -> Recorded:
    """Lets the submodules at these paths of `submodules` keep their outputs."""
    known = submodules(module)
    return {path: _record(known[path]) for path in paths}


def finish(module: nnx.Module, wanted: Mapping[str, Recorded], output: Output) -> Output:
    """`output` with the features that were recorded. Raises `ConfigError` for a path that has none."""
    features = dict(output.features)
    for path, recorded in wanted.items():
        found = outputs(recorded)
        if path in found:
            features[path] = found[path]
        elif path not in features:
            raise _missing(path, recorded, found, [*features, *submodules(module)])
    return output._replace(features=features)


def outputs(recorded: Recorded) -> dict[str, Any]:
    """The arrays that submodules returned, by path; of a tuple or dict each by its number or name after the path."""
    found: dict[str, Any] = {}
    for path, part in recorded.items():
        kept = vars(part).get(_KEPT)
        if kept is not None:
            found |= named_arrays(path, kept.get_value())
    return found


def submodules(module: nnx.Module) -> Recorded:
    """All submodules that can be called, by path: `layers.2`. One that is shared has the path that comes first."""
    return {".".join(map(str, path)): part for path, part in nnx.iter_modules(module) if path and is_callable(part)}


def is_callable(module: nnx.Module) -> bool:
    """Whether the module's class has a call (every class has one itself)."""
    return any("__call__" in vars(kind) for kind in type(module).__mro__)


def _prefixes(path: str) -> list[str]:
    """`path`, and what is left of it without its last parts."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def _at(module: nnx.Module, known: Recorded, path: str) -> nnx.Module | None:
    """The submodule at a path, also where a shared one has another path before it."""
    if path in known:
        return known[path]
    place: Any = module
    for part in path.split("."):
        if isinstance(place, Mapping):
            place = place.get(part)
        elif isinstance(place, list | tuple | nnx.List):
            place = place[int(part)] if part.isdecimal() and int(part) < len(place) else None
        else:
            place = vars(place).get(part) if hasattr(place, "__dict__") else None
    return place if isinstance(place, nnx.Module) and any(place is part for part in known.values()) else None


def _record(part: Any) -> nnx.Module:
    kind: Any = type(part)
    if not hasattr(kind, "_kd_jax_records"):
        object.__setattr__(part, "__class__", _recording(kind))
    return part


@functools.cache
def _recording(kind: Any) -> Any:
    """A subclass of `kind` that keeps what its call returns."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.__call__(self, *args, **kwargs)
        try:
            setattr(self, _KEPT, _Feature(result))
        except TraceContextError:
            raise ConfigError(
                f"the output of {kind.__name__} cannot be recorded, because the model calls it within a transformation "
                "of JAX: use that of NNX (nnx.remat, nnx.scan), or name the submodule around it"
            ) from None
        return result

    body = {"__call__": call, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "_kd_jax_records": True}
    return type(kind)(kind.__name__, (kind,), body, pytree=kind._pytree__is_pytree)


def _missing(path: str, recorded: Recorded, found: Mapping[str, Any], names: Iterable[str]) -> FeatureError:
    if not recorded:
        return unknown_feature(path, names)
    if found:
        return unknown_feature(path, found)
    prefix, part = next(iter(recorded.items()))
    return FeatureError(
        path,
        f"is not computed: {type(part).__name__} at {prefix} is not called, or returns no array, so name another, of "
        "kd.feature_names(model, inputs)",
    )
