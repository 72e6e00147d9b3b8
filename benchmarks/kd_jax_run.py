"""`python -m kd_jax.run` with one line more: the largest amount of device memory that JAX's allocator gave out."""

import json

import jax

from kd_jax import run


def main() -> None:
    """Runs the experiment that the command line names."""
    run.main()
    stats = jax.devices()[0].memory_stats() or {}
    print(json.dumps({"peak device bytes": stats.get("peak_bytes_in_use")}))


if __name__ == "__main__":
    main()
