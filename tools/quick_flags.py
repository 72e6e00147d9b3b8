"""XLA's flags for programs that compile in a third of the time and run slower, printed: `python -m tools.quick_flags`.

Most of the suite's time is XLA's. XLA ends a process that gives it a flag which it does not know, so each is tried: the
last one is none of releases after jax 0.11.
"""

import os
import subprocess
import sys

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)


def known(flag: str) -> bool:
    """Whether the XLA that is installed takes this flag."""
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    started = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, check=False
    )
    return started.returncode == 0


if __name__ == "__main__":
    print(*filter(known, FLAGS))
