"""One training step as a pure function: `init` makes the state before it, `step` is one update by one batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from kd_jax.data.batch import Batch
from kd_jax.data.mixing import Mixed, prepared
from kd_jax.errors import ConfigError, ShapeError
from kd_jax.losses.checks import as_whole
from kd_jax.losses.softmax import in_training
from kd_jax.methods import Method, Parts, resampled
from kd_jax.methods.base import as_parts, terms_of
from kd_jax.models import Network, Output
from kd_jax.models.fresh import fresh
from kd_jax.models.heads import HIDDEN, OF_THE_MODEL
from kd_jax.models.predict import highest_precision
from kd_jax.teacher import Teacher
from kd_jax.train.absent import broadened, masked, masked_labels, unless_absent, without_absent
from kd_jax.train.measures import WEIGHT, Measure

PyTree = Any
Prepare = Callable[[Key[Array, ""], PyTree, bool], PyTree]


class TrainState(NamedTuple):
    """What a step changes.

    variables: the network's (`Network.split` tells what of it is trained). learned, carried: the method's own `Parts`.
    optimizer_state: of the parameters; with a method that learns, of the pair of both. step: steps done.
    """

    variables: PyTree
    learned: PyTree
    carried: PyTree
    optimizer_state: PyTree
    step: Int[Array, ""]


class Training(NamedTuple):
    """What is compiled into a step: how, not with what.

    prepare: `prepare(key, inputs, train) -> inputs` inside the step; student and teacher see the same view.
    measures: of the training batches, by name.
    dtype: what the student computes in; None for the type of its parameters. These stay in float32.
    """

    network: Network
    optimizer: optax.GradientTransformation
    prepare: Prepare | None = None
    measures: tuple[tuple[str, Measure], ...] = ()
    dtype: Any = None


Metrics = dict[str, Float[Array, "..."]]
"""Of a batch, in training mode and before the update: `loss`, which is minimised, its terms, and the measures."""


def first_variables(key: Key[Array, ""], network: Network) -> PyTree:
    """Of a training with this key."""
    return fresh(network, jax.random.split(jax.random.fold_in(key, _INIT))[0])


def init(
    key: Key[Array, ""],
    training: Training,
    method: Method,
    batch: Batch | None = None,
    teacher: Teacher | None = None,
    *,
    variables: PyTree = None,
) -> TrainState:
    """The state before the first step.

    The network's initial variables depend on `key` alone, not on the method. batch, teacher: shapes are enough.
    variables: to start from, in place of new ones. A method that learns or carries nothing needs no batch.
    """
    method_key = jax.random.split(jax.random.fold_in(key, _INIT))[1]
    variables = first_variables(key, training.network) if variables is None else variables
    parts = Parts()
    if type(method).init is not Method.init and batch is None:
        parts = as_parts(method.init(method_key, None, None), method)  # type: ignore[arg-type]
    elif type(method).init is not Method.init:
        shapes = jax.eval_shape(
            lambda variables, batch, teacher: _outputs(
                training, method, variables, prepared(training.prepare, batch, key), teacher, key
            )[0],
            variables, batch, teacher,
        )  # fmt: skip
        student, taught = shapes
        parts = as_parts(method.init(method_key, student, taught[0] if taught else None), method)
    params, _ = training.network.split(variables)
    optimizer_state = training.optimizer.init(as_optimized(params, parts.learned))
    return TrainState(variables, parts.learned, parts.carried, optimizer_state, jnp.zeros((), jnp.int32))


def step(
    train_state: TrainState, batch: Batch, teacher: Teacher | None, key: Key[Array, ""], method: Method,
    *, training: Training,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """One update by the mean loss of `batch`. `key` is the training's; the step derives its own from it.

    teacher: with the same rows looked up as the batch. Raises `ShapeError` where shapes do not fit each other, and
    `MethodError` where the method lacks what it needs: while the step is traced.
    """
    network = training.network
    step_key = jax.random.fold_in(jax.random.fold_in(key, _STEP), train_state.step)
    batch = prepared(training.prepare, batch, jax.random.fold_in(jax.random.fold_in(key, _PREPARE), train_state.step))
    batch = resampled(method, key, network, train_state.variables, without_absent(batch), train_state.step)
    params, state = network.split(train_state.variables)

    def mean_loss(trained: tuple[PyTree, PyTree]) -> tuple[Array, tuple[PyTree, PyTree, Metrics]]:
        params, learned = trained
        variables = network.merge(params, state)
        (student, taught), new = _outputs(training, method, variables, batch, teacher, step_key)
        fitted = fit_labels(batch, student.logits)
        student, taught = masked(student, fitted), tuple(masked(one, fitted) for one in taught)
        labelled = masked_labels(fitted)
        terms, carried = all_terms(
            method, Parts(learned, train_state.carried), student, taught, labelled, train_state.step
        )
        loss = weighted_sum(terms, labelled.weights)
        known = {name: weighted_mean(values, labelled.weights) for name, values in terms.items()}
        seen = jax.lax.stop_gradient(student)
        for name, measure in training.measures:
            known[name] = weighted_mean(measure(seen, labelled, taught), labelled.weights)
        if labelled.weights is not None:
            known[WEIGHT] = jnp.sum(jnp.asarray(labelled.weights, jnp.float32))
        return loss, (new, carried, {"loss": loss, **known} | {"loss": loss})

    pair = (params, train_state.learned)
    with highest_precision(), in_training():
        slopes, (state, carried, metrics) = jax.grad(mean_loss, has_aux=True)(pair)
    # JAX's derivative by a complex number is the conjugate of the direction in which the loss grows.
    gradients, trained = jax.tree.map(jnp.conj, as_optimized(*slopes)), as_optimized(*pair)
    # Some, such as `optax.contrib.reduce_on_plateau`, look at the loss.
    optimizer = optax.with_extra_args_support(training.optimizer)
    updates, optimizer_state = optimizer.update(gradients, train_state.optimizer_state, trained, value=metrics["loss"])
    after_update = optax.apply_updates(trained, updates)
    params, learned = (after_update, train_state.learned) if trained is params else after_update
    after = TrainState(network.merge(params, state), learned, carried, optimizer_state, train_state.step + 1)
    after = unless_absent(batch, after, train_state._replace(step=after.step))
    return after, jax.tree.map(jax.lax.stop_gradient, metrics)


def as_optimized(params: PyTree, learned: PyTree) -> PyTree:
    """What an optimiser sees: the parameters; with a method that learns, the pair of them and what it learns."""
    return (params, learned) if jax.tree.leaves(learned) else params


def weighted_mean(values: Float[Array, "..."], weights: Any) -> Float[Array, ""]:
    """sum(weights · values) / sum(weights). What has the weight 0 is not computed into the sum.

    values: `[batch]`, `[batch, positions]`, or one number, which is its own mean. weights: `[batch]`, one for each
    position, or None. Values of whole examples have the sum of their positions' weights. No weight at all gives 0.
    """
    if values.ndim == 0:
        return values
    if weights is None:
        return jnp.mean(values)
    fitted = _fitted_weights(jnp.asarray(weights), values)
    total = jnp.sum(fitted)
    counted = jnp.sum(jnp.where(fitted == 0, 0, jnp.where(fitted == 0, 0, values) * fitted))
    return counted / jnp.where(total == 0, 1, total)


def weighted_sum(terms: Metrics, weights: Any) -> Float[Array, ""]:
    """The weighted mean of the sum of all terms."""
    together: dict[tuple[int, ...], Array] = {}
    for values in terms.values():
        same = together.get(values.shape)
        together[values.shape] = values if same is None else same + values
    means = [weighted_mean(values, weights) for values in together.values()]
    return sum(means[1:], means[0])


def fit_labels(batch: Batch, logits: Float[Array, "..."]) -> Batch:
    """The batch with labels that fit the logits `[..., classes]`. Raises `ShapeError` where they cannot.

    Whole numbers in a column, `[..., 1]`, are taken out of it; floats `[...]` of one output are put into one.
    """
    labels, weights = batch.labels, batch.weights
    if isinstance(labels, Mixed):
        soft = labels.soft(lambda own: fit_labels(batch._replace(labels=own), logits).labels, logits)
        return batch._replace(labels=soft)
    places = logits.shape[:-1]
    if weights is not None and not (jnp.ndim(weights) >= 1 and jnp.shape(weights) == places[: jnp.ndim(weights)]):
        raise ShapeError(
            f"the weights have the shape {jnp.shape(weights)} and the logits {logits.shape}: give one weight for each "
            "example, or one for each position"
        )
    if labels is None or not hasattr(labels, "dtype"):
        return batch
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        single = logits.shape[-1] == 1 and labels.shape == places
        return batch._replace(labels=jnp.asarray(labels)[..., None]) if single else batch
    if labels.shape == (*places, 1) and logits.ndim == labels.ndim:
        return batch._replace(labels=jnp.asarray(labels)[..., 0])
    if labels.shape != places:
        raise ShapeError(
            f"the labels have the shape {labels.shape} and the logits {logits.shape}: labels of whole numbers must "
            f"have the shape {places} (one-hot and soft labels must be floats), so {as_whole(labels, logits.shape)}"
        )
    return batch


# What a key is folded with, so that parameters, order and dropout are independent of one another; 1 is `data.batch`'s.
_INIT, _STEP, _PREPARE = 0, 2, 5


def _outputs(
    training: Training, method: Method, variables: PyTree, batch: Batch, teacher: Teacher | None, key: Key[Array, ""]
) -> tuple[tuple[Output, tuple[Output, ...]], PyTree]:
    """The student's output and those of its teachers; and the student's new state."""
    student, new = student_output(training, method, variables, batch.inputs, key)
    taught = () if teacher is None else teacher.outputs(batch.inputs, features=method.teacher_features)
    return (student, tuple(jax.tree.map(jax.lax.stop_gradient, one) for one in taught)), new


def student_output(
    training: Training, method: Method, variables: PyTree, inputs: PyTree, key: Key[Array, ""]
) -> tuple[Output, PyTree]:
    """The student's output in training mode, in the type of the training, and its new state."""
    network, features = training.network, method.student_features
    if training.dtype is None:
        return network.apply(variables, inputs, train=True, key=key, features=features)
    params, state = network.split(variables)
    given = network.merge(as_dtype(params, training.dtype), state)
    output, new = network.apply(given, as_dtype(inputs, training.dtype), train=True, key=key, features=features)
    # The products of a fused loss are of the training's type, too, and are added up in float32 there.
    of_head = {path: output.features[path] for path in (HIDDEN, *OF_THE_MODEL) if path in output.features}
    output = as_dtype(output, jnp.float32)
    output = output._replace(features={**output.features, **of_head})
    return output, jax.tree.map(_in_type_of, new, state)


def _in_type_of(after: Array, before: Array) -> Array:
    return after if after.dtype == before.dtype else after.astype(before.dtype)


def is_finite(state: TrainState, network: Network) -> Bool[Array, ""]:
    """Whether all that is trained is finite, and nothing else is NaN: a mask or a best value may be infinite."""

    def every(tree: PyTree, test: Callable[[Array], Array]) -> list[Array]:
        return [jnp.all(test(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    params, _ = network.split(state.variables)
    found = every((params, state.learned), jnp.isfinite) + every(state, lambda leaf: ~jnp.isnan(leaf))
    return jnp.all(jnp.stack(found)) if found else jnp.bool_(True)


def as_dtype(tree: PyTree, dtype: Any) -> PyTree:
    """Floats of a tree in another type."""
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating) else leaf, tree
    )


def all_terms(
    method: Method, parts: Parts, student: Output, taught: tuple[Output, ...], batch: Batch, step: Int[Array, ""]
) -> tuple[Metrics, PyTree]:
    """The terms of the loss; where there are several teachers, the means of theirs. Raises `ShapeError`."""
    if len(taught) < 2:
        terms, carried = terms_of(method, parts, student, taught[0] if taught else None, batch, step)
        _check_shapes(method, terms, (student, *taught), batch)
        return terms, carried
    if jax.tree.leaves(parts.carried):
        raise ConfigError(
            f"{type(method).__name__} carries values from step to step, which the mean of the losses of {len(taught)} "
            'teachers cannot: use kd.several(teachers, mean="probabilities")'
        )
    each = [terms_of(method, parts, student, one, batch, step)[0] for one in taught]
    means = {name: sum((terms[name] for terms in each[1:]), each[0][name]) / len(taught) for name in each[0]}
    _check_shapes(method, means, (student, *taught), batch)
    return means, parts.carried


def _check_shapes(method: Method, terms: Metrics, outputs: tuple[Output, ...], batch: Batch) -> None:
    """Raises `ShapeError` for values that are of no examples or positions: what was broadcast, `[batch, batch]`."""
    logits = [output.logits.shape for output in outputs]
    # A value for each class is a sum that was forgotten; outputs with a label each may have a loss each.
    known = [s if s[-1] == 1 or s == getattr(batch.labels, "shape", None) else s[:-1] for s in logits]
    known += [leaf.shape for output in outputs for leaf in jax.tree.leaves(dict(output.features))]
    for name, values in terms.items():
        if values.ndim and not any(values.shape == shape[: values.ndim] for shape in known):
            raise ShapeError(
                f"the term {name} of {type(method).__name__} has the shape {values.shape} and the logits {logits[0]}: "
                f"give one value for each example, {logits[0][:1]}, or for each position"
            )


def _fitted_weights(weights: Array, values: Array) -> Array:
    """A weight for each of the values. Raises `ShapeError` where there is none."""
    weights = weights.astype(values.dtype)
    if weights.ndim > values.ndim and weights.shape[: values.ndim] == values.shape:
        return jnp.sum(weights, axis=tuple(range(values.ndim, weights.ndim)))
    if weights.shape != values.shape[: weights.ndim]:
        raise ShapeError(
            f"the weights have the shape {weights.shape} and a term of the loss {values.shape}: give one weight for "
            "each example, or one for each position"
        )
    return jnp.broadcast_to(broadened(weights, values.ndim), values.shape)
