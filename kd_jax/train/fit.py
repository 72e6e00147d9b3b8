"""A whole training as one pure function: `fit`, and the loops of compiled steps that it is made of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from kd_jax.convolution import canonical
from kd_jax.data.batch import Batch, as_batch, as_key, check_counts, epoch_order, take
from kd_jax.data.order import called_as, check_order
from kd_jax.errors import NotFiniteError
from kd_jax.methods import Method, as_method
from kd_jax.models import as_model, count_parameters, programs
from kd_jax.models.fresh import is_one_program
from kd_jax.teacher import Teacher, as_teacher
from kd_jax.teachers.indices import in_order
from kd_jax.train import transpose
from kd_jax.train.checks import check, check_epochs, check_not_own, first_batch, make_training
from kd_jax.train.faults import check_schedules, check_teacher
from kd_jax.train.measures import WEIGHT, Measure, of_labelled
from kd_jax.train.sharding import (
    Layout,
    Sharding,
    along_data,
    check_batch_size,
    check_of_one,
    layout_of,
    on_mesh,
    put_teacher,
    put_variables,
    replicated,
    where_it_lies,
)
from kd_jax.train.sizes import SMALL
from kd_jax.train.step import (
    Metrics,
    Prepare,
    Training,
    TrainState,
    as_optimized,
    first_variables,
    init,
    is_finite,
    step,
)

PyTree = Any

# Several steps in each turn of the loop let XLA avoid copies of the carried parameters: two save 12 to 23 % on a CPU.
# Four save another 10 to 20 % with small networks, and cost as much with large ones (results/throughput/findings.md).
# Small networks are those that gain by `transpose`, too. Convolutions and attention gain nothing and compile longer.
_UNROLL, _UNROLL_SMALL = 2, 4


@called_as("kd.fit(key, data, network)")
@on_mesh
def fit(
    key: Any,
    data: Any,
    network: Any,
    *,
    method: Any,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    teacher: Any = None,
    start: PyTree = None,
    prepare: Prepare | None = None,
    measures: Mapping[str, Measure] | None = None,
    dtype: Any = None,
    mesh: Any = None,
    sharding: Sharding | None = None,
) -> tuple[TrainState, dict[str, Float[Array, " epochs"]]]:
    """A whole training, pure in its key: `vmap` it over keys for seeds, or over the numbers of a method for a grid.

    Two trainings with the same key start from the same parameters and see the same batches, whatever their method: a
    distilled student and its baseline are paired.

    key: a whole number or a key of `jax.random`. data: a `Batch` in memory. network: a `Network`, `Model` or module.
    start: variables to start from; None for those that the model has, else new ones from the key.
    measures: of the training batches, inside the step, by name: functions `(student's output, batch, teachers' outputs)
        -> values`, `[batch]` or `[batch, positions]`. Those of `kd.distill` are of its validation data, and differ.
    mesh, sharding: as of `kd.distill`; with a mesh it is called outside of `jit` and `vmap`.
    Returns the last state (`state.variables` are the network's) and the means of each epoch's metrics by name.
    Raises what `kd.distill` raises; `NotFiniteError` for a loss that is not finite, unless it is traced.
    """
    check_order("kd.fit(key, data, network)", models={"network": network, "teacher": teacher}, data={"data": data})
    data = as_batch(data)
    return fit_in_order(
        key, data, network, teacher=in_order(where_it_lies(as_teacher, teacher, mesh), data), method=method,
        optimizer=optimizer, epochs=epochs, batch_size=batch_size, start=start, prepare=prepare, measures=measures,
        dtype=dtype, mesh=mesh, sharding=sharding,
    )  # fmt: skip


def fit_in_order(
    key: Any, data: Batch, network: Any, *, method: Any, optimizer: Any, epochs: int,
    batch_size: int, teacher: Teacher | None = None, start: PyTree = None, prepare: Prepare | None = None,
    measures: Mapping[str, Measure] | None = None, dtype: Any = None, mesh: Any = None,
    sharding: Sharding | None = None, diverging: bool = False,
) -> tuple[TrainState, dict[str, Float[Array, " epochs"]]]:  # fmt: skip
    """`fit` with a teacher whose rows are those of the data, whatever its indices are.

    diverging: whether a training that is not finite is handed back as it is.
    """
    model, known, method = where_it_lies(as_model, network, mesh), teacher, as_method(method)
    training = make_training(model, optimizer, prepare=prepare, measures=measures, dtype=dtype)
    key = as_key(key)
    check_epochs(epochs)
    if start is None:
        check_not_own(model, known)
        start = model.variables
    check(training, method, data, known, start, batch_size=batch_size)
    known = known and known.in_memory()
    layout = None
    if mesh is not None:
        check_of_one(mesh)
        check_batch_size(mesh, batch_size)
        rules = sharding or Sharding()
        key, data, method = replicated(mesh, (key, data, method))
        known = put_teacher(mesh, known, rules.teacher)
        start = start if start is None else put_variables(mesh, model.network, start, rules.student, "student")
    elif start is None and is_one_program(model.network, key) and not programs.is_traced((data, known, method)):
        # Apart, it is compiled quickly, and once for all methods.
        start = first_variables(key, model.network)

    def first(key: Key[Array, ""], data: Batch, teacher: Teacher | None, method: Method, start: PyTree) -> TrainState:
        return init(key, training, method, *first_batch(data, teacher, batch_size), variables=start)

    if mesh is not None:
        layout = layout_of(mesh, sharding, model.network, start, jax.eval_shape(first, key, data, known, method, start))

    def whole(
        key: Key[Array, ""], data: Batch, teacher: Teacher | None, method: Method, start: PyTree
    ) -> tuple[TrainState, Metrics]:
        state = first(key, data, teacher, method, start)
        state = state if layout is None else layout.constrain(state)

        def epoch(state: TrainState, number: Int[Array, ""]) -> tuple[TrainState, Metrics]:
            order = epoch_order(key, number, examples=check_counts(data), batch_size=batch_size)
            state, metrics = scan_steps(state, key, data, teacher, order, method, training=training, layout=layout)
            return state, _means(metrics)

        return jax.lax.scan(epoch, state, jnp.arange(epochs))

    same = ("fit", training, epochs, batch_size, layout)
    state, history = programs.call(whole, key, data, known, method, start, same=same)
    if not (diverging or programs.is_traced(history)):
        bad = ~np.isfinite(np.asarray(history["loss"]))
        if bad.any():
            check_teacher(method, data, known, prepare)
            check_schedules(method, range((int(bad.argmax()) + 1) * (check_counts(data) // batch_size)))
            raise NotFiniteError(
                f"the loss is not finite in epoch {int(bad.argmax()) + 1}: choose a smaller learning rate, or look for "
                "inputs that are not finite"
            )
        if not programs.call(lambda state: is_finite(state, model.network), state, same=("finite", model.network)):
            raise NotFiniteError("a parameter is not finite after the last step: choose a smaller learning rate")
    return state, history


def _means(metrics: Metrics) -> Metrics:
    """Of an epoch's steps, each counting by its weights where it has some."""
    counts = metrics.get(WEIGHT)
    if counts is None:
        return of_labelled(jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics))
    total = jnp.sum(counts)
    shares = counts / jnp.where(total == 0, 1, total)
    return of_labelled({name: jnp.sum(values * shares, axis=0) for name, values in metrics.items() if name != WEIGHT})


def scan_steps(
    train_state: TrainState,
    key: Key[Array, ""],
    data: Batch,
    teacher: Teacher | None,
    order: Int[Array, "steps batch"],
    method: Method,
    *,
    training: Training,
    layout: Layout | None = None,
) -> tuple[TrainState, Metrics]:
    """One step for each row of `order`, as one loop; the metrics have a leading axis of steps.

    layout: where the state and the batches lie on a mesh; None for one device.
    """
    data = jax.tree.map(jnp.asarray, data)

    def look_up(rows: Int[Array, " batch"], step: Int[Array, ""]) -> tuple[Batch, Teacher | None]:
        if layout is None:
            return take(data, rows), teacher and teacher.take(rows)
        # Every device has all examples, and takes those of its part of the batch.
        rows = along_data(layout.mesh, rows)
        return along_data(layout.mesh, take(data, rows)), teacher and teacher.take(rows)

    return loop(train_state, key, look_up, order, method, training=training, layout=layout)


def loop(
    train_state: TrainState, key: Key[Array, ""], look_up: Any, order: Any, method: Method, *, training: Training,
    layout: Layout | None = None,
) -> tuple[TrainState, Metrics]:  # fmt: skip
    """A step for each of the leading axis of `order`. look_up: `(rows, steps done) -> (batch, teacher)` of a step."""
    params, _ = training.network.split(train_state.variables)
    small = count_parameters(params) < SMALL
    transposed = None
    which = transpose.tall(params)
    if small and any(which) and jax.default_backend() == "cpu" and layout is None:
        other = transpose.Transposed(training.network, which)
        pairs = [as_optimized(given, train_state.learned) for given in (params, other.turned(params))]
        transposed = other if transpose.is_blind(training.optimizer, *pairs) else None
    own = training if transposed is None else training._replace(network=transposed)

    def one(state: TrainState, rows: Any) -> tuple[TrainState, Metrics]:
        batch, teacher = look_up(rows, state.step)
        after, metrics = step(state, batch, teacher, key, method, training=own)
        return after if layout is None else layout.constrain(after), metrics

    def turned(state: TrainState, variables: PyTree) -> TrainState:
        assert transposed is not None
        moments = transposed.optimizer_state(training.optimizer, state.optimizer_state, params, state.learned)
        return state._replace(variables=variables, optimizer_state=moments)

    first = train_state
    if transposed is not None:
        first = turned(train_state, transposed.transpose(train_state.variables))
    dense = all(jnp.ndim(leaf) <= 2 for leaf in jax.tree.leaves(params))
    unroll = (_UNROLL_SMALL if small else _UNROLL) if dense else 1
    last, metrics = jax.lax.scan(canonical(one), first, order, unroll=unroll)
    if transposed is not None:
        last = turned(last, transposed.back(last.variables))
    return last, metrics
