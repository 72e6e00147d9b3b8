"""On what a command runs: versions, platform and devices."""

import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from kd_jax.convolution import onednn
from kd_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


def describe() -> dict[str, Any]:
    """Versions, platform and devices, as results.json keeps them."""
    return {
        "python": platform.python_version(),
        # Of the code that runs: an editable install knows what it was when it was installed.
        "packages": {"kd-jax": __version__} | {name: metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "convolutions": onednn.described(),
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
    }


def device_line(known: Mapping[str, Any]) -> str:
    """The device of a description in one line."""
    devices = known["devices"]
    of = f", the first of {len(devices)}" if len(devices) > 1 else ""
    version, by = known["packages"]["jax"], known["convolutions"]
    return f"{devices[0]}{of} ({known['cpus']} CPUs), jax {version}, convolutions by {by}"
