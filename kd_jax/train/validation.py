"""What a student is measured on after each epoch: looked at before anything is compiled."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.data.batch import Batch, as_batch, check_counts, check_values, is_in_memory
from kd_jax.data.stream import whole_pass
from kd_jax.errors import ConfigError
from kd_jax.evaluate import HIGHER_IS_BETTER, check_measures, evaluate
from kd_jax.losses.checks import check_float_labels, sum_to_1
from kd_jax.models import Model
from kd_jax.models.trying import PREPARE, told
from kd_jax.teacher import Teacher
from kd_jax.train.caching import answers_on, answers_shape, evaluation_batch_size
from kd_jax.train.processes import on_host
from kd_jax.train.sources import is_endless, is_iterator
from kd_jax.train.step import Training, fit_labels

PyTree = Any

_OF_CLASSES = ("accuracy", "correct", "errors", "ece")


class Validation:
    """Data to measure on: a `Batch`, a list of these, or another iterable, which is not begun to look at it.

    names: of the measures that it gives. soft: what its labels are, in words, where they are no whole numbers.
    """

    def __init__(
        self, data: Any, measures: Any, teacher: Teacher | None, training: Training, start: PyTree,
        classes: int,
    ) -> None:  # fmt: skip
        """start: the student's variables, or None. Raises `ConfigError` or `DataError` for what cannot be measured."""
        check_measures(measures)
        if not hasattr(data, "__iter__") or hasattr(data, "shape") or isinstance(data, str):
            raise ConfigError(f"validation is a {type(data).__name__}: give a kd.Batch, or a list of batches")
        whole_pass(data)
        if is_iterator(data):
            raise ConfigError("validation is an iterator, which is empty after one epoch: give a kd.Batch, or a list")
        if is_endless(data):
            raise ConfigError("validation has no end: give a pipeline that ends, such as data.take(100)")
        self.measures, self.classes = measures, classes
        # A cached teacher knows other examples.
        self.teacher = None if teacher is None or teacher.per_example else teacher
        self.soft = ""
        names: Iterable[str] = HIGHER_IS_BETTER
        if is_in_memory(data):
            data = as_batch(data)
            check_values(data, None)
            names = self._names(data, training, start)
        elif isinstance(data, list):
            data = [as_batch(part) for part in data]
            if not data:
                raise ConfigError("validation is an empty list: give at least one batch")
            names, *_ = [self._names(part, training, start) for part in data]
        self.data = data
        self.names = (*names, *(measures or {}))

    def _names(self, batch: Batch, training: Training, start: PyTree) -> list[str]:
        """The measures of a batch; whether student and teacher take it, and its labels fit."""
        key, prepare, inputs = jax.random.key(0), training.prepare, batch.inputs
        if not check_counts(batch):
            raise ConfigError("validation has a batch of 0 examples: give at least one example")
        check_values(batch, self.classes, absent=True)
        if prepare is not None:
            with told("prepare", inputs, PREPARE):
                inputs = jax.eval_shape(lambda inputs: prepare(key, inputs, False), inputs)

        def ask(variables: PyTree, inputs: PyTree) -> Any:
            variables = training.network.init(key) if variables is None else variables
            return training.network.apply(variables, jax.tree.map(jnp.asarray, inputs), train=False, key=key)[0].logits

        with told("the student", inputs):
            logits = jax.eval_shape(ask, start, inputs)
        fitted = jax.eval_shape(fit_labels, batch._replace(inputs=None), logits).labels
        names, of_classes = [], logits.shape[-1] > 1
        if hasattr(fitted, "dtype"):
            whole = jnp.issubdtype(fitted.dtype, jnp.integer) and of_classes
            # Several labels, and a regression, are no distribution over classes.
            of_classes = whole or (of_classes and _are_probabilities(batch))
            names = ["accuracy", "correct", "errors", "nll", "ece"] if whole else ["mse", *["nll"] * of_classes]
            names += ["perplexity", "bits_per_token"] if whole and logits.ndim > 2 else []
            if not whole and logits.shape[-1] > 1:
                check_float_labels(fitted, logits.shape)
                self.soft = f"{fitted.dtype} of the shape {fitted.shape}"
        if self.teacher is not None:
            with told("the teacher", inputs):
                taught = jax.eval_shape(lambda teacher, inputs: teacher.outputs(inputs)[0], self.teacher, inputs)
            if taught.logits.shape[-1] == logits.shape[-1]:
                names += ["agreement", "kl_to_teacher"] if of_classes else []
            else:
                # Of other classes there is no agreement.
                self.teacher = None
        return names

    def examiner(
        self, model: Model, batch_size: int | None, prepare: Any, *, shared: bool = False
    ) -> Callable[[PyTree], dict[str, float]]:
        """What measures a student's variables; the teacher is asked once, now. shared: by several processes, each for
        itself.
        """
        variables = model.variables
        if variables is None:
            variables = jax.eval_shape(model.network.init, jax.random.key(0))
        size, asked = evaluation_batch_size(batch_size, variables), self.teacher
        if asked is not None and isinstance(self.data, Batch):
            # In the data's order, whatever its indices are.
            self.data = self.data._replace(indices=None)
            asked = answers_on(asked, self.data, self.classes, batch_size=size, prepare=prepare)
        elif asked is not None and not isinstance(self.data, list):
            first = as_batch(next(iter(whole_pass(self.data))))
            asked = asked if answers_shape(asked, first, prepare)[-1] == self.classes else None

        def examine(variables: PyTree) -> dict[str, float]:
            variables = jax.tree.map(on_host, variables) if shared else variables
            own = Model(model.network, variables)
            return evaluate(own, self.data, teacher=asked, measures=self.measures, batch_size=size, prepare=prepare)

        return examine


def check_watched(measure: Any, what: str, known: Iterable[str], validation: Validation | None) -> None:
    """Raises `ConfigError` for a measure that no epoch will have. what: who asks for it, in words."""
    if not isinstance(measure, str):
        raise ConfigError(f"{what} is {measure!r}: give the name of a measure, such as 'loss'")
    names = dict.fromkeys((*known, *(() if validation is None else validation.names)))
    if measure in names or (validation is not None and measure.removeprefix("validation_") in validation.names):
        return
    if validation is None and measure.removeprefix("validation_") in HIGHER_IS_BETTER:
        raise ConfigError(f"{what} is {measure!r}, and there is no validation to measure it on: give validation=")
    if validation is not None and validation.soft and measure.removeprefix("validation_") in _OF_CLASSES:
        raise ConfigError(
            f"{what} is {measure!r}, which needs labels of whole numbers, and the labels are {validation.soft}: give "
            f"labels.argmax(-1), or use one of {', '.join(names)}"
        )
    raise ConfigError(f"{what} is {measure!r}, and there is no such measure: use one of {', '.join(names)}")


def _are_probabilities(batch: Batch) -> bool:
    """Whether the float labels that count are distributions over classes."""
    soft = np.asarray(batch.labels, np.float32)
    soft = soft if batch.weights is None else soft[np.asarray(batch.weights) != 0]
    return sum_to_1(soft.reshape(-1, soft.shape[-1]))
