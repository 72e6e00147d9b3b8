"""How good a network is on labelled examples, and how close to its teacher."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from kd_jax.data.batch import Batch, as_batch, check_values, check_whole
from kd_jax.data.joined import joined, padded
from kd_jax.data.order import called_as, check_order
from kd_jax.data.stream import whole_pass
from kd_jax.errors import ConfigError, ShapeError
from kd_jax.files import inputs_of
from kd_jax.likelihood import of_tokens
from kd_jax.losses import cross_entropy, kl_divergence
from kd_jax.losses.checks import as_whole, check_float_labels, sum_to_1
from kd_jax.losses.compensated import difference, exp
from kd_jax.losses.maps import wide
from kd_jax.models import Model, as_model
from kd_jax.models.compiled import call
from kd_jax.models.predict import highest_precision, outputs_in_batches
from kd_jax.models.trying import PREPARE, as_numbers, told, told_of_measure, warn_of_logits
from kd_jax.models.vocabulary import check_vocabulary
from kd_jax.teacher import Teacher, as_whole_teacher
from kd_jax.teachers.indices import in_order

PyTree = Any

_ECE_BINS = 15
_PARTS = 128

HIGHER_IS_BETTER = {
    "accuracy": True, "correct": True, "agreement": True,
    "loss": False, "errors": False, "nll": False, "ece": False, "kl_to_teacher": False, "mse": False,
    "perplexity": False, "bits_per_token": False,
}  # fmt: skip
"""Of the measures that have a name here."""


class Evaluation(NamedTuple):
    """Measures of one network on n examples.

    correct, errors: numbers of examples. accuracy: fraction of correct ones. nll: mean negative log-likelihood of the
    labels, in nats. ece: expected calibration error, a fraction (`calibration_error`).
    teacher_agreement: fraction of examples with the teacher's answer. kl_to_teacher: mean KL(teacher ‖ network) at
    temperature 1, in nats. Both are None without a teacher.
    """

    correct: Int[Array, ""]
    errors: Int[Array, ""]
    accuracy: Float[Array, ""]
    nll: Float[Array, ""]
    ece: Float[Array, ""]
    teacher_agreement: Float[Array, ""] | None
    kl_to_teacher: Float[Array, ""] | None


def predict(model: Any, inputs: PyTree, *, batch_size: int = 1000, prepare: Any = None) -> Float[Array, "examples ..."]:
    """Logits of all inputs in evaluation mode, `batch_size` at a time.

    model: an `nnx.Module`, or a `Model` with its variables. prepare: as of the training, called with `train=False`.
    No inputs give an empty answer of the right shape.
    """
    known = _with_variables(model)
    check_whole(batch_size, "batch_size")
    inputs = as_batch((inputs_of(inputs), None)).inputs
    if prepare is None:
        check_vocabulary(known.network, known.variables, inputs)
    return outputs_in_batches(known.network, known.variables, inputs, batch_size=batch_size, prepare=prepare).logits


@called_as("kd.evaluate(model, data)")
def evaluate(
    model: Any,
    data: Batch | Iterable[Any],
    *,
    teacher: Any = None,
    measures: Mapping[str, Callable[..., Any]] | None = None,
    batch_size: int = 1000,
    prepare: Any = None,
) -> dict[str, float | int]:
    """The measures of a model on `data`, by name, as numbers of Python.

    With whole numbers as labels: accuracy (a fraction), correct and errors (counts), nll (mean negative log-likelihood,
    nats), ece (expected calibration error, a fraction); of positions perplexity and bits_per_token (nll in bits), too.
    With floats: mse, of the outputs themselves, and nll where every row sums to 1. With a teacher: agreement (a
    fraction) and kl_to_teacher (nats, at temperature 1), but for one output, several labels and a regression.

    data: a `Batch`, or a finite iterable of batches. Labels of weight 0 do not count.
    measures: more of them, each `(logits, labels) -> values` or `(logits, labels, teacher_logits) -> values`, one value
        for each example or position, averaged with the weights, or one number. The labels are as methods have them.
    """
    check_order("kd.evaluate(model, data)", models={"model": model, "teacher": teacher}, data={"data": data})
    known, asked = _with_variables(model), as_whole_teacher(teacher)
    check_whole(batch_size, "batch_size")
    check_measures(measures)
    logits, labels, weights, taught = [], [], [], []
    for part in map(as_batch, whole_pass(data)):
        if prepare is None:
            check_vocabulary(known.network, known.variables, part.inputs, part.weights)
        output = outputs_in_batches(known.network, known.variables, part.inputs, batch_size=batch_size, prepare=prepare)
        logits.append(np.asarray(output.logits, np.float32))
        labels.append(None if part.labels is None else jax.tree.map(np.asarray, part.labels))
        weights.append(None if part.weights is None else np.asarray(part.weights, np.float32))
        if asked is not None:
            taught.append(np.asarray(teacher_logits(asked, part, batch_size=batch_size, prepare=prepare), np.float32))
    if not logits:
        raise ConfigError("there is no batch to evaluate on: give at least one")
    if not any(map(len, logits)):
        raise ConfigError("there is no example to evaluate on: give at least one")
    if len({part.shape[1:] for part in logits}) > 1 and all(part.ndim > 2 for part in logits):
        logits, labels, weights, taught = padded(logits, labels, weights, taught)
    together = Batch(None, joined(labels, "labels"), joined(weights, "weights"))
    check_values(together, None)
    answers, of_teacher = np.concatenate(logits), np.concatenate(taught) if taught else None
    warn_of_logits(answers, together.weights)
    if of_teacher is not None:
        warn_of_logits(of_teacher, together.weights, whose="the teacher's ")
    found = measured(answers, together, of_teacher, measures=measures or {})
    return {name: int(v) if np.asarray(v).dtype.kind in "iu" else float(v) for name, v in found.items()}


def check_measures(measures: Any) -> None:
    """Raises `ConfigError` for what are no functions by name."""
    named = measures or {}
    wrong = [one for one in named.values() if not callable(one)] if isinstance(named, Mapping) else [named]
    if wrong:
        raise ConfigError(f"measures has {wrong[0]!r}: give functions (logits, labels) -> values, by name")


def teacher_logits(
    teacher: Teacher, batch: Batch, *, batch_size: int = 1000, prepare: Any = None
) -> Float[np.ndarray, "..."]:
    """The teacher's logits of a batch; of several whose losses are averaged, the mean of their probabilities' logs."""
    teacher, inputs = in_order(teacher, batch) or teacher, jax.tree.leaves(batch.inputs)[0]
    if teacher.per_example and teacher.examples != inputs.shape[0]:
        raise ConfigError(
            f"the cached teacher knows {teacher.examples} examples and the batch has {inputs.shape[0]}: give the "
            "teacher itself to evaluate on other data"
        )
    parts = []
    for start in range(0, max(1, inputs.shape[0]), batch_size):
        part = jax.tree.map(lambda leaf, start=start: leaf[start : start + batch_size], batch.inputs)
        rows = jnp.arange(start, min(start + batch_size, inputs.shape[0]))
        parts.append(call(_ask, teacher.take(rows) if teacher.per_example else teacher, part, prepare=prepare))
    # On the host: whatever a function calls back is on the first device of a mesh alone.
    return np.concatenate([np.asarray(part) for part in parts])


def _ask(teacher: Teacher, inputs: PyTree, *, prepare: Any) -> Float[Array, "..."]:
    if prepare is not None:
        with told("prepare", inputs, PREPARE):
            inputs = prepare(jax.random.key(0), inputs, False)
    with told("the teacher", inputs), highest_precision():
        return _mean_logits(teacher.outputs(inputs))


def _mean_logits(outputs: tuple[Any, ...]) -> Float[Array, "..."]:
    if len(outputs) == 1:
        return outputs[0].logits
    logs = jnp.stack([jax.nn.log_softmax(output.logits, axis=-1) for output in outputs])
    return jax.nn.logsumexp(logs, axis=0) - float(np.log(len(outputs)))


def measured(
    logits: Float[Any, "..."],
    batch: Batch,
    taught: Float[Any, "..."] | None = None,
    *,
    measures: Mapping[str, Callable[..., Any]] | None = None,
) -> dict[str, Num[Any, ""]]:
    """The measures of `evaluate` from logits `[..., classes]`. Raises `ShapeError` where the parts do not fit."""
    labels, weights = batch.labels, batch.weights
    found: dict[str, Any] = {}
    classes, places = logits.shape[-1], logits.shape[:-1]
    if taught is not None and taught.shape != logits.shape:
        raise ShapeError(
            f"the teacher's logits have the shape {taught.shape} and the student's {logits.shape}: both need the same "
            "classes"
        )
    if weights is None:
        counted = np.ones(places, np.float32)
    else:
        if np.shape(weights) != places[: np.ndim(weights)]:
            raise ShapeError(f"the weights have the shape {np.shape(weights)} and the logits {logits.shape}")
        shaped = np.asarray(weights, np.float32).reshape(np.shape(weights) + (1,) * (len(places) - np.ndim(weights)))
        counted = np.broadcast_to(shaped, places)
    kept = (counted != 0).ravel()
    flat, share = logits.reshape(-1, classes)[kept], counted.ravel()[kept]
    flat_taught = None if taught is None else taught.reshape(-1, classes)[kept]
    of_classes = classes > 1
    if hasattr(labels, "dtype"):
        labels = _fitted(np.asarray(labels), logits.shape)
        found |= _by_labels(flat, labels, logits.shape, kept, share, batch)
        # Several labels, and a regression, are no distribution over classes.
        of_classes &= "nll" in found or not len(flat)
    if flat_taught is not None and len(flat) and of_classes:
        same = flat.argmax(-1) == flat_taught.argmax(-1)
        found["agreement"] = np.float32(_average(same, share))
        found["kl_to_teacher"] = np.float32(_average(np.asarray(_kl(flat, flat_taught)), share))
    for name, measure in (measures or {}).items():
        given = (jnp.asarray(logits), labels, None if taught is None else jnp.asarray(taught))
        with told_of_measure(name, logits, labels):
            values = as_numbers(measure(*given[: _count(measure)]))
        if values.ndim == 0:
            found[name] = values
        elif values.shape == places[: values.ndim]:
            over = counted if values.ndim == len(places) else counted.reshape(*values.shape, -1).sum(-1)
            safe = np.where(over == 0, 0, values)
            found[name] = np.float32(np.sum(safe * over, dtype=np.float64) / np.sum(over, dtype=np.float64))
        else:
            raise ShapeError(
                f"the measure {name} has the shape {values.shape}: it must be one number, or have the shape {places}"
            )
    return found


def _fitted(labels: Any, shape: tuple[int, ...]) -> Any:
    """Labels as methods have them: whole numbers out of a column, floats of one output in one."""
    if labels.dtype.kind in "iu":
        return labels[..., 0] if labels.shape == (*shape[:-1], 1) and shape[-1] > 1 else labels
    return labels[..., None] if labels.shape == shape[:-1] and shape[-1] == 1 else labels


def _by_labels(
    flat: Any, labels: Any, shape: tuple[int, ...], kept: Any, share: Any, batch: Batch
) -> dict[str, Num[Any, ""]]:
    """What the labels say, of the places that count."""
    if shape[-1] == 1:
        # A number that is predicted: it names no class.
        labels = labels.astype(np.float32)
    if labels.dtype.kind in "iu":
        if labels.shape != shape[:-1]:
            raise ShapeError(
                f"the labels have the shape {labels.shape} and the logits {shape}: labels of whole numbers must have "
                f"the shape {shape[:-1]}, so {as_whole(labels, shape)}"
            )
        check_values(Batch(None, labels, batch.weights), shape[-1])
        true = labels.ravel()[kept].astype(np.int32)
        right, nll = flat.argmax(-1) == true, _average(np.asarray(_hard(flat, true)), share)
        return {
            "accuracy": np.float32(_average(right, share)),
            "correct": np.int64(right.sum()),
            "errors": np.int64((~right).sum()),
            "nll": np.float32(nll),
            "ece": np.float32(calibration_error(jnp.asarray(flat), jnp.asarray(true), weights=jnp.asarray(share))),
            **(of_tokens(nll) if len(shape) > 2 else {}),
        }
    if labels.shape == shape[:-1] and shape[-1] == 1:
        labels = labels[..., None]
    check_float_labels(labels, shape)
    soft = labels.reshape(-1, shape[-1])[kept].astype(np.float32)
    found = {"mse": np.float32(_average(np.mean((flat - soft) ** 2, axis=-1), share))}
    if shape[-1] > 1 and sum_to_1(soft):
        found["nll"] = np.float32(_average(np.asarray(_hard(flat, soft)), share))
    return found


_hard, _kl = jax.jit(cross_entropy), jax.jit(kl_divergence)


def _average(values: Any, share: Any) -> float:
    """Weighted mean in float64; NaN of nothing."""
    total = np.sum(share, dtype=np.float64)
    return float(np.sum(values * share, dtype=np.float64) / total) if total else float("nan")


@jax.jit
def evaluate_logits(
    logits: Float[Array, "examples classes"],
    labels: Int[Array, " examples"],
    teacher_logits: Float[Array, "examples classes"] | None = None,
) -> Evaluation:
    """Every measure of `Evaluation`, for one seed or under `vmap`; the last two where the teacher's logits are given.

    In float32 or better, whatever the logits are.
    """
    kind = wide(logits)
    logits, labels = logits.astype(kind), labels.astype(jnp.int32)
    answers = jnp.argmax(logits, axis=-1).astype(labels.dtype)
    correct = jnp.sum(answers == labels)
    errors = jnp.sum(answers != labels)
    # Not len(labels): XLA multiplies by the inverse of a constant, which makes 0.91249996 of 9125 / 10,000.
    count = (correct + errors).astype(logits.dtype)
    agreement = distance = None
    if teacher_logits is not None:
        teacher_logits = teacher_logits.astype(kind)
        agreeing = jnp.sum(answers == jnp.argmax(teacher_logits, axis=-1).astype(labels.dtype))
        agreement = agreeing.astype(logits.dtype) / count
        distance = jnp.mean(kl_divergence(logits, teacher_logits))
    return Evaluation(
        correct,
        errors,
        correct.astype(logits.dtype) / count,
        jnp.mean(cross_entropy(logits, labels)),
        calibration_error(logits, labels),
        agreement,
        distance,
    )


def calibration_error(
    logits: Float[Array, "examples classes"],
    labels: Int[Array, " examples"],
    *,
    weights: Float[Array, " examples"] | None = None,
    bins: int = _ECE_BINS,
) -> Float[Array, ""]:
    r"""Expected calibration error: $\sum_b \frac{n_b}{n} |\mathrm{accuracy}_b - \mathrm{confidence}_b|$, a fraction.

    The confidence is the largest probability; bin b of `bins` holds those in (b/bins, (b+1)/bins].
    Guo, Pleiss, Sun and Weinberger (2017), equation 3, with their 15 bins. weights: how much each example counts.
    """
    answers = jnp.argmax(logits, axis=-1)
    top = answers[:, None] == jnp.arange(logits.shape[-1])[None]
    odds = exp(difference(logits, jnp.max(logits, axis=-1, keepdims=True)))
    others = jnp.sum(jnp.where(top, 0, odds), axis=-1)
    # 1 - confidence, which a difference would round away where a network is nearly certain.
    confidence, doubt = 1 / (1 + others), others / (1 + others)
    bin_of = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    surplus = jnp.where(answers.astype(labels.dtype) == labels, doubt, -confidence)
    if weights is not None:
        surplus = surplus * weights.astype(surplus.dtype)
    # In many short sums, as a long one rounds at every term.
    part = jnp.arange(len(labels), dtype=jnp.int32) % _PARTS
    parts = jax.ops.segment_sum(surplus, bin_of * _PARTS + part, num_segments=bins * _PARTS)
    total = jnp.sum(jnp.abs(jnp.sum(parts.reshape(bins, _PARTS), axis=-1)))
    return total / (len(labels) if weights is None else jnp.sum(weights).astype(total.dtype))


def _with_variables(model: Any) -> Model:
    known = as_model(model)
    if known.variables is None:
        raise ConfigError("the model has no variables yet: train it, or give a module that has its values")
    return known


def _count(measure: Callable[..., Any]) -> int:
    """How many arguments a measure takes by position: two or three."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        taken = [p for p in inspect.signature(measure).parameters.values() if p.kind in kinds]
    except (TypeError, ValueError):
        return 2
    return 3 if len([p for p in taken if p.default is inspect.Parameter.empty]) > 2 else 2
