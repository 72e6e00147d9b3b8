"""`compare`: methods over the same seeds, on anybody's models, with paired intervals."""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from kd_jax.comparison import Table
from kd_jax.data.batch import Batch, as_batch, check_counts, take
from kd_jax.errors import CheckpointError, ConfigError, DataError, NotFiniteError
from kd_jax.evaluate import HIGHER_IS_BETTER, evaluate
from kd_jax.methods import Method, as_method
from kd_jax.models import Model, as_model, count_parameters, parameters
from kd_jax.teacher import Teacher, as_teacher
from kd_jax.train import programs
from kd_jax.train.caching import kept_teacher
from kd_jax.train.callbacks import is_higher_better
from kd_jax.train.fit import fit
from kd_jax.train.measures import accuracy
from kd_jax.train.progress import is_watched
from kd_jax.train.resume import description, identity, opened
from kd_jax.train.sizes import SMALL
from kd_jax.train.step import Prepare

PyTree = Any

# A key of seeds for the choice among a grid, and of the students: other ones for each.
_STUDENT, _CHOICE = 1, 2


class Grid(NamedTuple):
    """Methods of one class, one for each combination of some numbers."""

    methods: tuple[Method, ...]
    labels: tuple[str, ...]


def grid(method: type[Method], **values: Any) -> Grid:
    """A method for each combination of the values, given as lists: `kd.grid(kd.KD, temperature=[1, 2, 4])`.

    What is no list is the same in all. `compare` chooses the best on a development split. Raises `ConfigError`.
    """
    names = list(values)
    lists = [list(value) if isinstance(value, list | tuple | np.ndarray) else [value] for value in values.values()]
    if not all(lists):
        raise ConfigError(
            f"{names[[bool(own) for own in lists].index(False)]} is an empty list: give at least one value"
        )
    several = [name for name, own in zip(names, lists, strict=True) if len(own) > 1]
    found, labels = [], []
    for chosen in itertools.product(*lists):
        given = dict(zip(names, chosen, strict=True))
        try:
            found.append(method(**given))
        except TypeError as error:
            raise ConfigError(f"{method.__name__} cannot be made of {given} ({error}): use its own numbers") from None
        labels.append(", ".join(f"{name} {given[name]:g}" for name in several))
    return Grid(tuple(found), tuple(labels))


def compare(
    student: Any,
    teacher: Any,
    train: Any,
    test: Any,
    *,
    methods: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    seeds: int | Sequence[int] = 5,
    measure: str = "accuracy",
    higher: bool | None = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    prepare: Prepare | None = None,
    development: Any = None,
    folder: Any = None,
    resume: bool = False,
    progress: bool | None = None,
) -> Table:
    """Trains a student by each of `methods` with each of the seeds, and compares them on the test data, read once.

    student: a class or function of `rngs`, or a `Model` without values: it starts anew for each seed. Students of one
        seed start from the same parameters and see the same batches, whatever the method, so that they are pairs.
    train, test: `Batch`es. methods: by name, a `Method`, or a `kd.grid`; the first is what others are compared with.
    seeds: how many, from 0, or which. measure: what is compared, of those of `kd.evaluate` or of `measures`; higher:
        whether more of it is better, where kd_jax does not know.
    development: data on which a grid's best is chosen; the last sixth of `train`, at most 10,000, where it is None.
        What is chosen is trained anew, by all of `train`, with other random numbers.
    folder, resume: every training that is done is kept there; a comparison that was killed goes on to the same result.

    Intervals are corrected for the number of methods that are compared (Bonferroni). Raises as `kd.distill` does.
    """
    data, tested = as_batch(train), as_batch(test)
    model, known = as_model(student), as_teacher(teacher)
    if len(methods) < 1:
        raise ConfigError("methods is empty: give at least one, by its name")
    if model.variables is not None:
        raise ConfigError(
            "the student has its values already, and every seed starts anew: give a class, or a function rngs -> module"
        )
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(seed) for seed in seeds)
    if not numbers:
        raise ConfigError(f"seeds is {seeds}: at least one is needed")
    better = is_higher_better(measure, higher)
    if measure not in HIGHER_IS_BETTER and measure not in (measures or {}):
        raise ConfigError(
            f"there is no measure {measure}: use one of {', '.join([*HIGHER_IS_BETTER, *(measures or {})])}"
        )
    entries = {name: one if isinstance(one, Grid) else as_method(one) for name, one in methods.items()}
    how = _How(model, optimizer, int(epochs), int(batch_size), prepare, measures, measure, better)
    settings = {
        "methods": {name: description(one) for name, one in entries.items()}, "epochs": epochs, "batch_size": batch_size,
        "seeds": list(numbers), "measure": measure,
    }  # fmt: skip
    own = identity(settings, data, None, known) if folder is not None else {}
    with opened(folder, own, resume=resume, warn=lambda sentence: None) as opened_folder:
        kept = None if opened_folder is None else _Kept(opened_folder.store.folder / "trainings")
        bar = _Bar(_count(entries, numbers), is_watched() if progress is None else progress)
        try:
            chosen = {
                name: _chosen(one, how, known, data, development, numbers, kept, bar, name)
                for name, one in entries.items() if isinstance(one, Grid)
            }  # fmt: skip
            final = {name: one.methods[chosen[name]] if isinstance(one, Grid) else one for name, one in entries.items()}
            results = _trained(final, how, known, data, numbers, _STUDENT, kept, bar)
            measured = _measured(results, how, known, tested)
        finally:
            bar.close()
        if opened_folder is not None:
            opened_folder.store.finish()
    labels = {name: entries[name].labels[place] for name, place in chosen.items()}  # type: ignore[union-attr]
    table = Table(
        measure, better, numbers, measured,
        {name: _stacked([one.history for one in ones]) for name, ones in results.items()},
        {name: label for name, label in labels.items() if label},
        count_parameters(model.network.split(results[next(iter(results))][0].variables)[0]),
        {name: sum(one.seconds for one in ones) for name, ones in results.items()},
        {} if known is None or known.per_example else _of_teacher(known, tested, how),
        max(1, len(entries) - 1),
    )  # fmt: skip
    if measure not in next(iter(measured.values())):
        names = ", ".join(next(iter(measured.values())))
        raise ConfigError(f"there is no measure {measure}: use one of {names}")
    return table


class _How(NamedTuple):
    model: Model
    optimizer: optax.GradientTransformation
    epochs: int
    batch_size: int
    prepare: Prepare | None
    measures: Mapping[str, Callable[..., Any]] | None
    measure: str
    higher: bool


class _Trained(NamedTuple):
    """One training. history: `[epochs]` by metric."""

    variables: PyTree
    history: dict[str, Float[np.ndarray, " epochs"]]
    seconds: float


class _Kept:
    """Trainings that are done, in a folder: their values, and what is known of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, model: Model) -> _Trained | None:
        facts = self.folder / f"{name}.json"
        if not facts.exists():
            return None
        try:
            known = json.loads(facts.read_text(encoding="utf-8"))
            restored = parameters.restore(model, self.folder / f"{name}.safetensors")
        except (OSError, ValueError, DataError):
            # It is trained again.
            return None
        history = {metric: np.asarray(values, np.float32) for metric, values in known["history"].items()}
        return _Trained(restored.variables, history, known["seconds"])

    def write(self, name: str, trained: _Trained, model: Model) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            parameters.save(Model(model.network, trained.variables), self.folder / f"{name}.safetensors")
            history = {metric: values.tolist() for metric, values in trained.history.items()}
            beside = self.folder / f".{name}.json"
            beside.write_text(json.dumps({"history": history, "seconds": trained.seconds}), encoding="utf-8")
            beside.replace(self.folder / f"{name}.json")
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be written ({error.strerror or error}): make room, and go on with resume=True"
            ) from None


class _Bar:
    """A bar over all trainings."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar: Any = None
        if shown:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, unit="training")

    def done(self, name: str, count: int) -> None:
        if self.bar is not None:
            self.bar.set_description_str(name, refresh=False)
            self.bar.update(count)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _count(entries: Mapping[str, Any], seeds: tuple[int, ...]) -> int:
    choices = sum(len(one.methods) for one in entries.values() if isinstance(one, Grid))
    return len(seeds) * (len(entries) + choices)


def _chosen(
    choice: Grid, how: _How, teacher: Teacher | None, data: Batch, development: Any, seeds: tuple[int, ...],
    kept: _Kept | None, bar: _Bar, name: str,
) -> int:  # fmt: skip
    """The place of the method with the best mean on the development split."""
    if len(choice.methods) == 1:
        bar.done(name, len(seeds))
        return 0
    seen, held = data, development
    if held is None:
        count = check_counts(data)
        size = min(10_000, count // 6)
        if size < 1:
            raise DataError(f"there are {count} examples: choosing by a part of them needs at least 6")
        rows = jnp.arange(count)
        seen, held = take(data, rows[:-size]), take(data, rows[-size:])
        if teacher is not None and teacher.per_example:
            teacher = teacher.take(rows[:-size])
    numbered = {f"{name}-choice{place}": method for place, method in enumerate(choice.methods)}
    results = _trained(numbered, how, teacher, seen, seeds, _CHOICE, kept, bar)
    measured = _measured(results, how, None, as_batch(held))
    means = [float(np.mean(values[how.measure])) for values in measured.values()]
    if all(np.isnan(means)):
        raise NotFiniteError(f"no training of the grid {name} has a finite {how.measure}: choose other values")
    signed = [mean if how.higher else -mean for mean in means]
    return int(np.nanargmax(signed))


def _trained(
    methods: Mapping[str, Method], how: _How, teacher: Teacher | None, data: Batch, seeds: tuple[int, ...], role: int,
    kept: _Kept | None, bar: _Bar,
) -> dict[str, list[_Trained]]:  # fmt: skip
    """Every method with every seed: small dense networks side by side, others in turn."""
    shapes = jax.eval_shape(how.model.network.init, jax.random.key(0))
    params = how.model.network.split(shapes)[0]
    dense = all(leaf.ndim <= 2 for leaf in jax.tree.leaves(params))
    side_by_side = dense and (count_parameters(params) < SMALL or jax.default_backend() != "cpu")
    found: dict[str, list[_Trained]] = {}
    for name, method in methods.items():
        taught = kept_teacher(teacher, method, data, how.prepare, how.epochs) if method.needs_teacher else None
        known = {s: None if kept is None else kept.read(f"{name}-seed{s}", how.model) for s in seeds}
        missing = [seed for seed, one in known.items() if one is None]
        together = side_by_side and len(missing) > 1
        for group in [missing] if together else [[seed] for seed in missing]:
            for seed, one in zip(group, _fit(method, how, taught, data, group, role), strict=True):
                known[seed] = one
                if kept is not None:
                    kept.write(f"{name}-seed{seed}", one, how.model)
        bar.done(name, len(seeds))
        found[name] = [one for one in known.values() if one is not None]
    return found


def _fit(
    method: Method, how: _How, teacher: Teacher | None, data: Batch, seeds: list[int], role: int
) -> list[_Trained]:
    if not seeds:
        return []
    whole = data.labels is not None and jnp.issubdtype(jnp.asarray(data.labels).dtype, jnp.integer)
    measures = {"accuracy": accuracy} if whole else {}

    def one(key: Any, data: Batch, teacher: Teacher | None, method: Method) -> Any:
        state, history = fit(
            key, data, how.model, method=method, optimizer=how.optimizer, epochs=how.epochs,
            batch_size=how.batch_size, teacher=teacher, prepare=how.prepare, measures=measures,
        )  # fmt: skip
        return state.variables, history

    keys = [jax.random.fold_in(jax.random.key(seed), role) for seed in seeds]
    started = time.perf_counter()
    if len(seeds) == 1:
        variables, history = one(keys[0], data, teacher, method)
        results = [(variables, history)]
    else:
        many = jax.vmap(one, in_axes=(0, None, None, None))
        stacked = programs.call(many, jnp.stack(keys), data, teacher, method)
        results = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(len(seeds))]
    results = jax.block_until_ready(results)
    seconds = (time.perf_counter() - started) / len(seeds)
    trained = []
    for seed, (variables, history) in zip(seeds, results, strict=True):
        known = {name: np.asarray(values) for name, values in history.items()}
        if not np.isfinite(known["loss"]).all():
            raise NotFiniteError(
                f"the loss of {type(method).__name__} with seed {seed} is not finite in epoch "
                f"{int(np.argmax(~np.isfinite(known['loss']))) + 1}: choose a smaller learning rate"
            )
        trained.append(_Trained(variables, known, seconds))
    return trained


def _measured(
    results: Mapping[str, list[_Trained]], how: _How, teacher: Teacher | None, data: Batch
) -> dict[str, dict[str, Float[np.ndarray, " seeds"]]]:
    from kd_jax.teacher import cached

    size = max(how.batch_size, 1000)
    asked: Any = None
    if teacher is not None and not teacher.per_example:
        asked = cached(teacher, data.inputs, batch_size=size, prepare=how.prepare)
    found = {}
    for name, ones in results.items():
        each = [
            evaluate(
                Model(how.model.network, one.variables), data, teacher=asked, measures=how.measures, batch_size=size,
                prepare=how.prepare,
            )
            for one in ones
        ]  # fmt: skip
        found[name] = {metric: np.asarray([values[metric] for values in each], np.float64) for metric in each[0]}
    return found


def _of_teacher(teacher: Teacher, data: Batch, how: _How) -> dict[str, float]:
    from kd_jax.evaluate import measured, teacher_logits

    logits = teacher_logits(teacher, data, batch_size=max(how.batch_size, 1000), prepare=how.prepare)
    return {name: float(value) for name, value in measured(np.asarray(logits, np.float32), data).items()}


def _stacked(histories: list[dict[str, Float[np.ndarray, " epochs"]]]) -> dict[str, Float[np.ndarray, "seeds epochs"]]:
    return {name: np.stack([history[name] for history in histories]) for name in histories[0]}
