"""Where a convolutional step's time goes: `python -m benchmarks.convolution_time [ResNet-20]`, about a minute.

kd_jax and eager PyTorch each train in a process of its own, in which oneDNN tells the time of each of its calls; that
costs a step a few milliseconds. Printed is what oneDNN takes of a step, by kind, and what is left.
"""

import argparse
import statistics
import time
from collections import defaultdict

from tabulate import tabulate

from benchmarks import networks, processes

WAYS = ("kd_jax", "eager")
STEPS, CALLS = 4, 5
_SUMS = ("all else", "a step")
_BEGIN, _END = "the calls begin", "milliseconds a step:"


def times(told: str) -> dict[str, float]:
    """Milliseconds a step of each kind of call, from what a process of `_train` printed, and `all else`."""
    calls, _, after = told.partition(_BEGIN)[2].partition(_END)
    found: defaultdict[str, float] = defaultdict(float)
    for line in calls.splitlines():
        fields = line.split(",")
        if line.startswith("onednn_verbose") and "exec" in fields:
            kind, what = fields[fields.index("exec") + 2], fields[fields.index("exec") + 4]
            name = f"{kind}, {what.replace('_', ' ')}" if kind == "convolution" else kind
            found[name] += float(fields[-1]) / (STEPS * CALLS)
    step = float(after.split()[0])
    return {**found, "all else": step - sum(found.values()), "a step": step}


def _train(row: networks.Row, way: str) -> None:
    trained = networks.kd_jax_trainer(row, STEPS) if way == "kd_jax" else networks.torch_trainer(row, STEPS, way)
    for _ in range(2):
        trained()
    print(_BEGIN, flush=True)
    seconds = []
    for _ in range(CALLS):
        begun = time.perf_counter()
        trained()
        seconds.append(time.perf_counter() - begun)
    print(_END, 1000 * statistics.mean(seconds) / STEPS, flush=True)


def main(name: str, way: str | None = None) -> None:
    """Prints the table, or where `way` is given trains in it."""
    if way is not None:
        return _train(networks.ROWS[name], way)
    found = {}
    for one in WAYS:
        finished = processes.run(
            ["-m", "benchmarks.convolution_time", name, "--way", one],
            mark=_BEGIN, environment={"ONEDNN_VERBOSE": "profile_exec"},
        )  # fmt: skip
        found[one] = times("\n".join(finished.output))
    kinds = [kind for kind in dict.fromkeys(kind for of in found.values() for kind in of) if kind not in _SUMS]
    rows = [[kind, *(f"{found[one].get(kind, 0):.1f}" for one in WAYS)] for kind in (*kinds, *_SUMS)]
    headers = [f"{name}, ms", *WAYS]
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=("left", "right", "right")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="ResNet-20", choices=list(networks.ROWS), help="default: ResNet-20")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    main(given.name, given.way)
