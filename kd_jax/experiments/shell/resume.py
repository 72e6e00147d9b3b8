"""Whether a run that is asked for is the one in its folder."""

import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from kd_jax.errors import MismatchError
from kd_jax.experiments.shell import environment
from kd_jax.train.checkpoint import Store

# Settings of JAX that choose other random numbers or another precision.
_ARITHMETIC = ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64")


@runtime_checkable
class Data(Protocol):
    """What a run is trained on."""

    @property
    def name(self) -> str:
        """The source it came from."""

    def digest(self) -> str:
        """Equal for equal data alone."""


def identity(data: Data, **more: Any) -> dict[str, Any]:
    """What makes a run the same run, bit for bit: data, versions, device, number of cores, and `more`, such as options.

    Another device or number of cores adds up large products in other parts.
    """
    known = environment.describe()
    exact = ("backend", "convolutions", "cpus", "devices", "matmul_precision", "packages")
    return {
        **more,
        "data": {"name": data.name, "sha256": data.digest()},
        "environment": {name: known[name] for name in exact},
        "jax": {name: jax.config.values[name] for name in _ARITHMETIC},
    }


def require_same(store: Store, asked: Mapping[str, Any]) -> None:
    """Raises `MismatchError`, which names the first difference, unless the run in the folder is the one `asked` for."""
    saved = store.identity()
    if saved.keys() != asked.keys():
        raise MismatchError(
            f"{store.folder} has what another command started: go on with that command, or choose another folder"
        )
    # As files have it: lists in place of tuples.
    for name, value in _flat(json.loads(json.dumps(asked))).items():
        found = _flat(saved).get(name)
        if found == value:
            continue
        if name == "data.sha256":
            raise MismatchError(
                f"the data set {asked['data']['name']} has the digest {value[:12]}…, and the run in {store.folder} was "
                f"trained on {str(found)[:12]}…: give it the same data, or start another run"
            )
        if name not in _flat(saved):
            raise MismatchError(
                f"the run in {store.folder} was started by a kd_jax that knew no {name.rpartition('.')[2]}: go on with "
                "that one, or start another run"
            )
        raise MismatchError(
            f"{name.rpartition('.')[2]} is {shown(value)}, and the run in {store.folder} has {shown(found)}: "
            "go on with what it was started with, or start another run"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def shown(value: Any) -> str:
    """A setting as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
