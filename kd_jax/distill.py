"""`distill`: trains one student, of any model, on any data, with or without a teacher."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float

from kd_jax.data.batch import as_batch, as_key, check_whole, is_in_memory
from kd_jax.data.mixing import mixes
from kd_jax.data.order import called_as, check_order
from kd_jax.errors import ConfigError, NotFiniteError
from kd_jax.methods import KD, CrossEntropy, as_method, check_rows, is_fused, is_on_policy
from kd_jax.methods.contrastive import check_memory
from kd_jax.models import Model, as_model, count_parameters, to_module
from kd_jax.models.nnx import NNXNetwork
from kd_jax.teacher import as_teacher
from kd_jax.teachers.indices import in_order
from kd_jax.train import measures as of_training
from kd_jax.train.caching import kept_teacher
from kd_jax.train.callbacks import Callback, EarlyStopping, as_callbacks, is_higher_better
from kd_jax.train.checkpoint_files import named_arrays
from kd_jax.train.checks import Checked, check, check_batch, check_not_own, make_training
from kd_jax.train.exchange import digest_here, meet, shapes, together
from kd_jax.train.faults import check_teacher
from kd_jax.train.lookup import of_batch
from kd_jax.train.loop import Plan, train
from kd_jax.train.matches import known_vocabularies, label_classes
from kd_jax.train.measures import WATCHED, warn_of_outputs
from kd_jax.train.processes import alone, is_first, is_shared, local, on_host, watched
from kd_jax.train.progress import Bar, Silent, is_watched
from kd_jax.train.resume import (
    Folder,
    Progress,
    description,
    digest,
    digest_of_batches,
    identity,
    identity_of_data,
    opened,
    optimizer_digest,
)
from kd_jax.train.sharding import (
    Sharding,
    Spread,
    check_of_one,
    off_mesh,
    on_mesh,
    put_teacher,
    put_variables,
    replicated,
    where_it_lies,
)
from kd_jax.train.sources import Memory, Stream, make_source
from kd_jax.train.start import copied, digest_of_step, first_state
from kd_jax.train.step import Prepare, TrainState, as_optimized
from kd_jax.train.validation import Validation, check_watched

PyTree = Any

# Of more classes the teacher is not watched in every step.
_MOST_WATCHED = 1000


class Result(NamedTuple):
    """What `distill` gives back.

    student: what was given, trained: a new `nnx.Module` in evaluation mode where a module was given, else a `Model`.
    history: arrays with one value an epoch: `loss`, each term of it, measures, `validation_…`, `seconds`.
    model: the student as a `Model`. state: the `TrainState` after the last step. best_epoch: that of `student`, from 1;
        None for the last.
    """

    student: Any
    history: dict[str, Float[np.ndarray, " epochs"]]
    model: Model
    state: TrainState
    best_epoch: int | None

    def __repr__(self) -> str:
        """The measures of the last epoch, not the parameters."""
        last = {name: f"{values[-1]:.4g}" for name, values in self.history.items() if len(values)}
        epochs = len(next(iter(self.history.values()), ()))
        best = "" if self.best_epoch is None else f", best epoch {self.best_epoch}"
        return f"Result({self.model!r}, {epochs} epochs{best}, {', '.join(f'{k} {v}' for k, v in last.items())})"


@called_as("kd.distill(student, teacher, data)")
@on_mesh
@together
def distill(
    student: Any,
    teacher: Any,
    data: Any,
    *,
    method: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int | None = None,
    key: Any = 0,
    prepare: Prepare | None = None,
    validation: Any = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    best: str | None = None,
    higher: bool | None = None,
    callbacks: Callback | Iterable[Callback] | None = (),
    checkpoint: Any = None,
    checkpoint_steps: int | None = None,
    resume: bool = False,
    progress: bool | None = None,
    dtype: Any = None,
    mesh: Any = None,
    sharding: Sharding | None = None,
) -> Result:
    """Trains `student` on `data`, taught by `teacher`.

    student: an `nnx.Module`, trained or new, which is not changed; or a `Model` of `from_nnx`, `from_linen` or
        `from_function`. teacher: a module or model, a list of several, `kd.cached(…)`, `kd.from_file(…)`, a function
        `inputs -> logits`; None trains on labels alone. It is always in evaluation mode.
    data: a `Batch` in memory, with `batch_size`, or an iterable of batches, where `steps` is the number of an epoch.
    method: `kd.KD()` where it is None, and without a teacher `kd.CrossEntropy()`; or a function of the student's
        logits, the teacher's, and labels. optimizer: optax's; `optax.adamw(1e-3)` where it is None.
    key: a whole number or a key of `jax.random`: of new parameters, order, dropout and `prepare`.
    prepare: `prepare(key, inputs, train) -> inputs`, inside the compiled step; both networks see the same view.
    validation: data for the measures of `kd.evaluate` after each epoch, with `measures` of your own beside them.
    best: the measure whose best epoch's student is given back, in place of the last; higher: whether more of it is
        better, where kd_jax does not know.
    callbacks: functions of a `callbacks.Epoch`, called after each epoch; one that returns True ends the training.
    checkpoint: a folder; resume: goes on with what is in it. checkpoint_steps: also after so many steps of an epoch.
    progress: a bar; None for one where somebody may see it. dtype: `jnp.bfloat16` computes in it, and keeps the
        parameters in float32: faster on a GPU, with about 3 digits in each product.
    mesh: a `jax.sharding.Mesh` with an axis `data`, over which each batch is divided; parameters lie as their module
        says (`with_partitioning`), or sharding: a `kd.Sharding` of rules. The result is that of one device, rounded.

    Raises an error of `kd_jax.errors`, in one sentence, before anything is compiled where what is given does not fit;
    `NotFiniteError` at the first loss or parameter that is not finite.
    """
    check_order(
        "kd.distill(student, teacher, data)", models={"student": student, "teacher": teacher}, data={"data": data}
    )  # fmt: skip
    teachers = teacher if isinstance(teacher, list | tuple) else [teacher]
    if student is not None and any(student is one for one in teachers):
        raise ConfigError("the student is its teacher's own object: give another model, or a copy (nnx.clone)")
    model, known = where_it_lies(as_model, student, mesh), where_it_lies(as_teacher, teacher, mesh)
    check_not_own(model, known)
    if known is not None and known.per_example and is_in_memory(data):
        data = as_batch(data)
        known = in_order(known, data)
    rules = sharding or Sharding()
    if mesh is not None:
        check_of_one(mesh)
    shared = is_shared(mesh)
    given = {"student": digest_here(model.variables), "teacher": digest_here(known)} if shared else {}
    # Of several processes each asks a teacher of its own for what is kept, and measures by itself.
    asked = known
    if mesh is not None:
        known = put_teacher(mesh, known, rules.teacher)
        asked = alone(asked) if shared else known
        if model.variables is not None:
            placed = put_variables(mesh, model.network, model.variables, rules.student, "student")
            model = Model(model.network, placed, model.origin)
    method = as_method(method if method is not None else CrossEntropy() if known is None else KD())
    epochs = check_whole(epochs, "epochs")
    steps = None if steps is None else check_whole(steps, "steps")
    if checkpoint_steps is not None:
        checkpoint_steps = check_whole(checkpoint_steps, "checkpoint_steps")
        if checkpoint is None:
            raise ConfigError(f"checkpoint_steps is {checkpoint_steps} without a folder: give checkpoint=DIR, too")
    several = as_callbacks(callbacks)
    key = as_key(key)
    if mesh is not None:
        key, method = replicated(mesh, (key, method))
    optimizer = optax.adamw(1e-3) if optimizer is None else optimizer
    training = make_training(model, optimizer, prepare=prepare, dtype=dtype)
    source = make_source(
        data, known, key, method, training, batch_size=batch_size, steps=steps, epochs=epochs, every=checkpoint_steps,
        mesh=mesh,
    )  # fmt: skip
    batch_size = source.batch_size if isinstance(source, Memory) else None
    checked = _check_source(source, model.variables)
    held = None
    if validation is not None:
        held = Validation(validation, measures, asked, training, model.variables, checked.student.logits.shape[-1])
    elif measures:
        raise ConfigError("measures are given without data to measure on: give validation=, too")
    seen = ("loss", *checked.terms, *(name for name, _ in source.training.measures if not name.startswith(WATCHED)))
    if best is not None:
        check_watched(best, "best", seen, held)
    for one in several:
        if isinstance(one, EarlyStopping):
            check_watched(one.measure, "the measure of early_stopping", seen, held)
    higher = best is not None and is_higher_better(best, higher)
    # A batch that is trained on is given away; this one is on the host.
    sample = source.data if isinstance(source, Memory) else source.peek()
    if isinstance(source, Memory):
        source.teacher = kept_teacher(known, method, source.data, prepare, epochs, source.batch_size, mesh, asked)
    spread = prepare if mesh is None or shared else Spread(mesh, prepare)
    examine = None if held is None else held.examiner(model, batch_size, spread, shared=shared)
    state = first_state(source, model, mesh, rules)
    params, _ = model.network.split(state.variables)
    settings = {
        "method": description(method), "epochs": epochs, "steps": steps, "batch_size": batch_size, "best": best,
        "key": np.asarray(jax.random.key_data(key)).tolist(), "dtype": None if dtype is None else jnp.dtype(dtype).name,
        "parameters": count_parameters(params),
    }  # fmt: skip
    settings |= {} if best is None else {"more of the best is better": higher}
    settings |= {"measures": list(measures)} if measures else {}
    own: dict[str, Any] = {}
    if checkpoint is not None or shared:
        if is_in_memory(validation):
            settings["validation"] = digest(validation)
        settings["batches of validation"] = digest_of_batches(validation)
        of_data = source.data if isinstance(source, Memory) else data

        def computed() -> dict[str, str]:
            return {
                "optimizer": optimizer_digest(optimizer, as_optimized(params, state.learned)),
                "computation of a step": digest_of_step(source, state, mesh),
            }

        own = off_mesh(mesh, computed)
        if shared:
            meet({
                "checkpoint": checkpoint and str(checkpoint), "checkpoint_steps": checkpoint_steps, "resume": resume,
                "settings": settings, "measures": [*(measures or ())], "mesh": f"{source.layout} {mesh.device_ids}",
                "data": identity_of_data(of_data), **given, "batch": shapes(sample), **own,
            })  # fmt: skip
        if checkpoint is not None:
            # In this order a difference is named by what it is of, before the program that it makes.
            own = off_mesh(mesh, lambda: identity(settings, of_data, model.variables, known, prepare, sample)) | own
    with opened(checkpoint, own, resume=resume, warn=_warn, mesh=mesh) as folder:
        begun = _begun(source, state, folder)
        bar = Bar() if (is_watched() if progress is None else progress) and is_first() else Silent()
        plan = Plan(
            source, epochs, examine, best, higher, several,
            lambda variables: _as_given(student, Model(model.network, copied(local(variables)))),
            folder, checkpoint_steps, bar, shared,
        )  # fmt: skip
        try:
            with watched(mesh):
                after = train(begun, plan)
        except NotFiniteError:
            asked = known if isinstance(source, Memory) else of_batch(known, sample)
            check_teacher(method, sample, asked, prepare)
            raise
    warn_of_outputs(after.history, _warn)
    _warn_of_change(student, model, mesh)
    after = after._replace(state=local(after.state), best=local(after.best))
    found = after.state.variables if after.best is None else after.best
    trained = Model(model.network, found)
    history = {
        name: np.asarray(values) for name, values in after.history.items()
        if not name.startswith(WATCHED)
    }  # fmt: skip
    return Result(
        _as_given(student, trained), history, trained, after.state, None if after.best is None else after.best_epoch + 1
    )


def _check_source(source: Memory | Stream, start: PyTree) -> Checked:
    """Everything is looked at that can be before a step is compiled."""
    training, method, taught = source.training, source.method, source.teacher
    if isinstance(source, Memory):
        known = source.data
        checked = check(training, method, known, taught, start, batch_size=source.batch_size)
    else:
        known = source.peek()
        check_memory(method, known)
        if is_on_policy(method) and training.prepare is None:
            check_rows(known, whole=False)
        taught = of_batch(taught, known)
        checked = check_batch(training, method, known, taught, start)
        source.classes = label_classes(method, checked.student.logits.shape[-1])
        source.vocabularies = known_vocabularies(training, start, taught)
    output = checked.student
    watched: dict[str, of_training.Measure] = {}
    later = isinstance(source, Stream)
    # Labels of the student's own sequences say nothing of how good it is.
    whole = not is_on_policy(method) and of_training.are_classes(known, output.logits.shape[-1], later=later)
    # Nor may anything ask for logits that a method does without.
    whole = whole and not is_fused(method)
    few = 1 < output.logits.shape[-1] <= _MOST_WATCHED and not is_fused(method)
    if whole:
        watched["accuracy"] = of_training.accuracy
        # Labels that an iterator has later are not known yet.
        if later or (np.asarray(known.labels) < 0).any():
            watched["unlabelled"] = of_training.unlabelled
    if few and (method.compares_logits or method.needs_labels):
        watched["student_normalised"] = of_training.student_normalised
    if few and taught is not None and taught.sparse is None and method.compares_logits:
        watched["teacher_normalised"] = of_training.teacher_normalised
        if whole and not mixes(training.prepare):
            watched["teacher_accuracy"] = of_training.teacher_accuracy
            watched["teacher_confidence"] = of_training.teacher_confidence
    named = tuple((name if name == "accuracy" else WATCHED + name, one) for name, one in watched.items())
    source.training = training._replace(measures=named)
    return checked


def _begun(source: Memory | Stream, state: TrainState, folder: Folder | None) -> Progress:
    """From the newest checkpoint on, where there is one."""
    if folder is not None:
        # Names that no checkpoint can have are told before the first step.
        named_arrays(state)
    restored = None if folder is None else folder.newest(state)
    if restored is None:
        return Progress(state)
    if isinstance(source, Stream) and restored.position is not None:
        source.go_to(restored.position)
    return restored


def _as_given(student: Any, trained: Model) -> Any:
    """A new module where a module or its class was given, else the model."""
    if isinstance(trained.network, NNXNetwork) and not isinstance(student, Model):
        return to_module(trained)
    return trained


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)


def _warn_of_change(student: Any, model: Model, mesh: Any) -> None:
    """Says that a module was changed by others while a copy of it was trained."""
    if not isinstance(student, nnx.Module) or model.variables is None:
        return
    now = where_it_lies(as_model, student, mesh)
    before, after = (list(map(on_host, jax.tree.leaves(one.variables))) for one in (model, now))
    changed = now.network != model.network or len(before) != len(after)
    if changed or any(not np.array_equal(one, two, equal_nan=True) for one, two in zip(before, after, strict=True)):
        _warn(
            "the student module was changed while it was trained: the training works on a copy and knows nothing of "
            "the change, so change the module before, or the result"
        )
