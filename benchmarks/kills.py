"""Kills a run again and again, resumes it, and compares what it leaves with an uninterrupted run, byte for byte.

`python -m benchmarks.kills [--kills N] [--out DIR] [-- OPTIONS OF kd_jax.run]`. Every other kill waits until a
checkpoint is being written; the others come at random moments. Each is SIGKILL, and each resumption a fresh process.
When a run ends, the next one begins, until there were N kills.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file
from tqdm import tqdm

from kd_jax.experiments.shell import environment
from kd_jax.experiments.shell.folder import RESULTS
from kd_jax.train import checkpoint

STAGES = ("teacher", "student", "distilled")
DEFAULT_OPTIONS = ("--epochs", "1", "--seeds", "3", "--checkpoint-steps", "100")


def start(folder: Path, options: list[str]) -> subprocess.Popen[bytes]:
    """A fresh process that begins the run in `folder`, or goes on with it."""
    command = [sys.executable, "-m", "kd_jax.run", *options, "--out", str(folder), "--resume", "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def finish(folder: Path, options: list[str]) -> None:
    """Goes on with the run to its end. Raises `RuntimeError` where it fails."""
    if start(folder, options).wait():
        raise RuntimeError(f"the run in {folder} failed: see above")


def kill_once(folder: Path, options: list[str], *, writing: bool, longest_s: float, rng: random.Random) -> str | None:
    """Starts or resumes the run and kills it; tells where it was, or None where it had ended before.

    writing: wait for a checkpoint that is being written. longest_s: else wait up to so long.
    """
    process = start(folder, options)
    deadline = time.monotonic() + rng.uniform(0, longest_s)
    # A checkpoint takes a fraction of a second; a random number of them is let go by.
    passed, seen, last = rng.randrange(8), 0, None
    while process.poll() is None:
        partial = next(folder.glob("checkpoints/*/.partial*"), None)
        if partial and partial.parent != last:
            seen += 1
        last = partial.parent if partial else None
        if (partial and seen > passed) if writing else time.monotonic() > deadline:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    if process.wait() == -signal.SIGKILL:
        begun = [stage for stage in STAGES if list(folder.glob(f"checkpoints/{stage}/*"))]
        place = f"{begun[-1]}" if begun else "before the first checkpoint"
        return f"writing, {place}" if list(folder.glob("checkpoints/*/.partial*")) else place
    if process.returncode:
        raise RuntimeError(f"the run in {folder} failed: see above")
    return None


def differences(a: Path, b: Path) -> list[str]:
    """What two finished runs differ in, timings aside: results.json, parameters, and the last states of every stage."""
    found = []
    first, second = (json.loads((folder / RESULTS).read_text()) for folder in (a, b))
    for results in (first, second):
        del results["timing"]
    if json.dumps(first) != json.dumps(second):
        found.append(RESULTS)
    names = [sorted(path.name for path in (folder / "parameters").iterdir()) for folder in (a, b)]
    if names[0] != names[1]:
        found.append("names of parameters")
    found += [
        name for name in names[0] if (a / "parameters" / name).read_bytes() != (b / "parameters" / name).read_bytes()
    ]
    for stage in STAGES:
        states = [checkpoint.Store(folder).newest(stage) for folder in (a, b)]
        assert states[0] is not None
        assert states[1] is not None
        if states[0].step != states[1].step or states[0].arrays.keys() != states[1].arrays.keys():
            found.append(f"{stage}: step or names")
            continue
        for name, array in states[0].arrays.items():
            other = states[1].arrays[name]
            if array.dtype != other.dtype or array.tobytes() != other.tobytes():
                found.append(f"{stage}: {name}")
    return found


def arrays_in(folder: Path) -> int:
    """Numbers that `differences` compares in a finished run."""
    saved = sum(array.size for path in (folder / "parameters").iterdir() for array in load_file(path).values())
    states = [checkpoint.Store(folder).newest(stage) for stage in STAGES]
    return saved + sum(int(np.size(array)) for state in states if state for array in state.arrays.values())


def main() -> None:
    """Kills, compares, prints and keeps the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24, help="how often a process is killed (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for kills.md and kills.json")
    parser.add_argument("options", nargs="*", default=DEFAULT_OPTIONS, help="of kd_jax.run, after --")
    given = parser.parse_args()
    options, rng = list(given.options), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        began = time.monotonic()
        finish(whole, options)
        lasted = time.monotonic() - began
        kills: Counter[str] = Counter()
        differing: list[str] = []
        runs, bar = 0, tqdm(total=given.kills, desc="kills")
        while bar.n < given.kills:
            folder = Path(temporary) / f"killed-{runs}"
            while True:
                place = None
                if bar.n < given.kills:
                    place = kill_once(folder, options, writing=bar.n % 2 == 0, longest_s=lasted, rng=rng)
                else:
                    finish(folder, options)
                if place is None:
                    break
                kills[place] += 1
                bar.update()
            runs += 1
            differing += differences(whole, folder)
        bar.close()
        facts: dict[str, Any] = {
            "options": options,
            "kills": kills.total(),
            "places": dict(sorted(kills.items())),
            "runs": runs,
            "numbers compared in each run": arrays_in(whole),
            "differences": differing,
            "environment": environment.describe(),
        }
    lines = [f"`python -m benchmarks.kills --kills {given.kills} --seed {given.seed} -- {' '.join(options)}`", ""]
    lines += ["| killed | times |", "|---|---:|", *(f"| {place} | {count} |" for place, count in sorted(kills.items()))]
    lines += [
        "",
        f"{kills.total()} kills by SIGKILL, each followed by a fresh process that resumes; {runs} runs were brought to "
        "their end so, of which some may have ended before their kill came. Compared with ",
    ]
    lines[-1] += (
        f"a run that was never interrupted: {facts['numbers compared in each run']:,} numbers of parameters, optimiser "
    )
    lines[-1] += "states and metrics in each, and results.json without its timings. "
    lines[-1] += f"Differences: {', '.join(differing) or 'none, byte for byte'}."
    lines += ["", f"jax {jax.__version__}, {facts['environment']['devices'][0]}, {facts['environment']['cpus']} CPUs."]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "kills.md").write_text(text)
        (given.out / "kills.json").write_text(json.dumps(facts, indent=1) + "\n")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
