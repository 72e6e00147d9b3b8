"""Whether a run that is asked for is the one in its folder."""

from collections.abc import Mapping
from typing import Any

import jax

from kd_jax.data.dataset import Dataset
from kd_jax.experiments.notebook.config import Config, option
from kd_jax.train.checkpoint import MismatchError, Store

# Settings of JAX that choose other random numbers or another precision.
_ARITHMETIC = ("jax_default_prng_impl", "jax_threefry_partitionable", "jax_enable_x64")


def identity(config: Config, dataset: Dataset, environment: Mapping[str, Any], every: int | None) -> dict[str, Any]:
    """What makes a run the same run, bit for bit: options, data, versions, device and number of cores."""
    return same(dataset, environment, config=config.as_dict(), checkpoint_steps=every)


def same(dataset: Dataset, environment: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """`more`, and of data, versions and device what makes a run the same run."""
    # A large product is added up in parts, one for each core.
    exact = ("backend", "cpus", "devices", "matmul_precision", "packages")
    return {
        **more,
        "data": {"name": dataset.name, "sha256": dataset.digest()},
        "environment": {name: environment[name] for name in exact},
        "jax": {name: jax.config.values[name] for name in _ARITHMETIC},
    }


def saved_options(store: Store, given: Mapping[str, Any], every: int | None) -> tuple[Config, int | None]:
    """The configuration and the checkpoint steps of the run in the folder.

    Raises `MismatchError` where options that are given differ, `CheckpointError` where the folder is damaged.
    """
    saved = store.identity()
    try:
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in saved["config"].items()}
        config = Config(**fields)
        saved_every = saved["checkpoint_steps"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MismatchError(
            f"{store.folder} has a run of another command or version: go on with the one that started it"
        ) from None
    asked = dict(given) | ({} if every is None else {"checkpoint_steps": every})
    known = config.as_dict() | {"checkpoint_steps": saved_every}
    for name, value in asked.items():
        if known[name] != (list(value) if isinstance(value, tuple) else value):
            raise MismatchError(
                f"{option(name)} is {_shown(value)}, and the run in {store.folder} has {_shown(known[name])}: "
                "leave the option out to go on, or choose another folder"
            )
    return config, saved_every


def require_same(store: Store, asked: Mapping[str, Any]) -> None:
    """Raises `MismatchError`, which names the first difference, unless the run in the folder is the one `asked` for."""
    saved = store.identity()
    if saved.keys() != asked.keys():
        raise MismatchError(
            f"{store.folder} has what another command started: go on with that command, or choose another folder"
        )
    for name, value in _flat(asked).items():
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
            f"{name.rpartition('.')[2]} is {_shown(value)}, and the run in {store.folder} has {_shown(found)}: "
            "go on with what it was started with, or start another run"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
