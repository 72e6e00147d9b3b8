"""Trainings by several processes, for tests/train/test_processes.py; each prints what it found as JSON.

`python tests/processes.py COUNT NUMBER PORT FOLDER NAME…`: of COUNT processes with 2 devices each, or one with 4.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils


def begin(count: int, number: int, port: str) -> None:
    """Before anything else of JAX. One that hangs is given up after a minute."""
    jax.config.update("jax_num_cpu_devices", 2 if count > 1 else 4)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            f"127.0.0.1:{port}", count, number, heartbeat_timeout_seconds=60, shutdown_timeout_seconds=60
        )


def line() -> Any:
    """All devices along `data`."""
    import devices as d

    return d.mesh(jax.device_count())


def both() -> Any:
    """All devices along `data` and `model`."""
    import devices as d

    return d.mesh(jax.device_count() // 2, 2)


def apart(one: Any, other: Any) -> float:
    import devices

    from kd_jax.train.processes import on_host

    return devices.apart(*(jax.tree.map(on_host, tree) for tree in (one, other)))


def trained(**more: Any) -> Any:
    import devices as d

    import kd_jax as kd

    how = {**d.HOW, **more}
    data = how.pop("data", d.DATA)
    if data is d.DATA:
        how["batch_size"] = 8
    return kd.distill(d.STUDENT, d.TEACHER, data, **how)


def memory(folder: Path) -> dict[str, float]:
    """Of data that every process has; over `data`, and with pieces over `model` and of moments."""
    import devices as d

    import kd_jax as kd

    alone, found, measured = trained(), {}, []
    for name, on, sharding in (("data", line(), None), ("both", both(), d.RULES)):
        result = trained(mesh=on, sharding=sharding)
        found[name] = apart(alone.state, result.state)
        found[f"loss {name}"] = apart(alone.history["loss"], result.history["loss"])
        measured.append(result.student)
    nll = [kd.evaluate(student, d.DATA, teacher=d.TEACHER)["nll"] for student in (alone.student, measured[0])]
    return {**found, "evaluated": abs(nll[0] - nll[1])}


def parts(folder: Path) -> dict[str, Any]:
    """Each process gives its own part: of rows by `kd.stream`, and by an iterator of its own."""
    import devices as d

    import kd_jax as kd

    alone = trained(key=7)
    stream = trained(data=kd.stream(d.DATA, batch_size=8, key=7), key=7, mesh=line())
    size = 8 // jax.process_count()
    own = slice(size * jax.process_index(), size * (jax.process_index() + 1))
    batches = [
        jax.tree.map(lambda leaf: leaf[own], batch) for batch in kd.batches(d.DATA, key=7, batch_size=8, epochs=2)
    ]
    iterator = trained(data=iter(batches), steps=8, key=7, mesh=line())
    return {"stream": apart(alone.state, stream.state), "iterator": apart(alone.state, iterator.state)}


def told(folder: Path) -> dict[str, Any]:
    """Validation, the best epoch and callbacks: the same in each process."""
    import devices as d

    how = {"validation": d.DATA, "best": "nll", "prepare": None}
    seen: list[float] = []
    alone = trained(**how)
    result = trained(mesh=line(), callbacks=lambda epoch: seen.append(epoch.metrics["validation_nll"]), **how)
    return {"best": [alone.best_epoch, result.best_epoch], "apart": apart(list(alone.history["validation_nll"]), seen)}


def killed(folder: Path) -> None:
    """Process 1 is killed after two epochs of four, when a checkpoint of the first is there."""
    import devices as d

    import kd_jax as kd
    from kd_jax.train import loop, processes

    loop._PAUSE, processes._SILENT = 0.0, 15.0

    def kill(epoch: Any) -> None:
        if epoch.number == 3 and jax.process_index() == 1:
            while not list((folder / "kept" / "checkpoints" / "training").glob("0*16")):
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    data = kd.stream(d.DATA, batch_size=8, key=7)
    trained(data=data, epochs=4, mesh=both(), sharding=d.RULES, checkpoint=folder / "kept", callbacks=kill)


def resumed(folder: Path) -> dict[str, Any]:
    """By other processes, on other meshes and on none: as a training that was never stopped."""
    import devices as d

    import kd_jax as kd

    found, count = {}, jax.process_count()
    whole = trained(data=kd.stream(d.DATA, batch_size=8, key=7), epochs=4)
    for name, more in {"both": {"mesh": both(), "sharding": d.RULES}, "data": {"mesh": line()}}.items():
        own = folder / f"{name} by {count}"
        if jax.process_index() == 0:
            shutil.copytree(folder / "kept", own)
        if count > 1:
            multihost_utils.sync_global_devices(name)
        data = kd.stream(d.DATA, batch_size=8, key=7)
        seen: list[int] = []
        result = trained(
            data=data,
            epochs=4,
            checkpoint=own,
            resume=True,
            callbacks=lambda epoch, seen=seen: seen.append(epoch.number),
            **more,
        )
        # Epochs 1 and 2 were trained by those that wrote.
        assert seen == [3, 4], seen
        found[name] = apart(whole.state, result.state)
    return found


def refused(folder: Path) -> list[str]:
    """In all processes, in the same words."""
    import devices as d

    import kd_jax as kd

    trained(mesh=line(), checkpoint=folder / "refused")
    again = {"mesh": line(), "checkpoint": folder / "refused"}
    return [
        d.refusal(lambda: trained(**again)),
        refusal_of_another(again),
        d.refusal(lambda: trained(mesh=jax.make_mesh((jax.device_count(),), ("seed",)))),
        d.refusal(lambda: trained(data=kd.stream(d.DATA, batch_size=10), mesh=line())),
        d.refusal(
            lambda: kd.fit(
                0, d.DATA, d.STUDENT, mesh=line(), method=kd.CrossEntropy(), optimizer=d.SGD, epochs=1, batch_size=8
            )
        ),
    ]


def refusal_of_another(again: dict[str, Any]) -> str:
    from kd_jax.errors import MismatchError

    try:
        trained(**again, resume=True, epochs=9)
    except MismatchError as error:
        return str(error)
    return "nothing was raised"


FUNCTIONS: dict[str, Callable[[Path], Any]] = {
    one.__name__: one for one in (memory, parts, told, killed, resumed, refused)
}


def main(count: int, number: int, port: str, folder: Path, names: list[str]) -> None:
    begin(count, number, port)
    print(json.dumps({name: FUNCTIONS[name](folder) for name in names}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
