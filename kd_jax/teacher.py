"""Teachers: live on the same view as the student, cached in memory or on disk, from a file, several at once."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Float

from kd_jax.data.batch import as_batch, check_whole
from kd_jax.data.order import check_order
from kd_jax.errors import ConfigError, DataError
from kd_jax.files import as_numpy, floats, inputs_of, npy, tensors
from kd_jax.models import Model, Network, Output, as_model
from kd_jax.models.compiled import Own
from kd_jax.models.doors import as_list, is_result
from kd_jax.models.predict import outputs_in_batches
from kd_jax.teachers import folder as folders
from kd_jax.teachers import writing
from kd_jax.teachers.base import FunctionTeacher, LiveTeacher, SeveralTeachers, Teacher
from kd_jax.teachers.disk import DiskTeacher
from kd_jax.teachers.keep import Keep, are_wrong, make_keep, of_examples
from kd_jax.teachers.kept import RESTS, CachedTeacher, TopKTeacher, of_inputs

PyTree = Any

MEANS = ("probabilities", "logits", "losses")


def several(teachers: Sequence[Any], *, mean: str = "probabilities") -> SeveralTeachers:
    """Several teachers as one: the mean of their `probabilities`, of their `logits`, or of the `losses` by each.

    Features are those of the first. Raises `ConfigError` for another mean, or no teacher.
    """
    if mean not in MEANS:
        raise ConfigError(f"mean is {mean!r}: use {', '.join(MEANS[:-1])} or {MEANS[-1]}")
    known = [as_teacher(teacher) for teacher in as_list(teachers, "the teachers")]
    if not known or any(teacher is None for teacher in known):
        raise ConfigError("there is no teacher in the list: give at least one, and None for no teacher at all")
    narrow = next((teacher.sparse for teacher in known if teacher is not None and teacher.sparse), None)
    if narrow is not None:
        raise ConfigError(f"a teacher in the list knows {narrow}: only teachers of all classes have a mean")
    counts = sorted({teacher.examples for teacher in known if teacher is not None and teacher.examples is not None})
    if len(counts) > 1:
        raise ConfigError(
            f"the teachers know {' and '.join(map(str, counts))} examples: give each the outputs of the same examples"
        )
    return SeveralTeachers(tuple(teacher for teacher in known if teacher is not None), mean)


def cached(
    teacher: Any,
    inputs: PyTree = None,
    *,
    features: str | Sequence[str] = (),
    batch_size: int = 1000,
    prepare: Any = None,
    keep: str = "logits",
    k: int | None = None,
    rest: str = "tail",
    draws: int | None = None,
    power: float | int = 1.0,
    systematic: bool = False,
    key: Any = 0,
    hidden: str | None = None,
    head: Any = None,
    dtype: Any = None,
    path: str | Path | None = None,
    shard_size: int | None = None,
) -> Any:
    """A teacher whose outputs of all training inputs are computed once, now, and kept in memory, or on disk.

    teacher: a model, or the array of logits `[examples, ..., classes]` that it gave, in the inputs' order.
    inputs: those of the training data (a `Batch` will do; what has the weight 0 there may have any answer). prepare: as
        of the training, called with `train=False`.
    keep: "logits", with `features`; "top-k", the k most probable classes and the log-mass of all others, which is one
        class more (`rest="tail"`, for `kd.TopKKL`), spread over them (`"uniform"`) or left out (`"renormalised"`);
        "samples", `draws` (50) classes with replacement from p ** power, for `kd.SampledKL`, whose gradient is on
        average that of all logits; "hidden", the feature `hidden`, of which `head`, `[width, classes]` or a pair with
        its bias, makes the logits.
    systematic: draws at equal distances in the running sum of p: as unbiased, with less variance. key: of the draws;
        each example has one of its own, so that the batch size changes nothing.
    dtype: of floats; by default float32, and in memory their own where it is wider. path: a folder, in which shards of
        `shard_size` examples (by default of about 32 MB) are written while the teacher runs. What is there is not
        computed again, also after a kill. Inputs may be memory-mapped.

    A training on inputs of the same types and shapes that are others, or in another order, is a `MismatchError`.

    Raises `MismatchError` where the folder has a cache of another teacher, other inputs or settings; `DataError` for a
    damaged one, and for answers that are NaN or infinite; `OutputError` where it cannot be written.
    """
    check_order("kd.cached(teacher, inputs)", models={"teacher": teacher}, data={"inputs": inputs})
    if rest not in RESTS:
        raise ConfigError(f"rest is {rest!r}: use {', '.join(RESTS[:-1])} or {RESTS[-1]}")
    features = (features,) if isinstance(features, str) else tuple(features)
    kept = make_keep(
        keep, k=k, draws=draws, power=power, systematic=systematic, hidden=hidden, features=features, dtype=dtype
    )
    if (keep == "hidden") != (head is not None):
        raise ConfigError(f"keep is {keep!r} {'without a' if head is None else 'with a'} head: it belongs to 'hidden'")
    if shard_size is not None and path is None:
        raise ConfigError(f"shard_size is {shard_size} without a folder of shards: give path=, too, or leave it out")
    if inputs is None:
        if isinstance(teacher, np.ndarray | jax.Array | list):
            if features or prepare is not None:
                raise ConfigError(
                    f"{'features are' if features else 'prepare is'} given with an array of logits, which nothing is "
                    "asked for: leave it out, or give the teacher and its inputs"
                )
            logits = jnp.asarray(floats(np.asarray(teacher), "the teacher's logits"))
            if keep == "logits" and path is None and dtype is None:
                return CachedTeacher(Output(logits))
            teacher, inputs = _Said(), logits
        else:
            raise ConfigError("kd.cached needs what the teacher is asked about: kd.cached(teacher, inputs)")
    live, batch_size = as_teacher(teacher), check_whole(batch_size, "batch_size")
    weights = getattr(inputs, "weights", None)
    inputs = as_batch((inputs_of(inputs), None)).inputs
    if isinstance(live, LiveTeacher) and keep == "logits" and path is None and dtype is None:
        answers = answered(live, inputs, batch_size=batch_size, prepare=prepare, features=features)
        _check_answers(answers.output, weights)
        return of_inputs(answers, inputs)
    if live is None or live.per_example:
        raise ConfigError(f"the teacher is {type(teacher).__name__}: only one that answers inputs can be cached")
    if path is None and dtype is None:
        kept = dataclasses.replace(kept, dtype="")
    work = writing.Work(live, inputs, kept, key=key, head=head, batch_size=batch_size, prepare=prepare, weights=weights)
    if path is None:
        return work.in_memory(rest) if isinstance(teacher, _Said) else of_inputs(work.in_memory(rest), inputs)
    size = None if shard_size is None else check_whole(shard_size, "shard_size")
    return _on_disk(work.on_disk(Path(path).expanduser(), size), rest)


def answered(
    teacher: Teacher, inputs: PyTree, *, batch_size: int, prepare: Any = None, features: tuple[str, ...] = ()
) -> CachedTeacher:
    """A teacher's logits of all inputs and the features that are asked for, in memory, whatever they are: `cached` of a
    training, which asks about its own data.
    """
    if not isinstance(teacher, LiveTeacher):
        work = writing.Work(
            teacher, inputs, Keep(features=features, dtype=""), key=0, head=None, batch_size=batch_size,
            prepare=prepare, is_strict=False,
        )  # fmt: skip
        return work.in_memory("tail")  # type: ignore[return-value]
    found = outputs_in_batches(
        teacher.network, teacher.variables, inputs, batch_size=batch_size, features=features, prepare=prepare
    )
    return CachedTeacher(Output(found.logits, {path: found.features[path] for path in features}))


def _check_answers(output: Output, weights: Any) -> None:
    """Raises `DataError` for answers that are NaN or infinite and count; nothing that is traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((output, weights))):
        return
    faults = are_wrong([output.logits, *output.features.values()], output.logits.shape[:-1])
    wrong = of_examples(np.asarray(faults), weights)
    if wrong.any():
        raise writing.wrong_answer(int(wrong.argmax()))


class _Said:
    """A teacher whose inputs are its logits."""

    def __call__(self, logits: Any) -> Any:
        return logits


def open_cache(path: str | Path, *, rest: str = "tail") -> DiskTeacher:
    """The cache that `kd.cached(…, path=path)` wrote, without the teacher. rest: as of `kd.cached`, of "top-k" alone.

    Each shard's digest is compared when it is first read. `teacher.in_memory()` reads all of it; `teacher.take(rows)`
    and `teacher.at(examples, positions)` some of it. Raises `DataError` where it is damaged or not complete.
    """
    if rest not in RESTS:
        raise ConfigError(f"rest is {rest!r}: use {', '.join(RESTS[:-1])} or {RESTS[-1]}")
    found = folders.read(Path(path).expanduser())
    found.require_whole()
    return _on_disk(found, rest)


def _on_disk(found: folders.Folder, rest: str) -> DiskTeacher:
    return DiskTeacher(found, rest, np.frombuffer(bytes.fromhex(found.identity), np.uint8))


def from_file(path: str | Path, *, classes: int | None = None) -> CachedTeacher | DiskTeacher:
    """A teacher known by the logits that it gave for the training examples, in their order.

    path: a `.npy`, `.npz` or `.safetensors` file; the last two hold them by the name `logits`; or the folder of a cache
        (`kd.open_cache`). Raises `DataError`.
    """
    if Path(path).expanduser().is_dir():
        found = open_cache(path)
        if classes is not None and found.folder.classes != classes:
            raise DataError(f"the cache in {path} has {found.folder.classes} classes: it must have {classes}")
        return found
    logits = _read_logits(path, None)
    if logits.ndim < 2 or (classes is not None and logits.shape[-1] != classes):
        wanted = "[examples, classes]" if classes is None else f"[examples, {classes}]"
        raise DataError(f"{path} has logits of the shape {logits.shape}: it must be {wanted}")
    return CachedTeacher(Output(jnp.asarray(floats(logits, f"the array logits of {path}"))))


def from_top_k(classes_of: Any, probabilities: Any, *, classes: Any, rest: str = "uniform") -> TopKTeacher:
    """A teacher known by its k largest probabilities for each training example, both `[examples, ..., k]`.

    classes_of: which classes they are of. classes: how many there are. rest: where the mass that is left goes,
    `uniform` over the other classes; `renormalised`, which makes the teacher surer than it was; or `tail`, one class
    more, for `kd.TopKKL` alone. Raises `DataError`.
    """
    if rest not in RESTS:
        raise ConfigError(f"rest is {rest!r}: use {', '.join(RESTS[:-1])} or {RESTS[-1]}")
    classes = check_whole(classes, "classes")
    which, known = as_numpy(classes_of, "classes_of"), as_numpy(probabilities, "probabilities")
    if known.dtype.kind not in "fiuV":
        raise DataError(f"the probabilities are {known.dtype}: give floats [examples, ..., k]")
    known = known.astype(np.float32)
    if which.shape != known.shape or which.dtype.kind not in "iu" or which.ndim < 2:
        raise DataError(
            f"the classes have the shape {which.shape} and the probabilities {known.shape}: both must be "
            "[examples, k], whole numbers and floats"
        )
    if which.size and not (which.min() >= 0 and which.max() < classes):
        raise DataError(f"a class is {which.max() if which.min() >= 0 else which.min()}: it must be 0 to {classes - 1}")
    ordered = np.sort(which, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise DataError("an example has the same class twice: give each class once, with its probability")
    mass = known.sum(-1)
    if not np.isfinite(known).all() or (known < 0).any() or (mass > 1 + 1e-3).any() or (mass <= 0).any():
        raise DataError("the probabilities of an example are negative or do not sum to at most 1: give probabilities")
    # The most probable first, as `kd.TopKKL` takes fewer of them.
    order = np.argsort(-known, axis=-1, kind="stable")
    which = np.take_along_axis(which.astype(np.int32), order, axis=-1)
    with np.errstate(divide="ignore"):
        logs, left = np.log(np.take_along_axis(known, order, axis=-1)), np.log(np.clip(1 - mass, 0, 1))
    return TopKTeacher(jnp.asarray(which), jnp.asarray(logs), jnp.asarray(left), classes, rest)


def as_teacher(teacher: Any) -> Teacher | None:
    """`teacher` as a `Teacher`: a model or module, a list of several, a function of inputs, or None.

    Raises `ConfigError` for what is none, and for a model without variables.
    """
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, list | tuple) and not is_result(teacher):
        return several(teacher)
    if isinstance(teacher, np.ndarray | jax.Array):
        return cached(teacher)
    if not isinstance(teacher, Model | Network | nnx.Module | nn.Module | type) and callable(teacher):
        return FunctionTeacher(Own(teacher))
    model = as_model(teacher)
    if model.variables is None:
        raise ConfigError("the teacher has no variables: give a trained module, or a model with its variables")
    taught = LiveTeacher(model.network, model.variables)
    object.__setattr__(taught, "origin", model.origin)
    return taught


def as_whole_teacher(teacher: Any) -> Teacher | None:
    """`as_teacher`, of one that has all logits. Raises `ConfigError`."""
    known = as_teacher(teacher)
    if known is not None and known.sparse is not None:
        raise ConfigError(f"the teacher knows {known.sparse}: measures need its logits, so give the teacher itself")
    return known


def load_logits(path: str | Path, *, examples: int, classes: int) -> Float[np.ndarray, "examples classes"]:
    """Logits that a teacher gave for `examples` images, in their order, of a `.npy`, `.npz` or `.safetensors` file.

    path: `.npz` and `.safetensors` files hold them by the name `logits`.

    The result is in float32, or in float64 where the file is that and JAX is set to compute in it. Raises `DataError`
    for another shape than `[examples, classes]` before the logits are read, and for other numbers than finite floats.
    """
    return floats(_read_logits(path, (examples, classes)), f"the array logits of {path}")


def _read_logits(path: str | Path, shape: tuple[int, ...] | None) -> Any:
    suffix = Path(path).suffix
    if suffix == ".npy":
        return npy.read_npy(path, shape)
    if suffix == ".npz":
        return npy.read_npz(path, ["logits"], shape)[0]
    if suffix == ".safetensors":
        return tensors.read(path, ["logits"], shape)["logits"]
    raise DataError(f"logits cannot be read from {path}: name a file that ends in .npy, .npz or .safetensors")
