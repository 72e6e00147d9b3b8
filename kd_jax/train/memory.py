"""Whether a training fits into memory, before it is tried."""

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax

from kd_jax.data.shifts import view_count
from kd_jax.models import Network, count_parameters

# Parameters, Adam's two means, gradient and update, as XLA keeps them in a loop, in float32; measured on a CPU.
_COPIES_OF_PARAMETERS = 8


def available() -> int | None:
    """Bytes that the first device of this process, or on a CPU the machine, has left; None where it does not tell."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return host() if device.platform == "cpu" else None


def host() -> int | None:
    """Bytes that the machine has left; None where it does not tell."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return None
    limits = [left_to_the_container()]
    # What the kernel keeps as a cache of files it gives back: MemAvailable counts it, SC_AVPHYS_PAGES does not.
    try:
        with open("/proc/meminfo") as lines:
            limits += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    except OSError:
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((limit for limit in limits if limit is not None), default=None)


def left_to_the_container(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control group of a container may use beyond what it does; None without a limit."""
    try:
        limit = int((group / "memory.max").read_text())
    except (OSError, ValueError):
        return None
    try:
        used = int((group / "memory.current").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # A cache of files, which is given back.
        return max(0, limit - used + int(facts["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return limit


def gib(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.1f} GiB"


def kept_parameters(network: Network, trainings: int) -> int:
    """Bytes of the parameters of so many trainings, in the blocks that they train in and put together."""
    return 2 * 4 * trainings * _parameters(network)


def teacher_outputs(examples: int, classes: int, shift: int) -> int:
    """Bytes of a teacher's logits of every view of so many images."""
    return 4 * view_count(shift) * examples * classes


class Needed(NamedTuple):
    """Bytes for one training: whatever the batch is, and for each image of a batch."""

    fixed: int
    per_image: int

    def total(self, batch_size: int) -> int:
        """Bytes with batches of that size."""
        return self.fixed + batch_size * self.per_image


def needed(network: Network, layers: Sequence[int], *, examples: int, test_examples: int) -> Needed:
    """For training and evaluating one seed of a network of such `layers`, rather too much than too little."""
    # The order of this epoch, the next one's and what that is made from, and the logits of the test images.
    fixed = 4 * (_COPIES_OF_PARAMETERS * _parameters(network) + 6 * examples + test_examples * layers[-1])
    # Every unit before and after its activation, and their gradients; the image as often, in the steps of one turn.
    return Needed(fixed, 4 * 4 * sum(layers))


@lru_cache(maxsize=256)
def _parameters(network: Network) -> int:
    """How many a network has, which is asked for each of a sweep's settings."""
    params, _ = network.split(jax.eval_shape(network.init, jax.random.key(0)))
    return count_parameters(params)
