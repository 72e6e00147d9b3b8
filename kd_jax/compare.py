"""`compare`: methods over the same seeds, on anybody's models, with paired intervals."""

import hashlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from kd_jax.comparison import Table
from kd_jax.data.batch import Batch, as_batch, check_whole
from kd_jax.data.order import called_as, check_order
from kd_jax.errors import ConfigError, NotFiniteError
from kd_jax.evaluate import HIGHER_IS_BETTER, evaluate, measured, teacher_logits
from kd_jax.files.digests import program_digest
from kd_jax.methods import Method, as_method
from kd_jax.methods.arguments import count_arguments
from kd_jax.methods.grid import Grid
from kd_jax.models import Model, as_model, count_parameters
from kd_jax.models.trying import warn_of_logits
from kd_jax.seeds import KeptTrainings, Setup, Trained, train_seeds
from kd_jax.teacher import LiveTeacher, SeveralTeachers, Teacher, as_teacher
from kd_jax.teachers.indices import in_order
from kd_jax.train.caching import answers_on, evaluation_batch_size
from kd_jax.train.callbacks import is_higher_better
from kd_jax.train.checks import check, first_batch, make_training
from kd_jax.train.faults import check_teacher
from kd_jax.train.held import Split, hold_out
from kd_jax.train.progress import is_watched, make_bar
from kd_jax.train.resume import description, digest, identity, opened, optimizer_digest
from kd_jax.train.sharding import (
    SEED,
    Sharding,
    Spread,
    check_batch_size,
    check_of_seeds,
    off_mesh,
    on_mesh,
    put_teacher,
    where_it_lies,
)
from kd_jax.train.step import Prepare, Training, init, step
from kd_jax.train.validation import Validation, check_watched
from kd_jax.version import __version__

PyTree = Any

# A key of seeds for the choice among a grid, and of the students: other ones for each.
_STUDENT, _CHOICE = 1, 2


@called_as("kd.compare(student, teacher, train, test)")
@on_mesh
def compare(
    student: Any,
    teacher: Any,
    train: Any,
    test: Any,
    *,
    methods: Mapping[str, Any],
    optimizer: optax.GradientTransformation | None = None,
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
    mesh: Any = None,
    sharding: Sharding | None = None,
) -> Table:
    """Trains a student by each of `methods` with each of the seeds, and compares them on the test data, read once.

    student: a class or function of `rngs`, or a `Model` without values: it starts anew for each seed. Students of one
        seed start from the same parameters and see the same batches, whatever the method, so that they are pairs.
    train, test: `Batch`es. methods: by name, a `Method`, or a `kd.grid`; the first is what others are compared with.
        optimizer: optax's; `optax.adamw(1e-3)` where it is None.
    seeds: how many, from 0, or which. measure: what is compared, of those of `kd.evaluate` or of `measures`; higher:
        whether more of it is better, where kd_jax does not know.
    development: a `Batch` on which a grid's best is chosen; a sixth of `train`, at most 10,000, drawn at random (always
        the same), where it is None. What is chosen is trained anew, by all of `train`, with other random numbers.
    folder, resume: every training that is done is kept there; a comparison that was killed goes on to the same result.
    mesh: with an axis `seed`, each device trains a seed at a time, to the same bits on any number of devices; with an
        axis `data`, each training has all devices, as in `kd.distill`, and `sharding`.

    Intervals are corrected for the number of methods that are compared (Bonferroni). Raises as `kd.distill` does.
    """
    check_order(
        "kd.compare(student, teacher, train, test)", models={"student": student, "teacher": teacher},
        data={"train": train, "test": test, "development": development},
    )  # fmt: skip
    data, tested = as_batch(train), as_batch(test)
    model = where_it_lies(as_model, student, mesh)
    known = in_order(where_it_lies(as_teacher, teacher, mesh), data)
    if mesh is not None and SEED not in mesh.axis_names:
        known = put_teacher(mesh, known, None if sharding is None else sharding.teacher)
        check_batch_size(mesh, batch_size)
    elif mesh is not None:
        check_of_seeds(mesh, sharding)
    if not isinstance(methods, Mapping):
        raise ConfigError(f"methods is a {type(methods).__name__}: give a dict with a name for each, {{'kd': kd.KD()}}")
    if len(methods) < 1:
        raise ConfigError("methods is empty: give at least one, by its name")
    if model.variables is not None:
        raise ConfigError(
            "the student has its values already, and every seed starts anew: give a class, or a function rngs -> module"
        )
    epochs, batch_size, numbers = check_whole(epochs, "epochs"), check_whole(batch_size, "batch_size"), _seeds(seeds)
    better = is_higher_better(measure, higher)
    if measure not in HIGHER_IS_BETTER and measure not in (measures or {}):
        raise ConfigError(
            f"there is no measure {measure}: use one of {', '.join([*HIGHER_IS_BETTER, *(measures or {})])}"
        )
    optimizer = optax.adamw(1e-3) if optimizer is None else optimizer
    entries = {name: one if isinstance(one, Grid) else as_method(one) for name, one in methods.items()}
    how = Setup(model, optimizer, epochs, batch_size, prepare, measures, measure, better, mesh, sharding)
    settings = {
        "methods": {name: description(one) for name, one in entries.items()}, "epochs": epochs,
        "batch_size": batch_size, "seeds": list(numbers), "measure": measure,
    }  # fmt: skip
    training = make_training(model, optimizer, prepare=prepare, dtype=None)
    for one in entries.values():
        for method in one.methods if isinstance(one, Grid) else (one,):
            classes = check(training, method, data, known, None, batch_size=batch_size).student.logits.shape[-1]
    how = how._replace(outputs=classes)
    choices = any(isinstance(one, Grid) and len(one.methods) > 1 for one in entries.values())
    split = hold_out(data, known, development) if choices else None
    for part in (tested,) if split is None else (tested, split.held):
        check_watched(measure, "measure", (), Validation(part, measures, known, training, None, classes))
    own = {}
    if folder is not None:
        held = {"development": "drawn" if development is None else digest(split.held)} if split is not None else {}

        def computed() -> dict[str, Any]:
            shapes = jax.eval_shape(model.network.init, jax.random.key(0))
            return identity(settings | held, data, None, known, prepare) | {
                "optimizer": optimizer_digest(optimizer, model.network.split(shapes)[0]),
                "computation of a step": _digest_of_steps(entries, training, known, data, batch_size),
            }

        own = off_mesh(how.mesh_of_one, computed)
    with opened(folder, own, resume=resume, warn=_warn, argument="folder", others=("trainings",)) as opened_folder:
        kept = None if opened_folder is None else KeptTrainings(opened_folder.store.folder / "trainings")
        bar = _Bar(_count(entries, numbers), is_watched() if progress is None else progress)
        try:
            chosen = {}
            for name, one in entries.items():
                if isinstance(one, Grid):
                    chosen[name] = _chosen(one, how, split, numbers, kept, bar.done, name)
                    if kept is not None:
                        kept.keep_choice(name, description(one.methods[chosen[name]]), numbers)
            final = {name: one.methods[chosen[name]] if isinstance(one, Grid) else one for name, one in entries.items()}
            results = train_seeds(final, how, known, data, numbers, _STUDENT, kept, bar.done)
            values = _measured(results, how, known, tested)
        finally:
            bar.close()
        if opened_folder is not None:
            opened_folder.store.finish()
    labels = {name: entries[name].labels[place] for name, place in chosen.items()}  # type: ignore[union-attr]
    table = Table(
        measure, better, numbers, values,
        {name: _stacked([one.history for one in ones]) for name, ones in results.items()},
        {name: label for name, label in labels.items() if label},
        count_parameters(Model(model.network, results[next(iter(results))][0].variables)),
        {name: sum(one.seconds for one in ones) for name, ones in results.items()},
        {} if known is None or known.per_example else _of_teacher(known, tested, how),
        max(1, len(entries) - 1), size_of(known), _told(settings),
    )  # fmt: skip
    if measure not in next(iter(values.values())):
        names = ", ".join(next(iter(values.values())))
        raise ConfigError(f"there is no measure {measure}: use one of {names}")
    return table


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


def _told(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of results.json needs to do it again: numbers of the methods, epochs and versions."""
    names = ("jax", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names} | {"kd_jax": __version__}
    shown = {name: value for name, value in settings.items() if name not in ("seeds", "measure")}
    return shown | {"versions": versions}


def _seeds(seeds: Any) -> tuple[int, ...]:
    """Each once. Raises `ConfigError`."""
    if isinstance(seeds, int | np.integer):
        return tuple(range(check_whole(seeds, "seeds")))
    if isinstance(seeds, str) or not isinstance(seeds, Iterable):
        raise ConfigError(f"seeds is {seeds!r}: give how many, or a list of whole numbers")
    numbers = tuple(check_whole(seed, "a seed", 0) for seed in seeds)
    if max(numbers, default=0) >= 2**63:
        raise ConfigError(f"a seed is {max(numbers)}: it must be at most 2**63 - 1")
    if not numbers:
        raise ConfigError(f"seeds is {seeds}: at least one is needed")
    twice = [seed for seed in numbers if numbers.count(seed) > 1]
    if twice:
        raise ConfigError(f"the seed {twice[0]} is there {numbers.count(twice[0])} times: give each seed once")
    return numbers


class _Bar:
    """A bar over all trainings."""

    def __init__(self, total: int, shown: bool) -> None:
        self.bar = make_bar(total=total, unit="training") if shown else None

    def done(self, name: str, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)
            self.bar.set_description_str(name)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _count(entries: Mapping[str, Any], seeds: tuple[int, ...]) -> int:
    choices = sum(len(one.methods) for one in entries.values() if isinstance(one, Grid))
    return len(seeds) * (len(entries) + choices)


def _chosen(
    choice: Grid, how: Setup, split: Split | None, seeds: tuple[int, ...], kept: KeptTrainings | None,
    done: Callable[[str, int], None], name: str,
) -> int:  # fmt: skip
    """The place of the method with the best mean on the development split, of those whose trainings are finite."""
    if len(choice.methods) == 1 or split is None:
        done(name, len(seeds))
        return 0
    seen, teacher, held = split
    numbered = {f"{name}-choice{place}": method for place, method in enumerate(choice.methods)}
    results = train_seeds(numbered, how, teacher, seen, seeds, _CHOICE, kept, done, diverging=True)
    # Answers of a network that is NaN would look like those of a bad one.
    whole = {label: ones for label, ones in results.items() if all(one.finite for one in ones)}
    on_held = _measured(whole, how, teacher, held)
    means = [float(np.mean(on_held[label][how.measure])) if label in whole else np.nan for label in results]
    if all(np.isnan(means)):
        check_teacher(choice.methods[0], seen, teacher, how.prepare)
        raise NotFiniteError(f"no training of the grid {name} has a finite {how.measure}: choose other values")
    signed = [mean if how.higher else -mean for mean in means]
    return int(np.nanargmax(signed))


def _measured(
    results: Mapping[str, list[Trained]], how: Setup, teacher: Teacher | None, data: Batch
) -> dict[str, dict[str, Float[np.ndarray, " seeds"]]]:
    # Answers that are kept are in the data's order.
    size, data = _batch_size(how), data._replace(indices=None)
    prepare = how.prepare if how.mesh_of_one is None else Spread(how.mesh_of_one, how.prepare)
    asked: Any = None
    if teacher is not None and not teacher.per_example:
        asked = answers_on(teacher, data, _classes(how, data), batch_size=size, prepare=prepare)
    found = {}
    for name, ones in results.items():
        each = [
            evaluate(
                Model(how.model.network, one.variables), data, teacher=asked, measures=how.measures, batch_size=size,
                prepare=prepare,
            )
            for one in ones
        ]  # fmt: skip
        found[name] = {metric: np.asarray([values[metric] for values in each], np.float64) for metric in each[0]}
    return found


def _batch_size(how: Setup) -> int:
    return evaluation_batch_size(how.batch_size, jax.eval_shape(how.model.network.init, jax.random.key(0)))


def _classes(how: Setup, data: Batch) -> int:
    """Of the student."""
    key, one = jax.random.key(0), jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), data.inputs)

    def logits() -> Any:
        inputs = one if how.prepare is None else how.prepare(key, one, False)
        return how.model.network.apply(how.model.network.init(key), inputs, train=False, key=key)[0].logits

    return int(jax.eval_shape(logits).shape[-1])


def _digest_of_steps(
    entries: Mapping[str, Any], training: Training, teacher: Teacher | None, data: Batch, batch_size: int
) -> str:
    """Of what each method computes in a step, with the student, its `prepare` and the teacher."""
    batch, taught = first_batch(data, teacher, batch_size)
    found = []
    for one in entries.values():
        method = one.methods[0] if isinstance(one, Grid) else one

        def trained(key: Any, batch: Batch, taught: Teacher | None, method: Method = method) -> Any:
            return step(init(key, training, method, batch, taught), batch, taught, key, method, training=training)

        found.append(program_digest(trained, jax.random.key(0), batch, taught))
    return hashlib.sha256("".join(found).encode()).hexdigest()


def _of_teacher(teacher: Teacher, data: Batch, how: Setup) -> dict[str, float]:
    """Its measures; none where it has other classes, of which the labels say nothing."""
    logits = np.asarray(teacher_logits(teacher, data, batch_size=_batch_size(how), prepare=how.prepare), np.float32)
    if logits.shape[-1] != how.outputs:
        return {}
    warn_of_logits(logits, data.weights, whose="the teacher's ")
    # Not those that compare with a teacher.
    own = {name: one for name, one in (how.measures or {}).items() if count_arguments(one) < 3}
    return {name: float(value) for name, value in measured(logits, data, measures=own).items()}


def size_of(teacher: Teacher | None) -> int | None:
    """How many trained numbers a teacher has; None where that is not known, as of a function or a PyTorch module."""
    if isinstance(teacher, SeveralTeachers):
        each = [size_of(one) for one in teacher.teachers]
        return None if None in each else sum(filter(None, each))
    if isinstance(teacher, LiveTeacher):
        return count_parameters(Model(teacher.network, teacher.variables)) or None
    return None


def _stacked(histories: list[dict[str, Float[np.ndarray, " epochs"]]]) -> dict[str, Float[np.ndarray, "seeds epochs"]]:
    return {name: np.stack([history[name] for history in histories]) for name in histories[0]}
