"""What a training keeps in its folder, so that it can go on after it was stopped: to the same bytes."""

import base64
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax.convolution import onednn
from kd_jax.data.batch import Batch, as_batch, is_in_memory
from kd_jax.data.stream import Batches
from kd_jax.errors import CheckpointError, ConfigError, MismatchError
from kd_jax.files import digests
from kd_jax.files.digests import calls_back, is_digest, program_text, text_digest
from kd_jax.methods import Method
from kd_jax.teacher import Teacher
from kd_jax.train.checkpoint import Store, lock
from kd_jax.train.checkpoint_files import named_arrays, restore_tree
from kd_jax.train.checkpoint_shared import SharedStore
from kd_jax.train.checks import first_batch
from kd_jax.train.exchange import flat
from kd_jax.train.processes import by_first, is_shared, on_host
from kd_jax.train.sources import Position
from kd_jax.train.step import TrainState

PyTree = Any

_NAME = "training"
_MODEL, _BATCHES, _FIRST = "model of the teacher", "list of batches", "first batch"
_UNKNOWN = "functions of Python that the teacher calls"
# What earlier versions did not keep.
_LATER = (
    _MODEL, _BATCHES, _FIRST, "settings.development", "settings.batches of validation",
    "settings.more of the best is better",
)  # fmt: skip


class Progress(NamedTuple):
    """How far a training is.

    state: after the last step. epoch: that is trained, from 0. start: steps of it that are done. partial: the metrics
    of these, `[steps]` each, and `examples`. history: of the epochs before, by name. best: variables, their value and
    epoch. position: of the iterator.
    """

    state: TrainState
    epoch: int = 0
    start: int = 0
    partial: dict[str, np.ndarray] = {}  # noqa: RUF012
    history: dict[str, list[float]] = {}  # noqa: RUF012
    best: PyTree = None
    best_value: float | None = None
    best_epoch: int = -1
    position: Position | None = None
    stopped: bool = False


class Folder:
    """The folder of one training."""

    def __init__(self, store: Store) -> None:
        self.store = store
        # The step of the last checkpoint that was written or read here; 0 for none.
        self.last = 0

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint while the training goes on. Raises `CheckpointError`."""
        arrays = {f"state.{name}": leaf for name, leaf in named_arrays(progress.state).items()}
        arrays |= {f"partial.{name}": values for name, values in progress.partial.items()}
        arrays |= {f"history.{name}": np.asarray(values) for name, values in progress.history.items() if values}
        if progress.best is not None:
            arrays |= {f"best.{name}": leaf for name, leaf in named_arrays(progress.best).items()}
        facts = {
            "epoch": progress.epoch, "start": progress.start, "best_value": progress.best_value,
            "best_epoch": progress.best_epoch, "position": _as_json(progress.position), "stopped": progress.stopped,
            "measures": list(progress.history),
        }  # fmt: skip
        self.last = int(progress.state.step)
        self.store.save(_NAME, self.last, arrays, facts)

    def newest(self, like: TrainState) -> Progress | None:
        """The newest good checkpoint; None where none was written. Raises `CheckpointError`, `MismatchError`."""
        found = self.store.newest(_NAME)
        if found is None:
            return None

        def part(name: str) -> dict[str, Any]:
            start = f"{name}."
            return {key.removeprefix(start): leaf for key, leaf in found.arrays.items() if key.startswith(start)}

        self.last = found.step
        facts, best, history = found.facts, part("best"), part("history")
        # In their order, which arrays do not keep.
        names = [name for name in facts.get("measures", history) if name in history]
        return Progress(
            state=restore_tree(part("state"), like),
            epoch=int(facts["epoch"]),
            start=int(facts["start"]),
            partial=part("partial"),
            history={name: history[name].tolist() for name in names},
            best=restore_tree(best, like.variables) if best else None,
            best_value=facts["best_value"],
            best_epoch=int(facts["best_epoch"]),
            position=_from_json(facts["position"]),
            stopped=bool(facts["stopped"]),
        )


@contextlib.contextmanager
def opened(
    folder: Any, identity: dict[str, Any], *, resume: bool, warn: Any, argument: str = "checkpoint", mesh: Any = None,
    others: tuple[str, ...] = (),
) -> Iterator[Folder | None]:  # fmt: skip
    """The folder for this process alone; None where no folder is asked for. others: folders in it that are used, too.

    Raises `MismatchError` where it has another training, `ConfigError` where it has one and `resume` is not asked for,
    and `CheckpointError` where something else lies where checkpoints go.
    """
    if folder is None:
        if resume:
            raise ConfigError(f"resume is asked for without a folder: give {argument}=DIR, too")
        yield None
        return
    try:
        path = Path(folder).expanduser()
    except TypeError:
        raise ConfigError(f"the folder of checkpoints is {folder!r}: give a path") from None
    shared = is_shared(mesh)
    store = (SharedStore if shared else Store)(path, warn=warn)
    if jax.process_count() > 1 and not shared:
        raise ConfigError(
            f"{argument}= is given to a training of one of {jax.process_count()} processes, and Orbax waits for all of "
            "them: train in a process without jax.distributed, or on a mesh of jax.devices()"
        )
    with contextlib.ExitStack() as held:

        def begin() -> str:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be made ({error.strerror}): choose another folder") from None
            held.enter_context(lock(path))
            held.callback(store.close)
            if store.started and not resume:
                raise ConfigError(
                    f"{path} already holds a training: go on with resume=True, or choose another folder for {argument}="
                )
            try:
                store.require_description(*others)
            except CheckpointError as error:
                raise CheckpointError(error.problem, f"restore it, or choose another folder for {argument}=") from None
            if store.started:
                _require_same(store, identity, warn)
            else:
                store.start(identity)
            return ""

        by_first(begin, shared)
        yield Folder(store)
        store.wait()


def identity(
    settings: dict[str, Any], data: Any, start: PyTree, teacher: Teacher | None, prepare: Any = None,
    first_given: Batch | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What makes a training the same training. data: a `Batch` in memory and a list of batches, by their bytes;
    `kd.stream`, by some of them; an iterator, by its type and the first batch that it gave.
    """
    taught = None if teacher is None else digest(teacher)
    model = None if teacher is None else teacher.host
    if teacher is not None and isinstance(data, Batch):
        # Its answers may be computed before the first step.
        first, rows = first_batch(data, teacher, 1)

        def answers(teacher: Teacher, inputs: PyTree) -> Any:
            inputs = inputs if prepare is None else prepare(jax.random.key(0), inputs, False)
            return [output.logits for output in teacher.outputs(inputs)]

        program = program_text(answers, rows, first.inputs)
        taught = text_digest(str(taught), text_digest(program))
        model = _UNKNOWN if model is None and calls_back(program) else model
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {
        "settings": settings, "data": identity_of_data(data), _BATCHES: digest_of_batches(data),
        _FIRST: None if first_given is None or isinstance(data, list | Batch | Batches) else digest(first_given),
        "start": None if start is None else digest(start), "teacher": taught, _MODEL: model, "versions": versions,
        "backend": jax.default_backend(), "convolutions": onednn.described(),
    }  # fmt: skip


def identity_of_data(data: Any) -> Any:
    """What makes data the same, as JSON holds it: see `identity`."""
    if isinstance(data, Batches):
        return data.identity()
    return digest(data) if isinstance(data, Batch) else f"{type(data).__module__}.{type(data).__qualname__}"


def description(value: Any) -> str:
    """A method as text that another process writes alike: functions by name, arrays by their bytes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f"{field.name}={description(getattr(value, field.name))}" for field in dataclasses.fields(value)]
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(description, value))})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return repr(np.asarray(value).item()) if np.ndim(value) == 0 else digest(value)
    if isinstance(value, Method):
        fields = [f"{name}={description(one)}" for name, one in vars(value).items()]
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    if " at 0x" not in repr(value):
        return repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(description, value))}]"
    known = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    inner = [f"{name}={description(one)}" for name, one in known.items()]
    return f"{type(value).__qualname__}({', '.join(inner)})"


def optimizer_digest(optimizer: optax.GradientTransformation, trained: PyTree) -> str:
    """SHA-256 of what the optimiser computes for such parameters, its numbers included."""
    trained = jax.eval_shape(lambda given: given, trained)
    update = optax.with_extra_args_support(optimizer).update
    programs = (
        jax.jit(optimizer.init).lower(trained),
        jax.jit(lambda *given: update(*given, value=jnp.zeros(()))).lower(
            trained, jax.eval_shape(optimizer.init, trained), trained
        ),
    )
    return hashlib.sha256("".join(program.as_text() for program in programs).encode()).hexdigest()


def _require_same(store: Store, asked: dict[str, Any], warn: Any) -> None:
    saved, wanted = flat(store.identity()), flat(json.loads(json.dumps(asked)))
    for name in dict.fromkeys((*wanted, *saved)):
        if saved.get(name) == wanted.get(name) or (name == _FIRST and saved.get(name) is None):
            if wanted.get(name) == _UNKNOWN:
                warn(f"nothing is known of {_UNKNOWN}: whether they are those of {store.folder} cannot be told")
            continue
        if name == _FIRST:
            warn(
                f"the first batch is another than that of the training in {store.folder}: it goes on with other data, "
                "or the iterable has another order each time"
            )
            continue
        if name in _LATER and name not in saved:
            warn(
                f"the training in {store.folder} was begun by a kd_jax that did not keep its {name.split('.')[-1]}: "
                "whether it is the same cannot be told"
            )
            continue
        if is_digest(saved.get(name)) and is_digest(wanted.get(name)):
            place = f"the training in {store.folder} has another {name}"
            raise MismatchError(f"{place}: go on with what it was started with, or choose another folder")
        raise MismatchError(
            f"{name} is {wanted.get(name)}, and the training in {store.folder} has {saved.get(name)}: go on with "
            "what it was started with, or choose another folder"
        )


def digest_of_batches(data: Any) -> str | None:
    """Of a list of batches; None of anything else."""
    return digest([as_batch(part) for part in data]) if isinstance(data, list) and not is_in_memory(data) else None


def digest(tree: PyTree) -> str:
    """SHA-256 of every array of a tree with its path, shape and type; all processes take part."""
    return digests.digest(jax.tree.map(on_host, tree))


def _as_json(position: Position | None) -> Any:
    """An iterator's position as JSON holds it: its state is bytes, or what JSON knows."""
    if position is None:
        return None
    state = position.state
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode(), "drawn": position.drawn}
    try:
        return {"value": json.loads(json.dumps(state)), "drawn": position.drawn}
    except (TypeError, ValueError):
        return {"drawn": position.drawn}


def _from_json(known: Any) -> Position | None:
    if known is None:
        return None
    state = base64.b64decode(known["bytes"]) if "bytes" in known else known.get("value")
    return Position(state, int(known["drawn"]))
