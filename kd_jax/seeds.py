"""One method with several seeds: side by side where that pays, on several devices, or in turn; kept in a folder."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from kd_jax.data.batch import Batch, as_key
from kd_jax.errors import CheckpointError, DataError, NotFiniteError
from kd_jax.methods import CrossEntropy, LabelSmoothing, Method, is_fused, is_on_policy
from kd_jax.models import Model, count_parameters, parameters, programs
from kd_jax.teacher import Teacher
from kd_jax.train.caching import kept_teacher
from kd_jax.train.faults import check_teacher
from kd_jax.train.fit import fit_in_order
from kd_jax.train.measures import UNLABELLED, accuracy, are_classes, unlabelled
from kd_jax.train.sharding import SEED, Sharding, replicated
from kd_jax.train.sizes import SMALL
from kd_jax.train.step import Prepare, is_finite

PyTree = Any


class Setup(NamedTuple):
    """How all students of a comparison are trained and measured."""

    model: Model
    optimizer: optax.GradientTransformation
    epochs: int
    batch_size: int
    prepare: Prepare | None
    measures: Mapping[str, Callable[..., Any]] | None
    measure: str
    higher: bool
    mesh: Mesh | None = None
    sharding: Sharding | None = None
    outputs: int = 0

    @property
    def devices(self) -> int:
        """How many devices have a seed each; 1 where a training has them all."""
        return 1 if self.mesh is None else dict(self.mesh.shape).get(SEED, 1)

    @property
    def mesh_of_one(self) -> Mesh | None:
        """The mesh that one training has for itself."""
        return None if self.mesh is None or SEED in self.mesh.axis_names else self.mesh


class Trained(NamedTuple):
    """One training. history: `[epochs]` by metric. finite: whether its losses and what it trained are."""

    variables: PyTree
    history: dict[str, Float[np.ndarray, " epochs"]]
    seconds: float
    finite: bool = True


class KeptTrainings:
    """Trainings that are done, in a folder: their values, and what is known of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, model: Model) -> Trained | None:
        """A training that is done; None where it is not, or is damaged."""
        name = _as_file(name)
        facts = self.folder / f"{name}.json"
        if not facts.exists():
            return None
        try:
            known = json.loads(facts.read_text(encoding="utf-8"))
            restored = parameters.restore(model, self.folder / f"{name}.safetensors")
        except (OSError, ValueError, DataError):
            # It is trained again.
            return None
        types = known.get("types", {})
        history = {
            metric: np.asarray(values, types.get(metric, "float32")) for metric, values in known["history"].items()
        }
        return Trained(restored.variables, history, known["seconds"], known.get("finite", True))

    def write(self, name: str, trained: Trained, model: Model) -> None:
        """Keeps a training. Raises `CheckpointError`."""
        name = _as_file(name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            parameters.save(Model(model.network, trained.variables), self.folder / f"{name}.safetensors")
            history = {metric: values.tolist() for metric, values in trained.history.items()}
            types = {metric: str(values.dtype) for metric, values in trained.history.items()}
            facts = {"history": history, "types": types, "seconds": trained.seconds, "finite": trained.finite}
            self._write(name, facts)
        except OSError as error:
            raise self._cannot(error) from None

    def keep_choice(self, name: str, chosen: str, seeds: tuple[int, ...]) -> None:
        """Notes what was chosen, and removes what was trained by another choice. Raises `CheckpointError`."""
        place = _as_file(f"{name}-chosen")
        try:
            file = self.folder / f"{place}.json"
            before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if before.get("method") == chosen:
                return
            for seed in seeds:
                (self.folder / f"{_as_file(f'{name}-seed{seed}')}.json").unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(place, {"method": chosen})
        except ValueError:
            raise CheckpointError(f"{file} is damaged: remove it, and go on with resume=True") from None
        except OSError as error:
            raise self._cannot(error) from None

    def _write(self, name: str, facts: dict[str, Any]) -> None:
        beside = self.folder / f".{name}.json"
        beside.write_text(json.dumps(facts), encoding="utf-8")
        beside.replace(self.folder / f"{name}.json")

    def _cannot(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.folder} cannot be written ({error.strerror or error}): make room, and go on with resume=True"
        )


def _as_file(name: str) -> str:
    """A name that no slash makes a folder of."""
    return quote(name, safe=" ,=+()")


def train_seeds(
    methods: Mapping[str, Method], how: Setup, teacher: Teacher | None, data: Batch, seeds: tuple[int, ...], role: int,
    kept: KeptTrainings | None, done: Callable[[str, int], None], *, diverging: bool = False,
) -> dict[str, list[Trained]]:  # fmt: skip
    """Every method with every seed: a seed on each device of a mesh; else small dense networks side by side, others in
    turn.

    diverging: whether a training that is not finite is handed back as it is. Else raises `NotFiniteError`.
    """
    shapes = jax.eval_shape(how.model.network.init, jax.random.key(0))
    params = how.model.network.split(shapes)[0]
    dense = all(leaf.ndim <= 2 for leaf in jax.tree.leaves(params))
    side_by_side = dense and (count_parameters(params) < SMALL or jax.default_backend() != "cpu")
    if how.mesh is not None:
        data = replicated(how.mesh, data)
        if how.mesh_of_one is None:
            teacher = replicated(how.mesh, teacher)
    found: dict[str, list[Trained]] = {}
    kept_teachers: dict[tuple[bool, bool], Teacher | None] = {}
    for name, method in methods.items():
        taught = None
        # A loss function takes a teacher that it does not need.
        if not isinstance(method, CrossEntropy | LabelSmoothing):
            asked = (bool(method.teacher_features), is_on_policy(method))
            if asked not in kept_teachers:
                # Each training is one program, which no file is read in.
                held = teacher and teacher.in_memory()
                found_teacher = kept_teacher(
                    held, method, data, how.prepare, how.epochs, how.batch_size, how.mesh_of_one
                )
                if how.mesh is not None and how.mesh_of_one is None:
                    found_teacher = replicated(how.mesh, found_teacher)
                kept_teachers[asked] = found_teacher
            taught = kept_teachers[asked]
        known = {s: None if kept is None else kept.read(f"{name}-seed{s}", how.model) for s in seeds}
        missing = [seed for seed, one in known.items() if one is None]
        done(name, len(seeds) - len(missing))
        count = len(missing) if side_by_side and how.mesh is None else how.devices
        for group in [missing[first : first + count] for first in range(0, len(missing), count)] if missing else []:
            for seed, one in zip(group, _fit(method, how, taught, data, group, role, diverging), strict=True):
                known[seed] = one
                if kept is not None:
                    kept.write(f"{name}-seed{seed}", one, how.model)
            done(name, len(group))
        found[name] = [one for one in known.values() if one is not None]
    return found


def _fit(
    method: Method, how: Setup, teacher: Teacher | None, data: Batch, seeds: list[int], role: int, diverging: bool
) -> list[Trained]:
    if not seeds:
        return []
    missing = np.asarray(data.labels) < 0 if are_classes(data, how.outputs) else np.bool_(True)
    # Labels of the student's own sequences say nothing of how good it is.
    measures = {} if missing.all() or is_on_policy(method) or is_fused(method) else {"accuracy": accuracy}
    if measures and missing.any():
        measures[UNLABELLED] = unlabelled

    def one(key: Any, data: Batch, teacher: Teacher | None, method: Method) -> Any:
        state, history = fit_in_order(
            key, data, how.model, method=method, optimizer=how.optimizer, epochs=how.epochs,
            batch_size=how.batch_size, teacher=teacher, prepare=how.prepare, measures=measures, mesh=how.mesh_of_one,
            sharding=how.sharding, diverging=True,
        )  # fmt: skip
        return state.variables, history, is_finite(state, how.model.network)

    keys = [jax.random.fold_in(as_key(seed), role) for seed in seeds]
    started = time.perf_counter()
    if how.mesh is not None and how.mesh_of_one is None:
        # Those that are too many for the seeds train the last one again.
        padded = jnp.stack([*keys, *keys[-1:] * (how.devices - len(keys))])
        along = jax.device_put(padded, NamedSharding(how.mesh, PartitionSpec(SEED)))
        same = ("seeds", how.mesh, how.model.network, how.optimizer, how.epochs, how.batch_size, how.prepare)
        stacked = programs.call(
            _one_on_each_device(one, how.mesh), along, data, teacher, replicated(how.mesh, method),
            same=(*same, tuple(measures)),
        )  # fmt: skip
        on_host = jax.tree.map(np.asarray, stacked)
        results = [jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), on_host) for i in range(len(seeds))]
    elif len(seeds) == 1:
        results = [one(keys[0], data, teacher, method)]
    else:
        many = jax.vmap(one, in_axes=(0, None, None, None))
        stacked = programs.call(many, jnp.stack(keys), data, teacher, method)
        results = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(seeds))]
    results = jax.block_until_ready(results)
    seconds = (time.perf_counter() - started) / len(seeds)
    trained = []
    for seed, (variables, history, sound) in zip(seeds, results, strict=True):
        known = {name: np.asarray(values) for name, values in history.items()}
        bad = ~np.isfinite(known["loss"])
        if bad.any() and not diverging:
            check_teacher(method, data, teacher, how.prepare)
            raise NotFiniteError(
                f"the loss of {type(method).__name__} with seed {seed} is not finite in epoch {int(bad.argmax()) + 1}: "
                "choose a smaller learning rate"
            )
        if not (sound or diverging):
            raise NotFiniteError(
                f"a parameter of {type(method).__name__} with seed {seed} is not finite after the last step: choose a "
                "smaller learning rate"
            )
        trained.append(Trained(variables, known, seconds, bool(sound) and not bad.any()))
    return trained


def _one_on_each_device(one: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A training on each device, by its own key: the program of one, whatever their number, so that bits are the same.

    A `vmap` would group the convolutions of all seeds, which the partitioner gathers (openxla/xla#47945).
    """

    def own(keys: Any, *rest: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[None], one(keys[0], *rest))

    along, every = PartitionSpec(SEED), PartitionSpec()
    return jax.shard_map(own, mesh=mesh, in_specs=(along, every, every, every), out_specs=along, check_vma=False)
