"""Whether two checkouts of kd_jax do the same, to the last byte: `python -m tools.same_bytes BEFORE AFTER [DIR]`.

In each: a run, a small sweep, a run that is stopped after its first checkpoint and resumed, the help of every command,
and what bad options are answered with. Everything that is printed or left in a folder is compared. Left out are

- seconds: `timing` in results.json, the lines on seconds and steps/s of a table, `train_s` of a checkpoint;
- kd_jax's own version, and digests of what holds it or seconds (`sha256` of run.json, `run` of a checkpoint);
- of checkpoints whatever Orbax writes beside the arrays, such as dates: the arrays of the newest ones are compared;
- which older checkpoints there are, since they keep a pause in seconds;
- of checkpoints whether the names of parameters begin with `variables.`;
- of memory, how much is free.

Both compile into one cache: the table says how many programs the second checkout did not find there. Exit code 0 where
all is the same, 1 where something differs. The files stay in DIR, where one is given, and what BEFORE left there is
taken for what it leaves.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

_SMALL = ["--teacher-hidden", "16", "--student-hidden", "4", "--learning-rate", "0.01", "--seeds", "3", "--quiet"]
_RUN = [*_SMALL, "--epochs", "2", "--batch-size", "256", "--shift", "1", "--schedule", "cosine"]
_SWEEP = [*_SMALL, "--epochs", "1", "--batch-size", "512", "--temperature", "1", "4", "--student-hidden", "3", "4"]
_STOPPED = [*_SMALL, "--epochs", "4", "--batch-size", "128", "--checkpoint-steps", "200"]
_REFUSED = (
    ("run", "--lr", "1"),
    ("run", "--seeds", "1000000000"),
    ("run", "--learning-rate", "1e30", "--teacher-hidden", "16", "--out", "diverged", "--quiet"),
    ("run", "--out", "run", "--quiet"),
    ("run", "--out", "run", "--resume", "--epochs", "3"),
    ("run", "--out", "sweep", "--resume"),
    ("run", "--out", "/proc/kd_jax"),
    ("sweep", "--temperature", "1", "1"),
    ("sweep", "--out", "run", "--resume"),
    ("reproduce", "hinton2015", "--out", "run"),
)
_SECONDS = re.compile(r".*(\(s, all seeds together\)|steps/s).*\n")
_FREE = re.compile(r"[\d.]+ GiB are free|at most [\d,]+$", re.MULTILINE)
_STOP_AFTER_S = 300
_PRINTED = "printed.json"


def main() -> None:
    """Runs both checkouts and prints a line for each part."""
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python -m tools.same_bytes BEFORE AFTER [DIR]")
    checkouts = [Path(given).resolve() for given in sys.argv[1:3]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[3] if len(sys.argv) == 4 else temporary).resolve()
        cache = folder / "cache"
        printed, programs = [], []
        for name, checkout in zip(("before", "after"), checkouts, strict=True):
            printed.append(_kept(folder / name) if name == "before" else {})
            if not printed[-1]:
                printed[-1] = _do_all(checkout, folder / name, cache)
            programs.append(len(list(cache.rglob("*-cache"))))
        rows = [_row(part, printed, folder) for part in printed[0]]
    print(tabulate(rows, ["part", "files", "same", "differ"], tablefmt="simple"))
    print(f"\n{programs[0]} programs compiled before, {programs[1] - programs[0]} others after.")
    print(f"\nLeft out:\n{__doc__.partition('Left out are')[2].partition('Both compile')[0].strip()}")
    sys.exit(any(row[3] for row in rows))


def _kept(folder: Path) -> dict[str, str]:
    """What was printed when BEFORE was run into the folder earlier, if it was."""
    path = folder / _PRINTED
    return json.loads(path.read_text()) if path.exists() else {}


def _do_all(checkout: Path, folder: Path, cache: Path) -> dict[str, str]:
    """Every part in one checkout; what each printed, and its exit code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def command(name: str, *options: str) -> str:
        return _outcome(_start(checkout, folder, cache, name, *options))

    printed = {
        "run": command("run", *_RUN, "--out", "run"),
        "sweep": command("sweep", *_SWEEP, "--out", "sweep"),
        "resumed": _stopped_and_resumed(lambda *options: _start(checkout, folder, cache, "run", *options), folder),
    }
    printed |= {f"{name} --help": command(name, "--help") for name in ("run", "sweep", "reproduce")}
    printed |= {" ".join(options): command(*options) for options in _REFUSED}
    (folder / _PRINTED).write_text(json.dumps(printed))
    return printed


def _start(checkout: Path, folder: Path, cache: Path, name: str, *options: str) -> subprocess.Popen[str]:
    """In a folder without a kd_jax, as Python prefers one that is there."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "KD_JAX_CACHE": str(cache), "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-m", f"kd_jax.{name}", *options],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _outcome(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate()
    return _FREE.sub("", _SECONDS.sub("", f"{out}\n{error}\nexit code {process.returncode}\n"))


def _stopped_and_resumed(start: Callable[..., subprocess.Popen[str]], folder: Path) -> str:
    process = start(*_STOPPED, "--out", "resumed")
    began = time.monotonic()
    while not list((folder / "resumed" / "checkpoints").glob("student/[0-9]*/sha256.txt")):
        if process.poll() is not None or time.monotonic() - began > _STOP_AFTER_S:
            sys.exit(f"no checkpoint came of the run that was to be stopped:\n{_outcome(process)}")
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stopped = _outcome(process)
    if "exit code 143" not in stopped:
        sys.exit(f"the run ended before it was stopped:\n{stopped}")
    return stopped + _outcome(start("--out", "resumed", "--resume", "--quiet"))


def _row(part: str, printed: list[dict[str, str]], folder: Path) -> list[Any]:
    """Of one part: how many outputs and files there are, how many are the same, and the names of the others."""
    contents = []
    for name, told in zip(("before", "after"), printed, strict=True):
        found: dict[str, Any] = {"what it printed": told[part]}
        if (folder / name / part).is_dir():
            found |= _contents(folder / name / part)
        contents.append(found)
    names = list({**contents[0], **contents[1]})
    differ = [name for name in names if contents[0].get(name) != contents[1].get(name)]
    return [part, len(names), len(names) - len(differ), ", ".join(differ)]


def _contents(folder: Path) -> dict[str, Any]:
    """What is compared of every file of a result, by its path."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    checkpoints = folder / "checkpoints"
    found = {str(path.relative_to(folder)): _content(path) for path in files if checkpoints not in path.parents}
    for stage in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        newest = max(path for path in stage.iterdir() if path.name.isdigit())
        found[str(newest.relative_to(folder))] = _checkpoint(newest)
    return found


def _content(path: Path) -> Any:
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(_without_versions(json.loads(content)))
    if path.suffix == ".md":
        return _SECONDS.sub("", content.decode())
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"] = _without_versions(json.loads(header["__metadata__"]["kd_jax"]))
        return list(header.items()), content[8 + length :]
    return content


def _without_versions(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {n: _without_versions(v) for n, v in tree.items() if n not in ("timing", "version", "kd-jax", "sha256")} | (
        {"data": tree["data"]} if "data" in tree else {}
    )


def _checkpoint(path: Path) -> Any:
    import orbax.checkpoint.experimental.v1 as ocp

    arrays = ocp.load(path)
    facts = dict(ocp.metadata(path).custom_metadata)
    facts = {name: value for name, value in facts.items() if name not in ("train_s", "run")}
    named = {name.removeprefix("variables."): array for name, array in arrays.items()}
    return facts, {name: (array.shape, str(array.dtype), array.tobytes()) for name, array in sorted(named.items())}


if __name__ == "__main__":
    main()
