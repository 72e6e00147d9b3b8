"""Trainings by several processes, for tests/train/test_processes.py; each prints what it found as JSON.

`python tests/processes.py COUNT NUMBER PORT FOLDER NAME…`: of COUNT processes with 2 devices each, or one with 4.
"""

import functools
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
import numpy as np
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
    return jax.make_mesh((jax.device_count(),), ("data",))


def both() -> Any:
    """All devices along `data` and `model`."""
    return jax.make_mesh((jax.device_count() // 2, 2), ("data", "model"))


def apart(one: Any, other: Any) -> float:
    """The largest difference of two trees."""
    from kd_jax.train.processes import on_host

    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(np.subtract(on_host(a), on_host(b), dtype=np.float64)))) for a, b in pairs)


def trained(**more: Any) -> Any:
    """With dropout, batch statistics, random views, weights, a teacher, and a loss that couples a batch."""
    import devices as d

    import kd_jax as kd

    how = {**d.HOW, **more}
    data = how.pop("data", d.DATA)
    if data is d.DATA:
        how["batch_size"] = 8
    return kd.distill(d.STUDENT, d.TEACHER, data, **how)


def data() -> Any:
    """Sixteen examples for `short`."""
    import small

    import kd_jax as kd

    return kd.Batch(small.X[:16].astype(np.float64), small.Y[:16])


def forward(params: Any, x: Any) -> Any:
    return jax.numpy.tanh(x @ params["first"]["kernel"]) @ params["head"]["kernel"]


@functools.cache
def sgd() -> Any:
    import optax

    return optax.sgd(0.1, momentum=0.9)


def short(**more: Any) -> Any:
    """A training that compiles fast: of two layers in float64, by default three epochs of four steps over `data`."""
    import kd_jax as kd

    rng = np.random.default_rng(0)
    layers = {name: {"kernel": rng.normal(size=size)} for name, size in (("first", (6, 8)), ("head", (8, 4)))}
    how = {"optimizer": sgd(), "epochs": 3, "batch_size": 4, "mesh": line(), "data": data(), **more}
    if not isinstance(how["data"], kd.Batch):
        how.pop("batch_size")
    return kd.distill(kd.from_function(forward, layers), None, how.pop("data"), **how)


def said(function: Callable[[], Any]) -> str:
    """The sentence with which a training ends."""
    from kd_jax import errors

    kinds = (errors.CheckpointError, errors.ConfigError, errors.DataError, errors.MismatchError, errors.RunError)
    try:
        function()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def memory(folder: Path) -> dict[str, Any]:
    """Of data that every process has, with validation, the best epoch and callbacks."""
    import devices as d

    import kd_jax as kd

    how: dict[str, Any] = {"validation": d.DATA, "best": "nll"}
    seen: list[float] = []
    alone = trained(**how)
    result = trained(mesh=line(), callbacks=lambda epoch: seen.append(epoch.metrics["validation_nll"]), **how)
    nll = [kd.evaluate(student, d.DATA, teacher=d.TEACHER)["nll"] for student in (alone.student, result.student)]
    return {
        "state": apart(alone.state, result.state), "loss": apart(alone.history["loss"], result.history["loss"]),
        "evaluated": abs(nll[0] - nll[1]), "told": apart(list(alone.history["validation_nll"]), seen),
        "best": [alone.best_epoch, result.best_epoch],
    }  # fmt: skip


def parts(folder: Path) -> dict[str, Any]:
    """Each process gives its own part: of rows by `kd.stream`, and by an iterator of its own; pieces over `model`."""
    import devices as d

    import kd_jax as kd

    def data() -> Any:
        return kd.stream(d.DATA, batch_size=8, key=7)

    how: dict[str, Any] = {"key": 7, "mesh": both(), "sharding": d.RULES}
    alone, stream = trained(data=data(), key=7), trained(data=data(), **how)
    size = 8 // jax.process_count()
    own = slice(size * jax.process_index(), size * (jax.process_index() + 1))
    batches = [
        jax.tree.map(lambda leaf: leaf[own], batch) for batch in kd.batches(d.DATA, key=7, batch_size=8, epochs=2)
    ]
    iterator = trained(data=iter(batches), steps=8, **how)
    return {
        "stream": apart(alone.state, stream.state), "iterator": apart(alone.state, iterator.state),
        "loss": apart(alone.history["loss"], stream.history["loss"]),
    }  # fmt: skip


def kept(folder: Path, **more: Any) -> Any:
    """A training with a checkpoint after each of four epochs, pieces over `model`, and of moments over `data`."""
    import kd_jax as kd

    def rule(path: str, shape: tuple[int, ...]) -> Any:
        return jax.sharding.PartitionSpec(None, "model")

    divided = {"mesh": both(), "sharding": kd.Sharding(student=rule, zero=True)} if jax.process_count() > 1 else {}
    how: dict[str, Any] = {"mesh": None, "epochs": 4, "key": 7, "checkpoint": folder, **divided, **more}
    return short(data=kd.stream(data(), batch_size=4, key=7), **how)


def killed(folder: Path) -> None:
    """Process 1 is killed when its pieces of the last checkpoint are written, and the others do not know it yet."""
    from orbax.checkpoint.experimental.v1._src.synchronization import multihost

    from kd_jax.train import loop, processes

    loop._PAUSE, processes._SILENT = 0.0, 15.0
    original, writes = multihost.sync_global_processes, []

    async def sync(key: str, **how: Any) -> None:
        writes.extend([key] if "commit_complete" in key else [])
        if len(writes) == 4 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        await original(key, **how)

    multihost.sync_global_processes = sync
    kept(folder / "kept")


def lost(folder: Path) -> None:
    """Process 1 is killed between two checkpoints, and process 0 waits for it in a step."""
    from kd_jax.train import processes

    processes._SILENT = 15.0

    def kill(epoch: Any) -> None:
        if epoch.number == 2 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    short(callbacks=kill)


def resumed(folder: Path) -> dict[str, Any]:
    """By one without a mesh, and then by more processes: as a training that was never stopped."""
    count, first = jax.process_count(), jax.process_index() == 0
    own, epochs = folder / f"by {count}", list[int]()
    if first:
        shutil.copytree(folder / "kept", own)
    if count > 1:
        multihost_utils.sync_global_devices("copied")
    else:
        whole = kept(folder / "whole")
        np.savez(folder / "whole.npz", *jax.tree.leaves(whole.state))
    result = kept(own, resume=True, callbacks=lambda epoch: epochs.append(epoch.number))
    known = np.load(folder / "whole.npz")
    return {"apart": apart([known[name] for name in known.files], jax.tree.leaves(result.state)), "epochs": epochs}


def refused(folder: Path) -> list[str]:
    """In all processes, in the same words."""
    import small

    import kd_jax as kd

    short(checkpoint=folder / "refused")
    how: dict[str, Any] = {"optimizer": small.SGD, "epochs": 1, "batch_size": 4, "mesh": line()}
    methods = {"alone": kd.CrossEntropy()}
    return [
        said(lambda: short(checkpoint=folder / "refused")),
        said(lambda: short(checkpoint=folder / "refused", resume=True, epochs=9)),
        said(lambda: short(mesh=jax.make_mesh((jax.device_count(),), ("seed",)))),
        said(lambda: short(data=kd.stream(data(), batch_size=10))),
        said(lambda: kd.fit(0, data(), small.net(6, 4), method=kd.CrossEntropy(), **how)),
        said(lambda: kd.compare(small.net(6, 4), None, data(), data(), methods=methods, **how)),
    ]


def unlike(folder: Path) -> list[str]:
    """Process 1 is given something else."""
    import optax

    other, same = jax.process_index() == 1, data()
    return [
        said(lambda: short(epochs=3 - other)),
        said(lambda: short(data=same._replace(inputs=same.inputs + other))),
        said(lambda: short(optimizer=optax.sgd(0.2 if other else 0.1))),
        said(lambda: short(checkpoint=None if other else folder / "unlike")),
        said(lambda: short(batch_size=6 if other else 4)),
        said(lambda: short(data=len if other else same)),
    ]


def uneven(folder: Path) -> list[str]:
    """Process 1 has fewer batches, smaller ones, and a disk that fails."""
    import kd_jax as kd

    other = jax.process_index() == 1
    batches = list(kd.batches(data(), key=0, batch_size=2, epochs=1))
    narrow = jax.tree.map(lambda leaf: leaf[:1], batches[2])

    def failing() -> Any:
        yield from batches[:2]
        if other:
            raise OSError("the disk is gone")
        yield from batches[2:]

    def own(function: Callable[[], Any]) -> str:
        try:
            return said(function)
        except OSError as error:
            return f"own: {error}"

    return [
        own(lambda: short(data=batches[: 3 if other else 4])),
        own(lambda: short(data=iter(batches[: 5 if other else 6]), steps=6, epochs=1)),
        own(lambda: short(data=[*batches[:2], narrow if other else batches[2]])),
        own(lambda: short(data=failing(), steps=4, epochs=1)),
    ]


def full(folder: Path) -> dict[str, Any]:
    """Process 1 can write no more: before Orbax begins, and while it writes. What was there stays; it goes on."""
    import resource

    from kd_jax.train import checkpoint_files, loop

    loop._PAUSE = 0.0
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before, whole, found = resource.getrlimit(resource.RLIMIT_FSIZE), short(), {}
    room = checkpoint_files.require_room

    for name, size in (("before", 100_000), ("amid", 100)):

        def limit(epoch: Any, size: int = size, name: str = name) -> None:
            if epoch.number == 2 and jax.process_index() == 1:
                # The write of the first goes on beside.
                while not (folder / name / "checkpoints" / "training" / "000000004").is_dir():
                    time.sleep(0.05)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

        if name == "amid":
            checkpoint_files.require_room = lambda path, size: None
        sentence = said(lambda limit=limit, name=name: short(checkpoint=folder / name, callbacks=limit))
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        checkpoint_files.require_room = room
        multihost_utils.sync_global_devices(name)
        kept = sorted(path.name for path in (folder / name / "checkpoints" / "training").iterdir())
        multihost_utils.sync_global_devices(name)
        resumed = short(checkpoint=folder / name, resume=True)
        found[name] = [sentence, kept, apart(whole.state, resumed.state)]
    return found


def damaged(folder: Path) -> dict[str, Any]:
    """A file of process 1 is damaged; then process 1 alone cannot read one; then none is good."""
    import warnings

    from kd_jax.errors import DamageError
    from kd_jax.train import checkpoint_files, loop

    loop._PAUSE = 0.0
    place = folder / "damaged" / "checkpoints" / "training"
    whole, found = short(checkpoint=folder / "damaged"), {}

    def damage(step: str) -> None:
        if jax.process_index() == 0:
            files = sorted((place / step / "state" / "ocdbt.process_1").rglob("d/*"))
            content = files[0].read_bytes()
            files[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        multihost_utils.sync_global_devices("damaged")

    def again(name: str) -> None:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            epochs: list[int] = []
            result = short(
                checkpoint=folder / "damaged", resume=True, callbacks=lambda epoch: epochs.append(epoch.number)
            )
        found[name] = [apart(whole.state, result.state), epochs, [str(one.message) for one in seen]]

    damage("000000012")
    again("a file")
    check = checkpoint_files.check

    def unreadable(path: Path) -> None:
        if path.name == "000000012" and jax.process_index() == 1:
            raise DamageError("its disk is gone")
        check(path)

    checkpoint_files.check = unreadable
    again("read by one")
    checkpoint_files.check = check
    for step in ("000000008", "000000012"):
        damage(step)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentence = said(lambda: short(checkpoint=folder / "damaged", resume=True))
    same = before == {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    found["none"] = [sentence, same]
    return found


FUNCTIONS: dict[str, Callable[[Path], Any]] = {
    one.__name__: one for one in (memory, parts, refused, unlike, uneven, full, damaged, killed, lost, resumed)
}


def main(count: int, number: int, port: str, folder: Path, names: list[str]) -> None:
    begin(count, number, port)
    print(json.dumps({name: FUNCTIONS[name](folder) for name in names}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
